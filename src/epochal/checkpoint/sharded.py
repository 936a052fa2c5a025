"""Tensors of which every process has a part: what of them a process writes, and how they come together again."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from epochal.runtime.shards import is_sharded, part_of

ALIKE = ("state.model.", "state.loss.", "state.optimizer.", "state.extras.best.weights.")  # in every process


def shared_out(named: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """The tensors that a process writes: of sharded ones its part; of weights, and of what an optimizer keeps for them,
    its share by their size. Of all else, of which the processes may have different ones, the first writes its own.

    >>> named = {"state.model.a": torch.zeros(4), "state.model.b": torch.zeros(3), "state.rows": torch.zeros(2)}
    >>> [list(shared_out(named, rank, 2)) for rank in range(2)]
    [['state.model.a', 'state.rows'], ['state.model.b']]
    """
    mine, loads = [], [(0, writer) for writer in range(size)]  # a heap: whoever has least, and is first, writes next
    for name in sorted(named, key=lambda name: (-named[name].numel() * named[name].itemsize, name)):
        if is_sharded(named[name]):
            writes = part_of(named[name])[0].numel() > 0
        elif name.startswith(ALIKE):
            load, writer = loads[0]
            heapq.heapreplace(loads, (load + max(1, named[name].nbytes), writer))
            writes = writer == rank
        else:
            writes = rank == 0
        mine += [name] if writes else []
    return {name: named[name] for name in sorted(mine)}


def put_together(shape: Iterable[int], pieces: Mapping[int, Tensor]) -> Tensor:
    """The whole of a tensor of this shape; pieces: by the row at which each begins.

    Raises ValueError if they do not fill it, row by row and each once.

    >>> put_together([3], {2: torch.ones(1), 0: torch.zeros(2)})
    tensor([0., 0., 1.])
    """
    shape, at = torch.Size(shape), 0
    for row, piece in sorted(pieces.items()):
        if row != at or piece.shape[1:] != shape[1:] or not piece.dim():
            raise ValueError("a tensor is not filled by its pieces")
        at += len(piece)
    if not shape or at != shape[0]:
        raise ValueError("a tensor is not filled by its pieces")
    return torch.cat([piece for _, piece in sorted(pieces.items())])
