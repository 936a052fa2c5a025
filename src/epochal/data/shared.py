"""A DataLoader of several processes: each reads its share of every batch, and all have the same order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from epochal.data.given import GivenLoader
from epochal.data.share import Part, Share, of_stream, rows_of
from epochal.errors import PlanError
from epochal.runtime import processes, seeding
from epochal.runtime.seeding import Alike


class SharedLoader:
    """A DataLoader as it is, of which each of several processes has its share.

    Of a map-style data set each process loads the samples of its share alone. Of anything else (a stream, a loader with
    a way of its own) each reads whole batches and cuts its share out of them, unless the stream itself gives each
    process something else; then all of that counts, and the processes go on until the last one has nothing left.

    alike: what the order is drawn from. What is drawn while a sample is made is each process's own.
    """

    def __init__(self, loader: DataLoader, part: Part, alike: Alike, target: Sequence[str] = ()):
        _refuse_padding(loader)
        self.loader, self.part, self.alike, self.target = loader, part, alike, target
        seeding.set_own_states(loader, processes.first(lambda: seeding.own_states(loader)))
        plain = type(loader).__iter__ is DataLoader.__iter__ and getattr(loader, "in_order", True)
        by_index = plain and loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset)
        self._parts = _Parts(loader.batch_sampler, part) if by_index else None
        self._given = GivenLoader(loader if self._parts is None else _with(loader, self._parts, alike))

    @property
    def samples(self) -> int | None:
        return GivenLoader(self.loader).samples

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def is_lost(self) -> bool:
        return self._given.is_lost

    @property
    def exactness(self) -> str | None:
        return GivenLoader(self.loader).exactness

    def close(self) -> None:
        self._given.close()

    def batches(self, epoch: int, start: int = 0) -> Iterator[Share]:
        """The shares of the batches of an epoch, from batch ``start`` on."""
        # What makes the samples may have drawn from them, more in one process than in another.
        self.alike.states, own = processes.first(lambda: (self.alike.states, self._of_the_order()))
        seeding.set_own_states(self.loader, own)
        batches = self._given.batches(epoch, start)
        if self._parts is not None:
            number = start
            while (batch := self._next(batches)) is not None:
                yield Share(batch, *self._parts.shares.pop(number))
                number += 1
            return
        anew = partial(self._given.batches, epoch)
        yield from of_stream(self._alike(batches), self.part, self.target, lambda: self._alike(anew()))

    def _alike(self, batches: Iterator[Any]) -> Iterator[Any]:
        while (batch := self._next(batches)) is not None:
            yield batch

    def _of_the_order(self) -> dict[str, Any]:
        """The generators of the loader's own that its order is drawn from, and not those of its data set."""
        own = seeding.own_states(self.loader)
        return {place: state for place, state in own.items() if not place.startswith((".dataset", ".collate_fn"))}

    def _next(self, batches: Iterator[Any]) -> Any:
        with self.alike.inside():
            return next(batches, None)

    def state_dict(self) -> dict[str, Any]:
        """As that of a loader of one process, from which any number can go on."""
        with self.alike.inside():
            given = self._given.state_dict()
        return {**given, "alike": self.alike.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alike.states = state.get("alike", self.alike.states)
        with self.alike.inside():
            self._given.load_state_dict(state)


class _Parts(Sampler):
    """The share of each batch of indices. shares: of a batch, by its number, how many count here, and in all."""

    def __init__(self, batch_sampler: Any, part: Part):
        self.batch_sampler, self.part = batch_sampler, part
        self.shares: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        self.shares.clear()
        for number, indices in enumerate(self.batch_sampler):
            wanted, counted = rows_of(self.part, len(indices))
            self.shares[number] = counted, len(indices)
            yield indices[wanted]


def _with(loader: DataLoader, parts: _Parts, alike: Alike) -> DataLoader:
    """The DataLoader with other batches of indices. What is drawn for a sample is drawn apart from the order."""
    other = copy.copy(loader)
    changes: dict[str, Any] = {"batch_sampler": parts, "_iterator": None}
    if loader.num_workers:
        changes["worker_init_fn"] = _Apart(parts.part.rank, loader.worker_init_fn)
    else:
        changes |= {"dataset": _Own(loader.dataset, alike), "collate_fn": alike.outside(loader.collate_fn)}
    vars(other).update(changes)  # it refuses to be changed by a plain assignment
    return other


class _Own:
    """A data set whose samples are made with the process's own random numbers."""

    def __init__(self, dataset: Any, alike: Alike):
        self.dataset = dataset
        self._get = alike.outside(dataset.__getitems__ if hasattr(dataset, "__getitems__") else self._one_by_one)

    def _one_by_one(self, indices: Sequence[Any]) -> list[Any]:
        return [self.dataset[index] for index in indices]

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        return self._get(indices)

    def __len__(self) -> int:
        return len(self.dataset)


class _Apart:
    """What a worker does first: its random numbers are not those of the same worker of another process."""

    def __init__(self, rank: int, then: Callable[[int], None] | None):
        self.rank, self.then = rank, then

    def __call__(self, worker: int) -> None:
        seeding.diverge(self.rank, torch.initial_seed())
        if self.then is not None:
            self.then(worker)


def _refuse_padding(loader: DataLoader) -> None:
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if type(sampler).__name__ == "DistributedSampler":
            what = "a DistributedSampler fills up the shares with samples that are there twice."
            fix = "give the DataLoader without it, with the batch_size of all processes together: each gets its share"
            raise PlanError(what, where="DataLoader(sampler=DistributedSampler(...))", fix=fix)
