"""R16: training goes on while a checkpoint is written to a slow disk.

What is saved is the state as it was at the snapshot, bit for bit; never are two in flight; and a writer's error is
raised within one step of the failure.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import epochal
from campaigns import harness
from campaigns.harness import Outcome, Part
from epochal.checkpoint import codec
from epochal.checkpoint.saver import Saver
from epochal.checkpoint.store import Checkpoints

WHAT = "training goes on while a checkpoint is written"
SAVES = {"small": 40, "full": 1_000}
LAST_SPOILT = 60  # calls to the disk, within which the one is drawn from which on they fail
X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Watching(Saver):
    """Keeps a digest of each state that it is given, and counts how many are being written."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.digests: dict[int, str] = {}
        self.writing = self.most = 0
        self.failed = threading.Event()

    def start(self, step: int, state: Mapping[str, Any]) -> None:
        self.digests[len(self.digests)] = harness.digest(codec.decode(*codec.encode(state)))
        super().start(step, state)

    def _write(self, *given: Any) -> None:
        self.writing += 1
        self.most = max(self.most, self.writing)
        super()._write(*given)
        self.writing -= 1
        if self._outcome is not None and isinstance(self._outcome[1], Exception):
            self.failed.set()


class Aliasing(Watching):
    """A snapshot that is none: the tensors are those of the model."""

    def start(self, step: int, state: Mapping[str, Any]) -> None:
        self.digests[len(self.digests)] = harness.digest(codec.decode(*codec.encode(state)))
        self._written = threading.Event()
        given = threading.Lock(), step, *codec.encode(state), self._written
        self._thread = threading.Thread(target=self._write, args=given, daemon=True, name="checkpoint")
        self._thread.start()


def run(scale: str) -> Outcome:
    """Runs of sixteen saves; in every third the disk fails after a while."""
    shares = 2 if scale == "full" else 1
    return harness.outcome("R16", WHAT, lambda part, rng, *_: _save(part, rng, SAVES[scale] // shares), shares=shares)


def bites() -> Outcome:
    """A snapshot that is not copied."""
    return harness.outcome("R16", WHAT, lambda part, rng, *_: _save(part, rng, 12, Aliasing))


def _save(part: Part, rng: random.Random, count: int, kind: type[Watching] = Watching) -> None:
    with harness.scratch() as folder:
        os.chdir(folder)
        number = 0
        while part.tried < count and number < 4 * count:
            number += 1
            fails_at = rng.randint(20, LAST_SPOILT) if number % 3 == 0 else None
            try:
                problems = _one(part, rng, folder / str(number), kind, fails_at)
            except Exception as error:
                problems = [f"{type(error).__name__}: {error}"]
            for problem in problems:
                part.fail(f"run {number}{f', call {fails_at} fails' if fails_at else ''}: {problem}")


def _one(part: Part, rng: random.Random, folder: Path, kind: type[Watching], fails_at: int | None) -> list[str]:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))
    saving = epochal.Saving("3 steps", keep=2, share=None)
    run = epochal.Plan(
        model, (X, Y), loss="mse", epochs=8, batch_size=8, seed=rng.randrange(1000), run=folder, save=saving,
        observers=(),
    ).prepare()  # fmt: skip
    saver = run.saver = kind(run.saver.checkpoints, saving)  # type: ignore[union-attr]
    problems, done, after = [], [0], [0]
    try:
        with harness.disk(_slow(rng, fails_at)), run:
            for event in run:
                if isinstance(event, epochal.StepDone):
                    time.sleep(0.001)
                    done[0] = event.step
                    after[0] += saver.failed.is_set()
                elif isinstance(event, epochal.Saved):
                    problems += _saved(part, saver, event, done[0])
    except epochal.CheckpointError as error:
        if fails_at is None:
            raise
        part.count("failures")
        part.most("most steps after a failure", after[0])
        if not saver.failed.is_set() or after[0] > 1:
            problems.append(f"after the failure {after[0]} steps were done: {error.what}")
    else:
        if fails_at is not None and saver.failed.is_set():
            problems.append("a failure was not told")
    if saver.most > 1:
        problems.append(f"{saver.most} were written at once")
    return problems


def _saved(part: Part, saver: Watching, event: epochal.Saved, done: int) -> list[str]:
    part.tried += 1
    part.count("saves during which steps were done", done > event.step)
    number = min(saver.digests)
    digest = saver.digests.pop(number)
    saver.digests = {n - 1: one for n, one in saver.digests.items()}
    if harness.digest(Checkpoints(event.path.parent).load(event.path)) != digest:
        return [f"{event.path.name} is not the state of its snapshot"]
    return []


def _slow(rng: random.Random, fails_at: int | None) -> Callable[..., Any]:
    """For the disk: writing takes its time, and from the call of a number on it fails, in the thread that saves."""
    calls = [0]

    def around(name: str, call: Callable[[], Any], arguments: tuple) -> Any:
        if threading.current_thread().name == "checkpoint":
            calls[0] += 1
            if fails_at is not None and calls[0] >= fails_at and name in ("write", "fsync", "mkdir", "rename"):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            if name in ("write", "fsync"):
                time.sleep(rng.random() * 0.003)
        return call()

    return around
