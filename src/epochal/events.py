"""What a run tells: frozen values, yielded by ``Run`` and handed to every observer."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from epochal.doctor.finding import Finding
    from epochal.protocols import StepResult

Row = Mapping[str, Any]  # one line of the history: epoch, step, lr, time, train_loss, val_loss, ...


class StopReason(enum.Enum):
    """Why a run ended; the value is the message."""

    EPOCHS = "all epochs are done"
    MAX_STEPS = "max_steps is reached"
    MAX_TIME = "max_time is used up"
    EARLY_STOPPING = "the monitored value no longer improves"
    ASKED = "an observer asked to stop"
    CLOSED = "the loop was left before its end"
    INTERRUPTED = "interrupted"
    NONFINITE = "a value that is not finite"
    FAILED = "an error"

    @property
    def message(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Stop:
    """An observer's answer that ends the run after the event in hand."""

    message: str
    reason: StopReason = StopReason.ASKED


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far: ``metric`` is the monitored name, ``value`` what it was."""

    epoch: int
    step: int
    metric: str
    value: float


@dataclass(frozen=True, slots=True)
class Started:
    """Before the first step.

    ``facts`` are the lines of the header, label to text, in order; ``config`` is the plan as resolved
    (only strings, numbers, booleans and lists); ``epochs`` and ``steps`` are how many are planned,
    None where that is not known; ``done`` and ``step`` are how many epochs and updates were done before, ``rows`` the
    history until then (after a resume). ``command``: the words that began it, on the command line.
    """

    facts: Mapping[str, str]
    config: Mapping[str, Any]
    epochs: int | None
    steps: int | None
    monitor: str
    run: Path | None = None
    done: int = 0
    step: int = 0
    rows: Sequence[Row] = ()
    command: Sequence[str] = ()


class StepDone(NamedTuple):  # one is made at every update, and a tuple is made in a fifth of the time
    """After one optimizer update.

    step: which one, from 1. epoch: the epoch in hand, from 1. samples: how many were seen in all.
    """

    step: int
    epoch: int
    samples: int
    result: StepResult


@dataclass(frozen=True, slots=True)
class Evaluated:
    """After an evaluation: a row of the history, and whether it is the best so far."""

    row: Row
    is_best: bool
    best: Best | None


@dataclass(frozen=True, slots=True)
class Saved:
    """After a checkpoint was committed."""

    path: Path
    step: int


@dataclass(frozen=True, slots=True)
class Noted:
    """Something that people should know, and that does not end the run: a sentence or two."""

    message: str


@dataclass(frozen=True, slots=True)
class Found:
    """Something that the doctor has found in the run, and that does not end it: ``finding`` is an
    ``epochal.Finding``."""

    finding: Finding


@dataclass(frozen=True, slots=True)
class Ended:
    """After the last step; the model holds the weights it will keep. is_torn: they may be those of half an update.

    where, fix: what an error that ended it says of its place, and of how to mend it.
    """

    reason: StopReason
    message: str
    best: Best | None
    restored: bool
    epochs: int
    steps: int
    seconds: float
    is_torn: bool = False
    where: str | None = None
    fix: str | None = None


Event = Started | StepDone | Evaluated | Saved | Noted | Found | Ended
