"""epochal's own loader: batches of an epoch, from any source but a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from epochal.data.order import AUGMENTATION, batch_indices, epoch_order
from epochal.data.share import ALL, Part, Share, of_stream, rows_of
from epochal.data.sources import Arrays, Samples, Source, Stream, open_source
from epochal.data.workers import end_workers, watched
from epochal.errors import DataError, PlanError
from epochal.protocols import Stateful
from epochal.runtime.seeding import derive, generators_in, own_states, seeded, set_own_states

TIMEOUT = 600.0  # seconds: longer than a slow disk takes for a batch, shorter than a night


class Loader:
    """epochal's own loader: the batches of an epoch are a function of (seed, epoch).

    data: whatever ``fit`` accepts but a DataLoader. seed: for the order and for the random numbers that
    a data set draws while a sample is made; these are seeded for each batch, so 0, 1 or 4 workers give
    the same samples, and the training's own generators are never touched. pin_memory: put batches where an
    accelerator can fetch them without waiting. timeout: after how many seconds without a batch a worker counts
    as hung (a WorkerError). part: this process's, of several: then each batch is a :class:`Share`.

    >>> loader = Loader((torch.arange(5.0), torch.arange(5)), batch_size=2)
    >>> [len(y) for x, y in loader.batches(epoch=0)]
    [2, 2, 1]
    """

    def __init__(
        self,
        data: Any,
        batch_size: int = 32,
        *,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 0,
        where: str = "data",
        target: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        pin_memory: bool = False,
        timeout: float = TIMEOUT,
        part: Part = ALL,
    ):
        self.part, self.target = part, target
        self.source: Source = open_source(data, where=where, target=target, dtype=dtype)
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.wide: int | None = None  # the samples of a batch where larger ones give the same; None: not known yet
        if workers > 1 and isinstance(self.source, Stream):
            what = f"an iterable data set is read by one worker at most, not by {workers}."
            fix = "use workers=1, or give a DataLoader over a data set that splits itself among its workers"
            raise PlanError(what, where=where, fix=fix)
        self._arrays = self.source if isinstance(self.source, Arrays) and not pin_memory else None
        if self._arrays is None:
            self._epoch = _Epoch(self.samples or 0, batch_size, shuffle, seed, part)
            self._data_loader = _data_loader(self.source, self._epoch, workers, pin_memory)
        self._timeout = timeout
        self._dataset = getattr(self.source, "dataset", None)
        asks = isinstance(self.source, Stream) and isinstance(self._dataset, Stateful) and workers == 0
        self._asked: Any = self._dataset if asks else None  # knows its place itself
        self._was_put = False  # to its place, and was not read since
        self._began: dict[str, Any] | None = None  # a stream's own generators when the epoch in hand began

    @property
    def samples(self) -> int | None:
        """How many samples an epoch has; None for a stream that does not say."""
        if isinstance(self.source, Stream):
            try:
                return len(self.source.dataset)
            except (TypeError, NotImplementedError):
                return None
        return len(self.source)

    @property
    def is_in_memory(self) -> bool:
        """Whether a batch is made by an index operation, and by no code of the user's."""
        return self._arrays is not None

    @property
    def row_bytes(self) -> int | None:
        """The bytes of a sample; None where batches cannot be of any other size, as several parts make them."""
        arrays = self._arrays if self.part.size == 1 else None
        return None if arrays is None else -(-arrays.nbytes // len(arrays))

    def __len__(self) -> int:
        if self.samples is None:
            raise TypeError("an iterable data set has no length")
        return -(-self.samples // (self.wide or self.batch_size))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of ``epoch``, from batch ``start`` on.

        A stream is read forward to there, unless its data set has ``state_dict`` and was put to its place by
        :meth:`load_state_dict`. Raises WorkerError if a worker dies or hangs.
        """
        if self._arrays is not None and not self.shuffle and self.part.size == 1:
            size = self.wide or self.batch_size
            starts, stops = range(start * size, len(self._arrays), size), count((start + 1) * size, size)
            return map(self._arrays.between, starts, stops)
        if self._arrays is not None:
            device = self._arrays.tensors[0].device
            order = epoch_order(len(self._arrays), seed=self.seed, epoch=epoch, shuffle=self.shuffle).to(device)
            if self.part.size > 1:
                return map(partial(self._share, order), range(start, len(self)))
            return map(self._arrays.take, batch_indices(order, self.batch_size, start))
        batches = self._read(epoch, start)
        if self.part.size == 1:
            return batches
        if isinstance(self.source, Stream):
            return of_stream(batches, self.part, self.target, lambda: self.source.batches(self.batch_size))
        return map(self._counted, count(start), batches)

    def _share(self, order: Tensor, number: int) -> Share:
        start = number * self.batch_size
        total = min(self.batch_size, len(order) - start)
        rows, counted = rows_of(self.part, total)
        batch = self._arrays.take(order[start + rows.start : start + rows.stop])  # type: ignore[union-attr]
        return Share(batch, counted, total)

    def _counted(self, number: int, batch: Any) -> Share:
        total = min(self.batch_size, len(self.source) - number * self.batch_size)  # type: ignore[arg-type]
        return Share(batch, rows_of(self.part, total)[1], total)

    def _read(self, epoch: int, start: int) -> Iterator[Any]:
        was_put = self._was_put
        if not (was_put and start and self._epoch.is_over):  # else it was saved after the last batch of its epoch
            self._was_put = False
            self._began = own_states(self._dataset)
            self._epoch.number, self._epoch.start, self._epoch.seed = epoch, start, self.seed
            self._epoch.first_read = start if was_put else 0
            read = partial(iter, self._data_loader)
            anew = read if was_put and not start else None
            yield from watched(read, self._data_loader, start, timeout=self._timeout, anew=anew)
        self._began, self._epoch.is_over = None, False

    def state_dict(self) -> dict[str, Any]:
        """What seed, epoch and batch do not say: the data set's own generators, and its place if it knows it."""
        reads_forward = isinstance(self.source, Stream) and self._asked is None and self._began is not None
        return {
            "own": self._began if reads_forward else own_states(self._dataset),
            "place": self._asked.state_dict() if self._asked is not None else None,
            "is_over": self._asked is not None and self._epoch.is_over,
            "wide": self.wide and [self.wide, self.batch_size],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what :meth:`state_dict` gave; the next :meth:`batches` goes on from there."""
        set_own_states(self._dataset, state["own"])
        self._began, self.wide = None, None
        if state.get("wide") and state["wide"][1] == self.batch_size:
            self.wide = state["wide"][0]
        if self._asked is not None and state["place"] is not None:
            self._asked.load_state_dict(state["place"])
            self._was_put, self._epoch.is_over = True, state["is_over"]

    def close(self) -> None:
        """Ends the workers; reading again starts new ones. Left to the collector of cycles they cost 5 seconds each."""
        if self._arrays is None:
            batches, self._data_loader._iterator = self._data_loader._iterator, None
            end_workers(batches)

    @property
    def exactness(self) -> str | None:
        """What a resumed run cannot repeat exactly, in a sentence; None where it repeats everything."""
        if isinstance(self.source, Stream):
            return None if self._asked is not None else READ_FORWARD
        in_workers = self._arrays is None and self._data_loader.num_workers > 0
        return RUNS_ON if in_workers and generators_in(self._dataset) else None


READ_FORWARD = "a stream that cannot be asked for its place: a resumed run reads it forward to there"
RUNS_ON = (
    "generators that persist in workers run on: a resumed run repeats the order of the samples, not what these draw"
)


def ended_early(where: str) -> DataError:
    fix = "look for a StopIteration that the data set lets out"
    return DataError("the data ended before their end.", where=where, fix=fix)


class _Epoch:
    """What is read in the epoch in hand: iterating it gives, for each batch, its seed and its indices.

    samples: how many there are; only a stream does not iterate it, and has 0. start: the first batch that is given.
    first_read: the first that a stream reads. is_over: whether a stream has seen its end, and may have rewound.
    """

    def __init__(self, samples: int, batch_size: int, shuffle: bool, seed: int, part: Part):
        self.samples, self.batch_size, self.shuffle, self.seed, self.part = samples, batch_size, shuffle, seed, part
        self.number, self.start, self.first_read, self.is_over = 0, 0, 0, False

    def seed_of(self, batch: int, *first_row: int) -> int:
        return derive(self.seed, AUGMENTATION, self.number, batch, *first_row)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        order = epoch_order(self.samples, seed=self.seed, epoch=self.number, shuffle=self.shuffle)
        for batch, index in enumerate(batch_indices(order, self.batch_size, self.start), self.start):
            wanted, _ = rows_of(self.part, len(index))
            # Two shares of a batch shall not have the same random numbers; the first has those of the whole.
            yield self.seed_of(batch, *([wanted.start] if wanted.start else [])), index[wanted].tolist()


class _Batches(Dataset):
    """Makes a batch for each request, in whichever process it runs."""

    def __init__(self, source: Samples | Arrays):
        self.source = source

    def __getitem__(self, index: tuple[int, list[int]]) -> Any:
        seed, indices = index
        with seeded(seed):
            if isinstance(self.source, Arrays):
                return self.source.take(torch.as_tensor(indices))
            try:
                return self.source.take(indices)
            except StopIteration as error:  # it would end the epoch without a word
                raise ended_early(f"samples {indices[0]} to {indices[-1]} of the data set") from error


class _StreamedBatches(IterableDataset):
    """The batches of a stream, one after the other, each made under its own seed."""

    def __init__(self, source: Stream, epoch: _Epoch):
        self.source, self.epoch = source, epoch

    def __iter__(self) -> Iterator[Any]:
        self.epoch.is_over = False
        batches = Stream(self._samples()).batches(self.epoch.batch_size)
        for number in count(self.epoch.first_read):
            with seeded(self.epoch.seed_of(number)):
                batch = next(batches, None)
            if batch is None:
                return
            if number >= self.epoch.start:
                yield batch

    def _samples(self) -> Iterator[Any]:
        yield from self.source.dataset
        self.epoch.is_over = True


def _data_loader(source: Source, epoch: _Epoch, workers: int, pin_memory: bool) -> DataLoader:
    """torch's own loader moves requests and batches between the processes."""
    stream = isinstance(source, Stream)
    return DataLoader(
        _StreamedBatches(source, epoch) if isinstance(source, Stream) else _Batches(source),
        sampler=None if stream else epoch,
        batch_size=None,  # a request is a whole batch
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0 and not stream,  # a stream's worker learns the epoch when it starts
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own, so that the training's is not drawn from
    )


def _as_it_is(batch: Any) -> Any:
    return batch
