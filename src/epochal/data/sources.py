"""What a run can read, brought to one of three forms: arrays in memory, samples by index, or a stream."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from epochal.data import tables
from epochal.errors import DataError, PlanError


@dataclass(frozen=True)
class Arrays:
    """Arrays of one length, batched by one index operation. ``parts`` keeps the user's form: tuple, dict or tensor."""

    parts: Any
    encoding: Any = None  # how a table became these arrays

    def __len__(self) -> int:
        return self.tensors[0].size(0)

    @cached_property
    def tensors(self) -> list[Tensor]:
        if isinstance(self.parts, Tensor):
            return [self.parts]
        return list(self.parts.values() if isinstance(self.parts, dict) else self.parts)

    def take(self, index: Tensor) -> Any:
        """The batch of these rows: copies, so that a model that works in place cannot change the data."""
        rows = [part.index_select(0, index) for part in self.tensors]
        return tuple(rows) if type(self.parts) is tuple else _in_form_of(self.parts, rows)

    def between(self, start: int, stop: int) -> Any:
        """The batch of the rows from ``start`` to before ``stop``: copies too, and quicker than by an index."""
        count = min(stop, len(self)) - start
        rows = [_narrowed(part, start, count) for part in self.tensors]
        return tuple(rows) if type(self.parts) is tuple else _in_form_of(self.parts, rows)

    def to(self, device: torch.device) -> Arrays:
        return self.map(lambda part: part.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Arrays:
        return Arrays(_in_form_of(self.parts, [change(part) for part in self.tensors]), self.encoding)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors)


def _narrowed(part: Tensor, start: int, count: int) -> Tensor:
    if part.is_contiguous():  # else torch copies all of it first
        return part.narrow_copy(0, start, count)
    return part.narrow(0, start, count).clone(memory_format=torch.contiguous_format)


def _in_form_of(parts: Any, tensors: list[Tensor]) -> Any:
    """The tensors as a dict with the keys of ``parts``, as a tuple, or alone, as ``parts`` are."""
    if isinstance(parts, dict):
        return dict(zip(parts, tensors))
    return tuple(tensors) if isinstance(parts, tuple) else tensors[0]


@dataclass(frozen=True)
class Samples:
    """A map-style data set: samples by index, made into batches by a collate function."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, index: Sequence[int]) -> Any:
        if hasattr(self.dataset, "__getitems__"):
            return default_collate(self.dataset.__getitems__(list(index)))
        return default_collate([self.dataset[i] for i in index])


@dataclass(frozen=True)
class Stream:
    """An iterable data set: samples in the order in which they come."""

    dataset: Any

    def batches(self, batch_size: int) -> Iterator[Any]:
        samples = iter(self.dataset)
        while batch := list(islice(samples, batch_size)):
            yield default_collate(batch)


Source = Arrays | Samples | Stream


def open_source(data: Any, *, where: str, target: Sequence[str] = (), dtype: torch.dtype | None = None) -> Source:
    """Brings ``data`` to one of the three forms.

    data: a tuple, dict or single array (torch, numpy, anything with ``__array__``, lists of numbers), a
    table or a path with ``target``, a map-style or an iterable data set, or a list of samples.
    dtype: what floating point numpy arrays become (numpy's default is float64, torch's float32); torch
    tensors keep theirs.

    Raises DataError if there is nothing in it, if lengths differ, or if it cannot be read.
    """
    if isinstance(data, Arrays | Samples | Stream):
        return data
    if tables.is_table(data):
        frame = tables.read_table(data, where=where)
        return encoded(learned(frame, target, where=where), frame, where=where, dtype=dtype)
    if isinstance(data, str | bytes) or hasattr(data, "__fspath__"):
        return _from_npz(data, where=where, target=target, dtype=dtype)
    if isinstance(data, IterableDataset):
        return Stream(data)
    if type(data) is TensorDataset:
        return _not_empty(Arrays(tuple(tensor.detach() for tensor in data.tensors)), where)
    if isinstance(data, Dataset):
        return _samples(data, where)
    if hasattr(data, "__array__"):
        return _arrays(data, where=where, dtype=dtype)
    if isinstance(data, Mapping):
        return _arrays({str(key): value for key, value in data.items()}, where=where, dtype=dtype)
    if isinstance(data, list | tuple) and data and all(map(_is_column, data)):
        return _arrays(tuple(data), where=where, dtype=dtype)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _samples(data, where)
    if hasattr(data, "__iter__"):
        fix = "wrap it in a torch.utils.data.IterableDataset whose __iter__ starts anew, or give a list"
        raise DataError(f"a {type(data).__name__} can be read only once.", where=where, fix=fix)
    fix = "give a tuple of arrays (X, y), a dict of arrays, a table or path with target=, a Dataset or a DataLoader"
    raise DataError(f"{type(data).__name__} is not something to train on.", where=where, fix=fix)


def _is_column(value: Any) -> bool:
    """Whether a part of a tuple is an array, rather than one sample of a list of samples."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    return isinstance(value, list) or (hasattr(value, "__array__") and hasattr(value, "__len__"))


def _samples(data: Any, where: str) -> Samples:
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        what = f"the data set {type(data).__name__} needs __len__ and __getitem__."
        raise DataError(what, where=where, fix="define both, or derive from torch.utils.data.IterableDataset")
    return _not_empty(Samples(data), where)


def _not_empty(source: Any, where: str) -> Any:
    if len(source) == 0:
        raise DataError("there are no samples.", where=where, fix="give at least one sample")
    return source


def _arrays(data: Any, *, where: str, dtype: torch.dtype | None) -> Arrays:
    if isinstance(data, dict | tuple):
        keys = _not_empty(list(data) if isinstance(data, dict) else range(len(data)), where)
        named = {f"{where}[{key!r}]": data[key] for key in keys}
    else:
        named = {where: data}
    tensors = [as_tensor(part, where=name, dtype=dtype) for name, part in named.items()]
    if len({len(tensor) for tensor in tensors}) > 1:
        lengths = ", ".join(f"{name} has {len(tensor)}" for name, tensor in zip(named, tensors))
        fix = "give every array one entry for each sample"
        raise DataError("the arrays have different lengths.", where=lengths, fix=fix)
    return _not_empty(Arrays(_in_form_of(data, tensors)), where)


def as_tensor(value: Any, *, where: str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor over the same memory where that is possible; floating point numpy arrays get ``dtype``."""
    if isinstance(value, Tensor):
        tensor = value.detach()
    else:
        tensor = _from_numpy(np.asarray(value), where)
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
    if tensor.dim() == 0:
        fix = "give one entry for each sample"
        raise DataError("a single number is not an array of samples.", where=where, fix=fix)
    return tensor


def _from_numpy(array: np.ndarray, where: str) -> Tensor:
    if array.dtype.kind in "OSUMmV":
        fix = "turn it into numbers first (a table with target= does that for categories)"
        raise DataError(f"an array of {array.dtype} cannot be trained on.", where=where, fix=fix)
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    with warnings.catch_warnings():
        # A read-only array (a memory map, say) is only ever indexed, never written to.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def learned(frame: Any, target: Sequence[str], *, where: str, task: str = "auto") -> Any:
    """The transformation of a table for a user's own model, whose predictions are what the target's column holds:
    a quantity stays in its own unit.
    """
    from epochal.data.encoding import Encoding

    if not target:
        fix = 'say which, for example target="price"'
        raise PlanError("a table needs the name of its target column.", where=where, fix=fix)
    encoding = Encoding.learn(frame, list(target), task=task, where=where)
    if encoding.task == "classification":
        return encoding
    return replace(encoding, target_mean=(0.0,) * len(target), target_scale=(1.0,) * len(target))


def encoded(encoding: Any, table: Any, *, where: str, dtype: torch.dtype | None = None) -> Arrays:
    """A table as arrays (features, targets), by a transformation that was learned on the training table."""
    frame = tables.read_table(table, where=where)
    parts = (encoding.features(frame, where=where), encoding.targets(frame, where=where))
    return Arrays(tuple(as_tensor(part, where=where, dtype=dtype) for part in parts), encoding)


def _from_npz(path: Any, *, where: str, target: Sequence[str], dtype: torch.dtype | None) -> Arrays:
    if not str(path).endswith(".npz"):
        fix = "give a .csv, .parquet or .npz file"
        raise DataError(f"{str(path)!r} has no known kind of data.", where=where, fix=fix)
    try:
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}.", where=where, fix="write it with np.savez") from error
    if missing := [name for name in target if name not in arrays]:
        what, held = f"there is no array {missing[0]!r} in {str(path)!r}.", ", ".join(arrays)
        raise DataError(what, where=f"{where}; it holds {held}", fix="name one of these as target=")
    return _arrays(arrays, where=where, dtype=dtype)
