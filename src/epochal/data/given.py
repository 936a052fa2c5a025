"""A DataLoader as it is, and how a resumed run finds its place in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)
from torch.utils.data._utils.fetch import _MapDatasetFetcher
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

from epochal.data.loader import READ_FORWARD, RUNS_ON, ended_early
from epochal.data.workers import end_workers, watched
from epochal.protocols import Stateful
from epochal.runtime import seeding

GRACE = 2  # times the user's timeout, for torch's own to come first
_NOT_IN_WORKERS = "the loader keeps its place itself: a resumed run repeats the order, not what is drawn in its workers"
_NOT_A_STREAM = (
    "the loader keeps its place in a stream itself: a resumed run goes on where the loader says, which may be off"
)
_STREAM_RUNS_ON = (
    "a stream in workers that persist runs on: a resumed run may miss samples of it, and repeats no random numbers"
)
_NOT_LATER = "is not torch's own: a resumed run repeats what it draws when an epoch begins, which may not be all"


class _Rows:
    """In the place of what fetches the samples of a batch: all of them by one index operation."""

    def __init__(self, tensors: Sequence[Tensor], fetcher: Any):
        self.tensors, self._fetcher = tensors, fetcher

    def fetch(self, index: Sequence[int]) -> list[Tensor]:
        kinds = set(map(type, index))
        if bool in kinds or not all(issubclass(kind, int | np.integer) for kind in kinds):
            return self._fetcher.fetch(index)  # a slice, say: a sampler may give anything that the data set takes
        rows = torch.tensor(index, dtype=torch.int64)
        # A sampler may give negative indices, which count from the end; samples are stacked into a contiguous batch.
        return [tensor[rows].contiguous() for tensor in self.tensors]


def fetch_at_once(batches: Any, loader: DataLoader) -> None:
    """Lets torch's iterator over a TensorDataset make a whole batch instead of its samples, one after the other.

    Everything else is torch's still: the order, what is drawn from which generator, and when. The batches are the same
    lists of tensors. Where anything about it is somebody else's, it is left as it is.
    """
    dataset = loader.dataset
    is_plain = type(batches) is _SingleProcessDataLoaderIter and type(batches._dataset_fetcher) is _MapDatasetFetcher
    if not is_plain or type(dataset) is not TensorDataset or loader.collate_fn is not default_collate:
        return
    if loader.batch_size is None and type(loader.batch_sampler) is not BatchSampler:
        return  # it may give anything
    if all(type(one) is Tensor and one.layout is torch.strided and not one.requires_grad for one in dataset.tensors):
        batches._dataset_fetcher = _Rows(dataset.tensors, batches._dataset_fetcher)


class GivenLoader:
    """A DataLoader taken as it is: its batches, its order, its collate function, its workers.

    Its state holds the random generators as they stood when the epoch in hand began: a resumed run makes the order
    of the epoch anew from them, goes to its place, and puts the generators back to where they were there. Without
    workers only indices are drawn on the way. With workers the batches are loaded once more, because what is drawn
    in a worker depends on all that it did before. A loader with ``state_dict`` is asked for its place, as is an
    iterable data set that is read without workers.
    """

    def __init__(self, loader: DataLoader):
        self.loader = loader
        asks_data = self._is_stream and isinstance(loader.dataset, Stateful) and loader.num_workers == 0
        self._asked: Any = loader if isinstance(loader, Stateful) else loader.dataset if asks_data else None
        self.is_lost = False  # with a worker: what is asked may have read on, and does not know where the training is
        self._is_read = False  # a loader that was never read has no place yet, and finding one may draw
        self._is_read_out = False  # the epoch in hand, though the run may still have to close it
        self._was_put = False  # what is asked was put to its place, and was not read since
        self._reading: Any = None  # torch's iterator over the epoch in hand
        self._began: dict[str, Any] | None = None
        self._loaded: dict[str, Any] = {}  # what the next epoch starts from

    @property
    def samples(self) -> int | None:
        if self._is_stream or self.loader.batch_size is None:
            return None
        try:
            count = len(self.loader.sampler)  # type: ignore[arg-type]
        except TypeError:
            return None
        return count - count % self.loader.batch_size if self.loader.drop_last else count

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """One pass, as a plain ``for`` would make it; a sampler with ``set_epoch`` is told the epoch.

        start: how many batches of this epoch were consumed before. Raises WorkerError if a worker dies or hangs.
        """
        for sampler in self._samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        count = yield from self._from(start)
        self._began = self._reading = None
        self._is_read_out = True
        # Only torch's own parts are sure to have the length that they tell.
        plain = type(self.loader).__iter__ is DataLoader.__iter__ and type(self.loader.batch_sampler) is BatchSampler
        sized = plain and type(self.loader.sampler) in (SequentialSampler, RandomSampler) and self.samples is not None
        if sized and count < len(self.loader):
            raise ended_early(f"batch {count} of {len(self.loader)} of the DataLoader")

    def state_dict(self) -> dict[str, Any]:
        """The generators as they are, and as they were when the epoch in hand began (None between two epochs)."""
        place = self._loaded.get("place")
        if not self._loaded and self._asked is not None and (self._is_read or self._asked is not self.loader):
            place = self._asked.state_dict()
        return {
            "began": self._began,
            "own": seeding.own_states(self.loader),
            "made": self._is_made,
            "place": place,
            "is_over": self._is_over,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what :meth:`state_dict` gave; the next :meth:`batches` goes on from there."""
        seeding.set_own_states(self.loader, state["own"])
        self._loaded, self._began = state, state["began"]

    def close(self) -> None:
        """Ends the workers of a pass that was not read to its end; those that persist are the user's, and stay."""
        if not self.loader.persistent_workers:
            end_workers(self._reading)

    @property
    def exactness(self) -> str | None:
        """What a resumed run cannot repeat exactly, in a sentence; None where it repeats everything."""
        if self._asked is self.loader and self._is_stream:
            return _NOT_A_STREAM
        if self._asked is not None:
            return _NOT_IN_WORKERS if self.loader.num_workers else None
        if self.loader.num_workers and self.loader.persistent_workers:
            return _STREAM_RUNS_ON if self._is_stream else RUNS_ON
        if self.loader.num_workers and not getattr(self.loader, "in_order", True):
            return "batches come as they are ready (in_order=False): no two runs have the same order"
        if self._is_stream:
            return READ_FORWARD
        parts = [one for one in self._samplers if not isinstance(one, Sequence)]
        foreign = [type(one) for one in parts if not type(one).__module__.startswith("torch.utils.data")]
        if type(self.loader).__iter__ is not DataLoader.__iter__:
            foreign.append(type(self.loader))
        return f"{foreign[0].__name__} {_NOT_LATER}" if foreign else None

    @property
    def _is_stream(self) -> bool:
        return isinstance(self.loader.dataset, IterableDataset)

    @property
    def _samplers(self) -> list[Any]:
        batch_sampler = self.loader.batch_sampler
        every = (self.loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
        return list({id(one): one for one in every if one is not None}.values())

    @property
    def _is_made(self) -> bool:
        """Whether the workers that persist were started, and their seed was drawn, here or before the restart."""
        return self._loaded.get("made", False) or getattr(self.loader, "_iterator", None) is not None

    @property
    def _is_over(self) -> bool:
        """Whether nothing is left of the epoch: what is asked has seen its end, and would begin another one."""
        fetcher = getattr(self._reading, "_dataset_fetcher", None)  # a stream's, whose last batch was a smaller one
        return self._loaded.get("is_over", False) or self._is_read_out or getattr(fetcher, "ended", False)

    def _generators(self) -> dict[str, Any]:
        every, own = seeding.generator_states(), seeding.own_states(self.loader)
        return {"global": every, "own": own, "made": self._is_made}

    def _put(self, states: dict[str, Any]) -> None:
        seeding.set_generator_states(states["global"])
        seeding.set_own_states(self.loader, states["own"])

    def _from(self, start: int) -> Any:
        """The batches from ``start`` on; what is drawn on the way there is drawn as it was the first time."""
        now, loaded = self._generators(), self._loaded
        # An epoch that has begun and has no update yet, as a worker was lost, is begun once more.
        began = self._began = loaded.get("began") or now
        self._loaded, self._is_read, self._is_read_out, place = {}, True, False, loaded.get("place")
        if place is not None:
            self._asked.load_state_dict(place)
            self._was_put = True

        def take_up() -> None:
            """Lets a loader that stands at the end of an epoch find that out, and draw what it wants for that."""
            if place is not None and self._asked is not self.loader.dataset:
                self._asked.state_dict()
                self._put(now)

        if place is not None and start and loaded["is_over"]:
            return watched(lambda: take_up() or iter(()), self.loader, start, timeout=GRACE * self.loader.timeout)
        was_put, self._was_put = self._was_put, False
        if began is not now:
            self._put(began)
        if began["made"] and place is None and self.loader.persistent_workers and self.loader._iterator is None:
            iter(self.loader)  # starts the workers and draws their seed, as the run did in its first epoch
            self._put(began)

        def make() -> Iterator[Any]:
            if not start:
                take_up()
            self._reading = iter(self.loader)
            fetch_at_once(self._reading, self.loader)
            return self._reading

        def lose(number: int) -> None:
            self.is_lost = self._asked is not None
            if number == start:
                self._put(now)
                self._loaded, self._began = loaded | ({"made": True} if now["made"] else {}), loaded.get("began")

        def anew() -> Iterator[Any]:
            self._put(now)
            return make()

        def skip(batches: Any) -> int:
            """Draws the indices, where that is enough; else the batches have to be loaded."""
            draw = getattr(batches, "_next_index", None)  # torch's own, and private
            if place is not None or draw is None or self.loader.num_workers or self._is_stream:
                return start if place is None else 0
            with suppress(StopIteration):
                for _ in range(start):
                    draw()
            return 0

        return watched(
            make, self.loader, start, timeout=GRACE * self.loader.timeout, skip=skip,
            in_place=(lambda: self._put(now)) if start else None, lose=lose,
            anew=anew if was_put and not start else None,
        )  # fmt: skip
