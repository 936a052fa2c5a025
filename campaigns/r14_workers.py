"""R14: workers of a loader are killed, stopped, or hang over a sample.

It is noticed in time and told which worker it was, no process is left behind, and the resumed run sees the same
samples in the same order: it leaves the bits of an undisturbed one.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import epochal
from campaigns import harness, training
from campaigns.harness import Child, Outcome, Part
from epochal.data import given, workers
from epochal.data import loader as own

WHAT = "workers killed, stopped or hung"
TIMES = {"small": 6, "full": 200}
TROUBLES = {"small": ("SIGKILL", "SIGSTOP", "sleep"), "full": ("SIGKILL", "SIGKILL", "SIGSTOP", "sleep")}
SAMPLES, BATCH, STEPS = 48, 4, 24  # two epochs
TIMEOUT = 1.0  # seconds, after which a worker counts as hung
SECONDS_OF_A_USERS_WORKERS = 8.0  # torch's persistent workers look every five seconds whether anybody is there
MORE = 4.0  # seconds for noticing and for ending the workers, on a machine with other work
LOADERS = ("own", "DataLoader", "DataLoader, persistent")


class Samples(Dataset):
    """One of them hangs, in a worker, while a file says so."""

    def __init__(self, hangs_at: int | None = None, mark: Path | None = None):
        self.hangs_at, self.mark = hangs_at, mark

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i == self.hangs_at:
            assert self.mark is not None
            self.mark.write_text(f"{time.monotonic()} {os.getpid()}")
            time.sleep(600)
        time.sleep(0.001)
        return torch.full((3,), i / SAMPLES) + torch.rand(()), torch.ones(1) * i


def run(scale: str) -> Outcome:
    shares = 2 if scale == "full" else 1
    _warm()
    return harness.outcome(
        "R14", WHAT, lambda part, rng, *_: _lose(part, rng, TIMES[scale] // shares, TROUBLES[scale]), shares=shares
    )


def bites() -> Outcome:
    """A loader that ends nobody, and one that begins its epoch anew after the restart."""

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with (
            harness.changed(own, end_workers=_ends_nobody), harness.changed(given, end_workers=_ends_nobody),
            harness.changed(workers, end_workers=_ends_nobody),
        ):  # fmt: skip
            _lose(part, rng, 1, ["sleep"], "own")
        seen = len(part.failures)
        read = own.Loader._read
        with harness.changed(own.Loader, _read=lambda self, epoch, start: read(self, epoch, max(0, start - 1))):
            _lose(part, rng, 1, ["SIGKILL"], "own")
        if len(part.failures) == seen:
            raise RuntimeError("a batch was read twice, and nobody saw it")

    _warm()
    return harness.outcome("R14", WHAT, work)


def _ends_nobody(batches: Any, at_once: bool = False) -> None:
    """In the place of ``end_workers``."""


def _warm() -> None:
    with harness.scratch() as folder:
        harness.warm(lambda: _fit(folder / "run", "own") and None)


def _lose(part: Part, rng: random.Random, count: int, troubles: Sequence[str], kind: str | None = None) -> None:
    with harness.scratch() as folder:
        os.chdir(folder)
        expected = {}
        for number in range(count):
            one = kind or rng.choice(LOADERS)
            what = rng.choice(troubles)
            # Not when the workers have made all batches of an epoch: they are not missed then. What workers that
            # persist draw in a later epoch is not repeated, and the header says so.
            at = rng.choice([*range(1, 8), *(() if "persistent" in one else range(13, 17))])
            worker = rng.randrange(2)
            if one not in expected:
                expected[one] = harness.ask(lambda: _undisturbed(folder / one, one)).value  # noqa: B023
            part.tried += 1
            part.count(what)
            for problem in _one(part, folder / str(number), one, what, at, worker, expected[one]):
                part.fail(f"{one}, {what} to worker {worker} at step {at}: {problem}")


def _fit(folder: Path, kind: str, observers: Any = (), data: Dataset | None = None) -> epochal.Run:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))
    train: Any = data or Samples()
    if kind != "own":
        persistent = "persistent" in kind
        train = DataLoader(train, BATCH, shuffle=True, num_workers=2, timeout=TIMEOUT, persistent_workers=persistent)
    options = {"batch_size": BATCH, "workers": 2} if kind == "own" else {}
    plan = epochal.Plan(
        model, train, loss="mse", lr=0.05, epochs=2, seed=1, observers=observers, run=folder, resume=True,
        save=epochal.Saving("1 steps", share=None), **options,
    )  # fmt: skip
    run = plan.prepare()
    if isinstance(run.train, own.Loader):
        run.train._timeout = TIMEOUT  # which the plan has no option for
    with run:
        for _ in run:
            pass
    return run


def _undisturbed(folder: Path, kind: str) -> dict[str, str]:
    _fit(folder, kind)
    return training.left(folder)


def _one(part: Part, folder: Path, kind: str, what: str, at: int, worker: int, expected: dict[str, str]) -> list[str]:
    child = Child(lambda: _troubled(folder, kind, what, at, worker))
    told = child.wait(timeout=20)
    left = _left_behind(child.pid, SECONDS_OF_A_USERS_WORKERS if "persistent" in kind else 0.5)
    if told.error is not None:
        return [told.error, *left]
    problems, found = left, told.value
    part.most(f"most seconds until {what} is noticed", found["seconds"])
    if found["seconds"] > MORE + (0 if what == "SIGKILL" else 3 * TIMEOUT):
        problems.append(f"noticed after {found['seconds']:.1f} seconds")
    patience = (TIMEOUT, 2 * TIMEOUT)  # the second where the worker stops while it hands a batch over
    hangs = [f"hangs: it gave no batch in {seconds:g} seconds." for seconds in patience]
    words = [f"a process that loads data {word}" for word in (["died."] if what == "SIGKILL" else hangs)]
    if found["error"] != "WorkerError" or found["what"] not in words:
        problems.append(f"told as {found['error']}: {found['what']}")
    if f"pid {found['lost']}" not in found["where"]:
        problems.append(f"{found['where']} does not name {found['lost']}")
    resumed = harness.ask(lambda: _undisturbed(folder, kind))
    if resumed.error is not None:
        return [*problems, f"resumed: {resumed.error}"]
    shutil.rmtree(folder)
    return [*problems, *(f"resumed, {name} differs" for name in training.differences(resumed.value, expected))]


def _troubled(folder: Path, kind: str, what: str, at: int, worker: int) -> dict[str, Any]:
    """In a child: trains until its trouble is told; gives what was told, of whom, and after how long."""
    os.setpgid(0, 0)  # so that those it leaves behind can be found
    mark = folder.with_suffix(".trouble")

    def trouble(event: epochal.Event) -> None:
        if isinstance(event, epochal.StepDone) and event.step == at and what != "sleep":
            living = [one.pid for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
            mark.write_text(f"{time.monotonic()} {sorted(living)[worker]}")
            os.kill(sorted(living)[worker], getattr(signal, what))

    data = Samples((at * 7) % SAMPLES, mark) if what == "sleep" else None
    try:
        _fit(folder, kind, [trouble], data)
    except Exception as error:
        seconds, lost = time.monotonic(), mark.read_text().split()
        return {
            "error": type(error).__name__, "what": getattr(error, "what", str(error)),
            "where": str(getattr(error, "where", "")), "seconds": seconds - float(lost[0]), "lost": int(lost[1]),
        }  # fmt: skip
    raise RuntimeError("it was not noticed")


def _left_behind(group: int, seconds: float) -> list[str]:
    """Ends the processes of a group that are still there after a while, and tells how many they were."""
    deadline = time.monotonic() + seconds
    while left := [one.pid for one in psutil.process_iter() if _is_alive_in(group, one)]:
        if time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
            return [f"{len(left)} processes are left behind"]
        time.sleep(0.05)
    return []


def _is_alive_in(group: int, process: psutil.Process) -> bool:
    with suppress(psutil.Error, OSError):
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    return False
