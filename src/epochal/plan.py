"""The plan of a run: every option, checked, as one frozen value."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from epochal import losses
from epochal.cadence import Every
from epochal.checkpoint.store import Saving
from epochal.errors import EpochalError, ModelError, PlanError, UnknownNameError
from epochal.metrics import named
from epochal.observe.early_stopping import EarlyStopping
from epochal.optim import optimizers
from epochal.optim.schedules import Schedule
from epochal.prepare import prepare
from epochal.result import Result
from epochal.run import Run
from epochal.runtime.precision import PRECISIONS


@dataclass(frozen=True, eq=False)
class Plan:
    """What ``fit`` takes, checked: ``Plan(...).fit()`` is ``fit(...)``.

    A plan is a value: nothing is trained, moved or written until :meth:`fit` or :meth:`prepare`. All its
    mistakes are reported at once. The options are described at :func:`epochal.fit`.
    """

    model: nn.Module
    train: Any
    val: Any = None
    _: dataclasses.KW_ONLY
    loss: str | Callable | None = None
    objective: Callable | None = None
    optimizer: str | Callable | Optimizer | None = None
    lr: float | None = None
    weight_decay: float | None = None
    schedule: str | Schedule | Callable | LRScheduler | None = None
    epochs: int | None = None
    max_steps: int | None = None
    max_time: float | str | None = None
    batch_size: int | None = None
    shuffle: bool | None = None
    workers: int | None = None
    accumulate: int = 1
    clip: float | None = None
    target: str | Sequence[str] | None = None
    metrics: Any = None
    patience: int | None = None
    early_stopping: EarlyStopping | None = None
    restore_best: bool = True
    evaluate_every: str | Every = "1 epoch"
    nonfinite: str = "stop"
    monitor: str | None = None
    device: str | torch.device = "auto"
    precision: str = "fp32"
    compile: bool = False
    strategy: str = "auto"
    seed: int | None = None
    run: str | Path | None = None
    resume: bool = False
    save: Saving | str | None = None
    observers: Sequence[Callable] | None = None
    step: Callable | None = None

    def __post_init__(self) -> None:
        if mistakes := list(_mistakes(self)):
            raise PlanError.of(mistakes)

    def fit(self) -> Result:
        """Trains, and gives what came of it."""
        with self.prepare() as run:
            for _ in run:
                pass
        return run.result

    def prepare(self) -> Run:
        """The run itself, ready to be iterated: ``with plan.prepare() as run: for event in run: ...``."""
        return prepare(self)

    def check(self) -> None:
        """Looks for mistakes without training: prepares everything but the run folder.

        Raises the error that ``fit`` would raise before its first step.
        """
        prepare(dataclasses.replace(self, run=None, resume=False, save=None, observers=()))

    def replace(self, **options: Any) -> Plan:
        """The plan with some options changed, checked anew; an unknown option is an error."""
        names = [field.name for field in dataclasses.fields(self)]
        for option in options:
            if option not in names:
                raise UnknownNameError.of_name("option", option, names, where="plan")
        return dataclasses.replace(self, **options)


def options() -> list[str]:
    """The names of the keyword options of ``fit``."""
    return [field.name for field in dataclasses.fields(Plan) if field.kw_only]


def _mistakes(plan: Plan) -> Iterator[EpochalError]:
    """One mistake at most from each check, in the order of the options."""
    for check in (
        _model, _loss, _optimizer, _schedule, _length, _loader, _accumulation, _metrics, _stopping,
        _evaluation, _machine, _run, _watchers, _choices,
    ):  # fmt: skip
        try:
            check(plan)
        except EpochalError as mistake:
            yield mistake


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
    lazy = [name for name, p in plan.model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ModelError(
            "the model has parameters without a shape.",
            where=f"{', '.join(lazy[:3])} of {type(plan.model).__name__}",
            fix="call the model once on a batch before fit, so that its lazy layers learn their sizes",
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
    if plan.step is not None and not callable(plan.step):
        raise PlanError(
            f"step is a {type(plan.step).__name__}, not a function.",
            where=f"step={plan.step!r:.60}",
            fix="give f(state, window) -> StepResult",
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


P = ParamSpec("P")


def _taking(_: Callable[P, Plan]) -> Callable[[Callable[..., Result]], Callable[P, Result]]:
    """Gives ``fit`` the signature of ``Plan``, for people, editors and type checkers alike."""

    def decorate(function: Callable[..., Result]) -> Callable[P, Result]:
        function.__signature__ = inspect.signature(Plan).replace(return_annotation=Result)  # type: ignore[attr-defined]
        return function

    return decorate


@_taking(Plan)
def fit(*arguments: Any, **options: Any) -> Result:
    """Trains a model to the end of its plan.

    model: an ``nn.Module``; it is trained in place, and moved to ``device``. train, val: a tuple or dict of
    arrays (torch, numpy, anything with ``__array__``; the first dimension counts samples), a table or a path
    (``.csv .parquet .npz``) with ``target``, a map-style or iterable data set, or a ``DataLoader``, taken as
    it is. ``val`` may be a fraction of ``train`` too. A batch ``(a, b, y)`` calls ``model(a, b)`` and
    compares with ``y``; a dict calls ``model(**inputs)``.

    What is minimised
        loss: ``mse l1 smooth_l1 huber cross_entropy nll bce bce_with_logits``, an ``nn.Module``, or
        ``f(outputs, targets)`` that gives the mean over the batch. objective: instead of it,
        ``f(model, batch)`` that gives a scalar tensor or ``epochal.Loss(value, weight, outputs, targets)``.
        step: instead of the whole update, ``f(state, window) -> StepResult``.
    How weights move
        optimizer: ``sgd adam adamw rmsprop adagrad nadam radam adafactor muon`` (``adam`` by default),
        ``f(params) -> Optimizer``, or an ``Optimizer``. lr, weight_decay: of a named one. schedule: ``step
        multistep exponential cosine onecycle linear plateau``, ``epochal.Schedule(...)``,
        ``f(optimizer) -> LRScheduler``, or an ``LRScheduler``. accumulate: micro-batches in one update.
        clip: the largest gradient norm. nonfinite: ``"stop"`` or ``"skip"``.
    How long
        epochs, max_steps, max_time (seconds, or ``"10 min"``): whichever comes first. patience, or
        early_stopping: evaluations without a new best. restore_best: with ``val``, end with the best weights.
        monitor: the column that decides what is best, ``val_loss`` by default, ``train_loss`` without ``val``.
    Data
        batch_size (32), shuffle (True for ``train``), workers (0), target: for epochal's own loader.
    What is seen
        metrics: ``accuracy top5 precision recall f1 confusion mae mse rmse r2``, ``f(outputs, targets)``,
        ``epochal.Metric`` or a torchmetrics metric. evaluate_every: ``"1 epoch"``, ``"500 steps"``. observers:
        callables that take an event and may answer ``Stop``; by default the console, ``()`` for silence.
    Where
        device (``"auto"``), precision (``fp32 bf16 fp16``), compile, strategy. seed: seeds python, numpy and
        torch at the start. run: a folder for everything; resume: continue it; save: ``epochal.Saving(...)``.

    Raises an EpochalError with all mistakes of the plan, before anything is trained.

    >>> import torch
    >>> X = torch.linspace(-1, 1, 64)[:, None]
    >>> result = fit(torch.nn.Linear(1, 1), (X, 3 * X), loss="mse", lr=0.1, epochs=50, seed=0, observers=())
    >>> result.reason.message, result.history.train_loss[-1] < 0.01
    ('all epochs are done', True)
    """
    # Not Plan(...).fit(): between the user's call and the user's loss stand as few frames as can be.
    with Plan(*arguments, **options).prepare() as run:
        for _ in run:
            pass
    return run.result
