"""Rules over the scores that a loss gets: what made them, and what it can give."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from epochal import losses
from epochal.doctor.case import Case, is_custom, made_last
from epochal.doctor.finding import Seen, rule
from epochal.doctor.graph import is_transposed, made_by, maker, softmax_of
from epochal.doctor.trace import Call, tensors

ROWS = 4  # a batch of fewer rows proves nothing
SUM = 1e-3  # how far from 1 a sum of probabilities may lie
RANGES = {  # what an activation can give at all
    "Sigmoid": (0.0, 1.0), "Hardsigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "Tanh": (-1.0, 1.0),
    "Relu": (0.0, math.inf), "Softplus": (0.0, math.inf), "LogSigmoid": (-math.inf, 0.0),
    "LogSoftmax": (-math.inf, 0.0), "Exp": (0.0, math.inf),
}  # fmt: skip
UNBOUNDED = ("Addmm", "Convolution", "Mm", "Relu", "LeakyRelu", "Hardtanh", "Softplus", "Gelu", "Elu", "Silu")
REGRESSION = losses.ELEMENTWISE - losses.BINARY


def scores_of(outputs: Tensor) -> Tensor:
    """Scores as (n, classes)."""
    outputs = outputs.detach()
    return outputs if outputs.dim() < 3 else outputs.movedim(1, -1).flatten(0, -2)


def range_of(outputs: Tensor) -> tuple[float, float] | None:
    """What the activation that made them can give at all; None where there is none, or it can give everything."""
    node, name = maker(outputs), made_by(outputs)
    if name == "Hardtanh":  # a ReLU6, too
        return float(node._saved_min_val), float(node._saved_max_val)
    if name == "Elu":  # a SELU, too
        return -float(node._saved_alpha) * float(node._saved_scale), math.inf
    return RANGES.get(name)


def _are_probabilities(outputs: Tensor) -> bool:
    rows = scores_of(outputs).float()
    if rows.dim() != 2 or rows.shape[0] < ROWS or rows.shape[1] < 2:
        return False
    return bool((rows >= 0).all() and ((rows.sum(1) - 1).abs() < SUM).all())


def _is_models(case: Case, call: Call) -> bool:
    """Whether the model made the scores as the loss gets them."""
    return any(maker(one) is maker(call.outputs) for one in tensors(case.now.outputs) if one.requires_grad)


def _made(case: Case, call: Call) -> str:
    """Where the scores of a loss come from, in words."""
    layer = made_last(case.now)
    inside = any(one is call.outputs for one in tensors(case.now.outputs))
    return f"{case.output_layer()}, {case.at(call.place)}" if layer and inside else case.at(call.place)


@rule("softmax-before-loss", "error", "batch")
def softmax_before_loss(case: Case) -> Iterator[Seen]:
    """A softmax of a softmax is nearly flat: gradients shrink, the loss cannot come near 0, and training stalls early.

    Looks at what cross_entropy gets: made by a softmax, or rows that are not negative and sum to 1 within 0.001, all
    of at least 4. A log_softmax before it is told as info: it changes nothing but costs time. Catalogue of AUTOTRAINER,
    UMLAUT and others; the mistake most often asked about.
    """
    for call in case.now.calls:
        if call.name != "cross_entropy":
            continue
        is_index = not call.targets.is_floating_point()
        if made_by(call.outputs) == "Softmax" or (is_index and _are_probabilities(call.outputs)):
            yield Seen(
                "cross_entropy gets probabilities, and takes the softmax of them once more.",
                f"the rows of {tuple(call.outputs.shape)} are not negative and sum to 1 within {SUM}",
                _made(case, call),
                "leave the softmax out of the model (and take it where you predict), or give its logarithm to "
                'loss="nll"'
                if _is_models(case, call)
                else "give the scores themselves to cross_entropy",
            )
        elif made_by(call.outputs) == "LogSoftmax":
            yield Seen(
                "cross_entropy gets the logarithms of probabilities: it takes the log_softmax itself.",
                "what it gets is made by log_softmax, which a second one does not change",
                _made(case, call),
                'leave the log_softmax out, or give loss="nll"',
                level="info",
            )


@rule("nll-without-log-softmax", "error", "batch")
def nll_without_log_softmax(case: Case) -> Iterator[Seen]:
    """NLLLoss only picks numbers out: of anything but logarithms of probabilities it is no likelihood, and falls
    without end.

    Looks at what nll_loss gets: an entry above 0, or rows whose exponentials do not sum to 1 within 0.01; not at what
    a log_softmax made.
    """
    for call in case.now.calls:
        if call.name != "nll" or scores_of(call.outputs).dim() != 2:
            continue
        made = softmax_of(call.outputs)
        is_over_classes = made is not None and made[0] == "LogSoftmax" and made[1] == min(1, len(made[2]) - 1)
        if is_over_classes and not is_transposed(call.outputs):
            continue  # half precision rounds its sums
        rows = scores_of(call.outputs).float()
        highest, off = rows.max().item(), (rows.exp().sum(1) - 1).abs().max().item()
        if highest > 1e-4 or off > 1e-2:
            yield Seen(
                "NLLLoss needs logarithms of probabilities, and gets other numbers.",
                f"the highest is {highest:.3g} (at most 0), and exp of a row sums to 1 within {off:.3g} (at most 0.01)",
                _made(case, call),
                'give loss="cross_entropy", which takes the scores as they are, or end the model with nn.LogSoftmax(1)',
                level=None if call.result is case.now.value or not is_custom(case) else "warning",
            )


@rule("sigmoid-before-logits-loss", "error", "batch")
def sigmoid_before_logits_loss(case: Case) -> Iterator[Seen]:
    """The loss takes the sigmoid itself; of values between 0 and 1 it is between 0.5 and 0.73, and no class 0 is ever
    sure.

    Looks at what binary_cross_entropy_with_logits gets: made by a sigmoid (or a softmax).
    """
    for call in case.now.calls:
        if call.name == "bce_with_logits" and made_by(call.outputs) in ("Sigmoid", "Softmax", "Hardsigmoid"):
            low, high = call.outputs.min().item(), call.outputs.max().item()
            yield Seen(
                f"bce_with_logits gets the output of a {made_by(call.outputs).lower()}, and takes the sigmoid "
                "once more.",
                f"what it gets lies from {low:.3g} to {high:.3g}, made by {made_by(call.outputs).lower()}",
                _made(case, call),
                'leave the sigmoid out of the model, or give loss="bce"',
            )


@rule("bce-on-logits", "warning", "batch")
def bce_on_logits(case: Case) -> Iterator[Seen]:
    """BCELoss takes logarithms of its inputs: of what is not a probability they do not exist, or mean nothing.

    Looks at what binary_cross_entropy gets: an entry outside 0..1 (torch refuses it on the host), or scores that came
    straight out of a layer, clamped or behind a ReLU.
    """
    for call in case.now.calls:
        if call.name == "bce" and made_by(call.outputs, past=("Clamp", "ClampMin", "ClampMax")) in UNBOUNDED:
            yield Seen(
                "BCELoss needs probabilities, and gets the scores of a layer.",
                f"what it gets lies from {call.outputs.min().item():.3g} to {call.outputs.max().item():.3g}",
                _made(case, call),
                'give loss="bce_with_logits", or end the model with nn.Sigmoid()',
            )


@rule("activation-before-loss", "warning", "batch")
def activation_before_loss(case: Case) -> Iterator[Seen]:
    """The scores of a classifier have to be free: an activation before the loss forbids most of them.

    Looks at what cross_entropy and binary cross-entropy with logits get: made by ReLU, tanh, sigmoid or another bounded
    activation. Without negative scores, or with scores from -1 to 1, a class cannot be ruled out.
    """
    made = {"Relu": "ReLU", "Tanh": "tanh", "Sigmoid": "sigmoid", "Hardtanh": "hardtanh", "LeakyRelu": "leaky ReLU",
            "Gelu": "GELU", "Elu": "ELU", "Silu": "SiLU", "Hardsigmoid": "hardsigmoid", "Softplus": "softplus",
            "NativeDropout": "dropout"}  # fmt: skip
    for call in case.now.calls:
        name = made_by(call.outputs)
        if call.name not in ("cross_entropy", "bce_with_logits") or name not in made:
            continue
        if call.name == "bce_with_logits" and name in ("Sigmoid", "Hardsigmoid"):
            continue  # which has a code of its own
        yield Seen(
            f"an activation ({made[name]}) stands between the last layer and {call.name}.",
            f"the scores lie from {call.outputs.min().item():.3g} to {call.outputs.max().item():.3g}, made by "
            f"{made[name]}",
            _made(case, call),
            "let the model end with its last nn.Linear",
        )
    for one in case.now.trace.softmaxes if not case.now.calls else ():
        name = made_by(one.inputs[0]) if isinstance(one.inputs[0], Tensor) else ""
        if name in made and any(maker(out) is maker(one.inputs[0]) for out in tensors(case.now.outputs)):
            yield Seen(f"an activation ({made[name]}) stands between the last layer and {one.name}.",
                       f"the scores lie from {one.inputs[0].min().item():.3g} to {one.inputs[0].max().item():.3g}",
                       f"{case.output_layer()}, {case.place}", "let the model end with its last nn.Linear")  # fmt: skip
            return
    yield from _dropped(case)


def _dropped(case: Case) -> Iterator[Seen]:
    """A regression that ends in a dropout."""
    for call in case.now.calls:
        if call.name in REGRESSION and made_by(call.outputs) == "NativeDropout":
            yield Seen(
                f"dropout stands between the last layer and {call.name}: it sets whole predictions to 0.",
                f"{(call.outputs == 0).float().mean().item():.0%} of the outputs are 0",
                _made(case, call),
                "let the model end with its last nn.Linear",
            )


@rule("unreachable-targets", "error", "batch")
def unreachable_targets(case: Case) -> Iterator[Seen]:
    """The activation at the model's end cannot give these targets: part of the error can never go away.

    Looks at what a loss of differences gets: made by sigmoid, tanh, ReLU, softmax or softplus, and more than five of a
    hundred targets outside of what that can give at all, by more than a hundredth of the variance of all.
    """
    for call in case.now.calls:
        name = made_by(call.outputs)
        reach = range_of(call.outputs)
        if call.name not in (REGRESSION | {"bce"}) or reach is None or call.outputs.shape != call.targets.shape:
            continue
        low, high = reach
        every = case.sample[1] if case.sample is not None and case.sample[1] is not None else call.targets
        every = every if every.is_floating_point() and every.shape[1:] == call.targets.shape[1:] else call.targets
        outside = ((every < low - 1e-4) | (every > high + 1e-4)).float().mean().item()
        if outside > 0.05 and _missed(every, low, high) > 0.01:
            yield Seen(
                f"the model ends with {name.lower()}, which cannot give these targets.",
                f"{outside:.0%} of the targets are outside of {low:g} to {high:g} (at most 5 %): "
                f"they lie from {every.min().item():.4g} to {every.max().item():.4g}",
                _made(case, call),
                f"leave out the {name.lower()} at the end, or scale the targets into its range",
            )
    yield from _unreachable_for_own(case)


def _missed(targets: Tensor, low: float, high: float) -> float:
    """What of the variance of the targets lies outside, at least."""
    values = targets.float()
    return ((values - values.clamp(low, high)).square().mean() / values.var().clamp(min=1e-12)).item()


def _unreachable_for_own(case: Case) -> Iterator[Seen]:
    """The same where outputs and targets are subtracted by the user; a warning, for it may be meant so."""
    for one in case.now.trace.differences:
        outputs, targets = sorted(one.inputs, key=lambda part: not part.requires_grad)
        name = made_by(outputs)
        if (reach := range_of(outputs)) is None or not outputs.requires_grad or targets.requires_grad:
            continue
        low, high = reach
        outside = ((targets < low - 1e-4) | (targets > high + 1e-4)).float().mean().item()
        if outside > 0.05 and _missed(targets, low, high) > 0.01:
            yield Seen(
                f"the model ends with {name.lower()}, which cannot give these targets.",
                f"{outside:.0%} of the targets are outside of {low:g} to {high:g} (at most 5 %)",
                f"{case.output_layer()}, {case.at(one.place)}",
                f"leave out the {name.lower()} at the end, or scale the targets into its range",
                level="warning",
            )
            return
