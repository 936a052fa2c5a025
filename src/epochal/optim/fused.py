"""One move of the weights by the optimizer's fused kernel itself, without what ``optimizer.step()`` does around it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, pairwise, starmap
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as _torch

_NUMBERS = (float, int)
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

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self._known: tuple[Any, ...] = ()  # what has to be as it was: the optimizer's own groups, states and step
        self._weights: list[Tensor] = []
        self._states: list[dict[str, Any]] = []
        self._kinds: list[Any] = []
        self._kernels: list[Any] = []

    def __call__(self, gradients: list[Tensor], found: Tensor | None = None) -> None:
        """gradients: of all weights, in the order of the optimizer's groups; those that have none are left out.
        found: where it is above 0, the device leaves the update out.
        """
        if not self._is_as_it_was(gradients):
            _step(self.optimizer, found)
            self._learn()
            return
        was_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            for kernel in self._kernels:
                kernel(gradients, found)
        finally:
            torch._C._set_grad_enabled(was_enabled)

    def _is_as_it_was(self, gradients: list[Tensor]) -> bool:
        if not self._kernels or len(gradients) != len(self._weights):
            return False
        one, (groups, states, own, method) = self.optimizer, self._known
        return (
            one.param_groups is groups
            and one.state is states
            and one.__dict__.get("step") is own
            and type(one).step is method
            and not (one._optimizer_step_pre_hooks or one._optimizer_step_post_hooks)
            and not (_torch._global_optimizer_pre_hooks or _torch._global_optimizer_post_hooks)
            and _are(self._weights, [weight for group in groups for weight in group["params"]])
            and _are(self._states, states.values())
            and list(map(_kind, groups)) == self._kinds
        )

    def _learn(self) -> None:
        """After an update by torch: what the next one can do without asking for it again."""
        one, self._kernels = self.optimizer, []
        own = one.__dict__.get("step")
        is_plain = own is None or hasattr(own, "_wrapped_by_lr_sched")  # a schedule wants to know of the first one
        if type(one) not in (Adam, AdamW, SGD) or not is_plain:
            return
        self._known = one.param_groups, one.state, own, type(one).step
        self._weights = [weight for group in one.param_groups for weight in group["params"]]
        self._states, self._kinds = list(one.state.values()), list(map(_kind, one.param_groups))
        kernels: list[Any] = []
        for group, place in zip(one.param_groups, _places(one.param_groups)):
            states = [one.state[p] for p in group["params"] if p in one.state]
            if not _is_of_one_kind(group, states):
                return
            kernels.append(_Sgd(group, place, states) if isinstance(one, SGD) else _Adam(group, place, states))
        if _are(self._states, [state for kernel in kernels for state in kernel.states]):
            self._kernels = kernels


def _are(known: Sequence[Any], now: Collection[Any]) -> bool:
    return len(known) == len(now) and all(map(is_, known, now))


def _places(groups: Sequence[dict[str, Any]]) -> Iterator[slice]:
    """Where the gradients of each group stand among all."""
    ends = list(accumulate((len(group["params"]) for group in groups), initial=0))
    return starmap(slice, pairwise(ends))


def _kind(group: dict[str, Any]) -> tuple[bool, ...]:
    """Which kernel a group is for, and over which states."""
    return group["fused"] is True and type(group["lr"]) in _NUMBERS, group.get("momentum") == 0, group.get("amsgrad") is True


def _is_of_one_kind(group: dict[str, Any], states: Sequence[Any]) -> bool:
    """Whether one call of a kernel does for the group what ``step`` does: torch calls one for each device and type."""
    weights = group["params"]
    kinds = {(type(p), p.device, p.dtype) for p in weights}
    can_be, keeps_nothing, _ = _kind(group)
    is_whole = len(states) == (0 if keeps_nothing else len(weights))
    return can_be and is_whole and len(kinds) == 1 and not weights[0].is_complex()


def _step(optimizer: Any, found: Tensor | None) -> None:
    if found is None:
        return optimizer.step()
    optimizer.found_inf = found
    try:
        return optimizer.step()
    finally:
        del optimizer.found_inf


class _Adam:
    """The kernel of Adam and AdamW over one group; its settings are read at each update, for a schedule moves them."""

    def __init__(self, group: dict[str, Any], place: slice, states: list[dict[str, Any]]):
        self.group, self.place, self.states = group, place, states
        self._all: Tensor | None = None  # the counts of all weights, where they lie on the host
        self._counts: list[Tensor] = []
        if states[0]["step"].is_cpu:  # there torch adds to one after the other
            self._all = torch.stack([state["step"] for state in states])
            self._counts = [self._all[number] for number in range(len(states))]
            for state, count in zip(states, self._counts):
                state["step"] = count

    def __call__(self, gradients: list[Tensor], found: Tensor | None) -> None:
        group, states = self.group, self.states
        counts = list(map(_COUNT, states))
        if self._all is not None and all(map(is_, counts, self._counts)):
            self._all.add_(1)
        else:
            torch._foreach_add_(counts, 1)
        kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        kernel(
            group["params"], gradients[self.place], list(map(_FIRST, states)), list(map(_SECOND, states)),
            list(map(_LARGEST, states)) if group["amsgrad"] else [], counts,
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=group["amsgrad"], maximize=group["maximize"], found_inf=found,
        )  # fmt: skip
        if found is not None:
            torch._foreach_sub_(counts, [found] * len(counts))


class _Sgd:
    """The kernel of SGD over one group."""

    def __init__(self, group: dict[str, Any], place: slice, states: list[dict[str, Any]]):
        self.group, self.place, self.states = group, place, states

    def __call__(self, gradients: list[Tensor], found: Tensor | None) -> None:
        group = self.group
        torch._fused_sgd_(
            group["params"], gradients[self.place], list(map(_MOMENTUM, self.states)),
            lr=group["lr"], momentum=group["momentum"], dampening=group["dampening"], nesterov=group["nesterov"],
            weight_decay=group["weight_decay"], maximize=group["maximize"], is_first_step=False, found_inf=found,
        )  # fmt: skip
