"""R17: several processes start on one run folder at once: exactly one goes on. A killed holder keeps nobody out."""

from __future__ import annotations

import os
import random
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, TensorDataset

from campaigns import harness, training
from campaigns.harness import Child, Outcome, Part
from epochal.errors import RunFolderError
from epochal.observe import recorder
from epochal.runtime import lock

WHAT = "several starts on one run folder, killed holders"
ROUNDS = {"small": 6, "full": 1_000}
SECONDS = 20.0


def run(scale: str) -> Outcome:
    """Two or five at once, on a new folder or one to resume; then the holder is killed, with or without workers."""
    expected = training.reference()
    training.reference(train=_loader(2), max_steps=1)  # what workers need is imported once

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.scratch() as folder:
            os.chdir(folder)
            for number in range(ROUNDS[scale]):
                count, workers = (2, 5)[number % 2], 2 * (number % 4 == 3)
                _round(part, folder / str(number), count, workers, expected)

    return harness.outcome("R17", WHAT, work)


def bites() -> Outcome:
    """No lock at all, and a lock that is a file, which a killed holder leaves behind."""

    class NoLock:
        def __init__(self, folder: Path):
            pass

        def release(self) -> None:
            pass

    class Present(NoLock):
        def __init__(self, folder: Path):
            if (folder / lock.LOCK_FILE).exists():
                raise RunFolderError("another run is at work in this folder.")
            (folder / lock.LOCK_FILE).touch()

    training.reference()

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.scratch() as folder:
            for number, (kind, count) in enumerate(((NoLock, 5), (Present, 2))):
                with harness.changed(recorder, Lock=kind):
                    _round(part, folder / str(number), count, 0, None)

    return harness.outcome("R17", WHAT, work)


def _loader(workers: int) -> DataLoader:
    inputs = torch.zeros(64, 6)
    return DataLoader(TensorDataset(inputs, torch.zeros(64, dtype=torch.int64)), batch_size=4, num_workers=workers)


def _options(workers: int) -> dict[str, Any]:
    return {"train": _loader(workers)} if workers else {}


def _start(folder: Path, go: int, told: int, workers: int, *, resume: bool) -> Callable[[], Any]:
    """Waits for the word, begins a run, tells that it has begun (or was kept out), and then stays where it is."""

    def stays(event: Any) -> None:
        if type(event).__name__ == "StepDone":
            os.write(told, b"r")
            time.sleep(600)

    def work() -> str:
        os.read(go, 1)
        try:
            training.fit(folder, resume=resume, observers=[stays], **_options(workers))
        except RunFolderError:
            os.write(told, b"k")
            return "kept out"
        except Exception:
            os.write(told, b"e")
            raise
        return "ended"

    return work


def _round(part: Part, folder: Path, count: int, workers: int, expected: dict[str, str] | None) -> None:
    part.tried += 1
    told = f"{folder.name}, {count} processes" + (f" with {workers} workers each" if workers else "")
    (waits, go), (hears, tells) = os.pipe(), os.pipe()
    resume = count == 5
    if resume:
        harness.ask(lambda: str(training.fit(folder, max_steps=2, **_options(workers))))
    children = [Child(_start(folder, waits, tells, workers, resume=resume)) for _ in range(count)]
    os.write(go, b"." * count)
    answers = _answers(hears, count)
    if sorted(answers) != sorted("k" * (count - 1) + "r"):
        part.fail(f"{told}: {answers.count('r')} began and {answers.count('k')} were kept out")
    alive = [child for child in children if _state(child.pid) not in ("zombie", None)]
    mine = [worker.pid for child in alive for worker in psutil.Process(child.pid).children()]
    part.count("workers that outlived the holder", 0)
    for child in alive:
        child.kill()
    for child in children:
        child.wait(timeout=10)
    for descriptor in (waits, go, hears, tells):
        os.close(descriptor)
    part.count("workers that outlived the holder", sum(_state(pid) not in ("zombie", None) for pid in mine))
    began = time.perf_counter()
    ended = harness.ask(lambda: training.trained(folder, **_options(workers)), timeout=SECONDS)
    part.most("most seconds of the next run", time.perf_counter() - began)
    if ended.error is not None:
        part.fail(f"{told}: the next run: {ended.error}")
    elif not workers and not resume and (wrong := training.differences(ended.value, expected or {})):
        part.fail(f"{told}: the next run: {', '.join(wrong)} differ")


def _answers(hears: int, count: int) -> str:
    answers, deadline = "", time.monotonic() + SECONDS
    while len(answers) < count and select.select([hears], [], [], max(0, deadline - time.monotonic()))[0]:
        answers += os.read(hears, count).decode()
    return answers


def _state(pid: int) -> str | None:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return None
