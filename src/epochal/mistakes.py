"""What can be wrong with the options of a plan, before anything is built.

``RULES`` says what one option can be by itself; a function stands for each group of options that have to fit together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from epochal import losses
from epochal.cadence import Every
from epochal.checkpoint.store import Saving
from epochal.doctor.finding import refuse_unknown
from epochal.errors import ModelError, PlanError, UnknownNameError
from epochal.metrics import named
from epochal.observe.early_stopping import EarlyStopping
from epochal.optim import optimizers
from epochal.optim.schedules import Schedule
from epochal.runtime import device as devices
from epochal.runtime.precision import PRECISIONS
from epochal.runtime.strategy import Strategy

if TYPE_CHECKING:
    from epochal.plan import Plan


def _whole(least: int, below: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value < below


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_above_zero(value: Any) -> bool:
    return _is_number(value) and value > 0


def _a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _are_functions(value: Any) -> bool:
    return isinstance(value, Iterable) and not callable(value) and all(map(callable, value))


COUNT, ABOVE_ZERO, CHOICE = "an integer of at least 1", "a number above 0", "True or False"

# Of each option: whether a value will do, what it must be, and what to give instead. A default is always right.
RULES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "objective": (callable, "a function", "give f(model, batch) -> scalar tensor"),
    "lr": (_is_above_zero, ABOVE_ZERO, "try lr=0.001"),
    "weight_decay": (_is_number, "a number of at least 0", "try weight_decay=0.01"),
    "epochs": (_whole(1), COUNT, "try epochs=10"),
    "max_steps": (_whole(1), COUNT, "try max_steps=10"),
    "max_time": (lambda given: isinstance(given, str) or _is_above_zero(given), ABOVE_ZERO, "try max_time=600"),
    "batch_size": (_whole(1), COUNT, "try batch_size=10"),
    "shuffle": (_a(bool), CHOICE, "give shuffle=True"),
    "workers": (_whole(0), "an integer of at least 0", "try 2"),
    "accumulate": (_whole(1), COUNT, "try accumulate=10"),
    "clip": (_is_above_zero, ABOVE_ZERO, "try clip=1.0"),
    "early_stopping": (_a(EarlyStopping), "an EarlyStopping", "give patience=10, or epochal.EarlyStopping(...)"),
    "restore_best": (_a(bool), CHOICE, "give restore_best=True"),
    "compile": (
        lambda given: isinstance(given, bool) or given == "graph",
        'True, False or "graph"',
        "give compile=True",
    ),
    "seed": (_whole(0, 2**63), "an integer from 0 to 2**63 - 1", "try 0"),
    "resume": (_a(bool), CHOICE, "give resume=True"),
    "observers": (_are_functions, "functions that take an event", "give a list of callables"),
    "step": (callable, "a function", "give f(state, window) -> StepResult"),
    "ignore": (
        lambda given: isinstance(given, list | tuple | set | frozenset) and all(isinstance(one, str) for one in given),
        "a list of codes",
        'give ignore=["unshuffled"], or ignore=["*"] for all',
    ),
}
NAMES = {  # the values of an option, and what they are called
    "precision": ("precision", PRECISIONS),
    "nonfinite": ("policy for values that are not finite", ("stop", "skip")),
}


def _follows(plan: Plan, name: str) -> None:
    value, (will_do, kind, fix) = getattr(plan, name), RULES[name]
    if value is not _default(plan, name) and not will_do(value):
        raise PlanError(f"{name} must be {kind}.", where=f"{name}={value!r:.80}", fix=fix)


def _is_among(plan: Plan, name: str) -> None:
    value, (kind, known) = getattr(plan, name), NAMES[name]
    if value not in known:
        raise UnknownNameError.of_name(kind, value, known, where=f"{name}={value!r}")


def _default(plan: Plan, name: str) -> Any:
    return plan.__dataclass_fields__[name].default


def _model(plan: Plan) -> None:
    if isinstance(plan.model, type):
        name = plan.model.__name__
        what = f"the model is the class {name}, not an instance of it."
        raise ModelError(what, where=f"model={name}", fix=f"give {name}()")
    if not isinstance(plan.model, nn.Module):
        what = f"the model is a {type(plan.model).__name__}, not a torch.nn.Module."
        raise ModelError(what, where=f"model={plan.model!r:.60}", fix="give an nn.Module")
    if isinstance(plan.model, DistributedDataParallel):
        what = "the model is wrapped already, and its weights have other names so."
        fix = "give model.module; fit wraps it itself where there are several processes"
        raise ModelError(what, where="model=DistributedDataParallel(...)", fix=fix)


def _loss(plan: Plan) -> None:
    if plan.loss is not None and plan.objective is not None:
        raise PlanError("loss and objective exclude each other.", where="loss=, objective=", fix="give one of them")
    if plan.loss is not None:
        losses.resolve(plan.loss)
    elif plan.objective is None and plan.step is None:
        fix = 'give loss="mse", loss="cross_entropy", a function f(outputs, targets), or objective=f(model, batch)'
        raise PlanError("there is nothing to minimise.", where="loss=None, objective=None", fix=fix)


def _optimizer(plan: Plan) -> None:
    if plan.optimizer is not None:
        optimizers.check(plan.optimizer)
    for name in ("lr", "weight_decay"):
        value = getattr(plan, name)
        if value is not None and not isinstance(plan.optimizer, str | None):
            what = f"{name} belongs to an optimizer that is given by name."
            where = f"{name}={value!r}, optimizer is a {type(plan.optimizer).__name__}"
            raise PlanError(what, where=where, fix=f"set {name} where the optimizer is made")


def _schedule(plan: Plan) -> None:
    if plan.schedule is None:
        return
    kind = (plan.schedule if isinstance(plan.schedule, Schedule) else Schedule(plan.schedule)).kind
    if isinstance(kind, LRScheduler) and not isinstance(plan.optimizer, Optimizer):
        what = "an LRScheduler belongs to one optimizer, but the optimizer is not given as an object."
        where = f"schedule={type(kind).__name__}, optimizer={plan.optimizer!r:.60}"
        raise PlanError(what, where=where, fix="give that optimizer too, or give schedule=lambda opt: ...")


def _length(plan: Plan) -> None:
    if isinstance(plan.max_time, str) and Every.parse(plan.max_time, where="max_time").unit != "second":
        raise PlanError("max_time is a time.", where=f"max_time={plan.max_time!r}", fix='give for example "10 min"')
    if plan.epochs is plan.max_steps is plan.max_time is None:
        where = "epochs=None, max_steps=None, max_time=None"
        raise PlanError("nothing says when the run ends.", where=where, fix="give epochs=10, say")


def _loader(plan: Plan) -> None:
    for name in ("batch_size", "shuffle", "workers"):
        if isinstance(plan.train, DataLoader) and getattr(plan, name) is not None:
            what = f"{name} belongs to epochal's own loader, but train is a DataLoader."
            fix = f"set {name} where the DataLoader is made, or give its data set as train"
            raise PlanError(what, where=f"{name}={getattr(plan, name)!r}", fix=fix)


def _val(plan: Plan) -> None:
    if isinstance(plan.val, str) and re.fullmatch(r"[0-9.]+", plan.val):
        raise PlanError("a fraction for val is a number.", where=f"val={plan.val!r}", fix=f"give val={plan.val}")
    if isinstance(plan.val, bool) or (isinstance(plan.val, int | float) and not 0 < plan.val < 1):
        raise PlanError("a fraction for val lies between 0 and 1.", where=f"val={plan.val!r}", fix="try val=0.2")


def _stopping(plan: Plan) -> None:
    if plan.patience is not None and plan.early_stopping is not None:
        what, where = "patience and early_stopping exclude each other.", f"patience={plan.patience!r}, early_stopping"
        raise PlanError(what, where=where, fix="give EarlyStopping(patience=...) alone")
    if plan.patience is not None:
        EarlyStopping(patience=plan.patience)
    if isinstance(plan.observers, Iterable) and any(isinstance(one, EarlyStopping) for one in plan.observers):
        what = "early stopping is not an observer of its own here."
        fix = "give it as early_stopping=, so that it shares the notion of best"
        raise PlanError(what, where="observers", fix=fix)


def _run(plan: Plan) -> None:
    if plan.resume and plan.run is None:
        raise PlanError("resume needs a run folder.", where="resume=True, run=None", fix='give run="runs/x"')
    if plan.save is not None:
        Saving.of(plan.save)


def _step(plan: Plan) -> None:
    rates = ("lr", "weight_decay") if plan.optimizer is None else ()
    for name in (*rates, "clip", "precision", "nonfinite"):
        if plan.step is not None and getattr(plan, name) != _default(plan, name):
            what = f"{name} belongs to epochal's own update, which step= replaces."
            fix = f"do in the step what {name} asks for" + (", or give optimizer=" if name in rates else "")
            raise PlanError(what, where=f"step=, {name}={getattr(plan, name)!r}", fix=fix)


def _strategy(plan: Plan) -> None:
    if Strategy.of(plan.strategy).kind != "fsdp":
        return
    wrong = {
        "a step of your own": (plan.step is not None, 'give strategy="ddp", and average_gradients in the step'),
        "an optimizer that was made before": (
            isinstance(plan.optimizer, Optimizer), "give a name, or a function f(params) -> Optimizer",
        ),
        f"the optimizer {plan.optimizer}": (
            plan.optimizer in ("muon", "adafactor"), 'give optimizer="adamw", or strategy="ddp"',
        ),
        "the loss scaler of fp16": (plan.precision == "fp16", 'give precision="bf16"'),
    }  # fmt: skip
    for what, (is_given, fix) in wrong.items():
        if is_given:
            told = f"fsdp puts parts of weights in the place of weights, of which {what} does not know."
            raise PlanError(told, where=f"strategy={plan.strategy}", fix=fix)


CHECKS: tuple[Callable[[Plan], object], ...] = (
    _model, _loss, _optimizer,
    *(partial(_follows, name=name) for name in RULES), *(partial(_is_among, name=name) for name in NAMES),
    _schedule, _length, _loader, _val, _stopping, _run, _step,
    lambda plan: named.resolve(plan.metrics, loss=None),
    lambda plan: Every.parse(plan.evaluate_every, where="evaluate_every"),
    lambda plan: devices.choose(plan.device),
    _strategy,
    lambda plan: refuse_unknown(() if isinstance(plan.ignore, str) else plan.ignore),
)  # fmt: skip
