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
    """What one process says: the signal that it has got, if any; whether it asks for an end; whether nothing of it is
    being written. And the first one alone: its time in seconds; whether saving is within its share of that.
    """

    signal: Signals | None = None
    stop: bool = False
    is_idle: bool = True
    seconds: float = 0.0
    may_save: bool = False


HEARD = tuple(number for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if (number := getattr(Signals, name, None)))
NONE_HEARD = [0.0] * len(HEARD)
FACTS = len(HEARD) + 4


class Agreement:
    """What was heard with the last update. engine: what adds it up; None where a user's own step trains. ask: gives
    this process's word.

    signal: one that a process has got. stop: whether one asks for an end. seconds: the first process's time. idle: how
    many processes have nothing left to write. may_save: whether the first finds that saving takes little enough time.
    """

    def __init__(self, engine: Engine | None):
        self.engine = engine
        self.ask: Callable[[], Word] = Word
        self.signal: Signals | None = None
        self.stop, self.seconds, self.idle, self.may_save = False, 0.0, 0, False
        self.pulse = Pulse()

    @property
    def is_sharded(self) -> bool:
        return self.engine is not None and self.engine.sharded

    def begin(self, stop: bool, seconds: float) -> None:
        """Before the first update all know this much."""
        self.stop, self.seconds = stop, seconds
        self.pulse.start()

    def align(self, modules: Sequence[nn.Module]) -> None:
        """Gives all processes the first one's running statistics. Raises ModelError where weights are not alike."""
        from epochal.runtime.parallel import refuse_drift

        refuse_drift(modules)
        processes.copy_from_first([buffer for module in modules for buffer in module.buffers()])

    def dissolve(self, is_whole: bool, *, has_failed: bool) -> bool:
        """At the end: the model is the user's alone again. Returns whether it is whole, and is_whole in all processes.

        After an error the others may not come, and a model that is sharded stays so.
        """
        if has_failed:
            return is_whole and not self.is_sharded
        if self.engine is not None:
            self.engine.dissolve()
        return all(processes.gather(is_whole))

    def facts(self) -> list[float]:
        """This process's word as numbers that can be added up."""
        word = self.ask()
        heard = NONE_HEARD if word.signal is None else [float(word.signal == number) for number in HEARD]
        return [*heard, float(word.stop), float(word.is_idle), word.seconds, float(word.may_save)]

    def exchange(self, *numbers: float) -> list[float]:
        """The sums of these numbers over all processes, where no gradient takes them along."""
        told = torch.tensor([*numbers, *self.facts()], dtype=torch.float64)
        sums = processes.add_up(told).tolist()
        self.hear(sums[len(numbers) :])
        return sums[: len(numbers)]

    def hear(self, sums: Sequence[float]) -> None:
        """Takes the sums of all processes' facts."""
        *signals, stop, idle, self.seconds, may_save = sums
        self.stop, self.idle, self.may_save = round(stop) > 0, round(idle), round(may_save) > 0
        for number, count in zip(HEARD, signals):
            if round(count):
                self.signal = number
