"""Rules over a loss as it is called: on what the model gave, and on what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from epochal import losses
from epochal.doctor.case import Case, is_custom
from epochal.doctor.finding import Seen, rule
from epochal.doctor.graph import operations_between
from epochal.doctor.rules.scores import scores_of
from epochal.doctor.trace import Operation, tensors

if TYPE_CHECKING:
    from epochal.doctor.probing import Probe

# What autograd calls operations on each number, and means and sums over all of them.
EACH = {
    "MeanBackward0", "SumBackward0", "PowBackward0", "AbsBackward0", "MulBackward0", "DivBackward0", "AddBackward0",
    "SubBackward0", "NegBackward0", "SqrtBackward0", "ExpBackward0", "LogBackward0", "ClampBackward1", "WhereBackward0",
}  # fmt: skip


@rule("broadcast-loss", "error", "batch")
def broadcast_loss(case: Case) -> Iterator[Seen]:
    """Outputs (n,) and targets (n, 1) are compared each with each: the loss is that of predicting the mean for all.

    Looks at every loss of torch's, whose shapes have to be the same, where both sides have the samples; and at every
    sum, difference and product inside a user's own: one side is made by the model, the other is not trained, their
    shapes differ by a last dimension of 1, and the result is (n, n). An error where the other side is a part of the
    batch, and what comes of it is a mean or a sum over all.
    """
    for call in case.now.calls:
        shapes = tuple(call.outputs.shape), tuple(call.targets.shape)
        is_meant = call.reduction == "none" and call.outputs.dim() == call.targets.dim()  # each with each, by views
        has_samples = case.now.samples in call.targets.shape
        if call.name in losses.ELEMENTWISE and shapes[0] != shapes[1] and has_samples and not is_meant:
            yield Seen(
                f"{call.name} compares outputs and targets of different shapes.",
                f"outputs {shapes[0]}, targets {shapes[1]}: they have to be the same",
                case.at(call.place),
                f"give both the shape {shapes[0]}, for example targets.reshape(outputs.shape)",
            )
            return
    for one, level in _each_with_each(case):
        first, second = (tuple(part.shape) for part in one.inputs)
        yield Seen(
            "outputs and targets of different shapes are compared each with each.",
            f"{first} and {second} made {tuple(one.result.shape)}",
            case.at(one.place),
            "give both the same shape, for example targets.reshape(outputs.shape)",
            level=level,
        )
        return


def _each_with_each(case: Case) -> Iterator[tuple[Operation, str | None]]:
    """What is not meant so: certainly not where targets are compared, and the loss is a mean or a sum of functions of
    each comparison; perhaps, where one of both is known.
    """
    for one in case.now.trace.spread:
        is_target = case.is_given(next(part for part in one.inputs if not part.requires_grad))
        between = operations_between(case.now.value, one.result) or set()
        is_of_all = bool(between) and between <= EACH
        is_choosing = any(name.startswith(("Min", "Max", "Amin", "Amax", "Sort", "Topk", "Kth")) for name in between)
        if (is_target or is_of_all) and not is_choosing:
            yield one, None if is_target and is_of_all else "warning"


@rule("detached-loss", "error", "batch")
def detached_loss(case: Case) -> Iterator[Seen]:
    """Nothing leads back from the loss to the weights, so no backward pass can change them.

    The graph was cut: by .detach(), .item(), .data, torch.tensor(...), torch.no_grad(), NumPy, or an operation without
    a derivative (argmax, round, comparisons). Looks at the graph of the first loss: it has to reach a trained weight.
    """
    value = case.now.value
    if not case.trained or case.now.is_opaque or (value.requires_grad and len(case.now.without) < len(case.trained)):
        return
    cut = next(
        (layer for layer in reversed(case.now.layers) if any(t.requires_grad for t in tensors(layer.output))), None
    )
    last = f"; the last layer with a graph is {cut.path or 'the model'}" if cut is not None else ""
    kept = case.now.outputs is None or any(one.requires_grad for one in tensors(case.now.outputs))
    fix = "return the tensor itself: without .item(), .detach(), .data, torch.tensor(...), argmax or NumPy on the way"
    yield Seen(
        "nothing leads back from the loss to a weight: it is cut off from the model.",
        f"of {len(case.trained)} trained parameters the loss reaches none{last}",
        f"{'the loss' if kept else 'the forward of ' + type(case.model).__name__}, {case.place}",
        fix if kept else fix + ", and not under torch.no_grad()",
    )


@rule("gradient-ascent", "warning", "graph")
def gradient_ascent(case: Case) -> Iterator[Seen]:
    """What is minimised falls where the error rises: every update makes the model worse.

    Looks at the derivative of what is minimised by each loss of torch's inside it: all of them are below 0, in three
    passes, and nothing else is minimised. An optimizer with ``maximize`` over such a loss is an error. A cosine
    similarity to what is not trained has to be made larger.
    """
    value, results = case.now.value, [call.result for call in case.now.calls if call.result.requires_grad]
    if results and value.requires_grad and all(one.dim() == 0 for one in results):
        slopes = torch.autograd.grad(value, results, retain_graph=True, allow_unused=True)
        known = [slope.item() for slope in slopes if slope is not None]
        parts = sum(one.item() * slope.item() for one, slope in zip(results, slopes) if slope is not None)
        if abs(parts - value.item()) > 1e-4 * max(abs(value.item()), 1e-9):
            return  # something else is minimised as well, which may mean it so
        is_reversed = bool(known) and all(slope < 0 for slope in known)
        maximizes = any(group.get("maximize") for group in case.optimizer.param_groups) if case.optimizer else False
        if is_reversed is not maximizes and known and all((slope < 0) is is_reversed for slope in known):
            name, at = case.now.calls[0].name, case.now.calls[0].place
            told = (
                "the optimizer has maximize=True"
                if maximizes
                else f"its derivative by {name} is {known[0]:.3g}, below 0"
            )
            fix = "make the optimizer without maximize" if maximizes else f"minimise {name} itself: leave out the minus"
            level = "error" if maximizes else None
            yield Seen("the error is maximised, not minimised.", told, case.at(at), fix, level)
        return
    yield from _likenesses(case)


def _likenesses(case: Case) -> Iterator[Seen]:
    """Of cosine similarities between what is trained and what is not, whether they are made smaller."""
    for one in case.now.trace.likenesses:
        first, second = one.inputs
        if case.now.value.requires_grad and first.requires_grad is not second.requires_grad:
            (slope,) = torch.autograd.grad(case.now.value, one.result, retain_graph=True, allow_unused=True)
            if slope is not None and bool((slope > 0).all()):
                yield Seen("the likeness to the targets is minimised, not maximised.",
                           f"the derivative by the cosine similarity is {slope.mean().item():.3g}, above 0",
                           case.at(one.place), "minimise 1 - cosine_similarity(outputs, targets)")  # fmt: skip
                return


@rule("negative-loss", "error", "batch")
def negative_loss(case: Case) -> Iterator[Seen]:
    """A loss that cannot be negative is: what it is given is not what it is made for, and it can fall without end.

    Looks at cross_entropy, binary cross-entropy and the losses of differences as they are called; targets that are not
    those of the batch are a warning.
    """
    for call in case.now.calls:
        if call.name != "nll" and not call.is_weighted and call.result.dim() == 0 and call.result.item() < -1e-6:
            low, high = call.targets.min().item(), call.targets.max().item()
            yield Seen(
                f"{call.name} is negative, which it never is of what it is made for.",
                f"{call.result.item():.4g}; its targets lie from {low:.3g} to {high:.3g}",
                case.at(call.place),
                "give targets that are probabilities: from 0 to 1, and of classes with the sum 1",
                level=None if case.is_given(call.targets) else "warning",  # they may be weighted by what was gained
            )
            return


@rule("sum-loss", "info", "graph")
def sum_loss(case: Case) -> Iterator[Seen]:
    """The gradient of a sum grows with the batch: a learning rate that suits one batch size does not suit another.

    Looks at the losses of torch's with reduction="sum" whose sum over the batch is minimised as it is: the derivative
    of what is minimised by that sum is 1. It may be meant so (a likelihood over the dimensions of one sample).
    """
    value = case.now.value
    for call in case.now.calls:
        if call.reduction == "sum" and call.result.requires_grad and value.requires_grad and case.now.samples > 1:
            (slope,) = torch.autograd.grad(value, call.result, retain_graph=True, allow_unused=True)
            if slope is not None and slope.item() == 1.0:
                yield Seen(
                    f"{call.name} is summed over the batch, not averaged.",
                    f"reduction='sum' over {call.outputs.numel()} entries of {case.now.samples} samples, divided "
                    "by nothing",
                    case.at(call.place),
                    'divide by the samples: loss / len(targets), or leave reduction at "mean"',
                    level="warning" if case.plan.step is None else None,  # a step may divide the gradients
                )


@rule("sum-loss", "info", "probe")
def grows_with_batch(probe: Probe) -> Iterator[Seen]:
    """The gradient of a sum grows with the batch: a learning rate that suits one batch size does not suit another.

    Asks an objective, or a loss of the user's own, for the loss of a batch and of the batch taken twice, in eval mode:
    it is twice as large.
    """
    case = probe.case
    if case.kind is not None or (twice := probe.twice()) is None:
        return
    one, two = probe.loss(case.now.batch, probe.model), probe.loss(twice, probe.model)
    if one and two and abs(two / one - 2) < 1e-5:
        yield Seen("the loss is summed over the batch, not averaged.",
                   f"{one:.4g} for a batch, {two:.4g} for the batch taken twice", case.place,
                   "divide by the samples: loss / len(targets)",
                   level=None if is_custom(case) else "warning")  # fmt: skip


@rule("initial-loss", "warning", "graph", told="symptom")
def initial_loss(case: Case) -> Iterator[Seen]:
    """Before it has learned anything, a model should lose what knowing nothing costs, ln(classes) say; far more says
    that it begins by being sure of what is wrong.

    Looks at cross_entropy over class indices, and at bce_with_logits, in the first batches: above 3 times ln(classes),
    and scores whose standard deviation is above 3. A loss below ln(classes) is that of pretrained weights, and no sign
    of anything. Of a regression it looks at the outputs: 30 times as far away as the targets lie apart, as they are
    large, and as 1.
    """
    for call in case.now.calls:
        is_binary = call.name == "bce_with_logits"
        is_index = call.name == "cross_entropy" and not call.targets.is_floating_point()
        if call.reduction != "mean" or not (is_binary or is_index):
            continue
        classes, value = call.outputs.shape[1] if is_index and call.outputs.dim() > 1 else 2, call.result.item()
        scores = call.outputs.detach().float()
        spread = scores.pow(2).mean().sqrt().item() if is_binary else scores_of(scores).std().item()
        if value > 3 * math.log(classes) and spread > 3 and case.run.state.progress.step < 3:
            yield Seen(
                f"at the start {call.name} is {value:.3g}, far above what knowing nothing costs.",
                f"ln({classes}) = {math.log(classes):.3g}, 3 times that allowed; the scores spread by "
                f"{spread:.3g} (3 allowed)",
                f"{case.output_layer()}, {case.place}",
                "normalise the inputs, or initialise the last layer smaller: nn.init.normal_(last.weight, std=0.01)",
            )
    yield from _far_off(case)


def _far_off(case: Case) -> Iterator[Seen]:
    """The same of a regression."""
    call = next((one for one in case.now.calls if one.name in losses.ELEMENTWISE - losses.BINARY), None)
    outputs, targets = (call.outputs, call.targets) if call is not None else (case.now.outputs, case.now.targets)
    if (is_custom(case) and call is None) or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    if outputs.shape != targets.shape or not targets.is_floating_point() or case.run.state.progress.step > 2:
        return
    wanted, middle = targets.float().std().item(), targets.float().mean()
    off = (outputs.detach().float() - middle).pow(2).mean().sqrt().item()
    if off > 30 * max(wanted, middle.abs().item(), 1.0):
        yield Seen(
            "at the start the outputs lie far away from all targets.",
            f"{off:.3g} in the mean, where the deviation of targets is {wanted:.3g} (30 times allowed)",
            f"{case.output_layer()}, {case.place}",
            "initialise with nn.init.kaiming_normal_(layer.weight), put norms between the layers, normalise the inputs",
        )


@rule("penalty-dominates", "warning", "graph")
def penalty_dominates(case: Case) -> Iterator[Seen]:
    """The penalty is larger than the error: the weights shrink towards 0 instead of learning.

    Looks at the gradient of torch's losses inside of what is minimised, and at that of the rest, where the rest does
    not go through the model's outputs (a penalty on weights; weight_decay, but adamw's): the rest is more than 2
    times as large (TheDeepChecker). ``epochal check`` also looks at a trained copy: its weights are less than half of
    what they began with, and the error is not smaller.
    """
    value, calls = case.now.value, [call for call in case.now.calls if call.result.requires_grad]
    decays = _decays(case)
    if not calls or not value.requires_grad or any(call.result.dim() for call in calls):
        return
    tables = {id(part.weight) for part in case.model.modules() if getattr(part, "sparse", False)}
    parameters = [p for p in case.trained.values() if id(p) in case.now.reached and id(p) not in tables]
    outputs = [one for one in tensors(case.now.outputs) if one.requires_grad]
    slopes = torch.autograd.grad(value, [call.result for call in calls], retain_graph=True, allow_unused=True)
    known = [(call.result, slope) for call, slope in zip(calls, slopes) if slope is not None]
    if not known or not outputs:
        return
    results, factors = map(list, zip(*known))
    is_all = abs(sum(one.item() * slope.item() for one, slope in known) - value.item()) <= 1e-6 * abs(value.item())
    if is_all and not decays:
        return  # nothing else is minimised; to ask for more gradients takes time
    of_outputs = _sized(value, outputs) - _sized(results, outputs, factors)
    if abs(of_outputs) > 1e-4 * _sized(value, outputs):
        return
    data = torch.autograd.grad(results, parameters, factors, retain_graph=True, allow_unused=True)
    whole = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    rest = [
        (0 if a is None else a) - (0 if b is None else b) + decays.get(id(p), 0.0) * p.detach()
        for a, b, p in zip(whole, data, parameters)
    ]  # fmt: skip
    of_data, of_rest = (
        math.sqrt(sum(float(one.abs().pow(2).sum()) for one in part if isinstance(one, Tensor)))
        for part in (data, rest)
    )
    if of_rest > 2 * of_data > 0:
        yield Seen(
            "the penalty on the weights is stronger than the error itself.",
            f"its gradient is {of_rest / of_data:.3g} times that of the error (2 allowed)",
            case.place,
            "make it smaller: weight_decay=0.01 with adamw, or a factor of 1e-4 in the objective",
        )


def _sized(value: Any, wanted: list[Tensor], factors: Any = None) -> float:
    slopes = torch.autograd.grad(value, wanted, factors, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float(one.abs().pow(2).sum()) for one in slopes if one is not None))


def _decays(case: Case) -> dict[int, float]:
    """Of each parameter the weight decay that is added to its gradient; adamw's is not."""
    if case.optimizer is None or type(case.optimizer).__name__ in ("AdamW", "Muon", "NAdam", "RAdam", "Adafactor"):
        return {}
    return {
        key: float(group.get("weight_decay") or 0.0) for key, group in case.held.items() if group.get("weight_decay")
    }
