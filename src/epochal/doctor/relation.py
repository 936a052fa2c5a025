"""Whether inputs tell anything of targets: neighbours and a linear model, asked about rows that they did not learn."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epochal.doctor.rules.symptoms import is_stalled

ROWS = 1500
LEAST = 150  # rows, below which nothing can be said
NEIGHBOURS = 5


class Relation(NamedTuple):
    """explained: the share of the targets that neighbours or a linear model explain, of ``rows`` that were held out;
    chance: what they explain of anything. is_learned: whether a trained copy explains more than nothing.
    """

    explained: float
    linear: float
    chance: float
    rows: int
    is_learned: bool


def relation(
    sample: tuple[list[Tensor], Tensor | None] | None, trial: Any, nothing: Nothing | None = None
) -> Relation | None:
    """What the inputs tell of the targets; None where it is not known. nothing: what always the same answer costs."""
    if sample is None or sample[1] is None or not sample[0] or len(sample[1]) < LEAST:
        return None
    features = _features(sample[0])
    targets = _numbers(sample[1])
    if features is None or targets is None:
        return None
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(len(features), generator=draw)[:ROWS]
    x, y = features[order], targets[order]
    half = len(x) // 2
    parts = (x[:half], y[:half]), (x[half:], y[half:])
    linear = _linear(*parts)
    explained = max(_neighbours(*parts), linear)
    learned = _learned(trial, nothing) if trial is not None else None
    # Three deviations of the correlation with something unrelated.
    return None if learned is None else Relation(explained, linear, 3 / math.sqrt(half), half, learned)


def _learned(trial: Any, nothing: Nothing | None) -> bool | None:
    """Whether the copy came to predict val better than at its start, and than always the same answer would."""
    values = [row["val_loss"] for row in trial.rows if math.isfinite(row.get("val_loss", math.nan))]
    if not values:
        return not is_stalled(trial.losses, 0.95)
    if nothing is None:
        return min(values) < 0.93 * trial.first
    return min(values) - nothing.floor < 0.97 * (nothing.cost - nothing.floor)


class Nothing(NamedTuple):
    """cost: the loss of always the same answer; floor: that of the targets themselves."""

    cost: float
    floor: float


def knowing_nothing(loss: Any, kind: str | None, known: Tensor | None, asked: Tensor | None) -> Nothing | None:
    """What always the same answer costs: the best one for the targets of train, over those of val; None where that is
    not known.
    """
    if known is None or asked is None or not len(asked):
        return None
    mean, exact = known.float().mean(0), asked.float()
    if kind in ("mse", "bce", "bce_with_logits"):
        if kind == "bce_with_logits":
            mean, exact = (torch.logit(part.clamp(1e-3, 1 - 1e-3)) for part in (mean, exact))
        return Nothing(*(float(loss(part.expand_as(asked), asked.float())) for part in (mean, exact)))
    if kind != "cross_entropy" or (not known.is_floating_point() and (known.dim() > 1 or int(known.min()) < 0)):
        return None
    if not known.is_floating_point():
        mean = torch.bincount(known, minlength=int(asked.max()) + 1).float()
    shares = (mean + 1e-4) / (mean + 1e-4).sum()
    floor = float(loss((asked + 1e-9).log(), asked)) if asked.is_floating_point() else 0.0
    return Nothing(float(loss(shares.log().expand(len(asked), -1), asked)), floor)


def _features(parts: list[Tensor]) -> Tensor | None:
    columns = []
    for part in parts:
        if part.is_floating_point():
            columns.append(part.float().flatten(1) if part.dim() > 1 else part.float()[:, None])
        elif not part.is_complex() and part.numel() and part.max() < 200 and part.min() >= 0 and part.dim() <= 2:
            codes = part if part.dim() == 2 else part[:, None]
            size = int(codes.max()) + 1
            if size * codes.shape[1] > 4000:
                return None
            hot = torch.nn.functional.one_hot(codes.long(), size).float()
            columns += [hot.flatten(1), hot.sum(1)]
        else:
            return None
    x = torch.cat(columns, 1)
    if not bool(torch.isfinite(x).all()) or x.shape[1] > 20_000:
        return None
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6)


def _numbers(targets: Tensor) -> Tensor | None:
    """Targets as centred columns; classes one a column."""
    if targets.is_floating_point():
        y = targets.float().flatten(1) if targets.dim() > 1 else targets.float()[:, None]
    elif targets.dim() == 1 and targets.min() >= 0 and targets.max() < 100:
        y = torch.nn.functional.one_hot(targets.long()).float()
    else:
        return None
    if y.shape[1] > 200 or not bool(torch.isfinite(y).all()):
        return None
    return y - y.mean(0)


def _explained(guess: Tensor, y: Tensor) -> float:
    """The squared correlation of the guesses with the targets, signed; robust to their scale."""
    one, two = guess - guess.mean(0), y - y.mean(0)
    dot, sizes = float((one * two).sum()), float(one.norm() * two.norm())
    return dot / sizes if sizes > 0 else 0.0


def _neighbours(known: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor]) -> float:
    nearest = torch.cdist(asked[0], known[0]).topk(min(NEIGHBOURS, len(known[0])), largest=False).indices
    return _explained(known[1][nearest].mean(1), asked[1])


def _linear(known: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor]) -> float:
    x, y = known
    kernel = x @ x.T + 0.1 * x.shape[1] * torch.eye(len(x))
    return _explained(asked[0] @ (x.T @ torch.linalg.solve(kernel, y)), asked[1])
