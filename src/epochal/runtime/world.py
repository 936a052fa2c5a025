"""Which of several processes this one is, as whoever started it says: torchrun, or SLURM's srun. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

PORT = 20_000  # SLURM gives none: ports from here on, by the number of the job


@dataclass(frozen=True)
class World:
    """rank: this process, from 0. size: how many there are. local_rank: its number on its machine. restarts: how often
    the launcher has started them all anew. Only the first one prints and writes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def announced(environment: Mapping[str, str] = os.environ) -> World:
    """The world that the environment tells of; a world of one where it tells of none.

    >>> announced({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}).rank
    3
    >>> announced({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}).size
    8
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:  # inside srun, not in the batch script
        names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_RESTART_COUNT"
    else:
        return World()
    rank, size, local, restarts = (int(environment.get(name, default)) for name, default in zip(names, "0100"))
    return World(rank, size, local, restarts)


def meeting_place(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Where the processes find each other, as ``env://`` wants it, filled in from what SLURM says.

    >>> meeting_place({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4",
    ...     "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "gpu[07-09,12]"})
    {'RANK': '1', 'WORLD_SIZE': '4', 'LOCAL_RANK': '0', 'MASTER_ADDR': 'gpu07', 'MASTER_PORT': '20077'}
    """
    world = announced(environment)
    found = {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(world.local_rank)}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    first = re.sub(r"\[(\w+).*", r"\1", nodes.split(",")[0])
    port = PORT + int(environment.get("SLURM_JOB_ID", 0)) % PORT
    return {**found, "MASTER_ADDR": first, "MASTER_PORT": str(port)} | {
        name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment
    }
