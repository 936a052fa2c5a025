"""R1: SIGKILL at random instants, half of them inside a save; resumed until the run ends, every bit is the same.

A process that is killed loses nothing that it had handed to the system: this is not a power loss (R3 is).
"""

from __future__ import annotations

import os
import random
import time
from contextlib import nullcontext
from pathlib import Path

from campaigns import harness, training
from campaigns.harness import Child, Outcome, Part
from epochal.runtime import seeding

WHAT = "SIGKILL at random instants, resumed to the end"
KILLS = {"small": 40, "full": 10_000}
MOST_SECONDS = 0.13  # about as long as the run takes when nothing disturbs it
CALLS_OF_A_RUN = 500  # calls to the disk that all saves of a run make together
MOST_DELAY = 0.002  # seconds, between such a call and the signal


def run(scale: str) -> Outcome:
    """Kills until there were enough."""
    expected = training.reference()
    return harness.outcome(
        "R1", WHAT, lambda part, rng, _, shares: _kill(part, rng, KILLS[scale] // shares, expected),
        shares=2 if scale == "full" else 1,
    )  # fmt: skip


def bites() -> Outcome:
    """The same, over a resume that does not put the random generators back."""
    expected = training.reference()

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.changed(seeding, set_generator_states=lambda states: None):
            _kill(part, rng, 12, expected)

    return harness.outcome("R1", WHAT, work)


def _kill(part: Part, rng: random.Random, kills: int, expected: dict[str, str]) -> None:
    with harness.scratch(on_disk=True) as folder:
        os.chdir(folder)
        number = 0
        while part.tried < kills:
            number += 1
            _one_run(part, rng, folder / f"run-{number}", expected)


def _one_run(part: Part, rng: random.Random, folder: Path, expected: dict[str, str]) -> None:
    """One run, killed again and again until it gets to its end before the signal."""
    for attempt in range(1, 200):
        ended = _attempt(rng, folder, inside=rng.random() < 0.5)
        if ended.killed:
            part.tried += 1
            part.count("kills that left half a checkpoint", bool(harness.leftovers(folder)))
            continue
        part.count("runs")
        part.most("most kills of one run", attempt - 1)
        if ended.error is not None:
            part.fail(f"{folder.name}, attempt {attempt}: {ended.error}")
        elif wrong := training.differences(ended.value, expected):
            part.fail(f"{folder.name}, after {attempt - 1} kills: {', '.join(wrong)} differ")
        return
    part.fail(f"{folder.name} does not come to an end")


def _attempt(rng: random.Random, folder: Path, *, inside: bool) -> harness.Ended:
    """Trains in a child, and kills it after a random time, or after a random call of a save and a short delay."""
    reached, mark = os.pipe()
    at = rng.randint(1, CALLS_OF_A_RUN) if inside else 0

    def work() -> dict[str, str]:
        os.close(reached)
        around = harness.counted(at, lambda: os.write(mark, b"."), only="checkpoint")
        with harness.disk(around) if inside else nullcontext():
            return training.trained(folder)

    child = Child(work)
    os.close(mark)
    if inside:
        os.read(reached, 1)  # also returns when the child has ended
        time.sleep(rng.random() * MOST_DELAY)
    else:
        time.sleep(rng.random() * MOST_SECONDS)
    child.kill()
    os.close(reached)
    return child.wait()
