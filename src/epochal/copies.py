"""A plan tried out: on copies, and afterwards everything is as it was."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from epochal import loop
from epochal.data.workers import end_workers
from epochal.errors import ModelError
from epochal.protocols import Stateful
from epochal.runtime import device as devices
from epochal.runtime.seeding import generator_states, own_states, set_generator_states, set_own_states

if TYPE_CHECKING:
    from epochal.plan import Plan
    from epochal.run import Run

COPIED = ("model", "loss", "objective", "optimizer", "schedule", "step", "metrics")  # together, as one may hold another


class _Held:
    """A module as it is: an objective may hold it, and not take the copy that it is given."""

    def __init__(self, module: nn.Module):
        known = [one for one in (*module.parameters(), *module.buffers()) if not is_lazy(one)]
        self._tensors = [(one, one.detach().clone()) for one in known if not one.is_meta]
        held = [(p, p.requires_grad, p.grad) for p in module.parameters()]
        self._parameters = [(*one, one[-1] if one[-1] is None else one[-1].detach().clone()) for one in held]
        self._modes = [(part, part.training) for part in module.modules()]
        self._drawn = [(part, own_states(part)) for part in module.modules()]

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, values in self._tensors:
            if not torch.equal(tensor, values):
                tensor.copy_(values)
        for parameter, is_trained, gradient, values in self._parameters:
            if parameter.requires_grad is not is_trained:
                parameter.requires_grad_(is_trained)
            parameter.grad = gradient
            if gradient is not None and values is not None and not torch.equal(gradient, values):
                gradient.copy_(values)
        loop.set_modes(self._modes)
        for part, states in self._drawn:
            set_own_states(part, states)


@contextmanager
def untouched(plan: Plan) -> Iterator[None]:
    """Inside, generators, threads and the place in the data may change; afterwards they are as before.

    What a data set or a loader counts in attributes of its own, and cannot be asked for, is that of after these reads.
    """
    given = list({id(data): data for data in (plan.train, plan.val) if isinstance(data, Dataset | DataLoader)}.values())
    parts = [part for data in given for part in (getattr(data, "dataset", None), data) if isinstance(part, Stateful)]
    with ExitStack() as after:  # from the last to the first, and all of them
        after.callback(set_generator_states, generator_states())
        after.callback(torch.set_num_threads, torch.get_num_threads())
        for data in given:
            after.callback(set_own_states, data, own_states(data))
        for part in parts:
            with suppress(Exception):  # a state that cannot be copied cannot be put back
                after.callback(part.load_state_dict, copy.deepcopy(part.state_dict()))
        for module in (plan.model, plan.loss):
            if isinstance(module, nn.Module):
                after.callback(_Held(module).put_back)
        for data in given:
            if (
                isinstance(data, DataLoader) and data.persistent_workers and data._iterator is None
            ):  # those that are started here
                after.callback(_end_workers_of, data)
        with warnings.catch_warnings():
            # A schedule marks the step of its optimizer, and a copy of the optimizer does not have the mark.
            warnings.filterwarnings("ignore", message=r"Seems like `optimizer\.step\(\)` has been overridden")
            yield


def _end_workers_of(loader: Any) -> None:
    batches, loader._iterator = loader._iterator, None
    end_workers(batches)


def copied(plan: Plan, *, channels_last: bool = False, **changes: Any) -> Plan:
    """The plan over copies of its model and of all that belongs to it; it writes nothing, and nobody watches."""
    memo: dict[int, Any] = {}
    try:
        parts = {name: _copy(getattr(plan, name), memo) for name in COPIED}
    except Exception as error:
        what = f"the model, or what belongs to it, cannot be copied: {error}."
        raise ModelError(what, where="the plan", fix="let copy.deepcopy copy it: it is tried out on a copy") from error
    if channels_last:
        devices.to_channels_last(parts["model"])
    silent = {"run": None, "resume": False, "save": None, "observers": (), "strategy": "auto", "early_stopping": None}
    return plan.replace(**{**parts, **silent, "patience": None, **changes})


def _copy(part: Any, memo: dict[int, Any]) -> Any:
    """A deep copy; of a function, one over copies of what it holds and names."""
    if isinstance(part, partial):
        given = {name: _copy(value, memo) for name, value in part.keywords.items()}
        return partial(_copy(part.func, memo), *(_copy(value, memo) for value in part.args), **given)
    if isinstance(part, MethodType):
        return MethodType(_copy(part.__func__, memo), _over_copies(copy.deepcopy(part.__self__, memo), memo))
    if isinstance(part, Optimizer):
        made = copy.deepcopy(part, memo)
        for name in vars(part).keys() - vars(made).keys():  # torch's __getstate__ keeps three of them
            if not callable(vars(part)[name]):  # as the step that a schedule has wrapped
                setattr(made, name, copy.deepcopy(vars(part)[name], memo))
        return made
    if not isinstance(part, FunctionType):
        return _over_copies(copy.deepcopy(part, memo), memo)
    if id(part) in memo:
        return memo[id(part)]
    if _is_of_a_library(part.__module__):
        return part
    known = dict(part.__globals__)
    cells = tuple(CellType() for _ in part.__closure__ or ())
    made = FunctionType(part.__code__, known, part.__name__, None, cells or None)
    made.__dict__, made.__qualname__, made.__module__ = dict(part.__dict__), part.__qualname__, part.__module__
    memo[id(part)] = made  # before what it holds, which may hold it
    for name in _names_in(part.__code__) & known.keys():
        known[name] = _copy_held(known[name], memo)
    if part.__defaults__:
        made.__defaults__ = tuple(_copy_held(value, memo) for value in part.__defaults__)
    if part.__kwdefaults__:
        made.__kwdefaults__ = {name: _copy_held(value, memo) for name, value in part.__kwdefaults__.items()}
    for cell, given in zip(cells, part.__closure__ or ()):
        with suppress(ValueError):  # not bound yet
            cell.cell_contents = _copy_held(given.cell_contents, memo)
    return made


def _over_copies(made: Any, memo: dict[int, Any]) -> Any:
    """An object of a class of the user's, whose methods work on copies of what they name, as functions do."""
    kind = type(made)
    if isinstance(made, (*_AS_THEY_ARE, nn.Module)) or _is_of_a_library(kind.__module__):
        return made
    named = {name: one for name, one in vars(kind).items() if isinstance(one, FunctionType) and _names_in(one.__code__)}
    with suppress(TypeError):  # its class may not be changed
        over = type(kind.__name__, (kind,), {name: _copy(one, memo) for name, one in named.items()})
        object.__setattr__(made, "__class__", over)  # also of one that is frozen
    return made


_AS_THEY_ARE = (ModuleType, type, BuiltinFunctionType, Tensor, np.ndarray, Dataset, DataLoader, str, bytes, int, float)


def _copy_held(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of what a function holds; itself where it cannot be copied (an open file), or need not be (data). But
    without a copy of a model or an optimizer, nothing can be tried out.
    """
    if isinstance(value, _AS_THEY_ARE) and not isinstance(value, nn.Parameter):
        return value
    try:
        return _copy(value, memo)
    except Exception:
        if isinstance(value, Optimizer | nn.Module):
            raise
        return value


def _names_in(code: CodeType) -> set[str]:
    """The names that code uses, and what is written within it."""
    return set(code.co_names).union(*(_names_in(one) for one in code.co_consts if isinstance(one, CodeType)))


def _is_of_a_library(name: str | None) -> bool:
    """Whether a module is installed, and not the user's own."""
    home = getattr(sys.modules.get(name or ""), "__file__", None) or ""
    return "site-packages" in home or (name or "").partition(".")[0] in {
        *sys.stdlib_module_names,
        "epochal",
        "torch",
    } - {"__main__"}


def heed(run: Run) -> None:
    """Ends what is measured if a signal came, which ends the run and not by itself what it is run for."""
    if run.signals.received is not None:
        raise KeyboardInterrupt
