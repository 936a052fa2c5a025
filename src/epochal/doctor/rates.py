"""Why a training goes badly: what others tell, on copies, at other rates and on sixteen samples alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

from epochal.data.batch import rows
from epochal.doctor.case import Case
from epochal.doctor.finding import Finding, Seen
from epochal.doctor.raised import as_finding
from epochal.doctor.rules.symptoms import goes_badly, has_learned, stands_still, update_ratio
from epochal.doctor.trial import Trial
from epochal.losses import BINARY, CLASS_INDEX

if TYPE_CHECKING:
    from epochal.plan import Plan


def is_bad(trial: Trial) -> bool:
    """Whether a training has left what is finite, or its loss has not come down."""
    return trial.last is math.inf or (len(trial.losses) >= 8 and goes_badly(trial.losses))


def causes(plan: Plan, case: Case, trial: Trial, until: float) -> list[Finding]:
    """Of a training that went badly: a rate that does better, or what is no rate's fault. No further training begins
    after ``until``, by perf_counter().
    """
    others = {}
    for factor in _factors(case, trial):
        if time.perf_counter() < until:
            others[factor] = Trial(plan, ("*",), factor=factor, updates=max(30, len(trial.losses)), seconds=0.8)
    found = _of_rates(case, trial, others)
    if found or stands_still(trial.vitals) or time.perf_counter() > until:
        return found
    return _of_sixteen(plan, case, trial)


def _factors(case: Case, trial: Trial) -> list[float]:
    """By what the rate is multiplied in other trials: what makes an update change the weights by a thousandth, too."""
    ratio = _change(case, trial)
    usual = 1e-3 / ratio if ratio > 0 else 1.0
    return [*([usual] if usual > 300 or usual < 1 / 300 else []), 0.01, 100.0, 0.1, 10.0]


def _change(case: Case, trial: Trial) -> float:
    """By how much of themselves an update changes the weights, in the median; NaN where that is not known."""
    names = [name for name, p in case.trained.items() if p.dim() > 1]
    ratios = [ratio for look in trial.vitals.looks if math.isfinite(ratio := update_ratio(look, names)) and ratio > 0]
    return median(ratios) if ratios else math.nan


def _of_rates(case: Case, trial: Trial, others: dict[float, Trial]) -> list[Finding]:
    rate = float(case.optimizer.param_groups[0].get("lr", math.nan)) if case.optimizer is not None else math.nan
    lower = [one for factor, one in others.items() if factor < 1]
    starts = [one.losses[0] for one in (trial, *lower) if one.losses and math.isfinite(one.losses[0])]
    start = starts[0] if starts else math.nan
    reached = f"the loss went from {start:.4g} to {_told(trial.last)} at lr {rate:.3g}"

    def better(is_wanted: Callable[[float], bool], word: str) -> list[Finding]:
        tried = [one for factor, one in others.items() if is_wanted(factor)]
        best = min(tried, key=lambda one: one.last, default=None)
        if best is None or not best.last < 0.8 * min(start, trial.last):
            return []
        other = rate * best.factor
        seen = Seen(
            f"the learning rate is too {word} for this model.",
            f"{reached}, and to {_told(best.last)} at {other:.3g} (a fifth less is enough to tell)",
            case.place,
            f"give lr={other:.1g}",
        )
        return [as_finding(f"lr-too-{word}", seen)]

    change = _change(case, trial)
    if not change < 0.01 and (found := better(lambda factor: factor < 1, "high")):
        return found
    can_move = not stands_still(trial.vitals) and not has_learned(trial.vitals)
    if change < 3e-4 and can_move and (found := better(lambda factor: factor > 1, "low")):
        return found
    if trial.last is math.inf:
        seen = Seen(
            "the training leaves what is finite, at lower rates, too.",
            f"{reached}; {getattr(trial.error, 'what', '')}",
            case.place,
            "give clip=1.0, and look at what takes a logarithm, a root or a quotient",
        )
        return [as_finding("divergence", seen, "error", "symptom")]
    return []


def _told(value: float) -> str:
    return "what is not finite" if not math.isfinite(value) else f"{value:.4g}"


def _of_sixteen(plan: Plan, case: Case, trial: Trial) -> list[Finding]:
    """Whether sixteen samples can be learned by heart, where more could not."""
    few = _first_rows(case, 16) if _can_be_zero(case) else None
    if few is None or not math.isfinite(trial.first) or trial.first <= 0:
        return []
    lone = {
        "train": few, "val": None, "monitor": None, "batch_size": None, "shuffle": None, "accumulate": 1,
        "workers": None, "schedule": None, "epochs": 400, "max_steps": 400,
    }  # fmt: skip
    tried = [Trial(plan, ("*",), factor=factor, updates=400, seconds=0.7, **lone) for factor in (1.0, 10.0)]
    best = min(one.last for one in tried)
    if any(one.error is not None for one in tried) or best <= 0.5 * min(one.first for one in tried):
        return []
    seen = Seen(
        "the model cannot learn sixteen samples by heart.",
        f"of a loss of {tried[0].first:.4g} it keeps {best:.4g} after {max(len(one.losses) for one in tried)} "
        "updates on them alone, also at ten times the rate (half allowed)",
        f"{type(case.model).__name__}; {case.place}",
        "give it what it lacks to tell them apart: positions, wider layers, the input that the answer depends on",
    )
    return [as_finding("cannot-fit", seen, None, "capacity")]


def _can_be_zero(case: Case) -> bool:
    """Whether the loss is one that falls to 0 where all is right."""
    loss, targets = getattr(case.objective, "loss", None), case.now.targets
    is_hard = case.kind not in BINARY or bool(((targets == 0) | (targets == 1)).all())
    is_index = case.kind not in CLASS_INDEX or not targets.is_floating_point()
    return case.kind is not None and is_hard and is_index and not getattr(loss, "label_smoothing", 0.0)


def _first_rows(case: Case, count: int) -> Any:
    """The first samples of the first batch, as a batch of their own; None where it cannot be cut."""
    return rows(case.now.batch, slice(0, min(count, case.now.samples)), getattr(case.objective, "target", ()))
