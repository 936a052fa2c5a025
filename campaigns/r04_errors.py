"""R4: every error of a disk, at every call of a save and of a run: nothing old is lost, and what is new is told.

Errors come from a stand-in at the border to the system, once or from then on; and really, from limits and mounts.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import epochal
from campaigns import harness, training
from campaigns.harness import Outcome, Part
from campaigns.r02_every_io import killed_at, save_in_place, state
from epochal.checkpoint import codec, store
from epochal.checkpoint.store import Checkpoints
from epochal.errors import DiskFullError, EpochalError

WHAT = "errors of the disk at every call"
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES", "EMFILE", "EINTR")
KINDS = (*ERRORS, "short write")
READING = {"listdir", "read", "fstat"}  # a full disk has no part in these
GOES_ON = {"save": epochal.Saving("1 steps", keep=2, share=None, on_full="continue")}


SMALL_DISKS = {
    f"a disk of {size}{told}": given for size in ("40k", "100k") for told, given in (("", {}), (", going on", GOES_ON))
}


def run(scale: str) -> Outcome:
    """Every call of a save, with fewer errors in the small version; and every call of a run, or a few."""
    expected = training.reference()
    shares = 2 if scale == "full" else 1

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        _saves(
            part, share, shares, Checkpoints.save, kinds=KINDS if scale == "full" else ("ENOSPC", "EIO", "short write")
        )
        _runs(part, rng, expected, share, shares, most=12 if scale == "small" else None)
        if share == 0:
            _really(part, expected)

    return harness.outcome("R4", WHAT, work, shares=shares)


def bites() -> Outcome:
    """A store that removes the old checkpoint before the new one is there."""

    def broken(checkpoints: Checkpoints, step: int, given: Any) -> None:
        try:
            save_in_place(checkpoints, step)
        except OSError as error:
            raise EpochalError(str(error)) from error

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        _saves(part, 0, 1, broken, kinds=("EIO",))

    return harness.outcome("R4", WHAT, work)


def breaking(kind: str, at: int, *, lasts: bool) -> Callable[..., Any]:
    """For the disk: the call of this number fails, and with ``lasts`` all after it."""
    calls = SimpleNamespace(count=0, broken=0)

    def around(name: str, call: Callable[[], Any], arguments: tuple) -> Any:
        calls.count += 1
        if calls.count < at or (calls.broken and not lasts) or name == "close":
            return call()
        if kind == "short write":
            if name != "write":
                return call()
            calls.broken += 1
            return os.write(arguments[0], bytes(arguments[1])[: max(1, len(arguments[1]) // 2)])
        if kind in ("ENOSPC", "EDQUOT") and name in READING:
            return call()
        calls.broken += 1
        number = getattr(errno, kind)
        raise OSError(number, os.strerror(number))

    around.calls = calls  # type: ignore[attr-defined]
    return around


def _saves(part: Part, share: int, shares: int, save: Callable[..., Any], *, kinds: tuple[str, ...]) -> None:
    with harness.scratch() as folder, harness.changed(store, PAUSES=(0, 0)):
        for kind in kinds:
            for lasts in (False, True):
                at = 1 + share
                while _one_save(part, folder / f"{kind}-{lasts}-{at}", kind, at, lasts, save):
                    at += shares


def _one_save(part: Part, folder: Path, kind: str, at: int, lasts: bool, save: Callable[..., Any]) -> bool:
    """Steps 1 and 2 are there; the disk fails while step 3 is saved; step 4 is saved when all is well again.

    Gives whether there were as many calls as that.
    """
    told = f"save, call {at}, {kind}{' and on' if lasts else ''}: "
    digests = {harness.digest(codec.decode(*codec.encode(state(step)))): step for step in (1, 2, 3, 4)}
    checkpoints, given = Checkpoints(folder, keep=1), state(3)
    before = harness.digest(given)
    for step in (1, 2):
        Checkpoints.save(checkpoints, step, state(step))
    saved, around = False, breaking(kind, at, lasts=lasts)
    try:
        with harness.disk(around):
            save(checkpoints, 3, given)
        saved = True
    except EpochalError as error:
        if kind in ("ENOSPC", "EDQUOT") and not isinstance(error, DiskFullError):
            part.fail(told + f"told as {error.describe()}")
    except Exception as error:
        part.fail(told + f"{type(error).__name__}: {error}")
    part.tried += 1
    part.count("saves that succeeded all the same", bool(saved and around.calls.broken))
    try:
        found = checkpoints.newest_whole()
        step = digests.get(harness.digest(found.state)) if found else None
        if step not in ((3,) if saved else (2, 3)):
            part.fail(told + f"step {step} is found afterwards")
        Checkpoints.save(checkpoints, 4, state(4))
        if left := harness.leftovers(folder):
            part.fail(told + f"left after the next save: {left}")
    except EpochalError as error:
        part.fail(told + error.describe())
    if harness.digest(given) != before:
        part.fail(told + "the state was touched")
    return around.calls.count >= at


def _runs(
    part: Part, rng: random.Random, expected: dict[str, str], share: int, shares: int, *, most: int | None
) -> None:
    """A run with its folder: what it raises is typed, and a later one goes on from it to the same end."""
    with harness.scratch() as folder:
        os.chdir(folder)
        around = breaking("EIO", 10**9, lasts=False)
        calls = harness.ask(lambda: _broken_run(folder / "counted", around, {})).value["calls"]
        chosen = [(kind, at) for at in range(1, calls + 1) for kind in KINDS]
        for kind, at in chosen[share::shares] if most is None else rng.sample(chosen, most):
            lasts = rng.random() < 0.5
            _one_run(part, folder / f"{kind}-{at}", kind, at, lasts, {}, expected)
            if kind in ("ENOSPC", "EDQUOT"):
                _one_run(part, folder / f"{kind}-{at}-goes-on", kind, at, lasts, GOES_ON, expected)


def _broken_run(folder: Path, around: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """How a run ended: with digests of the weights in memory, or with an error."""
    told: dict[str, Any] = {}
    with harness.disk(around), harness.changed(store, PAUSES=(0, 0)):
        try:
            result = training.fit(folder, **options)
            told = {"in memory": harness.digest(result.model.state_dict()), "reason": result.reason.name}
        except EpochalError as error:
            told = {"typed": type(error).__name__}
        except Exception as error:
            told = {"raw": f"{type(error).__name__}: {error}"}
    return {**told, "calls": getattr(around, "calls", SimpleNamespace(count=0)).count}


def _one_run(
    part: Part, folder: Path, kind: str, at: int, lasts: bool, options: dict[str, Any], expected: dict[str, str]
) -> None:
    told = f"run, call {at}, {kind}{' and on' if lasts else ''}{', going on' if options else ''}: "
    part.tried += 1
    ended = harness.ask(lambda: _broken_run(folder, breaking(kind, at, lasts=lasts), options))
    if ended.error is not None or "raw" in ended.value:
        part.fail(told + (ended.error or ended.value["raw"]))
        return
    if "in memory" in ended.value and ended.value["in memory"] != expected["in memory"]:
        part.fail(told + "other weights than those of a run without errors")
    again = harness.ask(lambda: training.trained(folder, **options))
    if _is_refused(again, folder):
        return
    if again.error is not None:
        part.fail(told + f"then {again.error}")
    elif wrong := training.differences(again.value, expected):
        part.fail(told + f"then {', '.join(wrong)} differ")


def _really(part: Part, expected: dict[str, str]) -> None:
    """No stand-in: limits of the process, disks that are too small, and one that may only be read."""
    with harness.scratch(on_disk=True) as folder:
        os.chdir(folder)
        for name, limit in {"RLIMIT_FSIZE": 2_000, "RLIMIT_NOFILE": 0}.items():
            part.tried += 1
            _begin(folder / name)
            ended = harness.ask(lambda: _limited(folder / name, name, limit))  # noqa: B023
            _judge(part, name, ended, folder / name, expected)
        for name, options in SMALL_DISKS.items():
            with _mounted(folder / name, f"size={name.removesuffix(', going on').split()[-1]}") as is_there:
                part.count("mounts", is_there)
                if is_there:
                    part.tried += 1
                    ended = harness.ask(lambda: _broken_run(folder / name / "run", _none, options))  # noqa: B023
                    if options and (ended.value or {}).get("in memory") != expected["in memory"]:
                        part.fail(f"{name}: {ended}")
                    subprocess.run(["mount", "-o", "remount,size=10m", folder / name], check=True)
                    _judge(part, name, ended, folder / name / "run", expected)
        with _mounted(folder / "read-only", "size=10m") as is_there:
            if is_there:
                part.tried += 1
                _begin(folder / "read-only" / "run")
                subprocess.run(["mount", "-o", "remount,ro", folder / "read-only"], check=True)
                ended = harness.ask(lambda: _broken_run(folder / "read-only" / "run", _none, {}))
                subprocess.run(["mount", "-o", "remount,rw", folder / "read-only"], check=True)
                _judge(part, "read-only", ended, folder / "read-only" / "run", expected, typed=True)


def _is_refused(again: harness.Ended, folder: Path) -> bool:
    """A run that trained on a full disk, and could save nothing but its results: they are not written over."""
    saved = Checkpoints(folder / "checkpoints").all()
    return not saved and again.error is not None and "no checkpoint that could be resumed from" in again.error


def _begin(folder: Path) -> None:
    """Some steps of a run, until it is killed."""
    harness.ask(lambda: killed_at(200, lambda: training.fit(folder)))


def _judge(part: Part, name: str, ended: harness.Ended, folder: Path, expected: dict, *, typed: bool = False) -> None:
    """A typed error or the right weights; and afterwards, with everything well, the run goes on to its end."""
    told = ended.value or {}
    if ended.error is not None or "raw" in told or (typed and "typed" not in told):
        part.fail(f"{name}: {ended}")
    is_saved = bool(Checkpoints(folder / "checkpoints").all())  # a run that could save nothing cannot be continued
    again = harness.ask(lambda: training.trained(folder))
    if _is_refused(again, folder):
        return
    wrong = again.error or (is_saved and training.differences(again.value, expected))
    if wrong:
        part.fail(f"{name}, then: {wrong}")


def _none(name: str, call: Callable[[], Any], arguments: tuple) -> Any:
    return call()


def _limited(folder: Path, name: str, limit: int) -> dict[str, Any]:
    """Goes on with a run, under a limit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    number = getattr(resource, name)
    least = len(os.listdir("/proc/self/fd")) if name == "RLIMIT_NOFILE" else limit
    _, most = resource.getrlimit(number)
    resource.setrlimit(number, (least, most))
    try:
        return _broken_run(folder, _none, {})
    finally:
        resource.setrlimit(number, (most, most))


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[bool]:
    """A disk in memory, where this process may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
    is_there = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield is_there
    finally:
        if is_there:
            subprocess.run(["umount", folder], check=True)
