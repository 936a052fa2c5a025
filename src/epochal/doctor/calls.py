"""What a step of the user's calls, in which order, and what its gradients are made of."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import LRScheduler

from epochal.doctor.case import noted
from epochal.doctor.finding import look
from epochal.doctor.graph import leaves
from epochal.doctor.trace import Trace, tensors, version_of
from epochal.runtime.attributes import content, own

if TYPE_CHECKING:
    from epochal.doctor.watch import Watch

MOST = 2**20  # numbers of a parameter that are looked at
DEPTH, MANY = 4, 200  # how deep, and at how many things at once, it is looked into what a step holds


class Loop:
    """Sees what a step of the user's calls, in which order: backward passes, optimizers, schedules, clipping.

    events: ``backward``, ``step``, ``empty step`` (no parameter had a gradient), ``stale step`` (one had an old
    gradient in it), ``foreign step`` (nothing of the model's), ``early schedule``,
    ``unscaled fp16``.
    """

    def __init__(self, watch: Watch):
        self.watch, self.case = watch, watch.case
        self.events: list[str] = []
        self.micro_batches = 1
        self.values: list[Tensor] = []  # that went back
        self._maximizes = False
        self._is_first = self.case.run.state.progress.step == 0
        self._stepped: list[Optimizer] = []
        self._has_memory = False  # whether an optimizer goes on from earlier updates, as one with a momentum does
        # Of each backward pass: by what a loss was multiplied, and how many targets it is the mean over.
        self.shares: list[tuple[float, int]] = []
        self.gradients: dict[int, Tensor] = {}
        parts = [self.case.plan.step, *parts_of(self.case.plan.step)]
        self._optimizers = [one for one in of_type(Optimizer, parts) if "param_groups" in own(one)]
        if any("optimizer" in one.__code__.co_names for one in of_type(FunctionType, parts) if _is_users(one)):
            self._optimizers += [one for one in [self.case.run.state.optimizer] if one is not None]  # state.optimizer
        self._scalers = of_type(torch.amp.GradScaler, parts)
        self._stack = ExitStack()
        self._thread = threading.get_ident()
        self._is_trial = watch.dense is not None
        self._trace = Trace(self.case.model, self._goes_back, full=self._is_trial)
        self.is_opaque = False
        self.reached: set[int] = set()
        self._arrived: dict[int, Tensor] = {}
        self._old: dict[int, Tensor] = {}  # gradients of an update before, as a new one arrives
        self._stale: dict[int, Tensor] = {}  # those that it was added to
        self._added: dict[int, int] = {}  # the version of each gradient, once backward has added to it
        self.is_rescaled = False  # whether gradients were changed between backward and the optimizer's step
        self._keeps = False  # whether gradients of an update before are added to
        self._used = watch.used
        # Schedules of optimizers that have not stepped yet, and how far they were.
        schedules = of_type(LRScheduler, parts) if self._is_first else []
        schedules = [one for one in schedules if {"last_epoch", "optimizer"} <= own(one).keys()]
        self._waiting = {one: one.last_epoch for one in schedules if not getattr(one.optimizer, "_opt_called", False)}

    def begin(self) -> Loop:
        """Sees from now on what is called, until its ``with`` is left."""
        hooks = torch_optimizer.register_optimizer_step_pre_hook, torch_optimizer.register_optimizer_step_post_hook
        with ExitStack() as stack:
            stack.callback(hooks[0](self._steps).remove)
            stack.callback(hooks[1](self._has_stepped).remove)
            every = [*(p for _, p in self.watch._names), *held_by(self._optimizers)]
            for p in {id(p): p for p in every if p.requires_grad and p.is_leaf}.values():
                stack.callback(p.register_hook(self._arriving(p)).remove)
                stack.callback(p.register_post_accumulate_grad_hook(self._has_added).remove)
            stack.enter_context(self._trace)
            self._stack = stack.pop_all()
        return self

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _goes_back(self, value: Tensor) -> None:
        self.events.append("backward")
        self.values.append(value.detach())
        with self.watch.quietly():
            reached, is_opaque = leaves(value)
            self.reached |= reached
            self.is_opaque = self.is_opaque or is_opaque
            if self._is_trial:
                self._note_share(value)
            if self.events.count("backward") == 1 and value.numel() == 1:
                self._first_goes_back(value)
            if not self._is_trial:
                self._trace.stop()  # what comes after it may need the memory

    def _first_goes_back(self, value: Tensor) -> None:
        made = (one for layer in self._trace.layers for one in tensors(layer.output))
        if not self._scalers and any(one.dtype is torch.float16 and one.requires_grad for one in made):
            self.events.append("unscaled fp16")
        one = noted(self.case, None, value, None, self._trace)
        one.samples = max((layer.shape[0] for layer in one.layers if layer.shape), default=1)
        # Of several networks this pass may be another one's: what the step reaches is known at its end.
        self.watch.batch_seen(("batch", "graph") if self._is_trial else ("batch",), without=("detached-loss",))

    def _note_share(self, value: Tensor) -> None:
        """Of a backward pass from one loss of torch's: its factor, and how many targets it is the mean over."""
        calls = [call for call in self._trace.calls if call.result.requires_grad]
        if not calls or calls[-1].result.dim() or value.dim():
            return
        (slope,) = torch.autograd.grad(value, calls[-1].result, retain_graph=True, allow_unused=True)
        if slope is not None and calls[-1].reduction == "mean":
            targets = calls[-1].targets
            counted = (
                int((targets != calls[-1].ignore_index).sum()) if not targets.is_floating_point() else targets.numel()
            )
            self.shares.append((slope.item(), counted))

    def _arriving(self, p: nn.Parameter) -> Callable[[Tensor], None]:
        def arrive(gradient: Tensor) -> None:
            with self.watch.quietly():
                self._note_arrival(p, gradient)

        return arrive

    def _note_arrival(self, p: nn.Parameter, gradient: Tensor) -> None:
        if self._is_trial and gradient.layout is torch.strided:
            before = self._arrived.get(id(p))
            self._arrived[id(p)] = gradient.detach().clone() if before is None else before + gradient
        if p.grad is None or not bool(p.grad.any()):
            self._old.pop(id(p), None)  # it was cleared
            self._stale.pop(id(p), None)
            return
        self._keeps = True
        if self._is_used(p):
            self._old[id(p)] = p.grad

    def _has_added(self, p: Tensor) -> None:
        """After a backward pass; autograd.grad, whose result may be put anywhere, does not come here."""
        with self.watch.quietly():
            if id(p) in self._old and p.grad is self._old[id(p)]:
                self._stale[id(p)] = p.grad
            if p.grad is not None:
                self._added[id(p)] = version_of(p.grad)

    def _steps(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == self._thread:
            with self.watch.quietly():
                self._note_step(optimizer, has_closure=len(args) > 1 or bool(kwargs))

    def _note_step(self, optimizer: Optimizer, *, has_closure: bool) -> None:
        every = [p for p in held_by([optimizer]) if p.requires_grad]
        if not has_closure and not any(p.grad is not None for p in every):
            self.events.append("empty step")
        elif any(self._is_stale(p) for p in every):
            self.events.append("stale step")
        if every and not self._is_of_model(every) and not self._waits:
            self.events.append("foreign step")
        self._has_memory = self._has_memory or bool(optimizer.state)
        self._stepped.append(optimizer)
        for one in [one for one in self._waiting if one.optimizer is optimizer]:
            if one.last_epoch > self._waiting.pop(one):
                self.events.append("early schedule")
        self._maximizes = self._maximizes or any(group.get("maximize") for group in optimizer.param_groups)
        self.events.append("step")
        if optimizer is not self.case.optimizer:
            for one in look("settings", replace(self.case, own_optimizer=optimizer), ignore=self.watch.ignore):
                self.watch.account(one)
        plain = [p for p in every if p.grad is not None and p.grad.layout is torch.strided and p.numel() <= MOST]
        self.is_rescaled |= any(self._added.get(id(p), now) != now for p in plain if (now := version_of(p.grad)) >= 0)
        self.gradients |= {id(p): p.grad.detach().clone() for p in plain if p.grad is not None}

    def _is_of_model(self, every: Sequence[Tensor]) -> bool:
        known = {id(p) for _, p in self.watch._names}
        return any(id(p) in known for p in every)

    def _is_used(self, p: Tensor) -> bool:
        """Whether its gradient is still as an optimizer has left it in an update before."""
        gradient, version = self._used.get(id(p), (None, 0))
        return gradient is not None and gradient() is p.grad and version_of(p.grad) == version

    def _is_stale(self, p: Tensor) -> bool:
        """Whether an old gradient was added to, and is still there."""
        return id(p) in self._stale and p.grad is self._stale[id(p)] and bool(p.grad.any())

    @property
    def _waits(self) -> bool:
        """Whether another optimizer of the step's holds weights of the model: it may step in other updates."""
        return self._is_of_model(held_by([one for one in self._optimizers if one not in self._stepped]))

    def _has_stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == self._thread:
            with self.watch.quietly():
                self._note_used(held_by([optimizer]))

    def _note_used(self, every: Sequence[Tensor]) -> None:
        self._used |= {id(p): (ref(p.grad), version_of(p.grad)) for p in every if p.grad is not None}

    def ends(self, has_moved: bool) -> None:
        """After the update. A step without an optimizer uses gradients, too."""
        if "step" in self.events or not has_moved:
            return
        if any(self._is_stale(p) for _, p in self.watch._names):
            self.events.append("stale step")
        self._note_used([p for _, p in self.watch._names])

    @property
    def forwards(self) -> int:
        return sum(layer.path == "" for layer in self._trace.layers)

    @property
    def throws_away(self) -> bool:
        """Whether gradients were cleared before they were used, by the first optimizer that would; a scaler may do that
        on purpose."""
        return "backward" in self.events and not self._keeps and not self._used and not self._scalers

    def summed(self, loss: Tensor) -> float:
        """How many times the loss that is reported went back in one update."""
        sizes = [float(value.sum()) for value in self.values] if self.events.count("step") == 1 else []
        return sum(sizes) / float(loss) if sizes and float(loss) and not self.is_rescaled else 0.0

    def climb(
        self, changes: Sequence[Tensor], parts: Sequence[tuple[str, nn.Parameter, Tensor]], loss: Tensor
    ) -> float:
        """The cosine between what the update did and the gradient that it was made from: below 0 where it goes down."""
        used = self.gradients if "step" in self.events else self._arrived  # a step may do without an optimizer
        pairs = [(change.float(), used[id(p)].float()) for change, (_, p, _) in zip(changes, parts)
                 if id(p) in used and used[id(p)].shape == change.shape]  # fmt: skip
        if self._has_memory or self.events.count("step") > 1 or ("step" not in self.events and not self._is_first):
            return 0.0  # what it remembers may lead another way
        if sum(float(value.sum()) for value in self.values) * float(loss.detach()) < 0:
            return 0.0  # what went back is the opposite of what is reported, and is to be made large
        dot = sum(float((one * two).sum()) for one, two in pairs)
        sizes = [math.sqrt(sum(float(pair[at].pow(2).sum()) for pair in pairs)) for at in (0, 1)]
        return dot / (sizes[0] * sizes[1]) if sizes[0] and sizes[1] and not self._maximizes else 0.0

    def shrunk(self) -> float:
        pairs = [(self._arrived[key], g) for key, g in self.gradients.items() if key in self._arrived]
        sizes = [math.sqrt(sum(float(pair[at].float().pow(2).sum()) for pair in pairs)) for at in (0, 1)]
        scale = max((one.get_scale() for one in self._scalers), default=1.0)
        return sizes[0] / scale / sizes[1] if sizes[1] else 0.0

    def close(self) -> None:
        """After the update: what all of its backward passes reached, and whether layers were connected at all. What
        another optimizer of the step's holds may be moved in other updates."""
        if not self.case.passes or "backward" not in self.events:
            return
        self.case.held |= {id(p): group for one in [*self._optimizers, *self._stepped] for group in one.param_groups
                           for p in group["params"]}  # fmt: skip
        self.case.now.reached, self.case.now.is_opaque = self.reached, self.is_opaque
        self.case.now.without = [name for name, p in self.case.trained.items() if id(p) not in self.reached]
        step = self.case.run.state.progress.step
        for one in look("wiring", self.case, ignore=self.watch.ignore, step=step):
            self.watch.account(one)


def _is_users(one: Any) -> bool:
    """Whether a function or a class is not torch's, or epochal's own."""
    return str(one.__module__).partition(".")[0] not in ("torch", "epochal", "builtins")


def of_type(kind: type, parts: Sequence[Any]) -> list[Any]:
    """Those of a type; asked of the type itself, for a lazy object may not be ready to say."""
    return [one for one in parts if issubclass(type(one), kind)]


def held_by(optimizers: Sequence[Optimizer]) -> list[nn.Parameter]:
    return [p for one in optimizers for group in one.param_groups for p in group["params"]]


def parts_of(part: Any) -> list[Any]:
    """What a function or an object holds: in its closure, among the globals that it names, in what it is bound to, in
    attributes, lists and dicts, and what these hold; not what is inside of modules and optimizers, and of torch.
    """
    found: dict[int, Any] = {}
    ahead = [part]
    for _ in range(DEPTH):
        new = {id(one): one for outer in ahead for one in _held(outer)[:MANY] if id(one) not in found}
        found |= new
        ahead = list(new.values())[:MANY]
    return list(found.values())


def _held(part: Any) -> list[Any]:
    kind = type(part)
    if issubclass(kind, nn.Module | Optimizer | LRScheduler | Tensor | type | ModuleType):
        return []
    if kind is FunctionType and not _is_users(part):
        return []
    held = list(own(part).values())
    if kind is MethodType:
        held += [part.__self__, part.__func__]
    elif kind is FunctionType:
        held += [value for cell in part.__closure__ or () for value in content(cell)]
        held += [part.__globals__[name] for name in part.__code__.co_names if name in part.__globals__]
    elif kind is partial:
        held += [part.func, *part.args, *part.keywords.values()]
    elif issubclass(kind, dict):
        held += islice(dict.values(part), MANY)
    elif issubclass(kind, list):
        held += islice(list.__iter__(part), MANY)
    elif issubclass(kind, tuple):
        held += islice(tuple.__iter__(part), MANY)
    elif _is_users(kind):
        held += [one for one in vars(kind).values() if type(one) is FunctionType]
    return held
