"""A run: iterated to its end, and what it leaves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from epochal import loop
from epochal.cadence import Every
from epochal.checkpoint.store import Checkpoints, Saving
from epochal.data.loader import GivenLoader, Loader
from epochal.data.window import Window, windows
from epochal.errors import NonFiniteError, PlanError
from epochal.events import Ended, Evaluated, Event, Saved, Started, StepDone, Stop, StopReason
from epochal.metrics.metric import Stream
from epochal.observe.averages import TrainAverages
from epochal.observe.best import BestSoFar
from epochal.protocols import Observer, Step, StepResult
from epochal.report.history import History
from epochal.result import Result, Setting
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


@dataclass(frozen=True)
class Validation:
    """What is evaluated, with which metrics, and how often; ``loader`` is None where there is no ``val``."""

    loader: Loader | GivenLoader | None
    stream: Stream
    every: Every


@dataclass
class Run:
    """A prepared run: ``for event in run`` trains. As a context manager it ends properly however it is left.

    state: complete at every event. started: what observers are told first. checkpoints: None where there is no
    run folder. saving: how often they are saved, and how much of the time it may take.
    """

    state: TrainState
    step: Step
    train: Loader | GivenLoader
    accumulate: int
    validation: Validation
    limits: Limits
    averages: TrainAverages
    best: BestSoFar
    setting: Setting
    started: Started
    observers: Sequence[Observer] = ()
    checkpoints: Checkpoints | None = None
    saving: Saving = field(default_factory=Saving)
    ended: Ended | None = field(default=None, init=False)
    _began: float = field(default_factory=time.perf_counter, init=False)
    _last_evaluation: float = field(default_factory=time.perf_counter, init=False)
    _last_saving: float = field(default_factory=time.perf_counter, init=False)
    _spent_saving: float = field(default=0.0, init=False)
    _modes: list[tuple[nn.Module, bool]] = field(default_factory=list, init=False)
    _train_modes: list[tuple[nn.Module, bool]] = field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[Event]:
        """The whole run, in the order in which things happen."""
        state, progress = self.state, self.state.progress
        self._begin()
        self.started = replace(self.started, done=progress.epoch, step=progress.step)
        yield self._tell(self.started)
        if progress.windows and self._evaluation_is_due(at_epoch_end=False):
            yield self._tell(self._evaluate())  # the state was taken between a step and its evaluation
        for result in loop.steps(state, self.step, self._windows, self._is_over):
            at_epoch_end = result is None
            if result is not None:
                self._account_for(result)
                yield self._tell(StepDone(progress.step, progress.epoch + 1, progress.samples, result))
            evaluated = self._evaluate() if self._evaluation_is_due(at_epoch_end) else None
            if at_epoch_end and state.schedule is not None:
                state.schedule.after_epoch()
            if evaluated is not None:
                yield self._tell(evaluated)
            if self.checkpoints is not None and self._saving_is_due(at_epoch_end):
                yield self._tell(self._save(self.checkpoints))
        if progress.evaluated != progress.step:
            yield self._tell(self._evaluate())
        if self.checkpoints is not None:
            yield self._tell(self._save(self.checkpoints))
        yield self._end(*self._reason())

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.ended is None:
            self._end(_reason_of(error), str(error).splitlines()[0] if error and str(error) else "")

    @property
    def result(self) -> Result:
        """What the run left; PlanError as long as it has not ended."""
        if (ended := self.ended) is None:
            raise PlanError(
                "the run has not ended.", where="Run.result", fix="iterate it to its end, or leave its with"
            )
        history = History(self.state.rows, self.best.monitor, self.best.mode, self.best.best)
        return Result(
            self.state.model, history, ended.best, ended.reason, ended.message, ended.restored, self.started.run,
            self.setting,
        )  # fmt: skip

    def _begin(self) -> None:
        self._began = time.perf_counter() - self.state.progress.seconds
        self._last_evaluation = self._last_saving = time.perf_counter()
        self._modes = [(part, part.training) for module in self.state.modules for part in module.modules()]
        for module in self.state.modules:
            # A model in train mode is left as it is: a backbone that was put to eval mode stays so.
            if not module.training:
                module.train()
        self._train_modes = [(part, part.training) for part, _ in self._modes]
        if isinstance(self.train, Loader):
            self.train.seed = self.state.seed  # that of a resumed run

    def _windows(self, progress: Progress) -> Iterator[Window]:
        """The windows of the epoch in hand that are still to come; what an observer left in eval mode trains again."""
        if not all(module.training for module in self.state.modules):
            for part, training in self._train_modes:
                part.training = training
        batches = self.train.batches(progress.epoch, progress.windows * self.accumulate)
        return windows(batches, self.accumulate, self.setting.target)

    def _is_over(self) -> bool:
        return self.state.stop is not None or self.limits.reached(self.state.progress, self._seconds()) is not None

    def _reason(self) -> tuple[StopReason, str]:
        if (stop := self.state.stop) is not None:
            return stop.reason, stop.message
        reason = self.limits.reached(self.state.progress, self._seconds()) or StopReason.CLOSED
        return reason, reason.message

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    def _tell(self, event: Event) -> Event:
        for observer in self.observers:
            answer = observer(event)
            if isinstance(answer, Stop) and self.state.stop is None:
                self.state.stop = answer
        return event

    def _account_for(self, result: StepResult) -> None:
        if not isinstance(result, StepResult) or not isinstance(result.loss, Tensor):
            wrong = type(getattr(result, "loss", result)).__name__
            raise PlanError(
                f"the step returned {wrong}.",
                where=f"step={getattr(self.step, '__name__', type(self.step).__name__)}",
                fix="return epochal.StepResult(loss), with the loss as a scalar tensor",
            )
        self.averages.update(result)
        # A schedule never moves before the optimizer has; an update that was left out is none.
        if result.applied and self.state.schedule is not None:
            self.state.schedule.after_step()

    def _evaluation_is_due(self, at_epoch_end: bool) -> bool:
        progress, since = self.state.progress, time.perf_counter() - self._last_evaluation
        every = self.validation.every
        due = every.due(step=progress.step, epoch=progress.epoch, at_epoch_end=at_epoch_end, seconds=since)
        return due and progress.evaluated != progress.step

    def _evaluate(self) -> Evaluated:
        """Closes a row: the training's means since the last one, and the validation."""
        progress, validation, setting = self.state.progress, self.validation, self.setting
        row: dict[str, Any] = {"epoch": max(1, progress.epoch_in_hand), "step": progress.step}
        row.update({"lr": self._lr(), "time": 0.0, **self.averages.take()})
        if validation.loader is not None:
            values = loop.evaluate(
                setting.objective, setting.forward, validation.loader.batches(epoch=0), validation.stream,
                modules=setting.modules, device=setting.device, autocast=setting.autocast,
            )  # fmt: skip
            row.update({f"val_{name}": value for name, value in values.items()})
        row["time"] = progress.seconds = self._seconds()
        is_best = self.best.update(row)
        if self.state.schedule is not None:
            self.state.schedule.after_evaluation(row[self.best.monitor])
        progress.evaluated = progress.step
        self._last_evaluation = time.perf_counter()
        self.state.rows.append(row)
        return Evaluated(row, is_best, self.best.best)

    def _lr(self) -> float | None:
        return float(self.state.optimizer.param_groups[0]["lr"]) if self.state.optimizer is not None else None

    def _saving_is_due(self, at_epoch_end: bool) -> bool:
        progress, since = self.state.progress, time.perf_counter() - self._last_saving
        every, share = Every.parse(self.saving.every), self.saving.share
        due = every.due(step=progress.step, epoch=progress.epoch, at_epoch_end=at_epoch_end, seconds=since)
        return due and (share is None or self._spent_saving <= share * self._seconds())

    def _save(self, checkpoints: Checkpoints) -> Saved:
        progress, began = self.state.progress, time.perf_counter()
        progress.seconds = self._seconds()
        path = checkpoints.save(progress.step, self.state.state_dict())
        self._last_saving = time.perf_counter()
        self._spent_saving += self._last_saving - began
        return Saved(path, progress.step)

    def _end(self, reason: StopReason, message: str) -> Ended:
        """Puts the best weights and the modules' modes back, and tells."""
        progress = self.state.progress
        restored = self.best.restore()
        for part, training in self._modes:
            part.training = training
        seconds = self._seconds()
        self.ended = Ended(
            reason, message or reason.message, self.best.best, restored, progress.epoch, progress.step, seconds
        )
        self._tell(self.ended)
        return self.ended


def _reason_of(error: BaseException | None) -> StopReason:
    if error is None:
        return StopReason.CLOSED
    if isinstance(error, KeyboardInterrupt):
        return StopReason.INTERRUPTED
    return StopReason.NONFINITE if isinstance(error, NonFiniteError) else StopReason.FAILED
