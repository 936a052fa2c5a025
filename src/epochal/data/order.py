"""The order of an epoch: a function of (seed, epoch), and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from epochal.runtime.seeding import derive

ORDER, AUGMENTATION, SPLIT = 1, 2, 3  # one stream of seeds for each use, so that they never coincide


def epoch_order(count: int, *, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """The indices of the epoch's samples in order, int64, shape (count,).

    >>> epoch_order(4, seed=0, epoch=0, shuffle=False)
    tensor([0, 1, 2, 3])
    """
    if not shuffle:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive(seed, ORDER, epoch)))


def batch_indices(order: Tensor, batch_size: int, start: int = 0) -> Iterator[Tensor]:
    """The order cut into batches, from batch ``start``; the last one may be smaller."""
    return (order[at : at + batch_size] for at in range(start * batch_size, len(order), batch_size))
