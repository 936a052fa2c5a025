"""Windows: the micro-batches of one optimizer update, with their sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from epochal.data.batch import size
from epochal.data.share import Share


class Window(NamedTuple):
    """All micro-batches of one update. The last window of an epoch holds what is left, so nothing is dropped.

    sizes: the number of samples of each batch; samples: how many there are in all. Of several processes, each has its
    share of every batch: ``samples`` counts those of all of them, ``sizes`` its own, and a batch of size 0 is a
    stand-in, of which nothing counts.
    """

    batches: list[Any]
    sizes: list[int]
    total: int | None = None  # over all processes, where there are several

    @property
    def samples(self) -> int:
        return sum(self.sizes) if self.total is None else self.total


def windows(batches: Iterable[Any], accumulate: int = 1, target: Sequence[str] = ()) -> Iterator[Window]:
    """Groups batches by ``accumulate``; ``target`` names the targets in a dict batch.

    >>> import torch
    >>> [w.sizes for w in windows(torch.zeros(7, 1).split(2), accumulate=3)]
    [[2, 2, 2], [1]]
    """
    batches = iter(batches)
    while group := list(islice(batches, accumulate)):
        if isinstance(group[0], Share):
            total = sum(share.total for share in group)
            yield Window([share.batch for share in group], [share.samples for share in group], total)
            continue
        yield Window(group, [size(batch, target) for batch in group])
