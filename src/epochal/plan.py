"""The plan of a run: every option, checked, as one frozen value."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from epochal.cadence import Every
from epochal.checkpoint.store import Saving
from epochal.doctor.finding import Finding
from epochal.doctor.trace import place
from epochal.errors import Mistakes, UnknownNameError
from epochal.mistakes import CHECKS
from epochal.observe.early_stopping import EarlyStopping
from epochal.optim.schedules import Schedule
from epochal.prepare import prepare
from epochal.result import Result
from epochal.run import Run
from epochal.runtime.strategy import Strategy


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
    compile: bool | str = False
    strategy: str | Strategy = "auto"
    seed: int | None = None
    run: str | Path | None = None
    resume: bool = False
    save: Saving | str | None = None
    observers: Sequence[Callable] | None = None
    step: Callable | None = None
    ignore: Sequence[str] = ()

    def __new__(cls, *arguments: Any, **given: Any) -> Plan:
        """Tells unknown options by their nearest names, together with the other mistakes."""
        if unknown := [name for name in given if name not in cls.__dataclass_fields__]:
            found = [_unknown(name, cls.__dataclass_fields__) for name in unknown]
            mistakes = Mistakes(found)
            with mistakes:
                cls(*arguments, **{name: value for name, value in given.items() if name not in unknown})
            mistakes.tell()
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.__dict__["_called"] = place()
        mistakes = Mistakes()
        for check in CHECKS:
            with mistakes:
                check(self)
        mistakes.tell()

    @property
    def called(self) -> str:
        """Where it was made, ``train.py:41``; empty where that is not known."""
        return self.__dict__["_called"]

    def fit(self) -> Result:
        """Trains, and gives what came of it."""
        with self.prepare() as run:
            for _ in run.alone():
                pass
        run.signals.pass_on()
        return run.result

    def prepare(self) -> Run:
        """The run itself, ready to be iterated: ``with plan.prepare() as run: for event in run: ...``."""
        return prepare(self)

    def check(self) -> list[Finding]:
        """Looks for mistakes, the most certain first: in the plan, the data, first passes, and trials on copies.

        Takes seconds. Model, optimizer, data and random generators are as before, to the bit.
        """
        from epochal.doctor.checkup import checkup

        return checkup(self)

    def replace(self, **changes: Any) -> Plan:
        """The plan with some options changed, checked anew."""
        plan = Plan(**{**{name: getattr(self, name) for name in self.__dataclass_fields__}, **changes})
        plan.__dict__["_called"] = self.called
        return plan


OTHER_NAMES = {  # what other libraries call it -> what it is called here
    "criterion": "loss", "loss_fn": "loss", "learning_rate": "lr", "num_epochs": "epochs", "max_epochs": "epochs",
    "scheduler": "schedule", "lr_scheduler": "schedule", "callbacks": "observers", "validation_data": "val",
    "validation": "val", "grad_clip": "clip", "gradient_clip_val": "clip", "num_workers": "workers",
}  # fmt: skip


def _unknown(name: str, known: Iterable[str]) -> UnknownNameError:
    error = UnknownNameError.of_name("option", name, known, where=f"{name}=")
    if name in OTHER_NAMES:
        error.fix = f"here it is called {OTHER_NAMES[name]!r}"
    return error


def options() -> list[str]:
    """The names of the keyword options of ``fit``."""
    return [field.name for field in dataclasses.fields(Plan) if field.kw_only]


# What people and editors see; inspect would find __new__ and its catch-all.
_initializer = inspect.signature(Plan.__init__)
Plan.__signature__ = _initializer.replace(parameters=list(_initializer.parameters.values())[1:])

P = ParamSpec("P")


def _taking(_: Callable[P, Plan]) -> Callable[[Callable[..., Result]], Callable[P, Result]]:
    """Gives ``fit`` the signature of ``Plan``, for people, editors and type checkers alike."""

    def decorate(function: Callable[..., Result]) -> Callable[P, Result]:
        function.__signature__ = Plan.__signature__.replace(return_annotation=Result)  # type: ignore[attr-defined]
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
        metrics: ``accuracy top5 precision recall f1 confusion mae mse rmse r2``, ``f(outputs, targets)`` (its
        mean over batches, weighted by samples), ``epochal.Metric`` or a torchmetrics metric. evaluate_every:
        ``"1 epoch"``, ``"500 steps"``. observers: callables that take an event and may answer ``Stop``; by
        default the console, ``()`` for silence. ignore: codes of findings (``"lr-*"`` too) that are not looked for.
    Where
        device (``"auto"``), precision (``fp32 bf16 fp16``), compile: the whole update as one graph of torch's compiler;
        ``"graph"``: replayed by a CUDA device itself. strategy: how several processes (of torchrun,
        srun or ``epochal train --processes``) train one model: ``"auto"``, ``"ddp"``, ``"fsdp"``, or
        ``epochal.Strategy(...)``. seed: seeds python, numpy and
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
        for _ in run.alone():
            pass
    run.signals.pass_on()
    return run.result
