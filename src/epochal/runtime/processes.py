"""Several processes as one group: how they meet, and what they tell each other beside the gradients.

All of it is torch.distributed's. In a world of one every function here does what it says without it.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import zip_longest
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from epochal.errors import EpochalError, ProcessError
from epochal.runtime.world import World, announced, meeting_place

T = TypeVar("T")
_is_ours = False  # the group, which was made here


def world() -> World:
    """The world as torch.distributed has set it up; a world of one where it has not."""
    if dist.is_available() and dist.is_initialized():
        told = announced()
        return World(dist.get_rank(), dist.get_world_size(), told.local_rank, told.restarts)
    return World()


def join(device: torch.device, timeout: timedelta) -> World:
    """Makes this process one of the group that its environment tells of, if it is not yet.

    timeout: how long the others are waited for before the group counts as broken; of a group that a user's own program
    has made, that program has said it.
    """
    global _is_ours
    if dist.is_initialized():
        if _is_ours:
            dist.distributed_c10d._set_pg_timeout(timeout)
            dist.distributed_c10d._get_default_store().set_timeout(timeout)
        return world()
    if announced().size > 1:
        place = meeting_place()
        before = {name: os.environ.get(name) for name in place}
        os.environ.update(place)  # for env://, which reads them there
        try:
            dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", timeout=timeout)
            atexit.register(leave)
            _is_ours = True
        except dist.DistError as error:
            told = announced()
            what = f"not all of the {told.size} processes came within {timeout.total_seconds():g} s."
            fix = "call fit in every process, and not only in the first"
            raise ProcessError(
                what, where=f"rank {told.rank}; {str(error).partition('. ')[0]:.100}", fix=fix
            ) from error
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
    return world()


def leave() -> None:
    """Ends the group for this process.

    torch keeps gloo's threads even so, wherever there was a DDP. One that is about to let go of a tensor while Python
    ends would abort the process, so they get a moment for what was sent last.
    """
    time.sleep(0.05)
    if dist.is_initialized():
        dist.destroy_process_group()


class Group:
    """Processes that act together. One that has a way of its own to talk can be used beside the training."""

    def __init__(self, handle: Any = None):
        self._handle, self.rank, self.size = handle, world().rank, world().size
        self.is_first = self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, by rank. A small value: it is pickled, between processes that trust each other."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._handle)
        return values

    def to_first(self, value: Any) -> list[Any]:
        """As :meth:`gather`, for the first process alone: the others get a list of their own value."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.is_first else [value]
        dist.gather_object(value, values if self.is_first else None, group=self._handle)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives, called by the first process alone; its error is every process's."""
        if self.size == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = portable(error)
        dist.broadcast_object_list(outcome, group=self._handle)
        if outcome[1] is not None:
            raise _shared(outcome[1])
        return outcome[0]

    def together(self, make: Callable[[], T]) -> T:
        """What ``make`` gives in this process; the first error of any of them is every process's."""
        if self.size == 1:
            return make()
        value: Any = None
        error = None
        try:
            value = make()
        except Exception as caught:
            error = portable(caught)
        errors = self.gather(error)
        if failed := [rank for rank, wrong in enumerate(errors) if wrong is not None]:
            raised = error if failed[0] == self.rank else errors[failed[0]]
            raise _shared(raised, failed[0] if len(failed) < self.size else None)
        return value


def _shared(error: Any, rank: int | None = None) -> Exception:
    """The error, marked with where it comes from; one of epochal's also as every process's, so that it is told once."""
    error.rank = rank
    if isinstance(error, EpochalError):
        error.is_shared = True
    return error


def portable(error: Exception) -> Exception:
    """The error as it can be sent to another process."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def aside(patience: timedelta) -> Group:
    """All processes, talking beside the training: for a thread that writes while the next steps are done."""
    if world().size == 1:
        return Group()
    return Group(dist.new_group(backend="gloo", timeout=patience))


def gather(value: Any) -> list[Any]:
    """As :meth:`Group.gather`, of all processes."""
    return Group().gather(value)


def to_first(value: Any) -> list[Any]:
    """As :meth:`Group.to_first`, of all processes."""
    return Group().to_first(value)


def unlike(values: list[Any]) -> list[tuple[int, Any, Any] | None]:
    """Of each process, by rank, the first place at which its list is not the first one's: the place, and what stands
    there in both; None if it is the same. Nobody gets everybody's list.
    """
    pairs = enumerate(zip_longest(first(lambda: values), values))
    return gather(next(((place, *pair) for place, pair in pairs if pair[0] != pair[1]), None))


def are_alike(numbers: Tensor) -> bool:
    """Whether all processes have the same numbers (int64, on the host): one exchange, whatever they are."""
    extremes = torch.cat([numbers, ~numbers])  # the least of all, and the least of what turns the largest into that
    if world().size > 1:
        dist.all_reduce(extremes, dist.ReduceOp.MIN)
    least, largest = extremes.chunk(2)
    return torch.equal(least, ~largest)


def of_first(*numbers: float) -> list[float]:
    """The first process's numbers; quicker than :func:`first`."""
    told = torch.tensor(numbers, dtype=torch.float64)
    if world().size > 1:
        dist.broadcast(told, 0)
    return told.tolist()


def first(make: Callable[[], T]) -> T:
    """As :meth:`Group.first`, of all processes."""
    return Group().first(make)


def together(make: Callable[[], T]) -> T:
    """As :meth:`Group.together`, of all processes."""
    return Group().together(make)


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world().size > 1:
        dist.all_reduce(tensor)
    return tensor


def copy_from_first(tensors: list[Tensor]) -> None:
    """Makes the tensors those of the first process, in place; together, for each exchange costs."""
    for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors):  # in one order in all processes
        alike = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind]
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        dist.broadcast(flat.view(torch.uint8), 0)  # gloo does not know every type
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike])):
            tensor.copy_(part.view_as(tensor))
