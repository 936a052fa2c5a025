"""The metrics with a name, and what a user may write as ``metrics=``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epochal.errors import DataError, PlanError, UnknownNameError
from epochal.metrics import classes, regression
from epochal.metrics.metric import Foreign, Metric, first_tensor, is_foreign, names_of, ratio, widest_float, with_count

NAMES = ("accuracy", "top5", "precision", "recall", "f1", "confusion", "mae", "mse", "rmse", "r2")


def resolve(metrics: Any, *, loss: str | None, ignore_index: int = -100) -> list[Metric | Foreign]:
    """Turns ``metrics=`` into metrics with different names.

    metrics: None, one item, a list of items, or a dict of name to item. An item is one of ``NAMES``, a
        ``Metric``, a torchmetrics ``Metric`` or ``MetricCollection``, or a function f(outputs, targets) that gives
        a scalar: its mean over the samples is the metric, and its ``__name__`` the name.
    loss: the short name of the loss, or None where it has none; it tells logits from probabilities.

    Raises UnknownNameError or PlanError at the first mistake.

    >>> names_of(resolve(["accuracy", "f1"], loss="cross_entropy"))
    ['accuracy', 'f1']
    """
    if metrics is None:
        return []
    items = metrics if isinstance(metrics, (list, tuple, Mapping)) else [metrics]
    pairs = items.items() if isinstance(items, Mapping) else [(None, item) for item in items]
    known = _named(loss, ignore_index)
    resolved = [_resolve_item(item, known, name) for name, item in pairs]
    names = names_of(resolved)
    if twice := [name for name in names if names.count(name) > 1]:
        fix = 'name them yourself: metrics={"first": ..., "second": ...}'
        raise PlanError(f"two metrics have the name {twice[0]!r}.", where="metrics", fix=fix)
    if "loss" in names:
        fix = "give it another name; train_loss and val_loss are the loss itself"
        raise PlanError("a metric cannot have the name 'loss'.", where="metrics", fix=fix)
    return resolved


def _resolve_item(item: Any, known: Mapping[str, Metric], name: Any) -> Metric | Foreign:
    if name is not None and not (isinstance(name, str) and name):
        what = f"the name of a metric is a string; {name!r} is not one."
        raise PlanError(what, where="metrics", fix="give it a name")
    if isinstance(item, str):
        if item not in known:
            raise UnknownNameError.of_name("metric", item, known, where="metrics")
        item = known[item]
    if isinstance(item, Metric):
        return dataclasses.replace(item, name=name) if name else item
    if is_foreign(item):
        return Foreign(item, name)
    if isinstance(item, type):
        fix = f"write {item.__name__}(...)"
        raise PlanError(f"{item.__name__} is a class, not a metric.", where="metrics", fix=fix)
    if not callable(item):
        fix = "give a name, an epochal.Metric, a torchmetrics metric, or a function f(outputs, targets)"
        raise PlanError(f"{item!r} is not a metric.", where="metrics", fix=fix)
    return _metric_of(item, name)


def _metric_of(function: Callable[[Any, Any], Any], name: str | None) -> Metric:
    name = name or getattr(function, "__name__", "<lambda>")
    if name == "<lambda>":
        what, fix = "a metric function needs a name, and this one has none.", 'give a dict: metrics={"name": function}'
        raise PlanError(what, where="metrics", fix=fix)
    try:
        inspect.signature(function).bind(None, None)
    except ValueError:  # some functions written in C have no signature
        pass
    except TypeError as error:
        what = f"the metric function {name!r} cannot be called with (outputs, targets): {error}."
        raise PlanError(what, where="metrics", fix="give it exactly two required parameters") from None
    return Metric(name, sums=partial(_weighted_scalar, function, name), value=ratio)


def mode_of(metric: Metric | Foreign) -> str | None:
    """The better direction of a metric: "max", "min", or None where it does not say (no collection does).

    >>> mode_of(resolve("mae", loss="mse")[0])
    'min'
    """
    higher = getattr(metric.metric if isinstance(metric, Foreign) else metric, "higher_is_better", None)
    return None if higher is None else "max" if higher else "min"


def _named(loss: str | None, ignore_index: int) -> dict[str, Metric]:
    by_class = {"loss": loss, "ignore_index": ignore_index}
    rates = partial(classes.rate_sums, **by_class)  # one object for three metrics, so that a Stream computes it once
    metrics = [
        Metric("accuracy", partial(classes.accuracy_sums, **by_class), ratio, True),
        Metric("top5", partial(classes.top5_sums, **by_class), ratio, True),
        Metric("precision", rates, partial(classes.rate, "precision"), True),
        Metric("recall", rates, partial(classes.rate, "recall"), True),
        Metric("f1", rates, partial(classes.rate, "f1"), True),
        Metric("confusion", partial(classes.confusion_sums, **by_class), classes.confusion_matrix, None),
        Metric("mae", regression.absolute_sums, ratio, False),
        Metric("mse", regression.square_sums, ratio, False),
        Metric("rmse", regression.square_sums, regression.root_ratio, False),
        Metric("r2", regression.r2_sums, regression.r2, True, merge=regression.merge_r2),
    ]
    return {metric.name: metric for metric in metrics}


def _weighted_scalar(function: Callable[[Any, Any], Any], name: str, outputs: Any, targets: Any) -> Tensor:
    """(value · samples, samples); the samples are the rows of the first tensor of the outputs."""
    counted = first_tensor((outputs, targets))
    value = torch.as_tensor(function(outputs, targets))
    if value.numel() != 1 or value.is_complex():
        what = f"the metric function {name!r} gave {value.dtype} {tuple(value.shape)}, not one real number."
        raise DataError(what, where="metrics", fix="return the mean over the batch")
    samples = len(counted) if counted is not None and counted.ndim else 1
    device = value.device if counted is None else counted.device
    value = value.detach().reshape(()).to(device, widest_float(device)) * samples
    return with_count(value if samples else torch.zeros_like(value), samples)  # the mean of nothing is NaN
