"""R9: hostile files: each is refused, with a typed error, in a second, in little memory, and no code is run.

Each is read in a child of its own. What Python tells its audit hooks (code that is compiled or run, modules that are
imported, processes, sockets, classes that a pickle asks for) is written down, and a pickle's payload makes a file.
"""

from __future__ import annotations

import copy
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import epochal
from campaigns import forging, harness, hostile, hostile_bytes, training
from campaigns.harness import Outcome, Part
from epochal.checkpoint.store import Checkpoints
from epochal.checkpoint.weights import load_weights
from epochal.cli.weights import import_checkpoint
from epochal.errors import CheckpointError, EpochalError

WHAT = "hostile files: typed error, a second, little memory, no code"
SECONDS = 1.0
ROOM = 64 * 2**20  # bytes of memory, beside twice the size of the file
FORBIDDEN = re.compile(r"exec|compile|import|os\.(system|exec|fork|posix_spawn|spawn)|subprocess|socket|pickle|ctypes")


def run(scale: str) -> Outcome:
    """Every case, or every third; in the full version, also states of which one entry is something odd."""
    training.reference()
    shares = 2 if scale == "full" else 1
    every = 1 if scale == "full" else 3

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        _warm()
        with harness.scratch() as folder:
            for name, make, load in list(_cases(folder / "canary"))[share :: shares * every]:
                if scale == "full" or name.removeprefix("import: ") not in hostile.DEVICES:
                    _one(part, folder, name, make, load)
            if scale == "full":
                _resumes(part, folder, share, shares)

    return harness.outcome("R9", WHAT, work, shares=shares)


def bites() -> Outcome:
    """A loader that falls back to reading pickles, as others do."""
    import pickle

    def trusting(path: Path) -> Any:
        try:
            return load_weights(path)
        except CheckpointError:
            return pickle.loads(Path(path).read_bytes())

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        _warm()
        with harness.scratch() as folder:
            for name, make in hostile.weights(folder / "canary"):
                if "pickle" in name:
                    _one(part, folder, name, make, trusting)

    return harness.outcome("R9", WHAT, work)


def _cases(canary: Path) -> Iterator[tuple[str, Callable[[Path], Path], Callable[[Path], Any]]]:
    for name, make in hostile.checkpoints(canary):
        yield name, make, lambda path: Checkpoints(path.parent).load(path)
        yield f"{name} (found)", make, lambda path: Checkpoints(path.parent).newest_whole()
    for name, make in hostile.weights(canary):
        yield name, make, load_weights
    for name, make in hostile.torch_files(canary):
        yield name, make, lambda path: import_checkpoint(path, path.parent / "imported")


def _one(part: Part, folder: Path, name: str, make: Callable[[Path], Path], load: Callable[[Path], Any]) -> None:
    place = folder / "case"
    place.mkdir()
    path = make(place)
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    part.tried += 1
    ended = harness.ask(lambda: _watched(path, load), timeout=5)
    for problem in _problems(part, name, ended, size):
        part.fail(f"{name}: {problem}")
    if (folder / "canary").exists():
        part.fail(f"{name}: the payload was run")
        (folder / "canary").unlink()
    if os.path.exists(place / "imported" / "imported.safetensors"):
        part.fail(f"{name}: something was imported")
    shutil.rmtree(place)


def _problems(part: Part, name: str, ended: harness.Ended, size: int) -> Iterator[str]:
    if ended.error is not None:
        yield ended.error
        return
    told = ended.value
    part.most("most milliseconds", told["seconds"] * 1000)
    part.most("most MiB of memory", told["memory"] / 2**20)
    if told["outcome"] != "typed":
        yield f"{told['outcome']} ({told['error']})"
    if told["seconds"] > SECONDS:
        yield f"{told['seconds']:.1f} seconds"
    if told["memory"] > 2 * size + ROOM:
        yield f"{told['memory'] / 2**20:,.0f} MiB for a file of {size / 2**20:,.1f}"
    if told["events"]:
        yield f"code: {told['events'][:5]}"


def _watched(path: Path, load: Callable[[Path], Any]) -> dict[str, Any]:
    """Loads, in a child, and tells what happened meanwhile."""
    events: list[str] = []
    armed = [False]

    def hook(event: str, arguments: tuple) -> None:
        if armed[0] and FORBIDDEN.match(event):
            events.append(f"{event} {arguments!r}"[:200])

    sys.addaudithook(hook)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began = _memory("VmRSS"), time.perf_counter()
    armed[0], told, outcome = True, "", "read"
    try:
        load(path)
    except EpochalError as error:
        told, outcome = error.describe(), "typed"
    except BaseException as error:
        told, outcome = f"{type(error).__name__}: {error}"[:300], "raw"
    armed[0] = False
    seconds = time.perf_counter() - began
    memory = max(0, _memory("VmHWM") - before)
    return {"outcome": outcome, "error": told[:300], "seconds": seconds, "memory": memory, "events": events}


def _warm() -> None:
    """What is imported or compiled late is so before the hook listens."""
    with harness.scratch() as folder:
        path = forging.lay(folder, forging.contents())
        Checkpoints(path.parent).newest_whole()
        bad = folder / "bad"
        archive = hostile_bytes.zipped({"archive/data.pkl": b"", "archive/version": b"3\n"})
        for data in (b"not a file of torch's", archive):
            bad.write_bytes(data)
            for load in (load_weights, lambda path: import_checkpoint(path, folder / "run")):
                with suppress(EpochalError):
                    load(bad)


def _memory(line: str) -> int:
    """Bytes, from what the kernel says of this process."""
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


ODD = (None, 1, -1, 0.5, "os.system", [], {}, [1, 2], {"a": 1}, (), "__class__")


def _resumes(part: Part, folder: Path, share: int, shares: int) -> None:
    """A whole checkpoint, its hashes right, with one entry that is something else.

    It is refused with a typed error, before a weight is touched; or taken, where the entry is of no weight. What can
    be told only in the first step, by the optimizer say, is counted, and is no failure.
    """
    ended = harness.ask(lambda: str(training.fit(folder / "run", max_steps=3)))
    if ended.error is None:
        ended = harness.ask(lambda: _odd_states(folder, share, shares), timeout=600)
    if ended.error is not None:
        part.fail(f"odd states: {ended.error}")
    else:
        part.add(Part(**ended.value))


def _odd_states(folder: Path, share: int, shares: int) -> dict[str, Any]:
    found = Checkpoints(folder / "run" / "checkpoints").newest_whole()
    assert found is not None
    part = Part()
    for place in _places(found.state)[share::shares]:
        for odd in (*ODD, KeyError):  # KeyError stands for an entry that is missing
            state = copy.deepcopy(found.state)
            owner = state
            for name in place[:-1]:
                owner = owner[name]
            if odd is KeyError:
                del owner[place[-1]]
            else:
                owner[place[-1]] = odd
            _resume(part, folder / "odd", state, f"state {'.'.join(map(str, place))} as {odd!r}")
    return asdict(part)


def _places(state: dict) -> list[tuple]:
    """Every entry, and every entry of a dict or list in it, a few levels down."""
    places: list[tuple] = [(name,) for name in state]
    for place in places:
        value = state
        for name in place:
            value = value[name]
        if len(place) < 4 and isinstance(value, dict | list) and len(value) < 20:
            places += [(*place, name) for name in (value if isinstance(value, dict) else range(len(value)))]
    return places


def _resume(part: Part, folder: Path, state: dict, name: str) -> None:
    """Prepares a run over such a checkpoint, and does a step."""
    shutil.rmtree(folder, ignore_errors=True)
    Checkpoints(folder / "checkpoints").save(3, state)
    model = training.model()
    before = harness.digest(model.state_dict())
    part.tried += 1
    run = None
    try:
        with training.plan(folder, model=model).prepare() as run:
            for event in run:
                if isinstance(event, epochal.StepDone):
                    break
        part.count("odd states that are taken")
    except Exception as error:
        if run is not None:
            part.count("odd states that only a step can tell")
        elif not isinstance(error, EpochalError):
            part.fail(f"{name}: {type(error).__name__}: {error}")
        elif harness.digest(model.state_dict()) != before:
            part.fail(f"{name}: refused after the weights were touched")
        else:
            part.count("odd states that are refused")
