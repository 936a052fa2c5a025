"""R12: NaN, Inf and -Inf planted in inputs, targets, a layer, the loss, a gradient and a weight, in several models.

The run stops at that very step and names what was planted: the step, the row, the layer. The weights in memory are
those of before it, bit for bit, and those on the disk are finite. Left out, such an update might never have been.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import epochal
from campaigns import harness
from campaigns.harness import Outcome, Part
from epochal.accumulation import gradients
from epochal.checkpoint.store import Checkpoints
from epochal.checkpoint.weights import load_weights
from epochal.step import Update

WHAT = "NaN and Inf planted in data, layers, losses, gradients"
PLANTS = {"small": 30, "full": 2_000}
SAMPLES, BATCH, MARK = 40, 5, 7.0  # a row whose first input is the mark is the one that is spoilt
VALUES = (torch.nan, torch.inf, -torch.inf)
PLACES = ("inputs", "targets", "layer", "loss", "gradient", "weight")


class Backward(torch.autograd.Function):
    """Goes through; on the way back, some rows of the gradient become ``value``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, value: float) -> Tensor:
        ctx.rows, ctx.value = rows, value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return filled(gradient, ctx.rows, ctx.value), None, None


def filled(x: Tensor, rows: Tensor, value: float) -> Tensor:
    return x.masked_fill(rows.view(-1, *[1] * (x.dim() - 1)), value)


class Mark(nn.Module):
    """Sees which rows are marked, for the layer that spoils them."""

    def __init__(self, seen: SimpleNamespace):
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.rows = x.flatten(1)[:, 0] == MARK
        return x


class Spoils(nn.Module):
    """Lets everything through, but for the marked rows: their values or their gradients."""

    def __init__(self, seen: SimpleNamespace, place: str, value: float):
        super().__init__()
        self.seen, self.place, self.value = seen, place, value

    def forward(self, x: Tensor) -> Tensor:
        if self.place == "layer":
            return filled(x, self.seen.rows, self.value)
        return Backward.apply(x, self.seen.rows, self.value) if self.place == "gradient" else x


class Last(nn.Module):
    """Of a sequence of states, the last."""

    def forward(self, given: tuple[Tensor, Any]) -> Tensor:
        return given[0][:, -1]


# The shape of an input, and the layers around the one that spoils.
MODELS: dict[str, tuple[tuple[int, ...], Callable[[nn.Module], list[nn.Module]]]] = {
    "MLP": ((6,), lambda spoils: [
        nn.Linear(6, 8), nn.LeakyReLU(), spoils, nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 1),
    ]),
    "CNN": ((1, 6, 6), lambda spoils: [
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), spoils, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(16, 1),
    ]),
    "LSTM": ((4, 3), lambda spoils: [
        nn.Linear(3, 5), spoils, nn.LSTM(5, 6, batch_first=True), Last(), nn.Linear(6, 1),
    ]),
    "transformer": ((3, 8), lambda spoils: [
        nn.Linear(8, 8), spoils, nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Flatten(), nn.Linear(24, 1),
    ]),
}  # fmt: skip


@dataclass
class Case:
    """place: of what is planted. row: of the sample. given: whether over a DataLoader. at: the step of a weight."""

    model: str
    place: str
    value: float
    row: int
    given: bool
    optimizer: str
    options: dict[str, Any]
    seed: int
    at: int = 0


def run(scale: str) -> Outcome:
    """Plants at random."""
    shares = 2 if scale == "full" else 1
    return harness.outcome("R12", WHAT, lambda part, rng, *_: _plant(part, rng, PLANTS[scale] // shares), shares=shares)


def bites() -> Outcome:
    """An update that does not look, and one that does not put back what it has moved."""

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.changed(Update, _look_for_nonfinite=lambda self, state, loss: gradients(state)):
            _plant(part, rng, 3)
        seen = len(part.failures)
        with harness.changed(Update, _keep=lambda self, state: SimpleNamespace(put_back=lambda: None)):
            _plant(part, rng, 10)
        if len(part.failures) == seen:
            raise RuntimeError("nothing was put back, and nobody saw it")

    return harness.outcome("R12", WHAT, work)


def _plant(part: Part, rng: random.Random, count: int) -> None:
    with harness.scratch() as folder:
        os.chdir(folder)
        for number in range(part.tried, part.tried + count):
            case = Case(
                rng.choice(list(MODELS)), PLACES[number % len(PLACES)], rng.choice(VALUES), rng.randrange(SAMPLES),
                rng.random() < 0.5, rng.choice(("sgd", "adam", "adamw")),
                rng.choice(({}, {}, {"clip": 0.5}, {"schedule": "onecycle"}, {"precision": "bf16"})),
                rng.randrange(1000), rng.randrange(SAMPLES // BATCH),
            )  # fmt: skip
            part.tried += 1
            part.count(f"in {case.place}")
            try:
                problems = [*_stops(case, folder / "run"), *([] if case.place == "weight" else _skips(case))]
            except Exception as error:
                problems = [f"{type(error).__name__}: {error}"]
            for problem in problems:
                part.fail(f"{case}: {problem}")
            shutil.rmtree(folder / "run", ignore_errors=True)


def _plan(case: Case, **options: Any) -> epochal.Plan:
    """The same model and data each time; what is planted is in the data, the layers and the loss."""
    torch.manual_seed(case.seed)
    shape, layers = MODELS[case.model]
    seen = SimpleNamespace(rows=None)
    model = nn.Sequential(Mark(seen), *layers(Spoils(seen, case.place, case.value)))
    inputs, targets = torch.randn(SAMPLES, *shape), torch.randn(SAMPLES, 1)
    row = inputs[case.row].view(-1)
    row[0] = case.value if case.place == "inputs" else MARK
    targets[case.row] = case.value if case.place == "targets" else MARK
    train: Any = (inputs, targets)
    if case.given:
        train = DataLoader(TensorDataset(inputs, targets), BATCH, shuffle=True)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        each = (outputs - targets) ** 2
        return (torch.where(targets == MARK, case.value, each) if case.place == "loss" else each).mean()

    usual: dict[str, Any] = {"epochs": 1, "loss": loss, "optimizer": case.optimizer, "lr": 0.01, "seed": case.seed}
    usual |= {"observers": ()} if case.given else {"observers": (), "batch_size": BATCH}
    return epochal.Plan(model, train, **{**usual, **case.options, **options})


def _is_planted(case: Case, batch: Any) -> bool:
    inputs, targets = batch
    marked = (inputs.flatten(1)[:, 0] == MARK).any() or (targets == MARK).any()
    return bool(marked) or not (torch.isfinite(inputs).all() and torch.isfinite(targets).all())


def _steps(run: epochal.Run, case: Case, *, pass_over: bool) -> list[tuple[int, int]]:
    """Trains; a window with something planted in it is never given to the model, or ends the run. Gives the steps and
    rows at which there was one.
    """
    found, inner = [], run.step

    def step(state: epochal.TrainState, window: Any) -> epochal.StepResult:
        (batch,) = window.batches
        if not _is_planted(case, batch):
            return inner(state, window)
        inputs, targets = batch
        rows = ~torch.isfinite(inputs.flatten(1)).all(1) | (inputs.flatten(1)[:, 0] == MARK)
        rows |= ~torch.isfinite(targets[:, 0]) | (targets[:, 0] == MARK)
        found.append((state.progress.step, int(rows.nonzero()[0])))
        return epochal.StepResult(torch.full((), torch.nan), weight=0.0, applied=False)

    run.step = step
    with run:
        for _ in run:
            if found and not pass_over:
                break
    return found


def _stops(case: Case, folder: Path) -> list[str]:
    """Whether it stops where it has to, says so, and leaves the weights of before."""
    before = _plan(case).prepare()
    if case.place == "weight":
        step, row, name = case.at, None, _plant_weight(before.state.model, case, case.at)
    else:
        (step, row), name = _steps(before, case, pass_over=False)[0], None
    plan = _plan(case, run=folder, save=epochal.Saving("1 steps", share=None))
    if name is not None:
        _plant_weight(plan.model, case, case.at)
    try:
        plan.fit()
    except epochal.NonFiniteError as error:
        told = error
    else:
        return ["it does not stop"]
    layer = next(i for i, part in enumerate(plan.model) if isinstance(part, Spoils))  # type: ignore[arg-type]
    expected = {
        "inputs": "the inputs hold a value", "targets": "the targets hold a value",
        "layer": f"layer '{layer}' (Spoils) made the first value", "loss": "the loss made the first value",
        "gradient": f"the backward pass of layer '{layer}' (Spoils) made the first gradient",
        "weight": f"the weight '{name}' is not finite",
    }[case.place]  # fmt: skip
    where = f"step {step}, epoch 1, batch {step}; " + (f"row {row} of it; " if row is not None else "")
    problems = [] if told.what.startswith(expected) else [f"says: {told.what}; not: {expected}"]
    problems += [] if (told.where or "").startswith(where) else [f"says: {told.where}; not: {where}"]
    problems += [] if told.exit_code == 3 else [f"exit code {told.exit_code}"]
    return problems + _left(case, plan.model, before.state.model, folder, name)


def _left(case: Case, model: nn.Module, before: nn.Module, folder: Path, name: str | None) -> list[str]:
    problems = []
    if name is None and harness.digest(model.state_dict()) != harness.digest(before.state_dict()):
        problems.append("the weights are not those of before")
    on_disk = Checkpoints(folder / "checkpoints").newest_whole()
    states = {"checkpoint": on_disk.state["model"] if on_disk else {}, "memory": model.state_dict()}
    weights = folder / "model.safetensors"
    if name is None:
        states["file"] = load_weights(weights)
    elif weights.exists():
        problems.append("weights that are not finite became the final ones")
    for place, state in states.items():
        spoilt = [key for key, value in state.items() if not torch.isfinite(value).all()]
        if spoilt and (place == "checkpoint" or spoilt != [name]):
            problems.append(f"not finite in the {place}: {spoilt}")
    return problems


def _plant_weight(model: nn.Module, case: Case, at: int) -> str:
    """Makes a weight not finite while the step of a number is done, and gives the name of it."""
    # Not a bias: an infinite one before a gate or a tanh saturates it, and leaves loss and gradients finite.
    named = [name for name, weight in model.named_parameters() if weight.dim() > 1]
    name, calls = named[case.row % len(named)], [0]

    def plant(module: nn.Module, inputs: Any) -> None:
        calls[0] += 1
        if calls[0] == at + 1:
            with torch.no_grad():
                model.get_parameter(name).view(-1)[0] = case.value

    model.register_forward_pre_hook(plant)
    return name


def _skips(case: Case) -> list[str]:
    """Whether a run that leaves it out has the bits of one in which the model never gets that batch."""
    states = []
    for one in ("left out", "never given"):
        run = _plan(case, nonfinite="skip", epochs=2).prepare()
        if one == "left out":
            with run:
                for _ in run:
                    pass
        elif len(_steps(run, case, pass_over=True)) != 2:
            return ["it is not in each epoch once"]
        state = copy.copy(run.state.state_dict())
        state["rows"] = [dict(row) for row in run.state.rows]
        states.append({name: harness.digest(value) for name, value in state.items()})
    return [f"left out, {name} differs" for name in states[0] if states[0][name] != states[1][name]]
