"""cli: a recipe killed with SIGKILL at random instants through the command line, and resumed until it ends.

Real processes: ``python -m epochal train RECIPE --run X`` and ``epochal resume X``, killed anywhere from the first
import to the last file. ``python -m campaigns.cli_kills [--small]``.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from campaigns import harness
from campaigns.harness import Outcome, Part

WHAT = "recipes killed through the command line"
KILLS = {"small": 2, "full": 20}
EPOCHS = {"small": 3, "full": 18}  # of about a third of a second
FILES = ("model.safetensors", "metrics.jsonl", "results.csv")
ROOT = Path(__file__).parents[1]
DIGITS = """    torch.set_num_threads(1)
    with files("epochal.cli").joinpath("digits.npz").open("rb") as file, np.load(file) as digits:
        images = torch.from_numpy(digits["images"])[:, None].float() / 16
        labels = torch.from_numpy(digits["labels"]).long()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(192, 10),
    )
"""
RECIPE = '''
"""Handwritten digits, shifted at random, with everything on that has a state."""

from importlib.resources import files

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import epochal


class Shifted(Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        shifts = torch.randint(-1, 2, (2,)).tolist()
        return self.images[i].roll(shifts, (1, 2)) + 0.05 * torch.randn(1, 8, 8), self.labels[i]


def plan() -> epochal.Plan:
DIGITS    return epochal.Plan(
        model, Shifted(images[:1400], labels[:1400]), val=(images[1400:], labels[1400:]), loss="cross_entropy",
        optimizer="adamw", lr=0.003, schedule=epochal.Schedule("cosine", warmup=20), metrics=["accuracy"], patience=8,
        epochs=EPOCHS, batch_size=32, clip=1.0, run="run", save=epochal.Saving("10 steps", share=None),
    )
'''.replace("DIGITS", DIGITS)

BREAKING = """
from epochal.runtime import seeding

seeding.set_generator_states = lambda states: None
"""


def run(scale: str) -> Outcome:
    return harness.outcome("cli", WHAT, lambda part, rng, *_: _runs(part, rng, KILLS[scale], EPOCHS[scale]))


def bites() -> Outcome:
    """A recipe that breaks the resume: the random generators are not put back."""

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.scratch(on_disk=True) as folder:
            expected, _ = _undisturbed(folder, 1, BREAKING)
            process = _started(folder, "run")
            while process.poll() is None and not list((folder / "run").glob("checkpoints/step-0000002*")):
                time.sleep(0.005)
            process.kill()
            process.wait()
            part.tried += 1
            _started(folder, "run").wait(300)
            _compare(part, folder / "run", expected)

    return harness.outcome("cli", WHAT, work)


def _undisturbed(folder: Path, epochs: int, more: str = "") -> tuple[dict[str, str], float]:
    """What an undisturbed run leaves, and how long it took."""
    (folder / "recipe.py").write_text(RECIPE.replace("EPOCHS", str(epochs)) + more)
    began = time.monotonic()
    _started(folder, "straight").wait(300)
    return {name: harness.sha256(folder / "straight" / name) for name in FILES}, time.monotonic() - began


def _runs(part: Part, rng: random.Random, kills: int, epochs: int) -> None:
    with harness.scratch(on_disk=True) as folder:
        expected, seconds = _undisturbed(folder, epochs)
        part.figures["seconds of an undisturbed run"] = seconds
        number = 0
        while part.tried < kills and number < 10 * kills:
            number += 1
            _one(part, rng, folder, f"run-{number}", expected, seconds, kills)


def _one(
    part: Part, rng: random.Random, folder: Path, name: str, expected: dict[str, str], seconds: float, kills: int
) -> None:  # fmt: skip
    """One run, killed up to four times, and then left to itself."""
    most = min(kills - part.tried, rng.randint(1, 4))
    for attempt in range(most + 1):
        process = _started(folder, name)
        try:
            code = process.wait(rng.random() * seconds if attempt < most else 300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            part.tried += 1
            part.count("kills before the run had begun", not (folder / name / "run.json").exists())
            continue
        if code:
            told = (folder / f"{name}.err").read_text().strip().splitlines()
            part.fail(f"{name}, after {attempt} kills: exit code {code}: {' '.join(told[-3:])}")
            return
        break
    part.count("runs")
    _compare(part, folder / name, expected)


def _started(folder: Path, name: str) -> subprocess.Popen:
    """Begins the run, or resumes it if it is there."""
    there = (folder / name / "run.json").exists()
    words = ["resume", name] if there else ["train", "recipe.py", "--run", name, "--seed", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (folder / f"{name}.err").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "epochal", *words], cwd=folder, env=environment, stdout=subprocess.DEVNULL,
            stderr=errors,
        )  # fmt: skip


def _compare(part: Part, run: Path, expected: dict[str, str]) -> None:
    wrong = [name for name in FILES if harness.sha256(run / name) != expected[name]]
    if wrong:
        part.fail(f"{run.name}: {', '.join(wrong)} differ")


if __name__ == "__main__":
    found = run("small" if "--small" in sys.argv[1:] else "full")
    print(f"{found.id}: {found.what}: {found.tried} tried, {len(found.failures)} failed, {found.seconds:.0f} seconds")
    print("\n".join([*found.failures, *(f"{name}: {value}" for name, value in found.figures.items())]))
    sys.exit(1 if found.failures else 0)
