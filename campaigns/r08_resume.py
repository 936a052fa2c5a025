"""R8: resumed at every step of a run, over many combinations of data, optimizers, schedules and options.

From one undisturbed run every checkpoint is kept; each resume begins from one of them, in a process of its own, some
of them killed again a step later, or interrupted while validating. What is left must have the same bits.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import epochal
from campaigns import harness, training
from campaigns.harness import Outcome, Part
from epochal.data.given import GivenLoader
from epochal.runtime import seeding

WHAT = "resumed at every step of a run"
RESUMES = {"small": 40, "full": 5_000}
SAMPLES, BATCH = 22, 4  # six batches an epoch, the last one smaller
X = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())), "numpy": np.random.rand, "python": random.random,
    "no": float,
}  # fmt: skip


class Augmented(Dataset):
    """Samples to which random numbers of one kind are added."""

    def __init__(self, draws: str):
        self.draw = DRAWS[draws]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i] + self.draw(), Y[i]


class Streamed(IterableDataset):
    """The same samples, one after the other."""

    def __init__(self, draws: str):
        self.samples = Augmented(draws)

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.samples.__getitem__, range(SAMPLES))


class Placed(Streamed):
    """A stream that knows its place."""

    position = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.position < SAMPLES:
            self.position += 1
            yield self.samples[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Averaged:
    """An observer that keeps an exponential moving average of the weights."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    def __call__(self, event: epochal.Event) -> None:
        if isinstance(event, epochal.StepDone):
            self.average.update_parameters(self.model)

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.average.load_state_dict(state)


LOADED = partial(DataLoader, batch_size=BATCH)
KEEPING = partial(StatefulDataLoader, batch_size=BATCH)  # torchdata's, which keeps its place itself
DATA: dict[str, Callable[[str], Any]] = {
    "arrays": lambda draws: (X, Y),
    "a data set": Augmented,
    "a data set, two workers": Augmented,
    "a DataLoader": lambda draws: LOADED(Augmented(draws)),
    "a DataLoader, shuffled": lambda draws: LOADED(Augmented(draws), shuffle=True),
    "a DataLoader, two workers": lambda draws: LOADED(Augmented(draws), shuffle=True, num_workers=2),
    "a stream": Streamed,
    "a stream that knows its place": Placed,
    "a StatefulDataLoader": lambda draws: KEEPING(Augmented(draws), shuffle=True),
    "a StatefulDataLoader, two workers": lambda draws: KEEPING(TensorDataset(X, Y), shuffle=True, num_workers=2),
    "a DataLoader of a stream": lambda draws: LOADED(Streamed(draws)),
    "a DataLoader of a stream that knows its place": lambda draws: LOADED(Placed(draws)),
}
CHOICES: dict[str, tuple] = {
    "draws": tuple(DRAWS),
    "optimizer": (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), "adam", "adamw", "rmsprop", "muon"),
    "schedule": (
        None, epochal.Schedule("step", step_size=1), "cosine", "onecycle", epochal.Schedule("plateau", patience=0),
        epochal.Schedule("linear", warmup=4),
    ),
    "accumulate": (1, 1, 2),
    "clip": (None, 0.5),
    "precision": ("fp32", "fp32", "bf16"),
    "early_stopping": (None, None, epochal.EarlyStopping(patience=1, min_delta=1e3)),
    "evaluate_every": ("1 epoch", "1 epoch", "4 steps"),
    "averaged": (False, True),
}  # fmt: skip
Variant = dict[str, Any]
Leg = tuple[str, int]  # ("step", n): killed after n more steps; ("val", n): interrupted in the n-th batch evaluated


def variants(rng: random.Random) -> Iterator[Variant]:
    """Combinations without end: every kind of data in turn, the rest at random."""
    while True:
        for name in DATA:
            yield {"data": name, **{option: rng.choice(values) for option, values in CHOICES.items()}}


def fit(folder: Path, variant: Variant, *, saving: str = "1 steps", watch: Any = None, leg: Leg | None = None) -> Any:
    """Trains a variant to its end, or to where a leg ends, resuming what is there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
    options = copy.deepcopy(
        {name: value for name, value in variant.items() if name not in ("data", "draws", "averaged")}
    )
    data = DATA[variant["data"]](variant["draws"])
    if not isinstance(data, DataLoader):
        options |= {"batch_size": BATCH, "workers": 2 if "workers" in variant["data"] else 0}
    observers = [Averaged(model)] if variant["averaged"] else []
    observers += [one for one in (watch, leg and ending(leg, model)) if one]
    return epochal.fit(
        model, data, val=(X[:9].clone(), Y[:9].clone()), loss="mse", metrics=["mae"], epochs=3, seed=1, run=folder,
        resume=True,
        lr=None if callable(variant["optimizer"]) else 0.01, observers=observers,
        save=epochal.Saving(saving, keep=2, share=None), **options,
    )  # fmt: skip


def ending(leg: Leg, model: nn.Module) -> Callable[[epochal.Event], None]:
    """What ends a leg: SIGKILL after a number of steps, or SIGINT in the midst of a validation."""
    kind, left = leg
    if kind == "val":
        evaluated: list[int] = []

        def interrupt(module: nn.Module, inputs: Any) -> None:
            if not module.training and (evaluated.append(1) or len(evaluated) == left):
                os.kill(os.getpid(), signal.SIGINT)

        model.register_forward_pre_hook(interrupt)
    done: list[int] = []

    def watch(event: epochal.Event) -> None:
        if kind == "step" and isinstance(event, epochal.StepDone) and (done.append(1) or len(done) == left):
            harness.kill_me()

    return watch


def run(scale: str) -> Outcome:
    """Variants, each resumed at every place (in the small version at a few), until there were enough."""
    shares = 2 if scale == "full" else 1
    places = None if scale == "full" else 4
    _warm()
    return harness.outcome("R8", WHAT, lambda *given: _resume(*given, RESUMES[scale] // shares, places), shares=shares)


def bites() -> Outcome:
    """A resume that forgets the random generators, and one that forgets where a DataLoader's epoch began."""

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.changed(seeding, set_generator_states=lambda states: None):
            _resume(part, rng, 0, 1, 4, 4)
        forgotten = Part()
        given = [one for one in _some(rng, 20) if one["data"] == "a DataLoader, shuffled"]
        with harness.changed(GivenLoader, load_state_dict=lambda self, state: None):
            _resume(forgotten, rng, 0, 1, 4, 4, iter(given))
        if not forgotten.failures:
            raise RuntimeError("where the epoch began was forgotten, and nobody saw it")
        part.add(forgotten)

    _warm()
    return harness.outcome("R8", WHAT, work)


def _some(rng: random.Random, count: int) -> list[Variant]:
    every = variants(rng)
    return [next(every) for _ in range(count)]


def _warm() -> None:
    with harness.scratch() as folder:
        harness.warm(lambda: fit(folder / "run", {**_some(random.Random(0), 4)[3], "optimizer": "muon"}) and None)


def _resume(
    part: Part, rng: random.Random, share: int, shares: int, count: int, places: int | None,
    every: Iterator[Variant] | None = None,
) -> None:  # fmt: skip
    every = every or variants(rng)
    while part.tried < count and not (part.failures and len(part.failures) > 200):
        variant = next(every)
        with harness.scratch() as folder:
            os.chdir(folder)
            _variant(part, rng, folder, variant, places)


def _variant(part: Part, rng: random.Random, folder: Path, variant: Variant, places: int | None) -> None:
    """One undisturbed run, and those that begin from its checkpoints."""
    kept = folder / "kept"
    straight = harness.ask(lambda: left_by(fit(folder / "straight", variant, watch=keeping(kept)), folder / "straight"))
    if straight.error is not None:
        part.fail(f"{told(variant)}: undisturbed: {straight.error}")
        return
    part.count("runs")
    found = sorted(kept.iterdir())
    for place in found if places is None else rng.sample(found, places):
        legs = [(rng.choice(("step", "step", "val")), rng.randint(1, 2)) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
        part.tried += 1
        if problem := _from(folder / "resumed", folder / "straight", place, variant, legs, straight.value):
            part.fail(f"{told(variant)}: from {place.name}{''.join(f', {leg}' for leg in legs)}: {problem}")
        for leg in legs:
            part.count(f"resumed again, after {'a kill' if leg[0] == 'step' else 'a signal in a validation'}")
        shutil.rmtree(folder / "resumed")


def _from(run: Path, straight: Path, place: Path, variant: Variant, legs: list[Leg], expected: dict) -> str | None:
    """Resumes from a checkpoint in processes of their own, and says what is not as in the undisturbed run."""
    shutil.copytree(place, run / "checkpoints" / place.name.split(".")[-1])
    for name in ("run.json", "config.toml", "metrics.jsonl", "results.csv"):
        shutil.copy(straight / name, run / name)  # with the rows of the whole run: they have to be cut back
    for leg in legs:
        saving = "1 steps" if leg[0] == "step" else "1000 steps"  # so that what the signal saves is of that moment
        ended = harness.ask(lambda: fit(run, variant, saving=saving, leg=leg) and None)  # noqa: B023
        if ended.error is not None and ended.killed != signal.SIGKILL:
            return f"{leg}: {ended.error}"
    ended = harness.ask(lambda: left_by(fit(run, variant, saving="1 epoch"), run))
    if ended.error is not None:
        return ended.error
    return ", ".join(training.differences(ended.value, expected)) or None


def keeping(folder: Path) -> Callable[[epochal.Event], None]:
    """An observer that keeps a copy of every checkpoint, numbered in their order."""
    count = [0]

    def watch(event: epochal.Event) -> None:
        if isinstance(event, epochal.Saved):
            count[0] += 1
            shutil.copytree(event.path, folder / f"{count[0]:03d}.{event.path.name}")

    return watch


def left_by(result: epochal.Result, folder: Path) -> dict[str, str]:
    """Digests of all that has to be the same in the end; the state holds optimizer, generators, average, decision."""
    best = f"{result.best} {result.message}"
    return {
        "reason": result.reason.name, "best": best, "in memory": harness.digest(result.model.state_dict()),
        **training.left(folder),
    }  # fmt: skip


def told(variant: Variant) -> str:
    named = {name: getattr(value, "kind", value) for name, value in variant.items()}
    named["optimizer"] = "sgd" if callable(variant["optimizer"]) else variant["optimizer"]
    return ", ".join(f"{value}" if name == "data" else f"{name} {value}" for name, value in named.items())
