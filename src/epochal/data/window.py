"""Windows: the micro-batches of one optimizer update, with their sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from epochal.data.batch import size


@dataclass(frozen=True, slots=True)
class Window:
    """All micro-batches of one update. The last window of an epoch holds what is left, so nothing is dropped.

    sizes: the number of samples of each batch; samples: their sum.
    """

    batches: list[Any]
    sizes: list[int]

    @property
    def samples(self) -> int:
        return sum(self.sizes)


def windows(batches: Iterable[Any], accumulate: int = 1, target: Sequence[str] = ()) -> Iterator[Window]:
    """Groups batches by ``accumulate``; ``target`` names the targets in a dict batch.

    >>> import torch
    >>> [w.sizes for w in windows(torch.zeros(7, 1).split(2), accumulate=3)]
    [[2, 2, 2], [1]]
    """
    batches = iter(batches)
    while group := list(islice(batches, accumulate)):
        yield Window(group, [size(batch, target) for batch in group])
