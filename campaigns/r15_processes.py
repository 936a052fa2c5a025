"""R15: one of two processes is killed, stopped or raises at random instants; the launcher begins anew until it ends.

Real processes: ``epochal train RECIPE --processes 2 --restarts N``. Each fault has to be told with the process it
befell, within the timeout of the group and what ending takes; and what the run leaves is what an undisturbed one does.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from campaigns import harness
from campaigns.cli_kills import DIGITS
from campaigns.harness import Outcome, Part

WHAT = "one of two processes killed, stopped or raising"
FAULTS = {"small": 3, "full": 100}
A_RUN = {"small": 3, "full": 10}  # faults in one command
EPOCHS = {"small": 20, "full": 40}
FILES = ("model.safetensors", "metrics.jsonl", "results.csv")
ROOT = Path(__file__).parents[1]
TIMEOUT = 6  # seconds of the group
SLACK = 60  # seconds for a diagnosis, for ending, and for starting two processes on a busy machine
RECIPE = '''
"""Handwritten digits with everything on that has a state. SIGUSR2: the next sample raises."""

import signal
from importlib.resources import files

import numpy as np
import torch
from torch import nn

import epochal

asked = []
signal.signal(signal.SIGUSR2, lambda *_: asked.append(1))


def objective(model, batch):
    images, labels = batch
    if asked and model.training:
        raise ValueError("asked to fail")
    outputs = model(images)
    return epochal.Loss(nn.functional.cross_entropy(outputs, labels), len(labels), outputs, labels)


def plan() -> epochal.Plan:
DIGITS    return epochal.Plan(
        model, (images[:1400], labels[:1400]), val=(images[1400:], labels[1400:]), objective=objective,
        optimizer="adamw", lr=0.003, schedule=epochal.Schedule("cosine", warmup=20), metrics=["accuracy"],
        epochs=EPOCHS, batch_size=33, accumulate=2, clip=1.0, strategy=epochal.Strategy("KIND", timeout="TIMEOUT s"),
        save=epochal.Saving("5 steps", share=None),
    )
'''.replace("DIGITS", DIGITS)
BREAKING = """
from epochal.runtime import seeding

seeding.set_generator_states = lambda states: None
"""


def run(scale: str) -> Outcome:
    return harness.outcome("R15", WHAT, lambda part, rng, *_: _runs(part, rng, scale))


def bites() -> Outcome:
    """A recipe that breaks the resume: the random generators are not put back."""

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.scratch(on_disk=True) as folder:
            expected = _undisturbed(part, folder, "ddp", 60, BREAKING)
            _one(part, rng, folder, "run", expected, 3, ["kill"] * 3)  # the first may come before a checkpoint

    return harness.outcome("R15", WHAT, work)


def _runs(part: Part, rng: random.Random, scale: str) -> None:
    with harness.scratch(on_disk=True) as folder:
        number = 0
        for kind in ("ddp", "fsdp") if scale == "full" else ("ddp",):
            expected = _undisturbed(part, folder, kind, EPOCHS[scale])
            wanted = part.tried + FAULTS[scale] // (2 if scale == "full" else 1)
            while part.tried < wanted and number < 10 * FAULTS[scale]:
                number += 1
                faults = [rng.choice(("kill", "stop", "raise")) for _ in range(A_RUN[scale])]
                if scale == "small":
                    faults = ["kill", "stop", "raise"]
                _one(part, rng, folder, f"run-{number}", expected, wanted - part.tried, faults)


def _undisturbed(part: Part, folder: Path, kind: str, epochs: int, more: str = "") -> dict[str, str]:
    recipe = RECIPE.replace("EPOCHS", str(epochs)).replace("KIND", kind).replace("TIMEOUT", str(TIMEOUT))
    (folder / "recipe.py").write_text(recipe + more)
    code = _started(folder, f"straight-{kind}", 0).wait(600)
    if code:
        part.fail(f"{kind}: the undisturbed run ended with {code}: {_told(folder, f'straight-{kind}')[-300:]}")
    return {name: harness.sha256(folder / f"straight-{kind}" / name) for name in FILES}


def _one(
    part: Part, rng: random.Random, folder: Path, name: str, expected: dict[str, str], most: int, faults: list[str]
) -> None:  # fmt: skip
    """One command, disturbed again and again, and then left to itself."""
    launcher, done = _started(folder, name, len(faults)), 0
    seen: set[int] = set()
    for fault in faults[:most]:
        workers = _workers(launcher, seen)
        if len(workers) < 2:
            break
        seen |= {worker.pid for worker in workers.values()}
        _wait_for_training(folder / name, launcher, rng, may_be_early=fault != "stop")  # no plan has said a timeout yet
        rank = rng.randrange(2)
        began = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            workers[rank].send_signal({"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "raise": signal.SIGUSR2}[fault])
            part.tried += 1
            part.count(f"{fault} of process {rank}")
            done += 1
        while launcher.poll() is None and _told(folder, name).count("all start again") < done:
            time.sleep(0.05)
            if time.monotonic() - began > TIMEOUT + SLACK:
                part.fail(f"{name}: {fault} of process {rank}: no restart in {TIMEOUT + SLACK} seconds")
                launcher.kill()
                return
        part.most(f"most seconds from {fault} to the restart", time.monotonic() - began)
        if launcher.poll() is not None:
            break
    code = launcher.wait(600)
    if code:
        part.fail(f"{name}: exit code {code}: {' '.join(_told(folder, name).splitlines()[-4:])}")
        return
    told = _told(folder, name)
    part.most("most restarts in a run", told.count("all start again"))
    if (named := len(re.findall(r"rank [01] is dead or stopped|ValueError|was killed", told))) < done:
        part.fail(f"{name}: {named} of {done} faults are told: {told[-600:]}")
    wrong = [file for file in FILES if harness.sha256(folder / name / file) != expected[file]]
    if wrong:
        part.fail(f"{name}: {', '.join(wrong)} differ after {faults[:done]}")


def _workers(launcher: subprocess.Popen, seen: set[int]) -> dict[int, psutil.Process]:
    """The two processes that were started last, by rank."""
    deadline = time.monotonic() + 60
    while launcher.poll() is None and time.monotonic() < deadline:
        found = {}
        with suppress(psutil.Error):
            for child in psutil.Process(launcher.pid).children():
                rank = child.environ().get("RANK")
                if child.pid not in seen and rank is not None:
                    found[int(rank)] = child
        if len(found) == 2:
            return found
        time.sleep(0.05)
    return {}


def _wait_for_training(run: Path, launcher: subprocess.Popen, rng: random.Random, *, may_be_early: bool) -> None:
    """Now and then a fault comes before anything is trained; mostly after a checkpoint or more."""
    before = _newest(run)
    deadline = time.monotonic() + (rng.random() * 8 if may_be_early and rng.random() < 0.15 else 60)
    while launcher.poll() is None and time.monotonic() < deadline and _newest(run) <= before:
        time.sleep(0.01)
    time.sleep(rng.random() * 0.5)


def _newest(run: Path) -> int:
    return max((int(path.name[5:13]) for path in run.glob("checkpoints/step-*")), default=-1)


def _started(folder: Path, name: str, restarts: int) -> subprocess.Popen:
    words = ["train", "recipe.py", "--run", name, "--seed", "0", "--processes", "2", "--restarts", str(restarts)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with (folder / f"{name}.err").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "epochal", *words], cwd=folder, env=environment, stdout=subprocess.DEVNULL,
            stderr=errors,
        )  # fmt: skip


def _told(folder: Path, name: str) -> str:
    return (folder / f"{name}.err").read_text()
