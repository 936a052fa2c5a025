"""What several processes decide together: each says in every update what it knows, and hears the sum of it.

A decision that one process made by itself (a signal came, the time is up, its checkpoint is written) would leave the
others waiting for it. So it is made where all have heard the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from signal import Signals
from typing import TYPE_CHECKING

import torch
from torch import nn

from epochal.runtime import processes
from epochal.runtime.pulse import Pulse

if TYPE_CHECKING:
    from epochal.runtime.parallel import Engine


@dataclass
class Word:
    """What one process says: the signal that it has got, if any; whether it asks for an end; its time in seconds (of
    the first process alone); whether nothing of it is being written.
    """

    signal: Signals | None = None
    stop: bool = False
    seconds: float = 0.0
    is_idle: bool = True


HEARD = tuple(number for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if (number := getattr(Signals, name, None)))
FACTS = len(HEARD) + 3


class Agreement:
    """What was heard with the last update. engine: what adds it up; None where a user's own step trains. ask: gives
    this process's word.

    signal: one that a process has got. stop: whether one asks for an end. seconds: the first process's time. idle: how
    many processes have nothing left to write.
    """

    def __init__(self, engine: Engine | None):
        self.engine = engine
        self.ask: Callable[[], Word] = Word
        self.signal: Signals | None = None
        self.stop, self.seconds, self.idle = False, 0.0, 0
        self.pulse = Pulse()

    @property
    def is_sharded(self) -> bool:
        return self.engine is not None and self.engine.sharded

    def begin(self, stop: bool, seconds: float) -> None:
        """Before the first update all know this much."""
        self.stop, self.seconds = stop, seconds
        self.pulse.start()

    def refuse_drift(self, modules: Sequence[nn.Module]) -> None:
        """Raises ModelError where the weights that all processes should have alike are not."""
        from epochal.runtime.parallel import refuse_drift

        refuse_drift(modules)

    def facts(self) -> list[float]:
        """This process's word as numbers that can be added up."""
        word = self.ask()
        return [
            *(float(word.signal == number) for number in HEARD),
            float(word.stop),
            word.seconds,
            float(word.is_idle),
        ]

    def exchange(self, *numbers: float) -> list[float]:
        """The sums of these numbers over all processes, where no gradient takes them along."""
        told = torch.tensor([*numbers, *self.facts()], dtype=torch.float64)
        sums = processes.add_up(told).tolist()
        self.hear(sums[len(numbers) :])
        return sums[: len(numbers)]

    def hear(self, sums: Sequence[float]) -> None:
        """Takes the sums of all processes' facts."""
        *signals, stop, self.seconds, idle = sums
        self.stop, self.idle = round(stop) > 0, round(idle)
        for number, count in zip(HEARD, signals):
            if round(count):
                self.signal = number
