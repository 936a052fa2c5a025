"""R21: guard, recorder with checkpoints, console, observers and the doctor, on or off: the same weights, and what they
cost; the doctor with each of the examples, too."""

from __future__ import annotations

import importlib
import io
import itertools
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

import epochal
from campaigns import harness
from campaigns.harness import Outcome, Part
from epochal.accumulation import gradients
from epochal.observe.console import Console
from epochal.step import Update

WHAT = "guard, recorder, console, observers, doctor on or off"
PARTS = ("guard", "recorder", "console", "observers", "doctor")
ROUNDS = {"small": 0, "full": 15}  # of the timing, in turns
EXAMPLES = Path(__file__).parents[1] / "examples"
LONG = 3.0  # seconds that a run of an example takes, about
TURNS = 5  # of an example
X = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))
Y = X[:, :10].argmax(1)


def run(scale: str) -> Outcome:
    """Every combination of them once for its bits; each of them alone, and all, for what it costs; in full, the doctor
    with the examples as they are, for both."""

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.scratch() as folder:
            os.chdir(folder)
            _bits(part, folder, [set(one) for n in range(len(PARTS) + 1) for one in itertools.combinations(PARTS, n)])
            _cost(part, folder, ROUNDS[scale])
            for path in sorted(EXAMPLES.glob("*.py")) if ROUNDS[scale] else ():
                if path.stem != "plain_loop":  # it is no recipe
                    _example(part, path.stem, TURNS)

    return harness.outcome("R21", WHAT, work)


def bites() -> Outcome:
    """An observer that draws a random number."""

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.scratch() as folder, harness.changed(Observing, draws=True):
            os.chdir(folder)
            _bits(part, folder, [set(), {"observers"}])

    return harness.outcome("R21", WHAT, work)


class Observing:
    """An observer of every event, which reads what it is told."""

    draws = False

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    def __call__(self, event: epochal.Event) -> None:
        if isinstance(event, epochal.StepDone):
            self.losses.append(event.result.loss)
            if self.draws:
                torch.rand(())


@contextmanager
def unguarded() -> Iterator[None]:
    """Updates that are not looked at; what the guard would put back is not kept either."""
    with harness.changed(Update, _look_for_nonfinite=lambda self, state, loss: gradients(state)):
        yield


def fit(on: set[str], folder: Path, epochs: int) -> tuple[str, float]:
    """A digest of what was trained, and the seconds it took."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip
    watching = [*([Console(io.StringIO())] if "console" in on else []), *([Observing()] if "observers" in on else [])]
    with nullcontext() if "guard" in on else unguarded():
        began = time.perf_counter()
        result = epochal.fit(
            model, (X, Y), val=(X[:128].clone(), Y[:128].clone()), loss="cross_entropy", optimizer="adamw",
            lr=0.003, epochs=epochs, batch_size=32, seed=0, metrics=["accuracy"], observers=watching,
            run=folder if "recorder" in on else None, ignore=() if "doctor" in on else ("*",),
        )  # fmt: skip
        seconds = time.perf_counter() - began
    return _digest(result), seconds


def _digest(result: epochal.Result) -> str:
    rows = [{name: value for name, value in row.items() if name != "time"} for row in result.history]
    return harness.digest([result.model.state_dict(), rows, torch.get_rng_state()])


def _bits(part: Part, folder: Path, combinations: list[set[str]]) -> None:
    expected, _ = fit(set(), folder / "none", 2)
    for number, on in enumerate(combinations):
        part.tried += 1
        if fit(on, folder / f"bits-{number}", 2)[0] != expected:
            part.fail(f"with {', '.join(sorted(on)) or 'nothing'} the bits are others")


def _cost(part: Part, folder: Path, rounds: int) -> None:
    """The ratio of the medians, to a run with nothing on; all of them in turns."""
    cases = {"nothing": set(), **{name: {name} for name in PARTS}, "all": set(PARTS)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        for name, on in cases.items():
            seconds[name].append(fit(on, folder / f"cost-{name}-{number}", 60)[1])
    for name in cases if rounds else ():
        median = statistics.median(seconds[name])
        part.figures[f"time with {name} on, of that with nothing"] = median / statistics.median(seconds["nothing"])


def _example(part: Part, name: str, rounds: int) -> None:
    """An example in the setting that it has, cut to some seconds: with the doctor and without, in turns."""
    with harness.changed(sys, path=[str(EXAMPLES), *sys.path]):
        recipe = importlib.import_module(name)

    def trained(updates: int, doctor: bool) -> tuple[str, float]:
        torch.manual_seed(0)
        plan = recipe.plan().replace(
            epochs=10**6, max_steps=updates, patience=None, seed=0, device="cpu", observers=(),
            ignore=() if doctor else ("*",),
        )  # fmt: skip
        began = time.perf_counter()
        result = plan.fit()
        seconds = time.perf_counter() - began
        return _digest(result), seconds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(30, doctor=True)
        updates = min(5000, max(200, round(30 * LONG / trained(30, doctor=False)[1])))
        found = [(trained(updates, doctor=True), trained(updates, doctor=False)) for _ in range(rounds)]
    part.tried += 1
    if len({digest for pair in found for digest, _ in pair}) != 1:
        part.fail(f"{name}: with the doctor the bits are others")
    with_it, without = (statistics.median(pair[at][1] for pair in found) for at in (0, 1))
    part.figures[f"{name}: {updates} updates of {1000 * without / updates:.2g} ms, time with the doctor on"] = (
        with_it / without
    )
