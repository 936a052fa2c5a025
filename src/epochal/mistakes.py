"""What can be wrong with the options of a plan, one check for each group of them, before anything is built."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from epochal import losses
from epochal.cadence import Every
from epochal.checkpoint.store import Saving
from epochal.errors import ModelError, PlanError, UnknownNameError
from epochal.metrics import named
from epochal.observe.early_stopping import EarlyStopping
from epochal.optim import optimizers
from epochal.optim.schedules import Schedule
from epochal.runtime import device as devices
from epochal.runtime.precision import PRECISIONS

if TYPE_CHECKING:
    from epochal.plan import Plan


def _model(plan: Plan) -> None:
    if isinstance(plan.model, type):
        raise ModelError(
            f"the model is the class {plan.model.__name__}, not an instance of it.",
            where=f"model={plan.model.__name__}",
            fix=f"give {plan.model.__name__}()",
        )
    if not isinstance(plan.model, nn.Module):
        raise ModelError(
            f"the model is a {type(plan.model).__name__}, not a torch.nn.Module.",
            where=f"model={plan.model!r:.60}",
            fix="give an nn.Module",
        )


def _loss(plan: Plan) -> None:
    if plan.loss is not None and plan.objective is not None:
        raise PlanError("loss and objective exclude each other.", where="loss=, objective=", fix="give one of them")
    if plan.loss is not None:
        losses.resolve(plan.loss)
    elif plan.objective is None and plan.step is None:
        raise PlanError(
            "there is nothing to minimise.",
            where="loss=None, objective=None",
            fix='give loss="mse", loss="cross_entropy", a function f(outputs, targets), or objective=f(model, batch)',
        )
    if plan.objective is not None and not callable(plan.objective):
        raise PlanError(
            f"the objective is a {type(plan.objective).__name__}, not a function.",
            where=f"objective={plan.objective!r:.60}",
            fix="give f(model, batch) -> scalar tensor",
        )


def _optimizer(plan: Plan) -> None:
    optimizer = plan.optimizer
    if isinstance(optimizer, str) and optimizer not in optimizers.NAMES:
        raise UnknownNameError.of_name("optimizer", optimizer, optimizers.NAMES, where=f"optimizer={optimizer!r}")
    if not (optimizer is None or isinstance(optimizer, str | Optimizer) or callable(optimizer)):
        raise PlanError(
            f"{type(optimizer).__name__} is not an optimizer.",
            where=f"optimizer={optimizer!r:.60}",
            fix="give a name, a function f(params) -> Optimizer, or an Optimizer",
        )
    given = {"lr": plan.lr, "weight_decay": plan.weight_decay}
    for name, value in given.items():
        if value is not None and optimizer is not None and not isinstance(optimizer, str):
            raise PlanError(
                f"{name} belongs to an optimizer that is given by name.",
                where=f"{name}={value!r}, optimizer is a {type(optimizer).__name__}",
                fix=f"set {name} where the optimizer is made",
            )


def _rate(plan: Plan) -> None:
    _positive(plan.lr, "lr", float)
    if plan.weight_decay is not None and not plan.weight_decay >= 0:
        raise PlanError(
            "weight_decay must not be negative.", where=f"weight_decay={plan.weight_decay!r}", fix="try 0.01"
        )


def _schedule(plan: Plan) -> None:
    if plan.schedule is None:
        return
    if not isinstance(plan.schedule, Schedule):
        Schedule(plan.schedule)
    kind = plan.schedule.kind if isinstance(plan.schedule, Schedule) else plan.schedule
    if isinstance(kind, LRScheduler) and not isinstance(plan.optimizer, Optimizer):
        raise PlanError(
            "an LRScheduler belongs to one optimizer, but the optimizer is not given as an object.",
            where=f"schedule={type(kind).__name__}, optimizer={plan.optimizer!r:.60}",
            fix="give that optimizer too, or give schedule=lambda opt: ...",
        )


def _length(plan: Plan) -> None:
    _positive(plan.epochs, "epochs", int)
    _positive(plan.max_steps, "max_steps", int)
    if isinstance(plan.max_time, str):
        if Every.parse(plan.max_time, where="max_time").unit != "second":
            raise PlanError("max_time is a time.", where=f"max_time={plan.max_time!r}", fix='give for example "10 min"')
    else:
        _positive(plan.max_time, "max_time", float)
    if plan.epochs is plan.max_steps is plan.max_time is None:
        raise PlanError(
            "nothing says when the run ends.",
            where="epochs=None, max_steps=None, max_time=None",
            fix="give epochs=10, say",
        )


def _loader(plan: Plan) -> None:
    _positive(plan.batch_size, "batch_size", int)
    if plan.workers is not None and (not _is_int(plan.workers) or plan.workers < 0):
        raise PlanError("workers must be an integer of at least 0.", where=f"workers={plan.workers!r}", fix="try 2")
    if isinstance(plan.train, torch.utils.data.DataLoader):
        for name in ("batch_size", "shuffle", "workers"):
            if getattr(plan, name) is not None:
                raise PlanError(
                    f"{name} belongs to epochal's own loader, but train is a DataLoader.",
                    where=f"{name}={getattr(plan, name)!r}",
                    fix=f"set {name} where the DataLoader is made, or give its data set as train",
                )
    if isinstance(plan.val, str) and re.fullmatch(r"[0-9.]+", plan.val):
        raise PlanError("a fraction for val is a number.", where=f"val={plan.val!r}", fix=f"give val={plan.val}")
    if isinstance(plan.val, bool) or (isinstance(plan.val, int | float) and not 0 < plan.val < 1):
        raise PlanError("a fraction for val lies between 0 and 1.", where=f"val={plan.val!r}", fix="try val=0.2")


def _accumulation(plan: Plan) -> None:
    _positive(plan.accumulate, "accumulate", int)
    _positive(plan.clip, "clip", float)


def _metrics(plan: Plan) -> None:
    named.resolve(plan.metrics, loss=None)


def _stopping(plan: Plan) -> None:
    if plan.patience is not None and plan.early_stopping is not None:
        raise PlanError(
            "patience and early_stopping exclude each other.",
            where=f"patience={plan.patience!r}, early_stopping",
            fix="give EarlyStopping(patience=...) alone",
        )
    if plan.patience is not None:
        EarlyStopping(patience=plan.patience)
    if plan.early_stopping is not None and not isinstance(plan.early_stopping, EarlyStopping):
        raise PlanError(
            f"early_stopping is a {type(plan.early_stopping).__name__}.",
            where=f"early_stopping={plan.early_stopping!r:.60}",
            fix="give patience=10, or epochal.EarlyStopping(...)",
        )


def _evaluation(plan: Plan) -> None:
    Every.parse(plan.evaluate_every, where="evaluate_every")


def _machine(plan: Plan) -> None:
    _among(plan.precision, PRECISIONS, "precision")
    _among(plan.nonfinite, ("stop", "skip"), "policy for values that are not finite", option="nonfinite")
    _among(plan.strategy, ("auto",), "strategy")
    devices.choose(plan.device)
    if plan.seed is not None and (not _is_int(plan.seed) or not 0 <= plan.seed < 2**63):
        raise PlanError("seed must be an integer from 0 to 2**63 - 1.", where=f"seed={plan.seed!r}", fix="try 0")


def _run(plan: Plan) -> None:
    for name in ("resume", "save"):
        if getattr(plan, name) and plan.run is None:
            raise PlanError(
                f"{name} needs a run folder.",
                where=f"{name}={getattr(plan, name)!r}, run=None",
                fix='give run="runs/x"',
            )
    if plan.save is not None:
        Saving.of(plan.save)


def _watchers(plan: Plan) -> None:
    observers = plan.observers
    if observers is not None and (callable(observers) or not all(callable(one) for one in observers)):
        raise PlanError(
            "observers are functions that take an event.",
            where=f"observers={observers!r:.80}",
            fix="give a list of callables",
        )
    if any(isinstance(one, EarlyStopping) for one in observers or ()):
        raise PlanError(
            "early stopping is not an observer of its own here.",
            where="observers",
            fix="give it as early_stopping=, so that it shares the notion of best",
        )
    if plan.step is not None:
        _step(plan)


def _step(plan: Plan) -> None:
    if not callable(plan.step):
        raise PlanError(
            f"step is a {type(plan.step).__name__}, not a function.",
            where=f"step={plan.step!r:.60}",
            fix="give f(state, window) -> StepResult",
        )
    rates = {"lr": plan.lr, "weight_decay": plan.weight_decay} if plan.optimizer is None else {}
    unused = {**rates, "clip": plan.clip, "precision": plan.precision, "nonfinite": plan.nonfinite}
    defaults = {"precision": "fp32", "nonfinite": "stop"}
    for name, value in unused.items():
        if value != defaults.get(name):
            raise PlanError(
                f"{name} belongs to epochal's own update, which step= replaces.",
                where=f"step=, {name}={value!r}",
                fix=f"do in the step what {name} asks for" + (", or give optimizer=" if name in rates else ""),
            )


def _choices(plan: Plan) -> None:
    for name in ("restore_best", "compile", "resume"):
        if not isinstance(getattr(plan, name), bool):
            raise PlanError(
                f"{name} is True or False.", where=f"{name}={getattr(plan, name)!r}", fix=f"give {name}=True"
            )
    if not isinstance(plan.shuffle, bool | None):
        raise PlanError("shuffle is True or False.", where=f"shuffle={plan.shuffle!r}", fix="give shuffle=True")


def _among(value: Any, known: Sequence[str], kind: str, option: str | None = None) -> None:
    if value not in known:
        raise UnknownNameError.of_name(kind, value, known, where=f"{option or kind}={value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(value: Any, name: str, kind: type) -> None:
    if value is None:
        return
    if kind is int and not (_is_int(value) and value >= 1):
        raise PlanError(f"{name} must be an integer of at least 1.", where=f"{name}={value!r}", fix=f"try {name}=10")
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise PlanError(
                f"{name} must be a number above 0.", where=f"{name}={value!r}", fix=f"try {name}={_EXAMPLES[name]}"
            )


_EXAMPLES = {"lr": 0.001, "clip": 1.0, "max_time": 600}


CHECKS = (
    _model, _loss, _optimizer, _rate, _schedule, _length, _loader, _accumulation, _metrics, _stopping, _evaluation,
    _machine, _run, _watchers, _choices,
)  # fmt: skip
