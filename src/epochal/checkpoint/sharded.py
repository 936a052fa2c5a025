"""Tensors of which every process has a part: what of them a process writes, and how they come together again."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from epochal.runtime.shards import is_sharded, part_of

ALIKE = ("state.model.", "state.loss.", "state.optimizer.", "state.extras.best.weights.")  # in every process


def writers(named: Mapping[str, Tensor], size: int) -> dict[str, int]:
    """Who writes which of the tensors that are not sharded: weights, and what an optimizer keeps for them, are shared
    out by their size. Of all else, of which the processes may have different ones, the first writes its own.
    """
    found, loads = {}, [(0, writer) for writer in range(size)]  # a heap: whoever has least, and is first, writes next
    for name in sorted(named, key=lambda name: (-named[name].numel() * named[name].itemsize, name)):
        if not is_sharded(named[name]):
            load, found[name] = loads[0] if name.startswith(ALIKE) else (0, 0)
            if name.startswith(ALIKE):
                heapq.heapreplace(loads, (load + max(1, named[name].nbytes), found[name]))
    return found


def shared_out(named: Mapping[str, Tensor], rank: int, by: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors that a process writes: of sharded ones its part, of the others those that ``by`` says.

    >>> named = {"state.model.a": torch.zeros(4), "state.model.b": torch.zeros(3), "state.rows": torch.zeros(2)}
    >>> [list(shared_out(named, rank, writers(named, 2))) for rank in range(2)]
    [['state.model.a', 'state.rows'], ['state.model.b']]
    """

    def is_mine(name: str) -> bool:
        return part_of(named[name])[0].numel() > 0 if is_sharded(named[name]) else by.get(name) == rank

    return {name: named[name] for name in sorted(named) if is_mine(name)}


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
