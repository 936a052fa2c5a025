"""R3: power loss, in every state in which the disk may be found afterwards (:mod:`campaigns.journal` says which).

Sequences of saves, with older ones removed, over one or several files; crash after crash, the next process going on
with what the last one left; and a whole run with its folder, resumed to its end.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from campaigns import harness, training
from campaigns.harness import Outcome, Part
from campaigns.journal import Crashed, Journal, as_synced, materialise
from campaigns.r02_every_io import state
from epochal.checkpoint import codec, store
from epochal.checkpoint.store import Checkpoints
from epochal.errors import EpochalError

WHAT = "power loss at any time, every legal state of the disk"
STATES = {"small": 1_500, "full": 60_000}  # drawn; a third of them are distinct
RUNS = {"small": 8, "full": 400}  # of the states, those of a whole run, which is resumed to its end
STEPS = 40  # more than any sequence of saves has


def run(scale: str) -> Outcome:
    """Saves alone, and then whole runs."""
    expected = training.reference()
    shares = 2 if scale == "full" else 1

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        _saves(part, rng, STATES[scale] // shares)
        _runs(part, rng, RUNS[scale] // shares, expected)

    return harness.outcome("R3", WHAT, work, shares=shares)


def bites() -> Outcome:
    """The same saves with each fsync left out."""
    return harness.outcome("R3", WHAT, lambda part, rng, share, shares: _saves(part, rng, 200, syncs=False))


def _saves(part: Part, rng: random.Random, count: int, *, syncs: bool = True) -> None:
    steps = {harness.digest(codec.decode(*codec.encode(state(step)))): step for step in range(STEPS)}
    seen: set[bytes] = set()
    with harness.scratch() as folder:
        before, saved = {}, 0
        while part.tried < count:
            left = list(_crashes(folder / "live", rng, before, saved, syncs=syncs))
            shutil.rmtree(folder / "live")
            for crashed, newest in left:
                part.tried += 1
                key = hashlib.sha256(repr(sorted(crashed.items())).encode()).digest()
                if key not in seen:
                    seen.add(key)
                    part.count("distinct states")
                    materialise(folder / "crashed", crashed)
                    for problem in _problems(folder / "crashed", steps, newest):
                        part.fail(f"state {len(seen)}, after the save of step {newest}: {problem}")
                    shutil.rmtree(folder / "crashed")
            before, saved = rng.choice([*left, ({}, 0)])
            if saved > STEPS - 6:
                before, saved = {}, 0


def _crashes(
    root: Path, rng: random.Random, before: Crashed, saved: int, *, syncs: bool
) -> Iterator[tuple[Crashed, int]]:
    """States left in the course of a few saves, with the newest step whose save had returned by then."""
    materialise(root, before)
    journal, left = Journal(root, syncs=syncs, top=as_synced(before)), []

    def draw() -> None:
        left.extend((journal.crash(rng), saved) for _ in range(min(6, journal.at_risk)))

    files = rng.choice((store.LARGEST_FILE, 100))  # bytes: one file of tensors, or several
    with harness.changed(store, LARGEST_FILE=files), harness.disk(_watched(journal, draw)):
        for step in range(saved + 1, saved + rng.randint(2, 4)):
            Checkpoints(root, keep=rng.choice((1, 2))).save(step, state(step))
            saved = step
    yield from left


def _watched(journal: Journal, draw: Callable[[], None]) -> Callable[..., Any]:
    """For the disk: tells the journal each call, of whichever thread, and then draws."""
    lock = threading.Lock()

    def around(name: str, call: Callable[[], Any], arguments: tuple) -> Any:
        with lock:
            result = call()
            if journal.saw(name, arguments, result):
                draw()
            return result

    return around


def _problems(folder: Path, steps: dict[str, int], saved: int) -> Iterator[str]:
    """It finds the newest step whose save had returned, or a newer one, bit for bit; and it can save again."""
    try:
        found = Checkpoints(folder).newest_whole()
        step = 0 if found is None else steps.get(harness.digest(found.state))
        if step is None:
            yield f"{found.path.name if found else ''} is taken for whole, and was never saved"
        elif step < saved:
            yield f"step {step} is the newest that is found" if step else "no checkpoint is found"
        Checkpoints(folder).save(STEPS, state(STEPS))
        if left := harness.leftovers(folder):
            yield f"left after the next save: {left}"
    except EpochalError as error:
        yield error.describe()


def _runs(part: Part, rng: random.Random, count: int, expected: dict[str, str]) -> None:
    """A run in a child, its disk left at random moments; from each of them another child goes on to the end."""
    done = 0
    while done < count:
        seed = rng.random()
        with harness.scratch() as folder:
            ended = harness.ask(lambda: _crashed_run(folder, random.Random(seed)))  # noqa: B023
            if ended.error is not None:
                part.fail(f"a run: {ended.error}")
            for number, crashed in enumerate(ended.value or ()):
                place = folder / f"crashed-{number}"
                materialise(
                    place, {name: None if data is None else bytes.fromhex(data) for name, data in crashed.items()}
                )
                done += 1
                part.tried += 1
                part.count("whole runs")
                again = harness.ask(lambda: training.trained(place))  # noqa: B023
                if again.error is not None:
                    part.fail(f"a run with {sorted(crashed)}: {again.error}")
                elif wrong := training.differences(again.value, expected):
                    part.fail(f"a run with {sorted(crashed)}: {', '.join(wrong)} differ")


def _crashed_run(folder: Path, rng: random.Random) -> list[dict[str, str | None]]:
    """About eight states; bytes as hexadecimal digits."""
    folder = folder / "run"
    folder.mkdir()
    journal, left = Journal(folder), []

    def draw() -> None:
        if rng.random() < 0.03 and journal.at_risk:
            left.append(journal.crash(rng))

    with harness.disk(_watched(journal, draw)):
        training.fit(folder)
    return [{name: None if data is None else data.hex() for name, data in crashed.items()} for crashed in left]
