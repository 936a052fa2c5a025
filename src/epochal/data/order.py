"""The order of an epoch: a function of (seed, epoch), and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from epochal.runtime.seeding import derive

ORDER, AUGMENTATION, SPLIT = 1, 2, 3  # one stream of seeds for each use, so that they never coincide
AHEAD = 16  # epochs


def epoch_order(count: int, *, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """The indices of the epoch's samples in order, int64, shape (count,).

    >>> epoch_order(4, seed=0, epoch=0, shuffle=False)
    tensor([0, 1, 2, 3])
    """
    if not shuffle:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(_seeds(seed, epoch // AHEAD)[epoch % AHEAD]))


@lru_cache(maxsize=4)
def _seeds(seed: int, block: int) -> list[int]:
    """Those of several epochs: an epoch's updates drive numpy's code out of the processor's caches, and one seed alone
    takes as long as ten.
    """
    return [derive(seed, ORDER, epoch) for epoch in range(block * AHEAD, (block + 1) * AHEAD)]


def batch_indices(order: Tensor, batch_size: int, start: int = 0) -> Iterator[Tensor]:
    """The order cut into batches, from batch ``start``; the last one may be smaller."""
    if start * batch_size >= len(order):  # to split nothing gives one part, of nothing
        return iter(())
    parts = order[start * batch_size :].split(64 * batch_size)  # not all at once: there may be millions
    return chain.from_iterable(part.split(batch_size) for part in parts)
