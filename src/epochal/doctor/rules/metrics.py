"""Rules over metrics of the user's: what they compare, and how they are averaged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from epochal.doctor.finding import Seen, rule
from epochal.losses import CLASS_INDEX

if TYPE_CHECKING:
    from epochal.doctor.probing import Probe


EQUAL = ("eq", "ne", "__eq__", "__ne__")


@rule("logit-threshold", "warning", "probe")
def logit_threshold(probe: Probe) -> Iterator[Seen]:
    """A threshold of 0.5, or rounding, is for probabilities; of scores, 0 is the middle. An argmax over one column is
    0.

    Looks at the metrics and the loss as they are called: what is compared with 0.5 (or rounded) lies outside of 0..1;
    or argmax is taken over a dimension of size 1. Where they leave torch: a metric of a binary classifier is the same
    for scores of 0.3, all of the right sign, as for -3 alone, but another one for 3.
    """
    for operation in probe.metric_operations():
        (args, kwargs), name = operation.inputs, operation.name
        given = args[0]
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.numel() < 4:
            continue
        low, high = given.min().item(), given.max().item()
        if name in EQUAL:
            continue
        if name == "argmax":
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            if isinstance(dim, int) and given.dim() > 1 and given.shape[dim] == 1:
                yield Seen("an argmax is taken over a single column, and is always 0.",
                           f"argmax over dimension {dim} of {tuple(given.shape)}", operation.place,
                           "compare the score with 0: (outputs > 0)")  # fmt: skip
                return
            continue
        bound = 0.5 if name == "round" else args[1] if len(args) > 1 else None
        bound = bound.item() if isinstance(bound, Tensor) and bound.numel() == 1 else bound
        if isinstance(bound, float) and bound == 0.5 and (low < -0.05 or high > 1.05):
            yield Seen(
                "scores are cut at 0.5, which is for probabilities.",
                f"they go from {low:.3g} to {high:.3g}",
                operation.place,
                "compare them with 0, or take torch.sigmoid(outputs) > 0.5",
            )
            return
    yield from _cut_too_high(probe)


def _cut_too_high(probe: Probe) -> Iterator[Seen]:
    calls = [call for call in probe.case.now.calls if call.name == "bce_with_logits"]
    outputs, targets = probe.evaluated.outputs, probe.case.now.targets
    if not calls or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    if outputs.numel() != targets.numel() or not bool(((targets == 0) | (targets == 1)).all()):
        return
    right = (2 * targets.detach() - 1).to(outputs).reshape(outputs.shape)
    for name, metric in probe.metric_functions():
        clear, faint, none = (float(metric(scores, targets)) for scores in (3 * right, 0.3 * right, -3 * right.abs()))
        if faint == none != clear:
            yield Seen(
                f"the metric {name!r} takes scores of 0.3 for the negative class, as if they were probabilities.",
                f"{faint:.4g} where all scores are 0.3 of the right sign, {clear:.4g} where they are 3 of it",
                f"metrics=, {name}",
                "compare them with 0, or take torch.sigmoid(outputs) > 0.5",
            )
            return


@rule("wrong-average", "warning", "probe")
def wrong_average(probe: Probe) -> Iterator[Seen]:
    """A metric that is no mean over samples (a root, an f1, a correlation) is another one when it is averaged over
    batches.

    Computes a metric function of the user's over all of val at once, and as the mean over batches: they differ by
    more than 5 of 100; by more than 5 of 1000 it is info.
    """
    for name, whole, mean in probe.averaged_metrics:
        off = abs(whole - mean) / max(abs(whole), abs(mean), 1e-9)
        if off > 0.005:
            yield Seen(
                f"the metric {name!r} is averaged over batches, and is no mean.",
                f"{mean:.4g} averaged over the batches of val, {whole:.4g} over all of it (5 % allowed)",
                f"metrics=, {name}",
                "give epochal.Metric or a torchmetrics metric, which keeps what it needs of each batch",
                level=None if off > 0.05 else "info",
            )


@rule("impossible-metric", "error", "probe")
def impossible_metric(probe: Probe) -> Iterator[Seen]:
    """A share above 1, or below 0, is none: the metric counts something twice, or divides by the wrong number.

    Looks at metrics whose names say accuracy, precision, recall, f1 or auc, over val; and at whether a metric compares
    (n,) with (n, 1), which asks each sample about all others.
    """
    for operation in probe.metric_operations(of_loss=False):
        (args, _), result = operation.inputs, operation.result
        one, other = (*args, None)[:2]
        if operation.name in EQUAL and isinstance(one, Tensor) and isinstance(other, Tensor):
            shapes = sorted((tuple(one.shape), tuple(other.shape)), key=len)
            count = shapes[0][0] if shapes[0] else 0
            is_of_one = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()  # labels with labels
            if count > 1 and shapes == [(count,), (count, 1)] and isinstance(result, Tensor) and not is_of_one:
                yield Seen(
                    "a metric compares each sample with all others.",
                    f"{tuple(one.shape)} and {tuple(other.shape)} made {tuple(result.shape)}",
                    operation.place,
                    "give both the same shape: outputs.squeeze(1), or targets.reshape(outputs.shape)",
                )
                return
    for name, whole, mean in probe.averaged_metrics:
        words = re.split(r"[^a-z0-9]+", name.lower())
        is_share = any(word in words for word in ("accuracy", "acc", "precision", "recall", "f1", "auc"))
        is_mean = abs(whole - mean) < 0.01 * max(abs(whole), 1e-9)
        for value in (whole, mean):
            if is_mean and 10 < value <= 100:
                continue  # in percent
            if is_share and not -1e-6 <= value <= 1 + 1e-6:
                yield Seen(
                    f"{name} is {value:.4g}, which no share can be.",
                    f"{value:.4g} over val (0 to 1 allowed)",
                    f"metrics=, {name}",
                    "divide by the number of samples, and look at the shapes: (n,) == (n, 1) compares each with each",
                    level="warning" if 1 < value <= 100 else None,  # it may be percent
                )
                return


@rule("loss-metric-disagree", "warning", "probe")
def loss_metric_disagree(probe: Probe) -> Iterator[Seen]:
    """A metric that is computed over another dimension than the loss says nothing of what is learned.

    Looks at the argmax of the model's outputs in a metric: for scores (n, classes, ...) it is taken over dimension 1.
    """
    classes = {
        call.outputs.shape: call.outputs.shape[1]
        for call in probe.case.now.calls
        if call.name in CLASS_INDEX and call.outputs.dim() > 2
    }
    for operation in probe.metric_operations():
        (args, kwargs), name = operation.inputs, operation.name
        given = args[0]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if name != "argmax" or not isinstance(given, Tensor) or given.shape not in classes or not isinstance(dim, int):
            continue
        if dim % given.dim() != 1:
            yield Seen(
                "a metric takes the argmax over another dimension than the classes.",
                f"argmax over dimension {dim % given.dim()} of {tuple(given.shape)}; the loss has its classes in "
                "dimension 1",
                operation.place,
                "take outputs.argmax(1)",
            )
            return
