"""A batch: what of it goes into the model, what into the loss, and how many samples it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_LISTS = (list, tuple)  # `list | tuple` is made anew at every call
TARGET_KEYS = ("target", "targets", "label", "labels", "y")


def split(batch: Any, target: Sequence[str] = ()) -> tuple[tuple, dict[str, Any], Any]:
    """The positional and the named inputs of the model, and the targets (None where there are none).

    A tuple or list ``(a, b, ..., y)`` calls ``model(a, b, ...)`` and compares with ``y``. A dict calls
    ``model(**inputs)`` with all entries but the targets (``target``, or the first key that is among
    ``target targets label labels y``); one single input is given by position. Anything else is the
    one input of the model.

    >>> split({"x": 1, "y": 2})
    ((1,), {}, 2)
    >>> split((1, 2, 3))
    ((1, 2), {}, 3)
    """
    if isinstance(batch, _LISTS) and not isinstance(batch, PackedSequence):
        return (tuple(batch[:-1]), {}, batch[-1]) if len(batch) > 1 else (tuple(batch), {}, None)
    if isinstance(batch, Mapping):
        return _split_mapping(batch, target)
    return (batch,), {}, None


def _split_mapping(batch: Mapping, target: Sequence[str]) -> tuple[tuple, dict[str, Any], Any]:
    keys = list(target) or [key for key in TARGET_KEYS if key in batch][:1]
    inputs = {key: value for key, value in batch.items() if key not in keys}
    targets = batch[keys[0]] if len(keys) == 1 else {key: batch[key] for key in keys} or None
    if len(inputs) == 1:
        return tuple(inputs.values()), {}, targets
    return (), inputs, targets


def size(batch: Any, target: Sequence[str] = ()) -> int:
    """How many samples the batch has: the first dimension of the targets, or of the first input.

    Targets first, because inputs may be laid out (time, batch, ...).

    >>> import torch
    >>> size((torch.zeros(7, 3, 2), torch.zeros(3)))
    3
    """
    if isinstance(batch, _LISTS) and not isinstance(batch, PackedSequence):
        for part in reversed(batch):
            if (found := _length(part)) is not None:
                return found
        return 1
    if isinstance(batch, Mapping):
        keys = [key for key in (*target, *TARGET_KEYS) if key in batch] + list(batch)
        return next((found for key in keys if (found := _length(batch[key])) is not None), 1)
    found = _length(batch)
    return 1 if found is None else found


def _length(part: Any) -> int | None:
    if isinstance(part, Tensor):
        return part.size(0) if part.dim() else None
    if isinstance(part, PackedSequence):
        return int(part.batch_sizes[0])
    if isinstance(part, Mapping | list | tuple):
        return size(part) if part else None
    return len(part) if hasattr(part, "__len__") and not isinstance(part, str) else None


def pieces(batch: Any, limit: int, target: Sequence[str] = (), *, no_lone: bool = False) -> list[Any] | None:
    """The batch as batches of at most ``limit`` samples, in order; None where it cannot be cut.

    Tensors, arrays and lists are cut where their first dimension is that of the batch; numbers, strings and None
    go into every piece. A packed sequence, a graph batch or a part of another length cannot be cut. The pieces
    share their memory with the batch. no_lone: a last piece of one sample gets one of the piece before, if it can.

    >>> import torch
    >>> [size(piece) for piece in pieces((torch.zeros(7, 3), torch.zeros(7)), 3)]
    [3, 3, 1]
    >>> pieces({"x": torch.zeros(4, 2), "names": ["a", "b", "c", "d"]}, 2)[1]["names"]
    ['c', 'd']
    >>> pieces((torch.zeros(5, 2), torch.zeros(2)), 1)
    """
    count = size(batch, target)
    if count <= limit:
        return [batch]
    edges = [*range(0, count, limit), count]
    if no_lone and count % limit == 1 and limit > 2:
        edges[-2] -= 1
    parts = [_rows(batch, slice(*ends), count) for ends in pairwise(edges)]
    return None if any(part is _WHOLE for part in parts) else parts


def rows(batch: Any, wanted: slice, target: Sequence[str] = ()) -> Any | None:
    """The batch of these rows, which share their memory with it; None where it cannot be cut (see :func:`pieces`)."""
    found = _rows(batch, wanted, size(batch, target))
    return None if found is _WHOLE else found


_WHOLE = object()  # what cannot be cut


def _rows(part: Any, rows: slice, count: int) -> Any:
    """These rows of one part of a batch of ``count`` samples; ``_WHOLE`` if it, or something in it, has none."""
    if part is None or isinstance(part, int | float | str):
        return part
    if isinstance(part, Mapping):
        cut = {key: _rows(value, rows, count) for key, value in part.items()}
        return _WHOLE if any(value is _WHOLE for value in cut.values()) else cut
    if isinstance(part, list | tuple) and not isinstance(part, PackedSequence) and not _one_a_sample(part, count):
        values = [_rows(value, rows, count) for value in part]
        if any(value is _WHOLE for value in values):
            return _WHOLE
        return type(part)(*values) if hasattr(part, "_fields") else type(part)(values)
    if isinstance(part, list | tuple) and not hasattr(part, "_fields"):
        return part[rows]
    shape = getattr(part, "shape", None)  # of a tensor or an array
    return part[rows] if shape and shape[0] == count else _WHOLE


def _one_a_sample(part: Sequence, count: int) -> bool:
    """Whether it is a list with an entry for each sample, and not a structure of parts that have them all."""
    return len(part) == count and not any(_length(value) == count for value in part)


def detached(value: Any) -> Any:
    """The tensors of a structure without the graph that they were computed in."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: detached(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(detached(part) for part in value)
    return value
