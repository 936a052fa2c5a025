"""Batches of an epoch, from any source: epochal's own loader, and a DataLoader as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from epochal.data.order import AUGMENTATION, batch_indices, epoch_order
from epochal.data.sources import Arrays, Samples, Source, Stream, open_source
from epochal.errors import DataError, PlanError
from epochal.runtime.seeding import derive, seeded


class Loader:
    """epochal's own loader: the batches of an epoch are a function of (seed, epoch).

    data: whatever ``fit`` accepts but a DataLoader. seed: for the order and for the random numbers that
    a data set draws while a sample is made; these are seeded for each batch, so 0, 1 or 4 workers give
    the same samples, and the training's own generators are never touched. pin_memory: put batches where an
    accelerator can fetch them without waiting.

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
    ):
        self.source: Source = open_source(data, where=where, target=target, dtype=dtype)
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        if workers > 1 and isinstance(self.source, Stream):
            raise PlanError(
                f"an iterable data set is read by one worker at most, not by {workers}.",
                where=where,
                fix="use workers=1, or give a DataLoader over a data set that splits itself among its workers",
            )
        self._arrays = self.source if isinstance(self.source, Arrays) and not pin_memory else None
        if self._arrays is None:
            self._epoch = _Epoch(self.samples or 0, batch_size, shuffle, seed)
            self._torch_loader = _torch_loader(self.source, self._epoch, workers, pin_memory)

    @property
    def samples(self) -> int | None:
        """How many samples an epoch has; None for a stream that does not say."""
        if isinstance(self.source, Stream):
            try:
                return len(self.source.dataset)
            except (TypeError, NotImplementedError):
                return None
        return len(self.source)

    def __len__(self) -> int:
        if self.samples is None:
            raise TypeError("an iterable data set has no length")
        return -(-self.samples // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of ``epoch``, from batch ``start`` on (a stream is read forward to there)."""
        if self._arrays is not None:
            device = self._arrays.tensors[0].device
            order = epoch_order(len(self._arrays), seed=self.seed, epoch=epoch, shuffle=self.shuffle).to(device)
            return map(self._arrays.take, batch_indices(order, self.batch_size, start))
        self._epoch.number, self._epoch.start, self._epoch.seed = epoch, start, self.seed
        return iter(self._torch_loader)


class GivenLoader:
    """A DataLoader taken as it is: its batches, its order, its collate function, its workers."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    @property
    def samples(self) -> int | None:
        if isinstance(self.loader.dataset, IterableDataset) or self.loader.batch_size is None:
            return None
        try:
            count = len(self.loader.sampler)  # type: ignore[arg-type]
        except TypeError:
            return None
        return count - count % self.loader.batch_size if self.loader.drop_last else count

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """One pass, as a plain ``for`` would make it; a sampler with ``set_epoch`` is told the epoch."""
        for sampler in (self.loader.sampler, self.loader.batch_sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        number = -1
        for number, batch in enumerate(self.loader):
            if number >= start:
                yield batch
        # Only torch's own parts are sure to have the length that they tell.
        plain = type(self.loader).__iter__ is DataLoader.__iter__ and type(self.loader.batch_sampler) is BatchSampler
        sized = plain and type(self.loader.sampler) in (SequentialSampler, RandomSampler) and self.samples is not None
        if sized and number + 1 < len(self.loader):
            raise _ended_early(f"batch {number + 1} of {len(self.loader)} of the DataLoader")


def _ended_early(where: str) -> DataError:
    return DataError(
        "the data ended before their end.", where=where, fix="look for a StopIteration that the data set lets out"
    )


class _Epoch:
    """What is read in the epoch in hand: iterating it gives, for each batch, its seed and its indices.

    samples: how many there are; only a stream does not iterate it, and has 0.
    """

    def __init__(self, samples: int, batch_size: int, shuffle: bool, seed: int):
        self.samples, self.batch_size, self.shuffle, self.seed = samples, batch_size, shuffle, seed
        self.number, self.start = 0, 0

    def seed_of(self, batch: int) -> int:
        return derive(self.seed, AUGMENTATION, self.number, batch)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        order = epoch_order(self.samples, seed=self.seed, epoch=self.number, shuffle=self.shuffle)
        for batch, index in enumerate(batch_indices(order, self.batch_size, self.start), self.start):
            yield self.seed_of(batch), index.tolist()


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
                raise _ended_early(f"samples {indices[0]} to {indices[-1]} of the data set") from error


class _StreamedBatches(IterableDataset):
    """The batches of a stream, one after the other, each made under its own seed."""

    def __init__(self, source: Stream, epoch: _Epoch):
        self.source, self.epoch = source, epoch

    def __iter__(self) -> Iterator[Any]:
        batches = self.source.batches(self.epoch.batch_size)
        for number in count():
            with seeded(self.epoch.seed_of(number)):
                batch = next(batches, None)
            if batch is None:
                return
            if number >= self.epoch.start:
                yield batch


def _torch_loader(source: Source, epoch: _Epoch, workers: int, pin_memory: bool) -> DataLoader:
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
