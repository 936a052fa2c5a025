"""What a metric is, and its running state on one side (train or val)."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epochal.errors import CheckpointError, DataError
from epochal.runtime.processes import gather, world

WORD_BORDER = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"  # Binary|F1|Score, KL|Divergence


@dataclass(frozen=True)
class Metric:
    """A metric in two halves: sums on the device, and the value that is made of them on the host.

    name: its name in the rows (``train_`` and ``val_`` are put before it).
    sums: (outputs, targets) of one batch -> vector (float64 or int64) on the outputs' device, of the same
        length for every batch. It must not wait for the device (no ``.item()``, no boolean indexing).
    value: the merged vector, on the CPU -> a float, or a (nested) list of numbers.
    higher_is_better: None where neither direction is better; such a metric cannot be monitored without a mode.
    merge: two vectors -> a new one, in any order: over batches, devices and processes.

    >>> def bias_sums(outputs, targets):
    ...     errors = (outputs - targets).double()
    ...     return torch.stack([errors.sum(), torch.ones_like(errors).sum()])
    >>> bias = Metric("bias", bias_sums, value=lambda sums: float(sums[0] / sums[1]))
    >>> bias.value(bias.sums(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])))
    0.5
    """

    name: str
    sums: Callable[[Any, Any], Tensor]
    value: Callable[[Tensor], float | list]
    higher_is_better: bool | None = None
    merge: Callable[[Tensor, Tensor], Tensor] = torch.add


@dataclass(frozen=True)
class Foreign:
    """A torchmetrics ``Metric`` or ``MetricCollection``, and the name that the user gave it, if any."""

    metric: Any  # a module that passes `is_foreign`; torchmetrics, which could name its type, may be absent
    name: str | None = None

    @property
    def label(self) -> str:
        return self.name or re.sub(WORD_BORDER, "_", type(self.metric).__name__).lower()

    @property
    def keys(self) -> list[str]:
        """What it puts into a row."""
        if isinstance(self.metric, nn.ModuleDict):  # what a MetricCollection is
            return [f"{self.name}_{key}" if self.name else str(key) for key in self.metric.keys()]  # noqa: SIM118
        return [self.label]


def is_foreign(item: object) -> bool:
    """Whether this is an instance of a torchmetrics class; known by its shape, as torchmetrics may be absent."""
    return isinstance(item, nn.Module) and hasattr(type(item), "metric_state")


def names_of(metrics: Iterable[Metric | Foreign]) -> list[str]:
    """The keys that these metrics put into a row, in order.

    A torchmetrics metric without a name of the user's is called by its class: ``MulticlassAccuracy`` gives
    ``multiclass_accuracy``. A collection gives its own keys, after ``name_`` where the user gave a name.
    (A torchmetrics metric whose value is a dict gives the keys of that dict, which only its value tells.)
    """
    return [name for one in metrics for name in (one.keys if isinstance(one, Foreign) else [one.name])]


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype for sums: float64, which counts exactly to 2**53; float32 on mps, which has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a tensor, or in nested mappings, lists and tuples of them."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for found in map(first_tensor, parts) if found is not None), None)


def with_count(total: Tensor, count: int) -> Tensor:
    """The sums (total, count), for ``ratio``."""
    return torch.stack([total, torch.full_like(total, count)])  # torch.tensor([...]) would wait for the device


def ratio(sums: Tensor) -> float:
    """The value of the sums (total, count); NaN when nothing was counted."""
    total, count = sums.tolist()
    return total / count if count else math.nan


def check_tensors(outputs: Any, targets: Any) -> None:
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        kinds = f"{type(outputs).__name__} and {type(targets).__name__}"
        what = f"a named metric needs outputs and targets that are tensors; they are {kinds}."
        fix = "give the metric as a function f(outputs, targets), or metrics=None"
        raise DataError(what, where="metrics", fix=fix)


def shapes(outputs: Tensor, targets: Tensor) -> str:
    """Where a metric found what it cannot count."""
    return f"metrics; outputs {tuple(outputs.shape)}, targets {tuple(targets.shape)}"


def _moved(sums: Tensor, device: torch.device) -> Tensor:
    if sums.is_floating_point():
        sums = sums.to(widest_float(device))  # before the move: mps cannot take a float64
    return sums.to(device)


class Mean:
    """The weighted mean of a stream of scalars, summed on their device in float64; on the host as numbers of Python's.

    On an accelerator an update with a number as the weight is one addition; nothing waits until ``compute``.

    >>> mean = Mean()
    >>> mean.update(torch.tensor(1.0), 3)
    >>> mean.update(torch.tensor(5.0), 1)
    >>> mean.compute()
    2.0
    """

    def __init__(self) -> None:
        self._total: float | Tensor = 0.0  # a number for as long as the values lie on the host
        self._weight: float | Tensor = 0.0  # a number for as long as the weights are numbers: exact, and free

    def update(self, value: Tensor, weight: float | Tensor = 1) -> None:
        """Counts ``value`` (a scalar tensor) ``weight`` times.

        A weight of 0 adds nothing, whatever the value: the mean over a batch that is all masked is NaN, and
        says nothing about the others.
        """
        if value.is_cpu:
            if weight:
                self._total = self._total + value.item() * float(weight)  # a float32 would stop counting at 2**24
                self._weight = self._weight + float(weight)
            return
        value = value.detach()
        if not isinstance(self._total, Tensor) or self._total.device != value.device:
            self._total = torch.full((), float(self._total), dtype=widest_float(value.device), device=value.device)
        if isinstance(weight, Tensor):
            weight = weight.detach().to(self._total)
            self._total.addcmul_(torch.where(weight == 0, 0, value), weight)  # 0 * nan would be nan
            self._weight = weight + self._weight
        elif weight:
            self._total.add_(value, alpha=float(weight))
            self._weight = self._weight + float(weight)

    def together(self) -> Mean:
        """The mean of what all processes have counted; in a world of one, this."""
        if world().size == 1:
            return self
        whole = Mean()
        for total, weight in gather((float(self._total), float(self._weight))):  # in one order, for one sum
            whole._total, whole._weight = whole._total + total, whole._weight + weight
        return whole

    def compute(self) -> float:
        """The mean so far; NaN when nothing has been counted. Waits for the device."""
        weight = float(self._weight)
        return float(self._total) / weight if weight else math.nan

    def reset(self) -> None:
        self._total = self._weight = 0.0

    def state_dict(self) -> dict[str, Any]:
        total = self._total.clone() if isinstance(self._total, Tensor) else self._total
        return {"total": total, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        total, self._weight = state["total"], state["weight"]
        self._total = total.clone() if isinstance(total, Tensor) and not total.is_cpu else float(total)


class Stream:
    """The running state of several metrics on one side (train or val).

    metrics: as ``resolve`` gives them. Each torchmetrics metric is copied, so that train and val do not share
    a state; the copy goes to the device of the outputs on first use. What metrics with the same ``sums``
    (precision, recall and f1, say) count in a batch is counted once.

    >>> from epochal.metrics.named import resolve
    >>> stream = Stream(resolve(["accuracy"], loss="cross_entropy"))
    >>> stream.update(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    >>> stream.compute()
    {'accuracy': 0.5}
    """

    def __init__(self, metrics: Sequence[Metric | Foreign]) -> None:
        self._metrics = [metric if isinstance(metric, Metric) else _copied(metric) for metric in metrics]
        self._own = [metric for metric in self._metrics if isinstance(metric, Metric)]
        self._foreign = {", ".join(one.keys): one for one in self._metrics if isinstance(one, Foreign)}
        self._sums: dict[str, Tensor] = {}  # of each of our own metrics
        self._is_empty = True
        self._device: torch.device | None = None

    def update(self, outputs: Any, targets: Any) -> None:
        """Counts one batch: what the model gave and what it should have given, detached, on one device."""
        if self._metrics:
            self._count(outputs, targets)

    @torch.no_grad()
    def _count(self, outputs: Any, targets: Any) -> None:
        tensor = first_tensor((outputs, targets))
        if tensor is not None and tensor.device != self._device:
            self._move(tensor.device)
        counted: dict[int, Tensor] = {}  # by the identity of `sums`, which need not be hashable
        for metric in self._own:
            if id(metric.sums) not in counted:
                counted[id(metric.sums)] = metric.sums(outputs, targets)
            new, old = counted[id(metric.sums)], self._sums.get(metric.name)
            self._sums[metric.name] = new if old is None else _merged(metric, old, new)
        for foreign in self._foreign.values():
            foreign.metric.update(outputs, targets)
        self._is_empty = False

    def _move(self, device: torch.device) -> None:
        self._sums = {name: _moved(sums, device) for name, sums in self._sums.items()}
        for foreign in self._foreign.values():
            foreign.metric.to(device)
        self._device = device

    @torch.no_grad()
    def compute(self) -> dict[str, float | list]:
        """Name -> value; a value that is not a scalar is a (nested) list. All NaN before the first update."""
        if self._is_empty:  # torchmetrics would warn
            return dict.fromkeys(names_of(self._metrics), math.nan)
        row: dict[str, float | list] = {}
        for metric in self._metrics:
            if isinstance(metric, Metric):
                row[metric.name] = _plain(metric.value(self._sums[metric.name].cpu()))
                continue
            value = metric.metric.compute()
            for key, part in _flat(metric.name if isinstance(value, Mapping) else metric.label, value):
                row[key if key not in row else f"{metric.label}_{key}"] = _plain(part)
        return row

    def together(self) -> Stream:
        """A stream that has counted what those of all processes have; in a world of one, this."""
        if world().size == 1 or not self._metrics:
            return self
        own = None if self._is_empty else {name: sums.cpu() for name, sums in self._sums.items()}
        counted = [told for told in gather((own, self._foreign)) if told[0] is not None]
        whole = Stream(self._metrics)
        whole._is_empty = not counted
        for sums, foreign in counted:
            for metric in self._own:
                old = whole._sums.get(metric.name)
                new = sums[metric.name]
                whole._sums[metric.name] = new if old is None else _merged(metric, old, new)
            for name, one in foreign.items():
                _take_in(whole._foreign[name].metric, one.metric)
        return whole

    def reset(self) -> None:
        self._sums.clear()
        self._is_empty = True
        for foreign in self._foreign.values():
            foreign.metric.reset()

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, lists and dicts. Later updates do not change it (merging makes new sums)."""
        foreign = {} if self._is_empty else self._foreign
        states = {name: _foreign_state(one.metric) for name, one in foreign.items()}
        return {"sums": dict(self._sums), "foreign": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a ``state_dict``.

        Raises CheckpointError where it counted other metrics than this stream does, as their values would
        cover only a part of the epoch. (A state before the first update fits any stream.)
        """
        self.reset()
        saved, mine = {*state["sums"], *state["foreign"]}, {*(metric.name for metric in self._own), *self._foreign}
        if not saved:
            return
        if saved != mine:
            counted, here = ", ".join(sorted(saved)), ", ".join(sorted(mine)) or "none"
            what = f"the checkpoint lies inside an epoch that counts the metrics {counted}; this run has {here}."
            fix = "resume with the same metrics, and change them at the end of an epoch"
            raise CheckpointError(what, where="metrics", fix=fix)
        self._sums = dict(state["sums"])
        for name, foreign in self._foreign.items():
            _load_foreign(foreign.metric, state["foreign"][name])
        self._is_empty = False
        self._device = None  # what was loaded may lie elsewhere: the next update moves it


def _copied(foreign: Foreign) -> Foreign:
    module = copy.deepcopy(foreign.metric)
    module.reset()  # the user may have tried it out
    for part in module.modules():
        if hasattr(part, "sync_on_compute"):
            part.sync_on_compute = False  # several processes put together what they have in ``Stream.together``
    return Foreign(module, foreign.name)


def _merged(metric: Metric, old: Tensor, new: Tensor) -> Tensor:
    if old.shape != new.shape:  # would broadcast, or fail with a message of torch's
        what = f"the sums of the metric {metric.name!r} changed shape from {tuple(old.shape)} to {tuple(new.shape)}."
        fix = "give the outputs of every batch the same number of classes or columns"
        raise DataError(what, where="metrics", fix=fix)
    return metric.merge(old, new)


def _take_in(metric: Any, other: Any) -> None:
    """Adds what another process's torchmetrics metric, or collection of them, has counted."""
    if isinstance(metric, nn.ModuleDict):
        for name in metric:
            _take_in(metric[name], other[name])
        return
    try:
        if metric._update_count == 0:
            _load_foreign(metric, _foreign_state(other))
        else:
            metric.merge_state(other)
    except (AttributeError, RuntimeError, ValueError, TypeError) as error:
        what = f"what several processes count of {type(metric).__name__} cannot be put together: {error}"
        fix = "use a metric with full_state_update=False, or count it after the training: result.evaluate"
        raise DataError(what, where="metrics", fix=fix) from error


def _flat(name: str | None, value: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(str(name), value)]
    return [pair for key in value for pair in _flat(f"{name}_{key}" if name else str(key), value[key])]


def _plain(value: Any) -> float | list:
    if isinstance(value, (list, tuple)):
        return [part if isinstance(part, int) else _plain(part) for part in value]
    return value.tolist() if isinstance(value, Tensor) and value.ndim else float(value)


def _foreign_state(metric: nn.Module) -> dict[str, dict[str, Any]]:
    """What a torchmetrics metric and those inside it have counted: path -> attribute -> value.

    Their own ``state_dict`` leaves out the number of updates, the place in the window of ``Running``, the
    extremes of ``MinMaxMetric``; so this takes whatever attribute is a tensor, a list of tensors, or an int.
    """
    return {
        path: {name: _snapshot(value) for name, value in vars(part).items() if _is_state(value)}
        for path, part in metric.named_modules()
    }


def _is_state(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return type(value) is int or all(isinstance(part, Tensor) for part in parts)


def _snapshot(value: Tensor | list[Tensor] | int) -> Tensor | list[Tensor] | int:
    if isinstance(value, list):
        return list(value)  # it only ever grows at its end, so its tensors need no copy
    return value.clone() if isinstance(value, Tensor) else value


def _load_foreign(metric: nn.Module, state: dict[str, dict[str, Any]]) -> None:
    for path, part in metric.named_modules():
        for name, value in state[path].items():
            setattr(part, name, _snapshot(value))
