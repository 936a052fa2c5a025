"""A run: iterated to its end, and what it leaves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from epochal import loop, nonfinite
from epochal.checkpoint.saver import Saver
from epochal.data.loader import Loader
from epochal.data.window import Window, windows
from epochal.data.workers import heard_while_awaited
from epochal.doctor.watch import Watch
from epochal.ending import Ending, reason_of
from epochal.errors import DiskFullError, EpochalError, PlanError, ProcessError, WorkerError
from epochal.events import Ended, Evaluated, Event, Found, Noted, Saved, Started, StepDone, Stop, StopReason
from epochal.feeding import AnyLoader
from epochal.observe.averages import TrainAverages
from epochal.observe.best import BestSoFar
from epochal.observe.console import Console
from epochal.observe.early_stopping import EarlyStopping
from epochal.observe.recorder import Recorder
from epochal.protocols import Observer, Step, StepResult
from epochal.report.history import History
from epochal.result import Result, Setting
from epochal.runtime import seeding
from epochal.runtime.compiler import Trust
from epochal.runtime.lock import Lock
from epochal.runtime.processes import first, gather, to_first, together, world
from epochal.runtime.seeding import Alike
from epochal.runtime.signals import Signals
from epochal.state import Progress, TrainState
from epochal.validation import Validation


@dataclass
class Run:
    """A prepared run: ``for event in run`` trains. As a context manager it ends properly however it is left.

    state: complete at every event. alike: what several processes draw alike. started: what observers are told first.
    about: what a later run is compared with when it resumes this one. notes: what there is to say of the start.
    saver, lock: None where there is no run folder. watch: the doctor's, None where nothing is looked for.
    """

    state: TrainState
    step: Step
    train: AnyLoader
    accumulate: int
    validation: Validation
    ending: Ending
    alike: Alike | None
    averages: TrainAverages
    best: BestSoFar
    trust: Trust
    setting: Setting
    started: Started
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    observers: Sequence[Observer] = ()
    saver: Saver | None = None
    lock: Lock | None = None
    watch: Watch | None = None
    ended: Ended | None = field(default=None, init=False)
    _handlers: ExitStack = field(default_factory=ExitStack, init=False)  # put back when it is left
    _last_evaluation: float = field(default=0.0, init=False)
    _last_saving: float = field(default=0.0, init=False)
    _saved_mark: tuple = field(default=(), init=False)
    _has_begun: bool = field(default=False, init=False)
    _were_finite: bool = field(default=False, init=False)  # the weights at the start, of a run that saves
    _modes: list[tuple[nn.Module, bool]] = field(default_factory=list, init=False)
    _train_modes: list[tuple[nn.Module, bool]] = field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[Event]:
        """The whole run, in the order in which things happen."""
        state, progress = self.state, self.state.progress
        if self._has_begun:
            fix = "iterate over it once; resume=True continues it in another run"
            raise PlanError("a run is iterated over once, and this one was.", where="iter(Run)", fix=fix)
        self._begin()
        yield self._tell(self.started)
        yield from map(self._note, self.notes)
        yield from self._save(wait=True)  # the start, too, can be resumed from, with all that is random in it
        if progress.windows and self._evaluation_is_due(at_epoch_end=False):
            yield from self._pending()  # the state was taken between a step and its evaluation
        for result in loop.steps(state, self.step, self._windows, self.ending.is_here, self.watch):
            at_epoch_end = result is None
            if result is not None:
                self._account_for(result)
                yield self._tell(StepDone(progress.step, progress.epoch + 1, progress.samples, result))
                if result.notes:
                    yield from map(self._note, result.notes)
                if self.watch is not None and self.watch.found:
                    yield from self._looked()
            due = self._evaluation_is_due(at_epoch_end)
            evaluated = self._evaluate(at_epoch_end) if due else None
            if due and evaluated is None:  # a signal came: it is made when the run is resumed
                break
            if at_epoch_end and state.schedule is not None:
                state.schedule.after_epoch()
            if evaluated is not None:
                yield from self._closed(evaluated)
            if self.saver is not None:
                yield from self._save() if self._saving_is_due(at_epoch_end) else self._saved()
        if progress.evaluated != progress.step and self.ending.signal is None:
            yield from self._pending()
        self._settle()
        yield from self._save(wait=True)
        yield from self._looked(is_over=True)
        yield self._end(*self.ending.reason())

    def alone(self) -> Iterator[Event]:
        """As ``iter(run)``, for who does nothing with the events: what cannot change then is not looked at again."""
        ours = all(type(observer) in (Console, Recorder, EarlyStopping) for observer in self.observers)
        in_memory = isinstance(self.train, Loader) and self.train.is_in_memory
        parts = [part for module in self.state.modules for part in module.modules()]
        self.trust.is_given = (
            ours and in_memory and self.validation.is_ours and not any(map(loop.switches_itself, parts))
        )
        return iter(self)

    def __enter__(self) -> Run:
        self._handlers.enter_context(self.signals)
        self._handlers.enter_context(heard_while_awaited())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if (lost := self.ending.lost(error)) is not None:  # another process; nothing can be saved without it
            with suppress(Exception):
                self.__exit__(type(lost), lost, None)
            raise lost from error
        # The signal reached them too. (Several processes would have to save together, and the others know nothing.)
        asked = self.signals.received is not None and isinstance(error, WorkerError) and world().size == 1
        try:
            if self.ended is None:
                reason, message = self.ending.reason() if asked else reason_of(error)
                self._leave(None if asked else error, reason, message)
        finally:
            self._handlers.close()
        return asked

    def _leave(self, error: BaseException | None, reason: StopReason, message: str) -> None:
        """The end of a run that did not come to its end by itself."""
        try:
            # Between two steps, or two events, the state is whole; a step of the user's may lose a worker within.
            is_lost = getattr(self.train, "is_lost", False)
            may_save = error is None or (isinstance(error, WorkerError) and world().size == 1)  # all have to, together
            if may_save and not (self.state.is_torn or is_lost):
                list(self._save(wait=True))
            elif not isinstance(error, KeyboardInterrupt | ProcessError):  # a second Ctrl-C waits for nothing
                list(self._saved(wait=True))
            if is_lost and self.saver is not None:
                self._note("a loader that keeps its place lost it with a worker: only earlier steps are saved")
            self._end(reason, message, error)
        except BaseException as failure:
            if self.ended is None:
                self._end(reason, message, error)
            if error is None or not isinstance(failure, Exception):
                raise
            error.add_note(f"epochal: {failure}")  # what ended the run matters more

    @property
    def signals(self) -> Signals:
        return self.ending.signals

    @property
    def result(self) -> Result:
        """What the run left; PlanError as long as it has not ended."""
        if (ended := self.ended) is None:
            fix = "iterate it to its end, or leave its with"
            raise PlanError("the run has not ended.", where="Run.result", fix=fix)
        history = History(self.state.rows, self.best.monitor, self.best.mode, self.best.best)
        return Result(
            self.state.model, history, ended.best, ended.reason, ended.message, ended.restored, self.started.run,
            self.setting, tuple(self.watch.told) if self.watch is not None else (),
        )  # fmt: skip

    def _begin(self) -> None:
        progress, self._has_begun = self.state.progress, True
        self._were_finite = self.saver is not None and not any(gather(nonfinite.weight(self.state.modules)))
        self.started = replace(self.started, done=progress.epoch, step=progress.step, rows=tuple(self.state.rows))
        self.ending.begin()
        if (agreement := self.ending.agreement) is not None:
            agreement.ask = lambda: self.ending.word(self.saver)
        self._last_evaluation = self._last_saving = self.ending.now()
        self._modes = [(part, part.training) for module in self.state.modules for part in module.modules()]
        for module in self.state.modules:
            # A model in train mode is left as it is: a backbone that was put to eval mode stays so.
            if not module.training:
                module.train()
        self._train_modes = [(part, part.training) for part, _ in self._modes]
        for loader in (self.train, self.validation.loader):
            if isinstance(loader, Loader):
                loader.seed = self.state.seed  # that of a resumed run

    def _windows(self, progress: Progress) -> Iterator[Window]:
        """The windows of the epoch in hand that are still to come; what an observer left in eval mode trains again."""
        if not all(module.training for module in self.state.modules):
            loop.set_modes(self._train_modes)
        batches = self.train.batches(progress.epoch, progress.windows * self.accumulate)
        return windows(batches, self.accumulate, self.setting.target)

    def _tell(self, event: Event) -> Event:
        for observer in self.observers:
            answer = observer(event)
            if isinstance(answer, Stop) and self.state.stop is None:
                self.state.stop = answer
        return event

    def _note(self, message: str) -> Event:
        return self._tell(Noted(message))

    def _looked(self, is_over: bool | None = None) -> Iterator[Event]:
        """What the doctor has found since the last time; with what the rows tell, at an evaluation and at the end."""
        if self.watch is not None:
            yield from map(self._tell, map(Found, self.watch.take(self.state.rows, is_over)))

    def _account_for(self, result: StepResult) -> None:
        if not isinstance(result, StepResult) or not isinstance(result.loss, Tensor):
            wrong = type(getattr(result, "loss", result)).__name__
            what = f"the step returned {wrong}."
            fix = "return epochal.StepResult(loss), with the loss as a scalar tensor"
            raise PlanError(what, where=f"step={getattr(self.step, '__name__', type(self.step).__name__)}", fix=fix)
        self.averages.update(result)
        # A schedule never moves before the optimizer has; an update that was left out is none.
        if result.applied and self.state.schedule is not None:
            self.state.schedule.after_step()

    def _evaluation_is_due(self, at_epoch_end: bool) -> bool:
        progress, every = self.state.progress, self.validation.every
        if every.unit == "epoch" and not at_epoch_end:  # as after nearly every update
            return False
        since = self.ending.now() - self._last_evaluation
        due = every.due(step=progress.step, epoch=progress.epoch, at_epoch_end=at_epoch_end, seconds=since)
        return due and progress.evaluated != progress.step

    def _pending(self) -> Iterator[Event]:
        if (evaluated := self._evaluate()) is not None:
            yield from self._closed(evaluated)

    def _closed(self, evaluated: Evaluated) -> Iterator[Event]:
        yield self._tell(evaluated)
        yield from self._looked(is_over=False)
        self.ending.agree()
        row = evaluated.row
        before = self.state.rows[-2] if len(self.state.rows) > 1 else {"step": 0, "val_loss": 0.0}
        if row.get("skipped") == row["step"] - before["step"]:
            yield self._note("every update since the last evaluation was left out: the weights stand still")
        if "val_loss" in row and math.isfinite(before.get("val_loss", 0.0)) and not math.isfinite(row["val_loss"]):
            yield self._note(
                f"val_loss is {row['val_loss']}: a sample of val, or what the model makes of it, is to blame"
            )

    def _evaluate(self, at_epoch_end: bool = False) -> Evaluated | None:
        """Closes a row: the training's means since the last one, and the validation. None, and nothing has happened,
        if a signal came meanwhile; an error, too, leaves all as it was.
        """
        progress, validation = self.state.progress, self.validation
        self._settle(together=validation.loader is not None)
        measured = {}
        if validation.loader is not None:
            before, is_whole = None, False
            if not validation.is_one_batch:  # a signal may come between two
                before = seeding.generator_states(), validation.loader.state_dict()
            try:
                measured = validation.measured(
                    self.setting, shared=self.ending.agreement is not None,
                    is_cut_short=lambda: self.signals.received is not None,
                )  # fmt: skip
                self.ending.agree_on_signal()
                is_whole = before is None or self.ending.signal is None
            finally:
                if not is_whole:
                    progress.reopen_epoch(at_epoch_end)
                if not is_whole and before is not None:
                    validation.loader.load_state_dict(before[1])
                    seeding.set_generator_states(before[0])
            if not is_whole:
                return None
        row: dict[str, Any] = {"epoch": max(1, progress.epoch_in_hand), "step": progress.step}
        row.update({"lr": self._lr(), "time": 0.0, **self.averages.take(), **measured})
        row["time"] = progress.seconds = self.ending.seconds()
        is_best = self.best.update(row)
        if self.state.schedule is not None:
            self.state.schedule.after_evaluation(row[self.best.monitor])
        progress.evaluated = progress.step
        self._last_evaluation = self.ending.now()
        self.state.rows.append(row)
        return Evaluated(row, is_best, self.best.best)

    def _settle(self, *, together: bool = True) -> None:
        """Lets a step that reads late (on an accelerator) say now whether all its updates were finite. together: and
        gives all processes the first one's running statistics, where the model is about to be looked at.
        """
        if (settle := getattr(self.step, "settle", None)) is not None:
            settle(self.state)
        if together and self.ending.agreement is not None:
            self.ending.agreement.align(self.state.modules)

    def _lr(self) -> float | None:
        rate = self.state.optimizer.param_groups[0].get("lr") if self.state.optimizer is not None else None
        return float(rate) if rate is not None else None

    def _saving_is_due(self, at_epoch_end: bool) -> bool:
        if (saver := self.saver) is None:
            return False
        progress, since = self.state.progress, self.ending.now() - self._last_saving
        due = saver.every.due(step=progress.step, epoch=progress.epoch, at_epoch_end=at_epoch_end, seconds=since)
        return due and self.ending.may_save(saver)

    def _save(self, *, wait: bool = False) -> Iterator[Event]:
        """Begins to save the state, unless nothing has happened since the last time; tells what is written."""
        yield from self._saved(wait=True)
        if self.saver is None or self._mark() == self._saved_mark:
            return
        self._settle()
        self.trust.end()
        if self._were_finite and (name := next(filter(None, gather(nonfinite.weight(self.state.modules))), None)):
            raise nonfinite.of_weight(name, self.state.progress.step)
        self.state.progress.seconds = self.ending.seconds()
        self.saver.start(self.state.progress.step, self.state_dict())
        self.ending.begin_to_write()
        self.keep_as_saved()
        self._last_saving = self.ending.now()
        yield from self._saved(wait=wait)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: the state, what the run is about, and what other processes have of their own."""
        whole = {**self.state.state_dict(), "about": self.about}
        if self.alike is not None:
            own = {name: part for name, part in whole.items() if name.startswith(("generators", "extras.data."))}
            own["extras.averages"] = self.averages.own_state_dict(whole["extras.averages"])
            whole |= {"generators": self.alike.states, "processes": to_first(own)}
        return whole

    def keep_as_saved(self) -> None:
        """The state stands in a checkpoint as it is; until something happens, there is nothing to save."""
        self._saved_mark = self._mark()

    def _mark(self) -> tuple:
        progress = self.state.progress
        return progress.step, progress.epoch, progress.windows, progress.evaluated, self.ending.is_stopped

    def _saved(self, *, wait: bool = False) -> Iterator[Event]:
        """Tells what was written since the last call, and raises what went wrong with it."""
        if self.saver is None or not self.saver.is_busy or not (wait or self.ending.is_written):
            return
        try:
            written = self.saver.finished(wait=wait)
        except DiskFullError as error:
            if self.saver.on_full == "stop":
                raise
            self._saved_mark = ()
            yield self._note(f"{error.what} The run does without it.")
        else:
            if written is not None:
                yield self._tell(Saved(written[1], written[0]))

    def _end(self, reason: StopReason, message: str, error: BaseException | None = None) -> Ended:
        """Puts the best weights and the modules' modes back, and tells. error: what ended the run."""
        progress, restored, is_whole = self.state.progress, False, False
        self.trust.withdraw()  # what is done with the model afterwards is not epochal's doing
        where, fix = (error.where, error.fix) if isinstance(error, EpochalError) else (None, None)
        is_torn = self.state.is_torn or isinstance(error, KeyboardInterrupt)  # an update may be half done
        try:
            restored = self.best.restore()
            if error is None and self.alike is not None:  # what a program draws after the run is alike again
                seeding.set_generator_states(first(seeding.generator_states))
            is_finite = not self._were_finite or nonfinite.weight(self.state.modules) is None
            is_whole = is_finite and (restored or not is_torn)
            if self.ending.agreement is not None:
                is_whole = self.ending.agreement.dissolve(is_whole, has_failed=error is not None)
        finally:  # a model that was changed meanwhile may not take them
            loop.set_modes(self._modes)
            self.ended = Ended(
                reason, message or reason.message, self.best.best, restored, progress.epoch, progress.step,
                self.ending.seconds(), not is_whole, where, fix,
            )  # fmt: skip
            ended = self.ended
            try:  # nobody goes on before the first process has told and written the end; and what failed in it is known
                together(lambda: self._tell(ended)) if error is None else self._tell(ended)
            finally:
                self._let_go(error)
        return ended

    def _let_go(self, error: BaseException | None) -> None:
        self.ending.end(error)
        try:
            for loader in (self.train, self.validation.loader):
                if loader is not None:
                    loader.close()
        finally:
            if self.lock is not None:
                self.lock.release() if self.saver is None else self.saver.then(self.lock.release)
