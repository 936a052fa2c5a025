"""Several processes as one group: how they meet, and what they tell each other beside the gradients.

All of it is torch.distributed's. In a world of one every function here does what it says without it.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from epochal.errors import EpochalError
from epochal.runtime.world import World, announced, meeting_place

T = TypeVar("T")


def world() -> World:
    """The world as torch.distributed has set it up; a world of one where it has not."""
    if dist.is_available() and dist.is_initialized():
        told = announced()
        return World(dist.get_rank(), dist.get_world_size(), told.local_rank, told.restarts)
    return World()


def join(device: torch.device, timeout: timedelta) -> World:
    """Makes this process one of the group that its environment tells of, if it is not yet.

    timeout: how long the others are waited for before the group counts as broken.
    """
    if announced().size > 1 and not dist.is_initialized():
        place = meeting_place()
        before = {name: os.environ.get(name) for name in place}
        os.environ.update(place)  # for env://, which reads them there
        try:
            dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", timeout=timeout)
            atexit.register(leave)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
    return world()


def leave() -> None:
    """Ends the group for this process: its threads would abort a process that ends before them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """What each process gives, by rank. A small value: it is pickled between processes that trust each other."""
    if world().size == 1:
        return [value]
    values: list[Any] = [None] * world().size
    dist.all_gather_object(values, value)
    return values


def first(make: Callable[[], T]) -> T:
    """What ``make`` gives, called by the first process alone; its error is every process's."""
    if world().size == 1:
        return make()
    outcome: list[Any] = [None, None]
    if world().is_first:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise _shared(outcome[1])
    return outcome[0]


def together(make: Callable[[], T]) -> T:
    """What ``make`` gives in this process; the first error of any process is every process's."""
    value, error = None, None
    try:
        value = make()
    except Exception as caught:
        error = caught
    errors = gather(error)
    if found := [rank for rank, one in enumerate(errors) if one is not None]:
        raised = error if error is not None and found[0] == world().rank else errors[found[0]]
        raise _shared(raised, found[0] if len(found) < len(errors) else None)
    return value  # type: ignore[return-value]


def _shared(error: Exception, rank: int | None = None) -> Exception:
    """The error, marked as one that every process raises, so that it is told once."""
    if isinstance(error, EpochalError):
        error.is_shared, error.rank = True, rank
    return error


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world().size > 1:
        dist.all_reduce(tensor)
    return tensor


def copy_from_first(tensors: list[Tensor]) -> None:
    """Makes the tensors those of the first process, in place."""
    for tensor in tensors:
        dist.broadcast(tensor, 0)
