"""A batch: what of it goes into the model, what into the loss, and how many samples it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

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
    if isinstance(batch, list | tuple) and not isinstance(batch, PackedSequence):
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
    if isinstance(batch, list | tuple) and not isinstance(batch, PackedSequence):
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
        return part.shape[0] if part.dim() else None
    if isinstance(part, PackedSequence):
        return int(part.batch_sizes[0])
    if isinstance(part, Mapping | list | tuple):
        return size(part) if part else None
    return len(part) if hasattr(part, "__len__") and not isinstance(part, str) else None
