"""Where a run ends, and why: its limits, a signal, an observer's word. Several processes end together."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from signal import Signals as Signal

from epochal.agreement import Agreement, Word
from epochal.checkpoint.saver import Saver
from epochal.errors import NonFiniteError, ProcessError
from epochal.events import StopReason
from epochal.runtime.processes import gather, of_first, world
from epochal.runtime.pulse import lost
from epochal.runtime.signals import Signals
from epochal.state import Progress, TrainState


@dataclass(frozen=True)
class Limits:
    """Where a run ends, whichever comes first; None is no limit."""

    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None

    def reached(self, progress: Progress, seconds: float) -> StopReason | None:
        if self.epochs is not None and progress.epoch >= self.epochs:
            return StopReason.EPOCHS
        if self.steps is not None and progress.step >= self.steps:
            return StopReason.MAX_STEPS
        if self.seconds is not None and seconds >= self.seconds:
            return StopReason.MAX_TIME
        return None


@dataclass
class Ending:
    """agreement: None where one process trains alone, and what it knows is what counts."""

    limits: Limits
    state: TrainState
    signals: Signals = field(default_factory=lambda: Signals(terminate=False))
    agreement: Agreement | None = None
    _began: float = field(default_factory=time.perf_counter, init=False)
    _is_first: bool = field(default_factory=lambda: world().is_first, init=False)

    def begin(self) -> None:
        """The clock goes on where the state left it, and what the state says is known to all."""
        self._began = time.perf_counter() - self.state.progress.seconds
        if self.agreement is not None:
            self.agreement.begin(self.state.stop is not None, self.state.progress.seconds)

    def end(self, error: BaseException | None) -> None:
        """Nobody waits for this process any more; who does all the same hears what ended it."""
        if self.agreement is not None:
            _, message = reason_of(error)
            self.agreement.pulse.stop(f"{type(error).__name__}: {message}" if error is not None else "its run is over")

    @property
    def is_written(self) -> bool:
        """Whether all processes have written what they had to: each tells it after the same update."""
        return self.agreement is None or self.agreement.idle == world().size

    def begin_to_write(self) -> None:
        """What was heard of it before does not count any more."""
        if self.agreement is not None:
            self.agreement.idle = 0

    def word(self, saver: Saver | None) -> Word:
        """What this process tells the others with each update."""
        if self.agreement is not None:
            self.agreement.pulse.step = self.state.progress.step
        is_idle, word = saver is None or saver.is_idle, Word(self.signals.received, self.state.stop is not None)
        if self._is_first:
            word.seconds = self.seconds()
            word.may_save = saver is not None and saver.may_start(word.seconds)
        word.is_idle = is_idle
        return word

    def may_save(self, saver: Saver) -> bool:
        """Whether saving is within its share of the time; of several processes, by the first one's clock."""
        return saver.may_start(self.seconds()) if self.agreement is None else self.agreement.may_save

    def agree(self) -> None:
        """Between two updates: an observer of the first process may have asked for an end."""
        if self.agreement is not None:
            stop, self.agreement.seconds = of_first(float(self.state.stop is not None), self.seconds())
            self.agreement.stop = stop > 0

    def agree_on_signal(self) -> None:
        """After an evaluation, in which nobody hears of another one's signal."""
        if self.agreement is not None:
            received = [one for one in gather(self.signals.received) if one is not None]
            self.agreement.signal = received[0] if received else self.agreement.signal

    def lost(self, error: BaseException | None) -> ProcessError | None:
        """What to say instead of an error, if it is of another process that was waited for."""
        if self.agreement is None:
            return None
        return lost(error, self.agreement.pulse, self.state.progress.step)

    @property
    def signal(self) -> Signal | None:
        return self.signals.received if self.agreement is None else self.agreement.signal

    @property
    def is_stopped(self) -> bool:
        return self.state.stop is not None if self.agreement is None else self.agreement.stop

    def seconds(self) -> float:
        """How long the run has taken until now."""
        return time.perf_counter() - self._began

    def now(self) -> float:
        """The seconds by which something is due: of several processes, those that all have heard."""
        return self.seconds() if self.agreement is None else self.agreement.seconds

    def is_here(self) -> bool:
        if self.is_stopped or self.signal is not None:
            return True
        seconds = 0.0 if self.limits.seconds is None else self.now()
        return self.limits.reached(self.state.progress, seconds) is not None

    def reason(self) -> tuple[StopReason, str]:
        if (stop := self.state.stop) is not None:
            return stop.reason, stop.message
        if self.is_stopped:
            return StopReason.ASKED, StopReason.ASKED.message  # the first process knows the words
        if (signal := self.signal) is not None:
            return StopReason.INTERRUPTED, f"interrupted by {signal.name}"
        reason = self.limits.reached(self.state.progress, self.now()) or StopReason.CLOSED
        return reason, reason.message


def reason_of(error: BaseException | None) -> tuple[StopReason, str]:
    """What an error says of the end it made; None is that of a loop that was left."""
    message = str(error).splitlines()[0] if error and str(error) else ""
    if error is None:
        return StopReason.CLOSED, message
    if isinstance(error, KeyboardInterrupt):
        return StopReason.INTERRUPTED, message
    return (StopReason.NONFINITE if isinstance(error, NonFiniteError) else StopReason.FAILED), message
