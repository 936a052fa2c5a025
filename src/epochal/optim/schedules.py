"""Learning rate schedules by name, from a factory, or as the user built them; stepped per epoch or per step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from epochal.errors import PlanError, UnknownNameError

PER_STEP = ("cosine", "onecycle", "linear")
PER_EPOCH = ("step", "multistep", "exponential", "plateau")
NAMES = (*PER_EPOCH, *PER_STEP)
_OWN_LENGTH = {"T_max", "total_iters", "total_steps"}


@dataclass(frozen=True, init=False)
class Schedule:
    """A schedule with its settings.

    kind: a name, ``f(optimizer) -> LRScheduler``, or an ``LRScheduler``. per: ``"step"`` or ``"epoch"``,
    how often it moves; by its kind if not given (cosine, linear and onecycle move every step over the
    whole run, the others every epoch). warmup: so many steps at the start in which the rate rises
    linearly to its full value. Other settings go to the torch class: ``Schedule("step", step_size=30)``.
    """

    kind: Any
    per: str | None = None
    warmup: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def __init__(self, kind: Any, *, per: str | None = None, warmup: int = 0, **settings: Any):
        for name, value in {"kind": kind, "per": per, "warmup": warmup, "settings": settings}.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        where = f"schedule={self.kind!r}"
        if isinstance(self.kind, str) and self.kind not in NAMES:
            raise UnknownNameError.of_name("schedule", self.kind, NAMES, where=where)
        if not isinstance(self.kind, str | LRScheduler) and not callable(self.kind):
            fix = "give a name, a function f(optimizer) -> LRScheduler, or an LRScheduler"
            raise PlanError(f"{type(self.kind).__name__} is not a schedule.", where=where, fix=fix)
        if self.per not in (None, "step", "epoch"):
            raise UnknownNameError.of_name("unit of a schedule", self.per, ("step", "epoch"), where=f"per={self.per!r}")
        if not isinstance(self.warmup, int) or self.warmup < 0:
            fix = "give an integer"
            raise PlanError("warmup must be a number of steps, 0 or more.", where=f"warmup={self.warmup!r}", fix=fix)
        if self.per == "step" and (self.kind == "plateau" or isinstance(self.kind, ReduceLROnPlateau)):
            fix = 'leave per= out, and set evaluate_every="500 steps"'
            raise PlanError("a plateau looks at evaluations, not at steps.", where=f"{where}, per='step'", fix=fix)
        if self.warmup and self.kind == "onecycle":
            fix = "use pct_start= instead"
            raise PlanError("onecycle has a warm-up of its own.", where=f"warmup={self.warmup}", fix=fix)
        if self.settings and not isinstance(self.kind, str):
            what = "settings belong to a schedule that is given by name."
            fix = "put them where the LRScheduler is made"
            raise PlanError(what, where=f"{where}, {', '.join(self.settings)}", fix=fix)


class Scheduled:
    """A schedule at work on an optimizer: the one place where a schedule is stepped.

    Nothing here moves before the optimizer has made its first update. length: the steps or epochs that a named
    schedule is spread over, where it is.
    """

    def __init__(self, scheduler: LRScheduler, per: str, warmup: LRScheduler | None, length: int | None = None):
        self.scheduler, self.per, self.length = scheduler, per, length
        self._warmup, self._warmup_steps, self._steps = warmup, getattr(warmup, "total_iters", 0), 0

    def after_step(self) -> None:
        """After an update of the optimizer."""
        self._steps += 1
        if self._warmup and self._steps <= self._warmup_steps:
            self._warmup.step()
            if self._steps == self._warmup_steps:  # the chain of products ends an ulp off the full rate
                for group in self._warmup.optimizer.param_groups:
                    group["lr"] = group["initial_lr"]
        elif self.per == "step":
            self.scheduler.step()

    def after_epoch(self) -> None:
        """At the end of an epoch."""
        plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        if self.per == "epoch" and not plateau and self._steps > self._warmup_steps:
            self.scheduler.step()

    def after_evaluation(self, value: float) -> None:
        """With the monitored value; only a plateau looks at it."""
        if isinstance(self.scheduler, ReduceLROnPlateau) and self._steps > self._warmup_steps:
            self.scheduler.step(value)

    def state_dict(self) -> dict[str, Any]:
        warmup = self._warmup.state_dict() if self._warmup else None
        scheduler = self.scheduler.state_dict()
        return {"scheduler": scheduler, "warmup": warmup, "steps": self._steps, "length": self.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the schedule stood; one of another length is stretched over this one (a run made longer)."""
        self._steps = state["steps"]
        if self._steps:  # the updates were made in another process; torch would warn that there were none
            self.scheduler.optimizer._opt_called = True  # type: ignore[attr-defined]
        if self._warmup:
            self._warmup.load_state_dict(state["warmup"])
        if self.length == state["length"]:
            self.scheduler.load_state_dict(state["scheduler"])
        elif moves := state["scheduler"]["last_epoch"]:
            for group in self.scheduler.optimizer.param_groups:
                group["lr"] = group["initial_lr"]
            for _ in range(moves):
                self.scheduler.step()


def build(schedule: Any, optimizer: Optimizer, *, epochs: int | None, steps: int | None, mode: str) -> Scheduled:
    """Puts a schedule to work.

    epochs, steps: the length of the run, None where it is not known. mode: "min" or "max", which way
    the monitored value improves.

    Raises PlanError for a scheduler of another optimizer, an unknown length where one is needed, or a
    plateau that watches in the wrong direction.
    """
    schedule = schedule if isinstance(schedule, Schedule) else Schedule(schedule)
    length = None  # of what is spread over the run
    if isinstance(schedule.kind, str):
        per = schedule.per or ("step" if schedule.kind in PER_STEP else "epoch")
        if schedule.kind in PER_STEP and not _OWN_LENGTH & set(schedule.settings):
            length = _length(schedule, epochs if per == "epoch" else steps, per)
        scheduler = _named(schedule, optimizer, length, mode)
    else:
        scheduler = schedule.kind if isinstance(schedule.kind, LRScheduler) else _from_factory(schedule.kind, optimizer)
        every_step = isinstance(scheduler, lr_scheduler.OneCycleLR | lr_scheduler.CyclicLR)
        per = schedule.per or ("step" if every_step else "epoch")
    _check(scheduler, optimizer, mode)
    warmup = None
    if schedule.warmup:
        warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / (schedule.warmup + 1), total_iters=schedule.warmup)
    return Scheduled(scheduler, per, warmup, length)


def _named(schedule: Schedule, optimizer: Optimizer, length: int | None, mode: str) -> LRScheduler:
    kind, settings = schedule.kind, schedule.settings
    highest = [group["lr"] for group in optimizer.param_groups]
    momentum = bool({"momentum", "betas"} & optimizer.defaults.keys())
    made_by: dict[str, tuple[Callable[..., LRScheduler], dict[str, Any]]] = {
        "step": (lr_scheduler.StepLR, {"step_size": 30, "gamma": 0.1}),
        "multistep": (lr_scheduler.MultiStepLR, {}),
        "exponential": (lr_scheduler.ExponentialLR, {"gamma": 0.95}),
        "plateau": (ReduceLROnPlateau, {"mode": mode}),
        "cosine": (lr_scheduler.CosineAnnealingLR, {"T_max": length}),
        "linear": (lr_scheduler.LinearLR, {"start_factor": 1.0, "end_factor": 0.0, "total_iters": length}),
        "onecycle": (lr_scheduler.OneCycleLR, {"max_lr": highest, "total_steps": length, "cycle_momentum": momentum}),
    }
    make, defaults = made_by[kind]
    try:
        return make(optimizer, **{**defaults, **settings})
    except (TypeError, ValueError) as error:
        needs = ' (it needs milestones, for example Schedule("multistep", milestones=[30, 60]))'
        what = f"the schedule {kind!r} cannot be made: {error}."
        fix = "give the settings of its torch class" + (needs if kind == "multistep" else "")
        raise PlanError(what, where=f"schedule={kind!r}, {settings or 'no settings'}", fix=fix) from error


def _length(schedule: Schedule, planned: int | None, per: str) -> int:
    if planned is None:
        what = f"the schedule {schedule.kind!r} needs to know how many {per}s there will be."
        fix = "give max_steps=" if per == "step" else "give epochs="
        raise PlanError(what, where="the data have no length" if per == "step" else "epochs is not given", fix=fix)
    return max(1, planned - (schedule.warmup if per == "step" else 0))


def _from_factory(factory: Callable[[Optimizer], Any], optimizer: Optimizer) -> LRScheduler:
    built = factory(optimizer)
    if not isinstance(built, LRScheduler):
        what = f"the schedule factory returned {type(built).__name__}, not an LRScheduler."
        fix = "return the scheduler, for example lambda opt: StepLR(opt, step_size=30)"
        raise PlanError(what, where="schedule", fix=fix)
    return built


def _check(scheduler: LRScheduler, optimizer: Optimizer, mode: str) -> None:
    if scheduler.optimizer is not optimizer:
        what = "the schedule moves the learning rate of another optimizer."
        fix = "give the optimizer that it was made with as optimizer=, or give f(optimizer) -> LRScheduler"
        raise PlanError(what, where=f"schedule={type(scheduler).__name__}", fix=fix)
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != mode:
        awaited, better = ("down", "up") if mode == "max" else ("up", "down")
        what = f"the plateau waits for the monitored value to go {awaited}, but it improves by going {better}."
        where = f"schedule=ReduceLROnPlateau(mode={scheduler.mode!r})"
        raise PlanError(what, where=where, fix=f"make it with mode={mode!r}")
