"""A batch among several processes: each has its share of every batch, and nobody has a sample twice.

Which samples a batch has never depends on how many processes there are; only how they are shared out does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epochal.data.batch import rows, size
from epochal.errors import DataError
from epochal.runtime import processes


@dataclass(frozen=True)
class Part:
    """Which share is this process's: the ``rank``-th of ``size``.

    >>> [Part(rank, 3).of(7) for rank in range(3)]
    [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
    >>> Part(2, 3).of(2)  # nothing is left for it
    slice(2, 2, None)
    """

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> slice:
        """The rows of a batch of ``count`` samples; shares differ by one sample at most, the first ones are larger."""
        each, rest = divmod(count, self.size)
        start = self.rank * each + min(self.rank, rest)
        return slice(start, start + each + (self.rank < rest))


ALL = Part()


@dataclass(frozen=True, slots=True)
class Share:
    """A process's share of a batch. samples: how many of it count here; total: how many all shares have.

    Where nothing is left for a process, ``batch`` is a stand-in with 0 samples that count: every process takes part in
    every update, for the others wait for its gradient.
    """

    batch: Any
    samples: int
    total: int


def rows_of(part: Part, count: int) -> tuple[slice, int]:
    """The rows to take from a batch, and how many of them count: of a stand-in, none.

    A stand-in has two rows where it can, for batch norm cannot do with one.
    """
    rows = part.of(count)
    if rows.start < rows.stop:
        return rows, rows.stop - rows.start
    return slice(0, min(2, count)), 0


def cut(batch: Any, part: Part, target: Sequence[str] = ()) -> Share:
    """The share of a batch that is there as a whole. Raises DataError if it cannot be cut."""
    count = size(batch, target)
    wanted, counted = rows_of(part, count)
    found = rows(batch, wanted, target)
    if found is None:
        what = "a batch cannot be shared out among processes: a part of it has not a row for each sample."
        fix = "give a map-style data set, whose samples are shared out before they become batches"
        raise DataError(what, where=f"a batch of {count} samples", fix=fix)
    return Share(found, counted, count)


def of_stream(
    batches: Iterator[Any], part: Part, target: Sequence[str], anew: Callable[[], Iterator[Any]]
) -> Iterator[Share]:
    """The shares of the batches of a stream, which each process reads.

    Where all read the same, each cuts its rows out. A stream that gives them different ones divides itself: all of it
    counts, until the last process has nothing left; whoever has ended stands by, with a batch that does not count.
    anew: reads from the beginning, for such a batch.
    """
    batch = next(batches, None)
    if len(set(processes.gather(None if batch is None else digest(batch)))) == 1:
        while batch is not None:
            yield cut(batch, part, target)
            batch = next(batches, None)
        return
    last = batch
    while any(counts := processes.gather(0 if batch is None else size(batch, target))):
        if last is None and (last := next(anew(), None)) is None:
            fix = "divide the stream so that every process gets something"
            raise DataError("this process gets no batch of the stream.", where=f"rank {part.rank}", fix=fix)
        if batch is None and (few := rows(last, slice(0, 2), target)) is not None:
            last = few
        yield Share(last, counts[part.rank], sum(counts))
        batch = None if batch is None else next(batches, None)
        last = last if batch is None else batch


def digest(batch: Any) -> str:
    """Tells two batches apart; what is neither an array nor a number or a text is all one."""
    found, parts = hashlib.sha256(), [batch]
    for part in parts:  # grows while it is walked
        if isinstance(part, Mapping):
            parts += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            parts += part
        elif isinstance(part, Tensor) and part.layout is torch.strided:
            found.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, np.ndarray):
            found.update(part.tobytes())
        else:
            found.update(repr(part if isinstance(part, str | bytes | int | float) else type(part)).encode())
    return found.hexdigest()
