"""A training of some seconds on a copy, which nobody needs any more: how it goes, also at another rate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from epochal.copies import copied
from epochal.doctor.watch import Vitals
from epochal.errors import FaultError
from epochal.events import Evaluated, StepDone

if TYPE_CHECKING:
    from epochal.plan import Plan
    from epochal.run import Run

UPDATES, SECONDS = 240, 2.5  # of a trial, at most
VAL = 1.0  # seconds that an evaluation of it may take


class Trial:
    """A copy of the plan, trained for a while and watched. error: what ended it; rows: of its evaluations.

    factor: of its learning rate.
    """

    def __init__(
        self,
        plan: Plan,
        ignore: tuple[str, ...],
        *,
        factor: float = 1.0,
        updates: int = UPDATES,
        seconds: float = SECONDS,
        **changes: Any,
    ):
        self.error: Exception | None = None
        self.rows: list[Mapping[str, Any]] = []
        self.factor, self.vitals = factor, Vitals()
        self.cut = 0  # updates after which it ran out of time
        self.model: nn.Module | None = None
        self.run: Run | None = None
        began, plan = time.perf_counter(), copied(plan, compile=False, **changes)
        try:
            with plan.prepare() as run:
                self.run = run
                if run.watch is not None:
                    run.watch.ignore, run.watch.dense = ignore, 4
                    self.vitals = run.watch.vitals
                _scale(run.state, factor)
                self.model = run.state.model
                for event in run:
                    if isinstance(event, Evaluated):
                        self.rows.append(event.row)
                    elif isinstance(event, StepDone):
                        spent = time.perf_counter() - began
                        if spent + spent / event.step > seconds:  # with the next one
                            self.cut = event.step
                        if event.step >= updates or self.cut:
                            break
        except Exception as error:
            self.error = error
        self.losses = self.vitals.read()

    @property
    def found(self) -> list[Any]:
        finding = self.error.finding if isinstance(self.error, FaultError) else None
        told = self.run.watch.told if self.run is not None and self.run.watch is not None else []
        return [*([finding] if finding is not None else []), *(one for one in told if one.stage != "rows")]

    @property
    def first(self) -> float:
        return _mean(self.losses[: max(1, len(self.losses) // 8)])

    @property
    def last(self) -> float:
        """The mean of the last quarter; infinite where it ended in what is not finite."""
        if self.error is not None or not self.losses or not all(map(math.isfinite, self.losses)):
            return math.inf
        return _mean(self.losses[-max(1, len(self.losses) // 4) :])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _scale(state: Any, factor: float) -> None:
    if factor == 1.0 or state.optimizer is None:
        return
    for group in state.optimizer.param_groups:
        for name in ("lr", "initial_lr", "max_lr", "min_lr"):
            if name in group:
                group[name] = group[name] * factor
    for part in (state.schedule and state.schedule.scheduler, state.schedule and state.schedule._warmup):
        if part is not None and hasattr(part, "base_lrs"):
            part.base_lrs = [rate * factor for rate in part.base_lrs]
