"""What watches a run: its first three updates in full, later ones now and then, by numbers that the update leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from epochal.doctor import finding
from epochal.doctor.calls import MOST, Loop, parts_of
from epochal.doctor.case import Case, Pass, noted
from epochal.doctor.finding import Finding, look
from epochal.doctor.rules.symptoms import goes_well, is_stalled
from epochal.doctor.trace import Trace
from epochal.errors import FaultError
from epochal.events import Row
from epochal.protocols import Loss, StepResult
from epochal.runtime.attributes import own

if TYPE_CHECKING:
    from epochal.data.window import Window
    from epochal.plan import Plan
    from epochal.run import Run
    from epochal.state import TrainState

FIRST = 3  # updates that are watched in full
EVERY = 100  # updates between two later looks
KEPT = 300  # losses of a run that are kept, at least
APART = 4  # updates between two losses that are kept, once EVERY were made
LOOKS = 4  # looks that are kept, beside the last one
PERSISTENT = 3  # times that a warning has to be seen


@dataclass
class Look:
    """An update that was looked at. step: the updates before it. Of each parameter by name: its norm before, that of
    its change and of its gradient (NaN where it has none), the share of its rows whose gradient is 0, and of its
    numbers that have a gradient and did not change.
    """

    step: int
    rate: float
    weight: dict[str, float]
    change: dict[str, float]
    gradient: dict[str, float]
    idle_rows: dict[str, float]
    lost: dict[str, float]
    applied: bool
    begun: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)  # of the first update alone
    events: Sequence[str] = ()
    climb: float = 0.0  # the cosine of the change with the gradient
    is_own: bool = False
    forwards: int = 0  # of the model, where they were counted
    passes: int = 0  # backward ones, and how many times the loss that is reported they make together
    summed: float = 0.0
    throws_away: bool = False  # whether gradients are cleared, and no optimizer has ever stepped
    reaches: bool = True  # whether a backward pass reached a trained weight
    shares: Sequence[tuple[float, int]] = ()
    micro_batches: int = 1
    shrunk: float = 0.0  # how many times smaller a gradient is at the optimizer's step than it arrived
    is_rescaled: bool = False  # whether gradients were changed in between

    @property
    def has_moved(self) -> bool:
        return any(change > 0 for change in self.change.values())


@dataclass
class Vitals:
    """looks: at updates. losses: of updates; norms: of their gradients, where they are clipped."""

    looks: list[Look] = field(default_factory=list)
    losses: Numbers = field(default_factory=lambda: Numbers())
    norms: Numbers = field(default_factory=lambda: Numbers())
    case: Case | None = None
    classes: int = 0  # that cross_entropy is over, 0 where there is none

    def read(self) -> list[float]:
        """The losses on the host; of a long run, evenly spaced ones."""
        return self.losses.read()

    def read_norms(self) -> list[float]:
        """The norms of gradients before they were clipped, on the host."""
        return self.norms.read()


class Numbers:
    """Numbers of updates, on the device until they are read; of many, evenly spaced ones."""

    def __init__(self) -> None:
        self.new: list[Tensor] = []
        self._read: list[float] = []
        self._apart, self._count = 1, 0  # every so many of those that came are kept; how many came

    def read(self) -> list[float]:
        """All of them, or evenly spaced ones."""
        if self.new:
            kept = self.new[-self._count % self._apart :: self._apart]
            self._count += len(self.new)
            if kept and kept[0].is_cpu:
                self._read += [one.item() for one in kept]
            elif kept:  # waits for the device once
                self._read += torch.stack([one.float().reshape(()) for one in kept]).tolist()
            self.new.clear()
        if len(self._read) > 2 * KEPT:
            self._read[:] = self._read[::2]
            self._apart *= 2
        return self._read


class Story(NamedTuple):
    """The history so far. is_over: whether the run has come to its end."""

    rows: Sequence[Row]
    is_over: bool


class Watch:
    """What looks at the updates of a run. found: what is to be told; told: what was.

    dense: look at every so many updates, for a trial; None: after EVERY.
    """

    def __init__(self, plan: Plan, run: Run, *, ignore: Sequence[str] = (), dense: int | None = None):
        self.case, self.ignore, self.dense = Case(plan, run), tuple(ignore), dense
        self.vitals = Vitals(case=self.case)
        self.found: list[Finding] = []
        self.told: list[Finding] = []
        self._counts: dict[str, set[int]] = {}  # updates in which a code was found
        self._codes: set[str] = set()
        self._rows_due = 0
        self._proved: FaultError | None = None
        self._is_compiled, self._is_own = bool(plan.compile), plan.step is not None
        self._names = list(self.case.trained.items())
        self.due: float = 0  # the next update that is looked at
        self._losses, self._norms = self.vitals.losses.new, self.vitals.norms.new
        self.used: dict[int, tuple[ref[Tensor], int]] = {}  # gradients as the last update of a user's step left them

    @property
    def _first(self) -> int:
        """How many updates are watched in full; more in a trial."""
        return FIRST if self.dense is None else 2 * FIRST

    @cached_property
    def _has_compiled_parts(self) -> bool:
        """Whether the user has compiled a part of the model, the loss or the step: a mode or a hook would have it
        compiled again."""
        plan = self.case.plan
        given = [one for one in (plan.loss, plan.objective, plan.step) if one is not None]
        every = [*self.case.model.modules(), *given, *(part for one in given for part in parts_of(one))]
        return any(
            type(part).__name__ == "OptimizedModule" or "_torchdynamo_orig_callable" in own(part)
            or own(part).get("_compiled_call_impl") is not None for part in every
        )  # fmt: skip

    def begin(self) -> None:
        """Raises what can be proved before anything is read or trained."""
        for stage in ("static", "settings"):
            for one in look(stage, self.case, ignore=self.ignore, only_errors=True):
                raise FaultError.of(one)

    def note(self, result: StepResult, step: int) -> None:
        """What an update gave, the ``step``-th from 0; nothing waits for it."""
        if step > EVERY and step % APART and self.dense is None:
            return
        if type(result) is not StepResult or self.due == math.inf:
            return
        for number, kept in ((result.loss, self._losses), (result.grad_norm, self._norms)):
            if isinstance(number, Tensor):
                kept.append(number.detach() if number.requires_grad else number)

    def take(self, rows: Sequence[Row] = (), is_over: bool | None = None) -> list[Finding]:
        """What was found since the last time. is_over: None between evaluations; else the rows are looked at, too."""
        if is_over or (is_over is not None and len(rows) >= self._rows_due):
            self._rows_due = len(rows) + max(1, len(rows) // 10)  # of many rows each would take longer than the last
            step = self.case.run.state.progress.step
            for one in look("rows", Story(rows, is_over), ignore=(*self.ignore, *self._codes), step=step):
                self._tell(one)
        new, self.found = self.found, []
        self.told += new
        return new

    def _tell(self, one: Finding) -> None:
        """Each code once."""
        if one.code not in self._codes:
            self._codes.add(one.code)
            self.found.append(one)

    def look(self, step: Callable, state: TrainState, window: Window) -> StepResult:
        """Makes an update, and looks at it; later on only while the loss does not fall as it should."""
        number, before, parts = state.progress.step, [], []
        if number > EVERY and self.dense is None and goes_well(self.vitals.read()):
            self._next(number)
            return step(state, window)
        is_first = False
        with self.quietly():
            is_first = number < self._first and not (self._is_compiled and number) and not self._has_compiled_parts
            parts = [(name, p, _part(p)) for name, p in self._names]
            before = [part.clone() for _, _, part in parts]
        result, seen = self._step_seen(step, state, window) if is_first else (step(state, window), None)
        self._next(number)
        if isinstance(result, StepResult):
            with self.quietly():
                is_ill = self.dense is not None or is_stalled(self.vitals.read())
                look = _measured(parts, before, state, result, seen, full=is_first, rows=is_ill)
                kept = KEPT if self.dense is not None else LOOKS
                self.vitals.looks = [*self.vitals.looks[-kept:], look]
                self._judge(look, number)
                self.vitals.read(), self.vitals.read_norms()
        return result

    def _step_seen(self, step: Callable, state: TrainState, window: Window) -> tuple[StepResult, Loop | None]:
        try:
            if not self._is_own:
                with self._objective_seen():
                    return step(state, window), None
            seen = None
            with self.quietly():
                seen = Loop(self).begin()
            if seen is None:
                return step(state, window), None
            with seen:
                result = step(state, window)
            if self._proved is not None:  # the step has caught it
                raise self._proved
            seen.micro_batches = len(window.batches)
            with self.quietly():
                seen.close()
            return result, seen
        finally:
            self._let_go()

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """What fails inside ends the looking, and not the training; but a mistake that is proved is raised."""
        try:
            yield
        except FaultError:
            raise
        except Exception:
            self.due = math.inf
            if finding.RAISES:
                raise

    def _let_go(self) -> None:
        """What fills memory: the pass of the update, and the rows that were looked at."""
        self.case.passes[:] = [_light(one) for one in self.case.passes]
        self.case.__dict__.pop("sample", None)

    def _next(self, number: int) -> None:
        if self.due == math.inf:
            return
        if self.dense is not None:
            self.due = number + (1 if number + 1 < self._first else self.dense)
        elif number + 1 < self._first:
            self.due = number + 1
        else:
            self.due = (number // EVERY + 1) * EVERY if number >= EVERY // 2 else EVERY // 2

    @contextmanager
    def _objective_seen(self) -> Iterator[None]:
        """The objective of the default update, looked at before its loss goes back."""
        objective = self.case.objective

        def seen(forward: Callable, batch: Any) -> Loss:
            objective.watch = None
            if not isinstance(forward, nn.Module):
                return objective(forward, batch)
            with Trace(self.case.model, loss=self.case.run.state.loss, full=self.dense is not None) as trace:
                loss = objective(forward, batch)
            with self.quietly():
                noted(self.case, batch, loss.value, loss.outputs, trace)
                self.batch_seen(("batch", "wiring"))
            self._let_go()  # before the backward pass, which may need the memory
            return loss

        objective.watch = seen
        try:
            yield
        finally:
            objective.watch = None

    def batch_seen(self, stages: Sequence[str], *, without: Sequence[str] = ()) -> None:
        for call in self.case.now.calls:
            if call.name == "cross_entropy" and not call.targets.is_floating_point() and call.outputs.dim() > 1:
                self.vitals.classes = call.outputs.shape[1]
        for stage in stages:
            step = self.case.run.state.progress.step
            for one in look(stage, self.case, ignore=(*self.ignore, *without), step=step):
                self.account(one)

    def account(self, one: Finding) -> None:
        """Raises what is an error; tells a warning when it was seen in enough updates."""
        if one.level == "error":
            self._proved = FaultError.of(one)
            raise self._proved
        updates = self._counts.setdefault(one.code, set())
        updates.add(self.case.run.state.progress.step)
        if one.level == "warning" and len(updates) >= PERSISTENT:
            self._tell(one)

    def _judge(self, seen: Look, number: int) -> None:
        if seen.begun or seen.is_own or seen.lost:
            for one in look("step", seen, ignore=self.ignore, step=number):
                self.account(one)
        if len(self.vitals.looks) >= PERSISTENT:
            for one in look("symptom", self.vitals, ignore=self.ignore, step=number):
                self.account(one)
        seen.begun = {}


def _light(one: Pass) -> Pass:
    """A pass of which only names are kept, and which layers ran."""
    trace = Trace(nn.Identity())
    trace.ends = one.trace.ends
    trace.layers = [layer._replace(input=None, output=None) for layer in one.layers]
    nothing = torch.zeros(())
    return Pass(None, [], None, one.samples, None, nothing, trace, one.without, one.reached, one.is_opaque)


def _part(parameter: Tensor) -> Tensor:
    """The first numbers of a parameter, in place."""
    whole = parameter.detach()
    return whole if whole.numel() <= MOST or not whole.is_contiguous() else whole.view(-1)[:MOST]


def _measured(
    parts: list[tuple[str, nn.Parameter, Tensor]], before: list[Tensor], state: TrainState, result: StepResult,
    seen: Loop | None, *, full: bool, rows: bool,
) -> Look:  # fmt: skip
    parts = [(name, p, _part(p)) for name, p, _ in parts]  # a step may have put other memory in their place
    names = [name for name, *_ in parts]
    gradients = [p.grad if seen is None else seen.gradients.get(id(p), p.grad) for _, p, _ in parts]
    plain = {name: g for name, g in zip(names, gradients) if g is not None and g.layout is torch.strided}
    changes = torch._foreach_sub([part for *_, part in parts], before) if parts else []
    numbers = torch._foreach_norm([*before, *changes, *plain.values()]) if parts else []
    asked = [(n, g) for n, g in plain.items() if rows and g.dim() > 1 and g.shape[0] > 1 and g.numel() <= MOST]
    idle = [(~g.flatten(1).any(1)).float().mean() for _, g in asked]
    told = torch.stack([one.float() for one in (*numbers, *idle)]).tolist() if numbers else []
    count = len(names)
    sizes = dict(zip(plain, told[2 * count : 2 * count + len(plain)]))
    rate = float(state.optimizer.param_groups[0].get("lr", math.nan)) if state.optimizer is not None else math.nan
    half = {name: (g, change, part) for (name, _, part), g, change in zip(parts, gradients, changes)
            if part.dtype in (torch.bfloat16, torch.float16) and g is not None and g.shape == change.shape}  # fmt: skip
    lost = {
        name: float(((g != 0) & (change == 0)).sum() / (g != 0).sum().clamp(min=1))
        for name, (g, change, _) in half.items()
    }
    begun = {}
    if full and state.progress.step == 0:
        begun = {name: (old, g) for (name, p, _), old, g in zip(parts, before, gradients)
                 if old.shape == p.shape and (g is None or g.shape == p.shape) and p.numel() <= MOST}  # fmt: skip
    look = Look(
        state.progress.step, rate, dict(zip(names, told)), dict(zip(names, told[count:])),
        {name: sizes.get(name, math.nan) for name in names},
        dict(zip([name for name, _ in asked], told[2 * count + len(plain) :])), lost, result.applied, begun,
    )  # fmt: skip
    if seen is not None:
        look.throws_away, look.passes, look.forwards = seen.throws_away, len(seen.values), seen.forwards
        look.summed = seen.summed(result.loss) if full and isinstance(result.loss, Tensor) else 0.0
        seen.ends(look.has_moved)
        look.is_own, look.events, look.shares, look.micro_batches = True, seen.events, seen.shares, seen.micro_batches
        look.reaches = seen.is_opaque or any(id(p) in seen.reached for _, p, _ in parts)
        look.climb, look.shrunk = seen.climb(changes, parts, result.loss), seen.shrunk()
        look.is_rescaled = seen.is_rescaled
    return look
