"""R6: the newest k of n checkpoints damaged in many ways: the newest whole one is found, and nothing is removed."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from campaigns import harness, training
from campaigns.harness import Outcome, Part
from campaigns.r02_every_io import state
from epochal.checkpoint import codec, manifest
from epochal.checkpoint.store import Checkpoints, Found
from epochal.errors import CheckpointError

WHAT = "the newest k of n checkpoints damaged"
CASES = {"small": 150, "full": 5_000}
RUNS = {"small": 6, "full": 300}
MOST = 6  # checkpoints


def run(scale: str) -> Outcome:
    """The store alone, and whole runs that are resumed."""
    expected = training.reference()

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        _stores(part, rng, CASES[scale] // shares)
        _runs(part, rng, RUNS[scale] // shares, expected)

    return harness.outcome("R6", WHAT, work, shares=2 if scale == "full" else 1)


def bites() -> Outcome:
    """A store that takes the newest checkpoint that has a manifest for whole."""

    def trusting(self: Checkpoints) -> Found | None:
        for path in reversed(self.all()):
            if (path / manifest.MANIFEST).exists():
                return Found(path, self.load(path))
        return None

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.changed(Checkpoints, newest_whole=trusting):
            _stores(part, rng, 60)

    return harness.outcome("R6", WHAT, work)


def _flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _cut(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def _zeros(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


def _longer(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + b"\0" * rng.randint(1, 99))


def _missing(file: Path, rng: random.Random) -> None:
    file.unlink()


def _folder_instead(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def _link_instead(file: Path, rng: random.Random) -> None:
    moved = file.with_name("elsewhere")
    file.rename(moved)
    file.symlink_to(moved)


def _noise(file: Path, rng: random.Random) -> None:
    file.write_bytes(rng.randbytes(rng.randint(1, 3000)))


def _empty_checkpoint(file: Path, rng: random.Random) -> None:
    shutil.rmtree(file.parent)
    file.parent.mkdir()


def _file_for_checkpoint(file: Path, rng: random.Random) -> None:
    shutil.rmtree(file.parent)
    file.parent.write_bytes(b"")


WAYS: tuple[Callable[[Path, random.Random], None], ...] = (
    _flip, _cut, _zeros, _longer, _missing, _folder_instead, _link_instead, _noise, _empty_checkpoint,
    _file_for_checkpoint,
)  # fmt: skip


def _damage(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(path.iterdir()))
    way = rng.choice(WAYS)
    way(file, rng)
    return f"{way.__name__} {path.name}/{file.name}"


def _stores(part: Part, rng: random.Random, cases: int) -> None:
    digests = {step: harness.digest(codec.decode(*codec.encode(state(step)))) for step in range(1, MOST + 1)}
    for _ in range(cases):
        with harness.scratch() as folder:
            n = rng.randint(1, MOST)
            k = rng.randint(0, n)
            paths = [Checkpoints(folder, keep=MOST).save(step, state(step)) for step in range(1, n + 1)]
            how = ", ".join(_damage(path, rng) for path in paths[n - k :])
            before = harness.listing(folder)
            part.tried += 1
            for problem in _problems(folder, paths, k, digests):
                part.fail(f"{k} of {n}: {how}: {problem}")
            if harness.listing(folder) != before:
                part.fail(f"{k} of {n}: {how}: something was changed")


def _problems(folder: Path, paths: list[Path], k: int, digests: dict[int, str]) -> list[str]:
    damaged = {str(path) for path in paths[len(paths) - k :]}
    try:
        found = Checkpoints(folder).newest_whole()
    except CheckpointError as error:
        unnamed = [path for path in damaged if path not in (error.where or "")]
        return [f"not named: {unnamed}"] if unnamed else [] if k == len(paths) else [error.describe()]
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    if found is None or harness.digest(found.state) != digests.get(len(paths) - k):
        return [f"{found.path.name if found else 'nothing'} is found"]
    named = {error.where for error in found.damaged}
    return [] if named == damaged else [f"named: {named}"]


def _runs(part: Part, rng: random.Random, count: int, expected: dict[str, str]) -> None:
    """A run that was killed, its newest checkpoints damaged, and resumed: it says so, and ends as if nothing were."""
    with harness.scratch() as folder:
        os.chdir(folder)
        for number in range(count):
            place = folder / str(number)
            at = rng.randint(90, 320)
            around = harness.counted(at, harness.kill_me)
            harness.ask(lambda: _fit_on(place, around))  # noqa: B023
            paths = Checkpoints(place / "checkpoints").all()
            k = rng.randint(0, len(paths))
            hurt = paths[len(paths) - k :]
            how = ", ".join(_damage(path, rng) for path in hurt)
            before = harness.listing(place / "checkpoints")
            part.tried += 1
            ended = harness.ask(lambda: training.trained(place, keep=100))  # noqa: B023
            told = (place / "journal.jsonl").read_text()
            after = harness.listing(place / "checkpoints")
            if k == len(paths) > 0:
                if "CheckpointError" not in (ended.error or "") or after != before:
                    part.fail(f"run, all damaged: {how}: {ended}")
            elif ended.error or training.differences(ended.value, expected):
                part.fail(f"run, {k} of {len(paths)}: {how}: {ended.error or 'ends otherwise'}")
            elif any(f"{path.name} is left out" not in told for path in hurt):
                part.fail(f"run, {k} of {len(paths)}: {how}: not all are named")
            elif lost := [
                name for name, sha in before.items() if after.get(name) != sha and not _replaced(name, after)
            ]:
                part.fail(f"run, {k} of {len(paths)}: {how}: changed: {lost}")


def _replaced(name: str, after: dict[str, str]) -> bool:
    """Whether a later checkpoint of the same step stands there, whose saving removes the older one."""
    return name.startswith(".step") or f"{name.split('/')[0][:13]}-2" in after


def _fit_on(folder: Path, around: Callable) -> None:
    with harness.disk(around):
        training.fit(folder, keep=100)
