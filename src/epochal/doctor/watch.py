"""What watches a run: its first three updates in full, later ones now and then, by numbers that the update leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import LRScheduler

from epochal.doctor.case import Case, Pass, noted
from epochal.doctor.finding import Finding, look
from epochal.doctor.trace import Trace, leaves
from epochal.errors import FaultError
from epochal.events import Row
from epochal.protocols import Loss, StepResult

if TYPE_CHECKING:
    from epochal.data.window import Window
    from epochal.plan import Plan
    from epochal.run import Run
    from epochal.state import TrainState

FIRST = 3  # updates that are watched in full
EVERY = 100  # updates between two later looks
MOST = 2**20  # numbers of a parameter that are looked at
PERSISTENT = 3  # times that a warning has to be seen


@dataclass
class Look:
    """An update that was looked at. step: the updates before it. Of each parameter by name: its norm before, that of
    its change and of its gradient (NaN where it has none), the share of its rows whose gradient is 0, and of its numbers
    that have a gradient and did not change.
    """

    step: int
    rate: float
    weight: dict[str, float]
    change: dict[str, float]
    gradient: dict[str, float]
    idle_rows: dict[str, float]
    lost: dict[str, float]
    applied: bool
    is_half: frozenset[str] = frozenset()
    # Of the first updates alone, as they were seen to be made:
    begun: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    sparse: frozenset[str] = frozenset()
    events: Sequence[str] = ()
    climb: float = 0.0  # the cosine of the change with the gradient
    is_own: bool = False
    shares: Sequence[tuple[float, int]] = ()
    micro_batches: int = 1
    shrunk: float = 0.0  # how many times smaller a gradient is at the optimizer's step than it arrived

    @property
    def has_moved(self) -> bool:
        return any(change > 0 for change in self.change.values())

    def has_gradients_in(self, name: str) -> bool:
        """Whether a weight beside this one has a gradient that is not 0: else nothing can be said of symmetry."""
        return any(size > 0 for other, size in self.gradient.items() if other != name and not math.isnan(size))


@dataclass
class Vitals:
    """looks: at updates. losses: of every update, as tensors until they are read. begun: what the run begins with."""

    looks: list[Look] = field(default_factory=list)
    losses: list[Any] = field(default_factory=list)
    norms: list[Any] = field(default_factory=list)
    case: Case | None = None
    classes: int = 0  # that cross_entropy is over, 0 where there is none

    def read(self) -> list[float]:
        """The losses on the host."""
        new = [one for one in self.losses if isinstance(one, Tensor)]
        if new:
            values = torch.stack([one.detach().float().reshape(()).cpu() for one in new]).tolist()
            self.losses[len(self.losses) - len(new) :] = values
        return self.losses

    def read_norms(self) -> list[float]:
        """The norms of gradients before they were clipped, on the host."""
        self.norms[:] = [float(one) for one in self.norms]
        return self.norms


class Story(NamedTuple):
    """The history so far. is_over: whether the run has come to its end."""

    rows: Sequence[Row]
    is_over: bool


class Watch:
    """What is put around the step of a run. found: what is to be told.

    dense: look at every so many updates, for a trial; None: after EVERY. levels: of what is found by the first batches.
    """

    def __init__(self, plan: Plan, run: Run, *, ignore: Sequence[str] = (), dense: int | None = None):
        self.case, self.ignore, self.dense = Case(plan, run), tuple(ignore), dense
        self.vitals = Vitals(case=self.case)
        self.found: list[Finding] = []
        self._counts: dict[str, int] = {}
        self._told: set[str] = set()
        self._is_compiled, self._is_own = bool(plan.compile), plan.step is not None
        self._names = list(self.case.trained.items())
        self._due = 0
        self.used: dict[int, tuple[int, int]] = {}  # gradients as the last update of a user's step left them

    @property
    def _first(self) -> int:
        """How many updates are watched in full; more in a trial."""
        return FIRST if self.dense is None else 2 * FIRST

    def begin(self) -> None:
        """Raises what can be proved before anything is read or trained."""
        for one in look("static", self.case, ignore=self.ignore, only_errors=True):
            raise FaultError.of(one)

    def around(self, step: Callable) -> Callable[[TrainState, Window], StepResult]:
        """The step, watched."""
        losses, norms = self.vitals.losses, self.vitals.norms

        def watched(state: TrainState, window: Window) -> StepResult:
            if state.progress.step < self._due:
                result = step(state, window)
            else:
                result = self._look(step, state, window)
            if isinstance(result, StepResult):
                losses.append(result.loss)
                if result.grad_norm is not None:
                    norms.append(result.grad_norm)
            return result

        return watched

    def read(self, rows: Sequence[Row], *, is_over: bool = False) -> None:
        """After an evaluation, and at the end."""
        for one in look("rows", Story(rows, is_over), ignore=self.ignore, step=self.case.run.state.progress.step):
            if one.code not in self._told:
                self._told.add(one.code)
                self.found.append(one)

    def take(self) -> list[Finding]:
        """What was found since the last time."""
        new, self.found = self.found, []
        return new

    def _look(self, step: Callable, state: TrainState, window: Window) -> StepResult:
        number = state.progress.step
        is_first = number < self._first and (not self._is_compiled or number == 0)
        parts = [(name, p, _part(p)) for name, p in self._names]
        before = [part.clone() for _, _, part in parts]
        with ExitStack() as seeing:
            events = seeing.enter_context(self._seen(step)) if is_first and self._is_own else None
            if is_first and not self._is_own:
                seeing.enter_context(self._objective_seen())
            result = step(state, window)
        if events is not None:
            events.micro_batches = len(window.batches)
        self._next(number)
        if not isinstance(result, StepResult):
            return result
        look = _measured(parts, before, state, result, events, full=is_first)
        self.vitals.looks.append(look)
        self._judge(look, number)
        return result

    def _next(self, number: int) -> None:
        if self.dense is not None:
            self._due = number + (1 if number + 1 < self._first else self.dense)
        elif number + 1 < self._first:
            self._due = number + 1
        else:
            self._due = (number // EVERY + 1) * EVERY if number >= EVERY // 2 else EVERY // 2

    @contextmanager
    def _objective_seen(self) -> Iterator[None]:
        """The objective of the default update, looked at before its loss goes back."""
        objective = self.case.objective

        def seen(forward: Callable, batch: Any) -> Loss:
            objective.watch = None
            if not isinstance(forward, nn.Module):
                return objective(forward, batch)
            with Trace(self.case.model) as trace:
                loss = objective(forward, batch)
            noted(self.case, batch, loss.value, loss.outputs, trace)
            self._batch_seen(("batch", "wiring"))
            return loss

        objective.watch = seen
        try:
            yield
        finally:
            objective.watch = None

    @contextmanager
    def _seen(self, step: Callable) -> Iterator[Loop]:
        """A step of the user's, with all that it calls."""
        seen = Loop(self, step)
        with seen:
            yield seen
        seen.close()

    def _batch_seen(self, stages: Sequence[str]) -> None:
        for call in self.case.now.calls:
            if call.name == "cross_entropy" and not call.targets.is_floating_point() and call.outputs.dim() > 1:
                self.vitals.classes = call.outputs.shape[1]
        for stage in stages:
            step = self.case.run.state.progress.step
            for one in look(stage, self.case, ignore=self.ignore, step=step):
                self._account(one)
        self.case.passes[:-1] = [_light(one) for one in self.case.passes[:-1]]

    def _account(self, one: Finding) -> None:
        """Raises what is an error; tells a warning when it was seen often enough."""
        if one.code in self._told:
            return
        if one.level == "error":
            self._told.add(one.code)
            raise FaultError.of(one)
        self._counts[one.code] = self._counts.get(one.code, 0) + 1
        if one.level == "warning" and self._counts[one.code] >= PERSISTENT:
            self._told.add(one.code)
            self.found.append(one)

    def _judge(self, seen: Look, number: int) -> None:
        if seen.begun or seen.is_own or seen.is_half:
            for one in look("step", seen, ignore=self.ignore, step=number):
                self._account(one)
        if len(self.vitals.looks) >= PERSISTENT:
            for one in look("symptom", self.vitals, ignore=self.ignore, step=number):
                self._account(one)
        seen.begun = {}


def _light(one: Pass) -> Pass:
    """A pass of which only the names are kept."""
    one.batch = one.outputs = one.targets = None
    one.inputs, one.trace.calls, one.trace.spread = [], [], []
    one.trace.softmaxes, one.trace.thresholds = [], []
    one.trace.layers = [layer._replace(input=None, output=None) for layer in one.trace.layers]
    one.value = torch.zeros(())
    return one


def _part(parameter: Tensor) -> Tensor:
    """The first numbers of a parameter, in place."""
    whole = parameter.detach()
    return whole if whole.numel() <= MOST or not whole.is_contiguous() else whole.view(-1)[:MOST]


def _measured(
    parts: list[tuple[str, nn.Parameter, Tensor]], before: list[Tensor], state: TrainState, result: StepResult,
    seen: Loop | None, *, full: bool,
) -> Look:  # fmt: skip
    names = [name for name, *_ in parts]
    gradients = [p.grad if seen is None else seen.gradients.get(id(p), p.grad) for _, p, _ in parts]
    plain = {name: g for name, g in zip(names, gradients) if g is not None and g.layout is torch.strided}
    changes = torch._foreach_sub([part for *_, part in parts], before) if parts else []
    numbers = torch._foreach_norm([*before, *changes, *plain.values()]) if parts else []
    rows = [(n, g) for n, g in plain.items() if g.dim() > 1 and g.shape[0] > 1 and g.numel() <= MOST]
    idle = [(~g.flatten(1).any(1)).float().mean() for _, g in rows]
    told = torch.stack([one.float() for one in (*numbers, *idle)]).tolist() if numbers else []
    count = len(names)
    sizes = dict(zip(plain, told[2 * count : 2 * count + len(plain)]))
    rate = float(state.optimizer.param_groups[0]["lr"]) if state.optimizer is not None else math.nan
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
    return Look(
        state.progress.step, rate, dict(zip(names, told)), dict(zip(names, told[count:])),
        {name: sizes.get(name, math.nan) for name in names}, dict(zip([n for n, _ in rows], told[2 * count + len(plain) :])),
        lost, result.applied, frozenset(half), begun, frozenset(),
        seen.events if seen is not None else (), seen.climb(changes, parts) if seen is not None else 0.0, seen is not None,
        seen.shares if seen is not None else (), seen.micro_batches if seen is not None else 1,
        seen.shrunk() if seen is not None else 0.0,
    )  # fmt: skip


class Loop:
    """Sees what a step of the user's calls, in which order: backward passes, optimizers, schedules, clipping.

    events: ``backward``, ``step``, ``empty step`` (no parameter had a gradient), ``stale step`` (one had an old gradient
    in it), ``foreign step`` (nothing of the model's), ``early schedule``.
    """

    def __init__(self, watch: Watch, step: Callable):
        self.watch, self.case = watch, watch.case
        self.events: list[str] = []
        self.micro_batches = 1
        self.shares: list[
            tuple[float, int]
        ] = []  # of each backward pass: by what a loss was multiplied, and what it counts
        self.gradients: dict[int, Tensor] = {}
        self._parts = list(parts_of(step))
        self._stack = ExitStack()
        self._trace: Trace | None = None
        self._reached: set[int] = set()
        self._arrived: dict[int, Tensor] = {}
        self._stale: set[int] = set()
        self._used: dict[int, tuple[int, int]] = watch.used

    def __enter__(self) -> Loop:
        hooks = torch_optimizer.register_optimizer_step_pre_hook, torch_optimizer.register_optimizer_step_post_hook
        self._stack.callback(hooks[0](self._steps).remove)
        self._stack.callback(hooks[1](self._has_stepped).remove)
        every = [p for _, p in self.watch._names]
        every += [p for one in self._parts if isinstance(one, Optimizer) for g in one.param_groups for p in g["params"]]
        for p in {id(p): p for p in every if p.requires_grad and p.is_leaf}.values():
            self._stack.callback(p.register_hook(self._arriving(p)).remove)
        self._trace = Trace(self.case.model, self._goes_back)
        self._stack.enter_context(self._trace)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _goes_back(self, value: Tensor) -> None:
        self.events.append("backward")
        self._reached |= leaves(value)
        self._note_share(value)
        if self.events.count("backward") == 1 and value.numel() == 1 and self._trace is not None:
            one = noted(self.case, getattr(self.watch, "batch", None), value, None, self._trace)
            one.samples = max(
                (layer.input.shape[0] for layer in one.layers if layer.input is not None and layer.input.dim()),
                default=1,
            )
            self.watch._batch_seen(("batch",))

    def _note_share(self, value: Tensor) -> None:
        """Of a backward pass from one loss of torch's: its factor, and how many targets it is the mean over."""
        calls = [call for call in self._trace.calls if call.result.requires_grad] if self._trace is not None else []
        if not calls or calls[-1].result.dim() or value.dim():
            return
        (slope,) = torch.autograd.grad(value, calls[-1].result, retain_graph=True, allow_unused=True)
        if slope is not None and calls[-1].reduction == "mean":
            targets = calls[-1].targets
            counted = int((targets != -100).sum()) if not targets.is_floating_point() else targets.numel()
            self.shares.append((slope.item(), counted))

    def _arriving(self, p: nn.Parameter) -> Callable[[Tensor], None]:
        def arrive(gradient: Tensor) -> None:
            before = self._arrived.get(id(p))
            if gradient.layout is torch.strided:
                self._arrived[id(p)] = gradient.detach() if before is None else before + gradient.detach()
            used = self._used.get(id(p))
            if p.grad is None or used is None:
                return
            if used == (id(p.grad), p.grad._version) and bool(p.grad.any()):
                self._stale.add(id(p))

        return arrive

    def _steps(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        every = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        known = {id(p) for _, p in self.watch._names}
        if not any(p.grad is not None for p in every):
            self.events.append("empty step")
        elif any(id(p) in self._stale and p.grad is not None for p in every):
            self.events.append("stale step")
        if every and not any(id(p) in known for p in every):
            self.events.append("foreign step")
        for one in self._parts:
            if isinstance(one, LRScheduler) and one.optimizer is optimizer and one._step_count > 1:
                if not any("step" in event for event in self.events) and not self._used:
                    self.events.append("early schedule")
        self.events.append("step")
        self.watch.case.held |= {id(p): group for group in optimizer.param_groups for p in group["params"]}
        plain = [p for p in every if p.grad is not None and p.grad.layout is torch.strided and p.numel() <= MOST]
        self.gradients |= {id(p): p.grad.detach().clone() for p in plain}

    def _has_stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._used[id(p)] = (id(p.grad), p.grad._version)

    def climb(self, changes: Sequence[Tensor], parts: Sequence[tuple[str, nn.Parameter, Tensor]]) -> float:
        """The cosine between what the update did and the gradient that it was made from: below 0 where it goes down."""
        pairs = [(change.float(), self.gradients[id(p)].float()) for change, (_, p, _) in zip(changes, parts)
                 if id(p) in self.gradients and self.gradients[id(p)].shape == change.shape]  # fmt: skip
        dot = sum(float((one * two).sum()) for one, two in pairs)
        sizes = [math.sqrt(sum(float(pair[at].pow(2).sum()) for pair in pairs)) for at in (0, 1)]
        return dot / (sizes[0] * sizes[1]) if sizes[0] and sizes[1] else 0.0

    def shrunk(self) -> float:
        pairs = [(self._arrived[key], g) for key, g in self.gradients.items() if key in self._arrived]
        sizes = [math.sqrt(sum(float(pair[at].float().pow(2).sum()) for pair in pairs)) for at in (0, 1)]
        scale = max((one.get_scale() for one in self._parts if isinstance(one, torch.amp.GradScaler)), default=1.0)
        return sizes[0] / scale / sizes[1] if sizes[1] else 0.0

    def close(self) -> None:
        """After the update: what all of its backward passes reached, and whether layers were connected at all."""
        if not self.case.passes or "backward" not in self.events:
            return
        self.case.now.reached = self._reached
        self.case.now.without = [name for name, p in self.case.trained.items() if id(p) not in self._reached]
        step = self.case.run.state.progress.step
        for one in look("wiring", self.case, ignore=self.watch.ignore, step=step):
            self.watch._account(one)


def parts_of(function: Any, depth: int = 0) -> Iterator[Any]:
    """What a function holds: in its closure, among the globals that it names, or in the object that it belongs to."""
    if isinstance(function, MethodType):
        yield from parts_of(function.__self__, depth)
        function = function.__func__
    if isinstance(function, FunctionType):
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:
                continue
            yield held
            if isinstance(held, FunctionType | MethodType) and depth < 2:
                yield from parts_of(held, depth + 1)
        yield from (function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__)
    elif hasattr(function, "__dict__") and not isinstance(function, nn.Module | type):
        for value in vars(function).values():
            yield value
            if isinstance(value, list | tuple):
                yield from value
