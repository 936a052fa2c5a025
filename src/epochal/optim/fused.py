"""One move of the weights by the optimizer's fused kernel itself, without what ``optimizer.step()`` does around it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise, repeat, starmap
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW
from torch.optim import optimizer as _torch

_HOME = os.path.dirname(torch.__file__)
_ADAMS = ("fused", "amsgrad", "maximize", "decoupled_weight_decay", "differentiable")
_SGDS = ("fused", "nesterov", "maximize", "differentiable")
_COUNT, _FIRST, _SECOND, _LARGEST, _MOMENTUM = map(
    itemgetter, ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
)


class Fused:
    """``move(gradients)`` does what ``optimizer.step()`` does, to the bit, in a fifth of its time.

    torch's ``step`` sorts weights by device and type, gathers their states and adds 1 to each of their counts, one
    after the other, at every update. Here that is known from the update before, and found to be so still; the counts
    share one tensor. Whatever is unusual is left to ``optimizer.step()``: another optimizer than torch's own Adam,
    AdamW or SGD with ``fused=True``, hooks, a method that somebody has replaced, a weight without gradient, a state or
    weights that were exchanged, the first update.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> move = Fused(SGD([weight], lr=0.5, fused=True))
    >>> for _ in range(2):
    ...     weight.sum().backward()
    ...     move([weight.grad])
    ...     weight.grad = None
    >>> weight.data
    tensor([0., 0.])
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self._known: tuple[Any, ...] = ()  # what has to be as it was: the optimizer's own groups, states and step
        self.weights: list[Tensor] = []
        self._states: list[dict[str, Any]] = []
        self.kinds: list[Kind] = []
        self._settings: tuple[str, ...] = ()
        self._as_set: list[Any] = []  # the settings of all groups that decide on a kernel's operations
        self.kernels: list[Any] = []

    def __call__(self, gradients: list[Tensor], found: Tensor | None = None) -> None:
        """gradients: of all weights, in the order of the optimizer's groups; those that have none are left out.
        found: where it is above 0, the device leaves the update out.
        """
        if not (self.is_ready or self._begin()) or len(gradients) != len(self.weights):
            _step(self.optimizer, found)
            self.learn()
            return
        was_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            for kernel in self.kernels:
                kernel(gradients, found)
        finally:
            torch._C._set_grad_enabled(was_enabled)

    @property
    def is_ready(self) -> bool:
        """Whether all is as it was at the last update, so that it can be done without ``optimizer.step()``."""
        if not self.kernels:
            return False
        one, (groups, states, own, method) = self.optimizer, self._known
        return (
            one.param_groups is groups
            and one.state is states
            and one.__dict__.get("step") is own
            and type(one).step is method
            and not (one._optimizer_step_pre_hooks or one._optimizer_step_post_hooks)
            and not (_torch._global_optimizer_pre_hooks or _torch._global_optimizer_post_hooks)
            and _are(self.weights, [weight for group in groups for weight in group["params"]])
            and _are(self._states, states.values())
            and [group[name] for group in groups for name in self._settings] == self._as_set
            and all(map(_fits, groups, self.kinds))
            and all(kernel.is_whole for kernel in self.kernels)
        )

    def _begin(self) -> bool:
        """Makes the state of an Adam before its first update, as its ``step`` would; True if all is known then.

        (The first call of ``step`` imports torch's compiler, which takes a second.)
        """
        one = self.optimizer
        if type(one) not in (Adam, AdamW) or one.state:
            return False
        weights = [weight for group in one.param_groups for weight in group["params"]]
        if any(weight.grad is None or weight.grad.is_sparse for weight in weights):
            return False
        with suppress(TypeError):  # of another torch, whose method takes other lists
            for group in one.param_groups:
                one._init_group(group, [], [], [], [], [], [])
            self.learn()
        return self.is_ready

    def learn(self) -> None:
        """After an update by torch, or with its state loaded: what the next one can do without asking for it again."""
        one, self.kernels = self.optimizer, []
        own = one.__dict__.get("step")
        if type(one) not in (Adam, AdamW, SGD) or not (_is_torchs(own) and _is_torchs(type(one).step)):
            return
        if own is not None:
            one._opt_called = True  # as its wrapper notes: else a schedule warns that it moves before the optimizer
        self._known = one.param_groups, one.state, own, type(one).step
        self.weights = [weight for group in one.param_groups for weight in group["params"]]
        self._states, self.kinds = list(one.state.values()), list(map(_kind, one.param_groups))
        self._settings = _ADAMS if isinstance(one, Adam) else _SGDS
        self._as_set = [group[name] for group in one.param_groups for name in self._settings]
        kernels: list[Any] = []
        for group, place in zip(one.param_groups, _places(one.param_groups)):
            states = [one.state[p] for p in group["params"] if p in one.state]
            if not _is_of_one_kind(group, states):
                return
            kernels.append(_Sgd(group, place, states) if isinstance(one, SGD) else _Adam(group, place, states))
        if _are(self._states, [state for kernel in kernels for state in kernel.states]):
            self.kernels = kernels


def _is_torchs(method: Any) -> bool:
    """Whether a method, and all that it wraps, is torch's own code; a schedule wraps ``step`` to count its calls."""
    while method is not None:
        code = getattr(getattr(method, "__func__", method), "__code__", None)
        if code is None or not code.co_filename.startswith(_HOME):
            return False
        method = getattr(method, "__wrapped__", None)
    return True


def _are(known: Sequence[Any], now: Collection[Any]) -> bool:
    return len(known) == len(now) and all(map(is_, known, now))


def _places(groups: Sequence[dict[str, Any]]) -> Iterator[slice]:
    """Where the gradients of each group stand among all."""
    ends = list(accumulate((len(group["params"]) for group in groups), initial=0))
    return starmap(slice, pairwise(ends))


class Kind(NamedTuple):
    """What of a group decides which operations an update has; the rest are numbers."""

    can_be: bool
    keeps_nothing: bool
    is_amsgrad: bool
    is_maximized: bool
    is_nesterov: bool
    is_decoupled: bool


_FLAGS = ("amsgrad", "maximize", "nesterov", "decoupled_weight_decay")


def _kind(group: dict[str, Any]) -> Kind:
    flags = [group.get(name) is True for name in _FLAGS]
    return Kind(group["fused"] is True and isinstance(group["lr"], float | int), group.get("momentum") == 0, *flags)


def _fits(group: dict[str, Any], kind: Kind) -> bool:
    return isinstance(group["lr"], float | int) and (group.get("momentum") == 0) is kind.keeps_nothing


def _is_of_one_kind(group: dict[str, Any], states: Sequence[Any]) -> bool:
    """Whether one call of a kernel does for the group what ``step`` does: torch calls one for each device and type."""
    weights = group["params"]
    kinds = {(type(p), p.device, p.dtype) for p in weights}
    kind = _kind(group)
    keeps = ("momentum_buffer",) if "momentum" in group else ("step", "exp_avg", "exp_avg_sq")
    is_whole = len(states) == (0 if kind.keeps_nothing else len(weights))
    is_whole = is_whole and all(isinstance(state.get(name), Tensor) for state in states for name in keeps)
    return kind.can_be and is_whole and len(kinds) == 1 and not weights[0].is_complex()


def _step(optimizer: Any, found: Tensor | None) -> None:
    if found is None:
        return optimizer.step()
    optimizer.found_inf = found
    try:
        return optimizer.step()
    finally:
        del optimizer.found_inf


class _Adam:
    """Adam and AdamW over one group; its settings are read at each update, for a schedule moves them."""

    is_whole = True

    def __init__(self, group: dict[str, Any], place: slice, states: list[dict[str, Any]]):
        self.group, self.place, self.states = group, place, states
        self.counts = torch.stack([state["step"] for state in states])  # else torch adds to one after the other
        self._counts = list(map(self.counts.select, repeat(0), range(len(states))))
        for state, count in zip(states, self._counts):
            state["step"] = count
        self._one = torch.ones_like(self.counts[0])  # a number would be made a tensor, at every update
        self._read_counts()

    def _read_counts(self) -> None:
        self.time, self._is_even = int(self.counts[0]), bool((self.counts == self.counts[0]).all())
        self._version = self.counts._version

    @property
    def is_traceable(self) -> bool:
        """Whether all weights have been moved equally often, and the counts are those that are known."""
        if self.counts._version != self._version:  # somebody has written to them; a graph leaves no trace
            self._read_counts()
        return self._is_even and _are(self._counts, list(map(_COUNT, self.states)))

    @property
    def averages(self) -> list[list[Tensor]]:
        """What is kept of all weights, by kind."""
        kinds = (_FIRST, _SECOND, _LARGEST) if self.group["amsgrad"] else (_FIRST, _SECOND)
        return [list(map(kind, self.states)) for kind in kinds]

    def __call__(self, gradients: list[Tensor], found: Tensor | None) -> None:
        group, counts, self.time = self.group, list(map(_COUNT, self.states)), self.time + 1
        if all(map(is_, counts, self._counts)):
            is_known = self.counts._version == self._version
            self.counts.add_(self._one)
            self._version = self.counts._version if is_known else -1
        else:
            torch._foreach_add_(counts, 1)
        kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        first, second, *largest = self.averages
        kernel(
            group["params"], gradients[self.place], first, second, largest[0] if largest else [], counts,
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=group["amsgrad"], maximize=group["maximize"], found_inf=found,
        )  # fmt: skip
        if found is not None:
            torch._foreach_sub_(counts, [found] * len(counts))

    def numbers(self) -> list[float]:
        """What :meth:`formula` needs for the next update; powers are taken here, where they are taken once."""
        group, (first, second), time = self.group, self.group["betas"], self.time + 1
        rate, decay = group["lr"] / (1 - first**time), group["weight_decay"]
        decay *= group["lr"] if group["decoupled_weight_decay"] else 1
        return [rate, (1 - second**time) ** 0.5, 1 - first, second, 1 - second, group["eps"], decay]

    @staticmethod
    def formula(
        kind: Kind, weight: Tensor, gradient: Tensor, averages: Sequence[Tensor], numbers: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The weight and its averages after an update.

        Source: D. Kingma, J. Ba, Adam (2015); I. Loshchilov, F. Hutter, Decoupled weight decay regularization (2019);
        in the order of operations of torch's fused kernel.
        """
        rate, root, keep, second, keep_second, eps, decay = numbers
        if kind.is_decoupled:
            weight = weight - decay * weight
        else:
            gradient = gradient + decay * weight
        mean = averages[0] + (gradient - averages[0]) * keep
        square = averages[1] * second + gradient * gradient * keep_second
        kept = [mean, square]
        if kind.is_amsgrad:
            square = torch.maximum(averages[2], square)
            kept.append(square)
        return weight - rate * mean / (square.sqrt() / root + eps), kept


class _Sgd:
    """SGD over one group."""

    is_traceable, counts, time = True, None, 0

    def __init__(self, group: dict[str, Any], place: slice, states: list[dict[str, Any]]):
        self.group, self.place, self.states = group, place, states

    @property
    def is_whole(self) -> bool:
        """For torch a momentum of None is one that begins with the next gradient."""
        return all(state["momentum_buffer"] is not None for state in self.states)

    @property
    def averages(self) -> list[list[Tensor]]:
        return [list(map(_MOMENTUM, self.states))] if self.states else []

    def __call__(self, gradients: list[Tensor], found: Tensor | None) -> None:
        group = self.group
        torch._fused_sgd_(
            group["params"], gradients[self.place], list(map(_MOMENTUM, self.states)),
            lr=group["lr"], momentum=group["momentum"], dampening=group["dampening"], nesterov=group["nesterov"],
            weight_decay=group["weight_decay"], maximize=group["maximize"], is_first_step=False, found_inf=found,
        )  # fmt: skip

    def numbers(self) -> list[float]:
        group = self.group
        return [group["lr"], group["momentum"], 1 - group["dampening"], group["weight_decay"]]

    @staticmethod
    def formula(
        kind: Kind, weight: Tensor, gradient: Tensor, averages: Sequence[Tensor], numbers: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The weight and its momentum after an update, as torch's documentation of SGD has it."""
        rate, momentum, keep, decay = numbers
        gradient = gradient + decay * weight
        if not averages:
            return weight - rate * gradient, []
        buffer = momentum * averages[0] + keep * gradient
        return weight - rate * (gradient + momentum * buffer if kind.is_nesterov else buffer), [buffer]
