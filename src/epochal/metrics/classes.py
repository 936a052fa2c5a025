"""The metrics of classes: how often the right one was predicted.

What the shapes mean:

    outputs       targets       loss            meaning
    (N, C, ...)   (N, ...)      any             scores of C classes; class indices, of any integer type
    (N, C, ...)   (N, C, ...)   cross_entropy   scores; probabilities, of which the largest is the truth
    (N[, 1])      (N[, 1])      any             binary: an output above the threshold is a yes
    (N, L, ...)   (N, L, ...)   bce[...]        L labels, each a binary question

The threshold is 0 (a logit), and 0.5 where the loss holds the outputs to the scale of the targets ("bce" and the
losses of regression). Targets equal to ``ignore_index`` do not count.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from epochal.errors import DataError, PlanError
from epochal.metrics.metric import check_tensors, shapes

ELEMENTWISE_LOSSES = ("bce", "bce_with_logits")
TARGET_SCALE_LOSSES = ("bce", "mse", "l1", "smooth_l1", "huber")


def _decisions(
    outputs: Any, targets: Any, loss: str | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, int | None]:
    """What was predicted, what is true, which of it counts (all of one shape), and how many classes there are.

    The first two are class indices (N, ...); or, where there are no classes (None), yes or no in (N, labels, ...).
    """
    check_tensors(outputs, targets)
    if single := _is_single_column(outputs, targets):
        outputs, targets = outputs.reshape(-1, 1), targets.reshape(-1, 1)
    if single or (loss in ELEMENTWISE_LOSSES and outputs.ndim > 1 and outputs.shape == targets.shape):
        threshold = 0.5 if loss in TARGET_SCALE_LOSSES else 0.0
        return outputs > threshold, targets > 0.5, targets != ignore_index, None
    truth = _class_indices(outputs, targets, loss)
    return outputs.argmax(1), truth, truth != ignore_index, outputs.shape[1]


def _is_single_column(outputs: Tensor, targets: Tensor) -> bool:
    sizes, others = ([size for size in tensor.shape if size != 1] for tensor in (outputs, targets))
    return outputs.ndim > 0 and outputs.shape[1:2] in ((), (1,)) and sizes == others


def _class_indices(outputs: Tensor, targets: Tensor, loss: str | None) -> Tensor:
    if loss == "cross_entropy" and outputs.ndim > 1 and outputs.shape == targets.shape:
        return targets.argmax(1)
    if outputs.ndim < 2 or targets.shape != outputs.shape[:1] + outputs.shape[2:]:
        where = f"{shapes(outputs, targets)}; loss {loss or 'of your own'}"
        fix = "give outputs (N, C, ...) and targets (N, ...) of class indices, or a function as the metric"
        raise DataError("outputs and targets do not say which class is meant.", where=where, fix=fix)
    if targets.is_floating_point() or targets.is_complex():
        what = f"class indices are integers; the targets are {targets.dtype}."
        raise DataError(what, where=shapes(outputs, targets), fix="give targets.long()")
    return targets.long()  # first of all: as uint8, -100 and 156 are equal


def accuracy_sums(outputs: Any, targets: Any, *, loss: str | None, ignore_index: int) -> Tensor:
    """(right, counted), over all elements; int64."""
    predicted, truth, counted, _ = _decisions(outputs, targets, loss, ignore_index)
    return torch.stack([((predicted == truth) & counted).sum(), counted.sum()])


def top5_sums(outputs: Any, targets: Any, *, loss: str | None, ignore_index: int) -> Tensor:
    """(the truth is among the five highest scores, counted); int64."""
    _, truth, counted, classes = _decisions(outputs, targets, loss, ignore_index)
    if classes is None or classes < 5:
        what = f"top5 needs at least 5 classes; the outputs have {classes or 'yes-or-no answers'}."
        raise PlanError(what, where=shapes(outputs, targets), fix="leave top5 out; accuracy says more here")
    best = outputs.topk(5, dim=1).indices
    return torch.stack([((best == truth.unsqueeze(1)).any(1) & counted).sum(), counted.sum()])


def rate_sums(outputs: Any, targets: Any, *, loss: str | None, ignore_index: int) -> Tensor:
    """How many were right, predicted and true, for each label (3·L) or each class (3·C, and how many targets lie
    outside the classes); int64.
    """
    predicted, truth, counted, classes = _decisions(outputs, targets, loss, ignore_index)
    if classes is None:
        counts = torch.stack([predicted & truth & counted, predicted & counted, truth & counted])
        return counts.sum([axis for axis in range(counts.ndim) if axis not in (0, 2)]).flatten()
    predicted, truth, one = predicted.flatten(), truth.flatten(), counted.flatten().long()
    zeros = one.new_zeros(classes + 1)
    slot = torch.where((truth >= 0) & (truth < classes), truth, classes)
    right = zeros.scatter_add(0, predicted, one * (predicted == truth))
    return torch.cat([right[:-1], zeros.scatter_add(0, predicted, one)[:-1], zeros.scatter_add(0, slot, one)])


def rate(kind: str, sums: Tensor) -> float:
    """Precision, recall or f1: the mean over the labels, or over the classes that appear; 0/0 counts as 0.

    As scikit-learn's ``precision_score`` and so on with ``average="macro", zero_division=0``.
    """
    columns, has_outside = divmod(sums.numel(), 3)
    if has_outside:
        _check_outside(int(sums[-1]), columns)
    right, predicted, true = sums[: 3 * columns].double().view(3, columns)
    over, under = {"precision": (right, predicted), "recall": (right, true), "f1": (2 * right, predicted + true)}[kind]
    rates = over / under.clamp(min=1)
    return (rates[predicted + true > 0] if has_outside else rates).mean().item()


def confusion_sums(outputs: Any, targets: Any, *, loss: str | None, ignore_index: int) -> Tensor:
    """How often each (truth, predicted) was met (C·C), then how many targets lie outside the classes; int64."""
    predicted, truth, counted, classes = _decisions(outputs, targets, loss, ignore_index)
    if classes is None:
        if predicted.shape[1] > 1:
            what = "confusion is for one class a sample; the outputs are several labels."
            raise PlanError(what, where=shapes(outputs, targets), fix="take precision and recall")
        predicted, truth, classes = predicted.long(), truth.long(), 2
    inside = (truth >= 0) & (truth < classes)
    cell = torch.where(inside, truth * classes + predicted, classes**2).flatten()
    return cell.new_zeros(classes**2 + 1).scatter_add(0, cell, counted.flatten().long())


def confusion_matrix(sums: Tensor) -> list[list[int]]:
    """Rows are the truth, columns what was predicted."""
    classes = math.isqrt(sums.numel())
    _check_outside(int(sums[-1]), classes)
    return sums[:-1].view(classes, classes).tolist()


def _check_outside(outside: int, classes: int) -> None:
    # Told here and not in the sums, which must not wait for the device.
    if outside:
        what = f"{outside} targets lie outside the classes 0 to {classes - 1}."
        fix = "number the classes from 0, and give the model one output a class"
        raise DataError(what, where="metrics", fix=fix)
