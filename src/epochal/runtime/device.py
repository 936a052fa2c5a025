"""Which device a run uses, and moving batches to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from epochal.errors import PlanError


def choose(device: str | torch.device, local_rank: int | None = None) -> torch.device:
    """The device to use: ``"auto"`` takes the accelerator if there is one, anything else is kept.

    local_rank: of several processes on this machine; each takes an accelerator of its own.

    >>> choose("cpu")
    device(type='cpu')
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return _own(found, local_rank) if found is not None else torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        where = f"device={device!r}; torch says: {str(error).strip().splitlines()[0]}"
        fix = 'use device="auto" or "cpu", or install a torch build for this device'
        raise PlanError(f"the device {device!r} cannot be used.", where=where, fix=fix) from error
    return _own(chosen, local_rank)


def _own(device: torch.device, local_rank: int | None) -> torch.device:
    if local_rank is None or device.type == "cpu" or device.index is not None:
        return device
    own = torch.device(device.type, local_rank % torch.accelerator.device_count())
    torch.accelerator.set_device_index(own.index)
    return own


def describe(device: torch.device) -> str:
    """The device in words, for the header."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' if threads != 1 else ''})"
    return str(device)


def set_threads(count: int) -> None:
    """How many threads torch's operations use on the host. Raises PlanError for far more than it has cores."""
    most = 4 * (os.cpu_count() or 1)
    if count > most:
        what = f"this machine has {os.cpu_count()} cores, and far fewer than {count}."
        raise PlanError(what, where=f"threads={count}", fix=f"give {most} at most; as many as there are cores is usual")
    torch.set_num_threads(count)


def to_channels_last(model: nn.Module) -> None:
    """Lays the weights of convolutions out with their channels last; what they compute is laid out so, too."""
    for weight in model.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def move(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on ``device``.

    Walks dicts, lists, tuples and named tuples; anything else with a ``to`` method (a packed sequence,
    a graph batch) is asked to move itself, and what cannot move stays. From pinned memory the copy does
    not wait.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=batch.is_pinned()) if batch.device != device else batch
    if hasattr(batch, "to") and callable(batch.to):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move(value, device) for value in batch)
    return batch


def moves(device: torch.device) -> bool:
    """Whether batches, which come from the host, have to be moved at all."""
    return device.type != "cpu"
