"""Rules over the direction in which the outputs are pushed: to the targets, or away from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from epochal.doctor.finding import Seen, rule
from epochal.doctor.trace import tensors

if TYPE_CHECKING:
    from epochal.doctor.case import Pass
    from epochal.doctor.probing import Probe


@rule("gradient-ascent", "error", "probe")
def prefers_errors(probe: Probe) -> Iterator[Seen]:
    """What is minimised is lower for wrong outputs than for right ones: every update makes the model worse.

    Asks a loss of the user's own, f(outputs, targets): for the targets themselves it is 0, and for the outputs of the
    model it is below that.
    """
    case = probe.case
    loss, outputs, targets = getattr(case.objective, "loss", None), case.now.outputs, case.now.targets
    if loss is None or case.kind is not None or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    if outputs.shape != targets.shape or not targets.is_floating_point():
        return
    with torch.no_grad():
        given, perfect = float(loss(outputs.detach(), targets)), float(loss(targets.to(outputs.dtype), targets))
    if abs(perfect) < 1e-6 and given < -1e-6:
        yield Seen(
            "the loss is lower for wrong outputs than for right ones.",
            f"{given:.4g} for the outputs of the model, {perfect:.4g} for the targets themselves",
            f"the loss {getattr(loss, '__name__', type(loss).__name__)}; {case.place}",
            "turn its sign around: a loss falls as the outputs come near the targets",
        )


@rule("gradient-ascent", "warning", "probe")
def pushes_away(probe: Probe) -> Iterator[Seen]:
    """What is minimised pushes the outputs away from the targets: a sign is the wrong way round.

    Asks an objective, or a loss of the user's own, for its slope by the outputs of the model: in the first batches it
    leads away from the targets for more than 95 of 100 samples; and after some training the outputs are further away
    than before. Exempt: outputs that are never negative, which may be distances.
    """
    case = probe.case
    if case.kind is not None or probe.trained is None:
        return
    shares = [_away(one) for one in case.passes]
    known = [share for share in shares if share is not None]
    if not known or len(known) < len(shares) or min(known) <= 0.95:
        return
    before, after = (_distance(probe.outputs(case.now.batch, model), case.now.targets)
                     for model in (probe.model, probe.trained))  # fmt: skip
    if before is not None and after is not None and after > before:
        yield Seen(
            "what is minimised pushes the outputs away from the targets.",
            f"for {min(known):.0%} of the samples of {len(known)} batches (95 % allowed); {before:.3g} away at first, "
            f"{after:.3g} after {probe.updates} updates",
            case.place,
            "look at the sign: minimise the error, -log_prob, 1 - dice or 1 - r2",
        )


def _aim(outputs: Any, targets: Any) -> tuple[Tensor, Tensor] | None:
    """The output that stands for the targets, and the way from it to them, of each sample; None where that is not
    known. Of classes it is the way of the scores."""
    if not isinstance(targets, Tensor) or not targets.dim() or targets.is_complex():
        return None
    wanted = targets.detach()
    is_binary = bool(((wanted == 0) | (wanted == 1)).all())
    for one in tensors(outputs):
        if not one.is_floating_point() or not one.dim() or len(one) != len(wanted) or len(one) < 4:
            continue
        now = one.detach()
        if (is_binary or not wanted.is_floating_point()) and bool((now >= 0).all()):
            return None  # they may be distances
        if now.numel() == wanted.numel() and (wanted.is_floating_point() or is_binary):
            wanted = wanted.reshape(now.shape).to(now.dtype)
            return one, 2 * wanted - 1 if is_binary else wanted - now
        is_index = now.dim() == 2 and wanted.dim() == 1 and not wanted.is_floating_point() and now.shape[1] > 1
        if is_index and bool(((wanted >= 0) & (wanted < now.shape[1])).all()):
            return one, nn.functional.one_hot(wanted.long(), now.shape[1]) - now.softmax(1)
    return None


def _away(one: Pass) -> float | None:
    """The share of samples whose output the loss pushes away from the targets."""
    aim = _aim(one.outputs, one.targets)
    if aim is None or not aim[0].requires_grad or not one.value.requires_grad:
        return None
    (slope,) = torch.autograd.grad(one.value, aim[0], retain_graph=True, allow_unused=True)
    along = -(slope * aim[1]).reshape(len(slope), -1).sum(1) if slope is not None else torch.zeros(1)
    return (along[along != 0] < 0).float().mean().item() if bool((along != 0).any()) else None


def _distance(outputs: Any, targets: Any) -> float | None:
    """How far outputs are from the targets; of two classes told by one score, how far they lie the wrong way round."""
    if (aim := _aim(outputs, targets)) is None:
        return None
    now, way = aim[0].detach(), aim[1]
    if not bool((way.abs() == 1).all()):
        return way.abs().mean().item()
    return (now[way < 0].mean() - now[way > 0].mean()).item() if bool((way != way.flatten()[0]).any()) else None
