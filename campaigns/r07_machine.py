"""R7: random sequences of saves, crashes, removals, resumes, renames and foreign files (a Hypothesis state machine).

At all times after the first save there is a whole checkpoint, and nothing that is not the run's own is touched.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from campaigns import harness
from campaigns.harness import Outcome, Part
from campaigns.r02_every_io import save_in_place, state
from epochal.checkpoint import codec, files, store
from epochal.checkpoint.store import Checkpoints
from epochal.errors import CheckpointError

WHAT = "random sequences of save, crash, remove, rename"
SEQUENCES = {"small": 40, "full": 4_000}
FOREIGN = ("notes.txt", "step-abc", "steps/a.txt", "step-00000001.bak/manifest.json", "model.pt", ".hidden")
INSIDE = ("mine.txt", "manifest.json.bak", "deep/more.txt")


class Crash(BaseException):
    """The process is gone: nothing of it is done any more, no ``finally`` either (the disk no longer answers)."""


def crashing(at: int) -> Callable[..., Any]:
    """For the disk: the call of this number is the last one that is made."""
    calls = [0]

    def around(name: str, call: Callable[[], Any], arguments: tuple) -> Any:
        calls[0] += 1
        if calls[0] > at:
            if name == "close":
                call()
            raise Crash
        return call()

    return around


class Machine(RuleBasedStateMachine):
    """One run's folder of checkpoints, beside files of others."""

    save: Callable[[Checkpoints, int], None] = staticmethod(
        lambda checkpoints, step: checkpoints.save(step, state(step))
    )
    figures: dict[str, int] = {}
    is_shrunk = True  # whether a failure is made as short as it can be

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="campaign-", dir=harness.MEMORY))
        self.folder, self.step, self.saved = self.root / "run" / "checkpoints", 0, 0
        self.foreign: dict[Path, bytes] = {}
        self._foreign(self.root / "other" / "checkpoints" / "step-00000001" / "manifest.json")
        self.digests: dict[str, int] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def _foreign(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(b"a stranger's")
            self.foreign[path] = b"a stranger's"

    def _next(self) -> int:
        self.step += 1
        self.digests[harness.digest(codec.decode(*codec.encode(state(self.step))))] = self.step
        return self.step

    @rule(keep=st.integers(1, 3), again=st.booleans())
    def saves(self, keep: int, again: bool) -> None:
        """The next step, or the newest once more."""
        step = self.saved if again and self.saved else self._next()
        self.save(Checkpoints(self.folder, keep), step)
        self.saved = step
        assert not harness.leftovers(self.folder), harness.leftovers(self.folder)
        self.figures["saves"] = self.figures.get("saves", 0) + 1

    @rule(keep=st.integers(1, 3), at=st.integers(0, 60))
    def crashes_in_a_save(self, keep: int, at: int) -> None:
        step = self._next()
        try:
            with harness.disk(crashing(at)):
                self.save(Checkpoints(self.folder, keep), step)
            self.saved = step
        except Crash:
            self.figures["crashes"] = self.figures.get("crashes", 0) + 1
        found = self._found()
        self.saved = max(self.saved, found)  # a crash after the rename: the new one is there already
        self.step = max(self.saved, self.step)

    @rule()
    def resumes(self) -> None:
        """A later process begins where the newest whole one is."""
        self.step = max(self.step, self._found())

    @precondition(lambda self: self.saved)
    @rule(name=st.sampled_from(("runs/a", "b", "c d")), copied=st.booleans())
    def is_renamed_or_copied(self, name: str, copied: bool) -> None:
        new = self.root / name / "checkpoints"
        if new.exists() or not self.folder.exists():
            return
        new.parent.mkdir(parents=True, exist_ok=True)
        if copied:
            shutil.copytree(self.folder, new)
            for path in list(self.foreign):
                if path.is_relative_to(self.folder):
                    self.foreign[new / path.relative_to(self.folder)] = self.foreign[path]
        else:
            self.folder.rename(new)
            for path in [path for path in self.foreign if path.is_relative_to(self.folder)]:
                self.foreign[new / path.relative_to(self.folder)] = self.foreign.pop(path)
        self.folder = new

    @rule(name=st.sampled_from(FOREIGN))
    def a_stranger_puts_a_file(self, name: str) -> None:
        self._foreign(self.folder / name)

    @precondition(lambda self: self.saved)
    @rule(name=st.sampled_from(INSIDE), newest=st.booleans())
    def a_stranger_puts_a_file_into_a_checkpoint(self, name: str, newest: bool) -> None:
        paths = Checkpoints(self.folder).all()
        self._foreign(paths[-1 if newest else 0] / name)

    def _found(self) -> int:
        found = Checkpoints(self.folder).newest_whole()
        return self.digests[harness.digest(found.state)] if found else 0

    @invariant()
    def the_newest_is_whole(self) -> None:
        try:
            assert self._found() >= self.saved, f"step {self.saved} is lost"
        except CheckpointError as error:
            raise AssertionError(error.describe()) from error

    @invariant()
    def nothing_foreign_is_touched(self) -> None:
        for path, data in self.foreign.items():
            assert path.is_file() and path.read_bytes() == data, f"{path.relative_to(self.root)} was touched"


def run(scale: str) -> Outcome:
    """Sequences of up to forty moves."""
    shares = 2 if scale == "full" else 1
    return harness.outcome("R7", WHAT, lambda *given: _sequences(*given, SEQUENCES[scale] // shares), shares=shares)


def bites() -> Outcome:
    """A store that writes in place, and one that sweeps up whatever it finds."""

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        class InPlace(Machine):
            save = staticmethod(save_in_place)
            is_shrunk = False

        class Sweeping(Machine):
            is_shrunk = False

        _sequences(part, rng, share, shares, 30, InPlace)
        with harness.changed(files, sweep=_sweep_all):
            _sequences(part, rng, share, shares, 30, Sweeping)

    return harness.outcome("R7", WHAT, work)


def _sweep_all(folder: Path) -> None:
    """Removes whatever is not named like a checkpoint."""
    for name in os.listdir(folder):
        if not store.NAME.fullmatch(name):
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            else:
                os.unlink(folder / name)


def _sequences(
    part: Part, rng: random.Random, share: int, shares: int, count: int, machine: type[Machine] = Machine
) -> None:
    machine.figures.clear()
    chosen = settings(
        max_examples=count, stateful_step_count=40, deadline=None, database=None, derandomize=shares == 1,
        suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet, print_blob=False,
        report_multiple_bugs=False, phases=[Phase.generate, *([Phase.shrink] if machine.is_shrunk else [])],
    )  # fmt: skip
    part.tried += count
    try:
        run_state_machine_as_test(machine, settings=chosen)
    except BaseException as error:
        part.fail("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])[:2000])
    for name, value in machine.figures.items():
        part.count(name, value)
