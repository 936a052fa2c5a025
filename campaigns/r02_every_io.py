"""R2: killed after every single call to the disk, of a save and of a run: the old or the new is found, whole."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from campaigns import harness, training
from campaigns.harness import Outcome, Part
from epochal.checkpoint import codec, files
from epochal.checkpoint.store import Checkpoints
from epochal.errors import CheckpointError

WHAT = "killed after every call to the disk"
Save = Callable[[Checkpoints, int], None]


def run(scale: str) -> Outcome:
    """Every call of a save in both scales; of a whole run, a sample in the small one."""
    expected = training.reference()

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        _saves(part, share, shares, save)
        _runs(part, rng, share, shares, expected, most=12 if scale == "small" else None)

    return harness.outcome("R2", WHAT, work, shares=2 if scale == "full" else 1)


def bites() -> Outcome:
    """A store that writes its files in place, over the last ones."""
    for step in range(1, 5):
        contents(step)  # a child that is killed leaves no folder behind then
    return harness.outcome("R2", WHAT, lambda part, rng, share, shares: _saves(part, share, shares, save_in_place))


def state(step: int) -> dict[str, Any]:
    """A small state that tells its step in a tensor, in a number and in its size."""
    weights = torch.arange(64 + step, dtype=torch.float32) * step
    return {"model": {"weight": weights, "bias": weights[:4].double()}, "progress": {"step": step, "rate": step / 7}}


def save(checkpoints: Checkpoints, step: int) -> None:
    """As it is done."""
    checkpoints.save(step, state(step))


def save_in_place(checkpoints: Checkpoints, step: int) -> None:
    """As it must not be done: the same protocol and hashes, without a folder aside and a rename."""
    for path in checkpoints.all():
        files.remove_folder(path)
    with harness.changed(files, aside=lambda path: path):
        checkpoints._commit(step, {name: [data] for name, data in contents(step).items()})


@functools.cache
def contents(step: int) -> dict[str, bytes]:
    """The files of a checkpoint, as they would be written."""
    with harness.scratch() as folder:
        path = Checkpoints(folder).save(step, state(step))
        return {file.name: file.read_bytes() for file in sorted(path.iterdir(), reverse=True)}


def _saves(part: Part, share: int, shares: int, save: Save) -> None:
    """Steps 1 and 2 are saved, with one kept; step 3 is being saved when the process is killed; then step 4 is."""
    digests = {harness.digest(codec.decode(*codec.encode(state(step)))): step for step in range(1, 5)}
    with harness.scratch() as folder:
        at = share + 1
        while True:
            checkpoints = Checkpoints(folder / str(at), keep=1)
            save(checkpoints, 1)
            save(checkpoints, 2)
            ended = harness.ask(lambda: killed_at(at, lambda: save(checkpoints, 3)))  # noqa: B023
            if ended.killed is None:
                part.count("calls of a save", at - 1 if share == 0 else 0)
                return
            part.tried += 1
            for problem in _problems(checkpoints, digests, save):
                part.fail(f"save, call {at}: {problem}")
            at += shares


def killed_at(at: int, work: Callable[[], Any]) -> None:
    """Does something, and is killed right after the call to the disk of this number."""
    with harness.disk(harness.counted(at, harness.kill_me)):
        work()


def _problems(checkpoints: Checkpoints, digests: dict[str, int], save: Save) -> list[str]:
    """What is wrong after a kill: the state that is found, and then the next save."""
    problems = []
    try:
        found = checkpoints.newest_whole()
        step = digests.get(harness.digest(found.state)) if found else None
        if step not in (2, 3):
            problems.append("what is found was never saved" if found else "nothing is found")
        save(checkpoints, 4)
        again = checkpoints.newest_whole()
        if again is None or digests.get(harness.digest(again.state)) != 4 or again.damaged:
            problems.append("the next save is not what is found after it")
    except CheckpointError as error:
        problems.append(error.describe())
    if left := harness.leftovers(checkpoints.folder):
        problems.append(f"left after the next save: {left}")
    if len(checkpoints.all()) != 1:
        problems.append(f"kept: {[path.name for path in checkpoints.all()]}")
    return problems


def _runs(
    part: Part, rng: random.Random, share: int, shares: int, expected: dict[str, str], *, most: int | None
) -> None:
    """A whole run with its folder: checkpoints and records; killed after call n, then resumed to its end."""
    with harness.scratch(on_disk=True) as folder:
        os.chdir(folder)
        calls = harness.ask(lambda: _calls(folder / "counted")).value
        part.count("calls of a run", calls if share == 0 else 0)
        chosen = range(1 + share, calls + 1, shares)
        for at in chosen if most is None else [*chosen[2:18:5], *rng.sample(chosen, most)]:
            _one_run(part, folder / str(at), at, expected)


def _one_run(part: Part, folder: Path, at: int, expected: dict[str, str]) -> None:
    harness.ask(lambda: killed_at(at, lambda: training.fit(folder)))
    part.tried += 1
    ended = harness.ask(lambda: training.trained(folder))
    if ended.error is not None:
        part.fail(f"run, call {at}: {ended.error}")
    elif wrong := training.differences(ended.value, expected):
        part.fail(f"run, call {at}: {', '.join(wrong)} differ")
    elif left := [name for name in harness.leftovers(folder) if "/" not in name]:
        part.fail(f"run, call {at}: left {left}")  # among the checkpoints, the next save removes it


def _calls(folder: Path) -> int:
    around = harness.counted(0, lambda: None)
    with harness.disk(around):
        training.fit(folder)
    return around.calls.count
