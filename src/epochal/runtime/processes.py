"""How many processes train together, and which one this is."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed


@dataclass(frozen=True)
class World:
    """rank: this process, from 0. size: how many there are. Only the first one prints and writes."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def world() -> World:
    """The world as torch.distributed has set it up; a world of one where it has not."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return World()
