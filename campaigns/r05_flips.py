"""R5: single bits flipped, files cut and files swapped: all is noticed before a tensor reaches a model.

Beside it, for the same state and as many flips in proportion: what ``torch.load(weights_only=True)`` notices of a
``.pt`` file, and safetensors' own reader of its file.
"""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from campaigns import harness, training
from campaigns.harness import Outcome, Part
from epochal.checkpoint import files, manifest
from epochal.checkpoint.store import Checkpoints
from epochal.errors import CheckpointError

WHAT = "bits flipped, files cut and swapped"
FLIPS = {"small": 2_000, "full": 100_000}
CUTS = {"small": 100, "full": 1_000}
HEAD = 1024  # bytes of a file that are hit as often as all that follow


def run(scale: str) -> Outcome:
    """Flips, cuts and swaps, and the two other formats for comparison."""
    shares = 2 if scale == "full" else 1

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.scratch() as folder:
            _flips(part, rng, folder, FLIPS[scale] // shares)
            _cuts(part, rng, folder, CUTS[scale] // shares)
            if share == 0:
                _swaps(part, folder)
                _others(part, rng, folder, FLIPS[scale] // 20)

    training.reference()  # what a run imports is imported once
    return harness.outcome("R5", WHAT, work, shares=shares)


def bites() -> Outcome:
    """A loader that compares sizes but no hashes."""

    def unchecked(folder: Path, name: str, expected: manifest.File) -> bytes:
        return files.read(folder / name, size=expected.size)

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.scratch() as folder, harness.changed(manifest, _read=unchecked):
            _flips(part, rng, folder, 300)

    return harness.outcome("R5", WHAT, work)


def _trained(folder: Path) -> list[Path]:
    """Two checkpoints of a run that has been trained in a child."""
    ended = harness.ask(lambda: str(training.fit(folder / "run")))
    if ended.error is not None:
        raise RuntimeError(ended.error)
    return Checkpoints(folder / "run" / "checkpoints").all()[-2:]


def _copy(folder: Path, path: Path, name: str) -> Path:
    place = folder / name / path.name
    shutil.copytree(path, place, dirs_exist_ok=True)
    return place


def _judge(part: Part, path: Path, what: str) -> None:
    """One attempt to load what was damaged."""
    part.tried += 1
    try:
        Checkpoints(path.parent).load(path)
        part.fail(f"{what}: not noticed")
    except CheckpointError:
        pass
    except Exception as error:
        part.fail(f"{what}: {type(error).__name__}: {error}")


def _place(rng: random.Random, size: int) -> int:
    """A byte of a file; its beginning as often as the rest."""
    return rng.randrange(min(HEAD, size)) if rng.random() < 0.5 else rng.randrange(size)


def _flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def _flips(part: Part, rng: random.Random, folder: Path, count: int) -> None:
    path = _copy(folder, _trained(folder)[-1], "flips")
    Checkpoints(path.parent).load(path)
    contents = {file: file.read_bytes() for file in sorted(path.iterdir())}
    part.most("most bytes of the checkpoint", sum(map(len, contents.values())))
    for number in range(count):
        file = list(contents)[number % len(contents)]
        at, bit = _place(rng, len(contents[file])), rng.randrange(8)
        file.write_bytes(_flipped(contents[file], at, bit))
        _judge(part, path, f"bit {bit} of byte {at} of {file.name}")
        part.count(f"flips in {file.name}")
        file.write_bytes(contents[file])
    Checkpoints(path.parent).load(path)


def _cuts(part: Part, rng: random.Random, folder: Path, count: int) -> None:
    path = _copy(folder, _trained(folder)[-1], "cuts")
    contents = {file: file.read_bytes() for file in sorted(path.iterdir())}
    for number in range(count):
        file = list(contents)[number % len(contents)]
        length = rng.choice((0, 1, len(contents[file]) - 1, rng.randrange(len(contents[file]))))
        file.write_bytes(contents[file][:length])
        _judge(part, path, f"{file.name} cut to {length} bytes")
        file.write_bytes(contents[file])


def _swaps(part: Part, folder: Path) -> None:
    """Files of another checkpoint of the same run, files under each other's names, and folders under others' names."""
    older, newer = _trained(folder)
    for names in ((name,) for name in sorted(file.name for file in newer.iterdir())):
        path = _copy(folder, newer, f"swap-{names[0]}")
        shutil.copyfile(older / names[0], path / names[0])
        _judge(part, path, f"{names[0]} of {older.name} in {newer.name}")
    contents = sorted(file.name for file in newer.iterdir())
    for one, other in ((one, other) for one in contents for other in contents if one != other):
        path = _copy(folder, newer, f"name-{one}-{other}")
        shutil.copyfile(newer / one, path / other)
        _judge(part, path, f"{one} as {other}")
    path = _copy(folder, newer, "folder")
    _judge(part, path.rename(path.with_name("step-00000999")), f"{newer.name} as step-00000999")


def _others(part: Part, rng: random.Random, folder: Path, count: int) -> None:
    """The same state as torch and as safetensors keep it: how many flips are read as if nothing were wrong."""
    state = Checkpoints(folder / "flips").newest_whole()
    model = {name: value.clone() for name, value in state.state["model"].items()} if state else {}
    optimizer = state.state["optimizer"] if state else {}
    flat = {**model, **_tensors(optimizer, "optimizer")}
    memory = io.BytesIO()
    torch.save(flat, memory)
    read: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
        "torch.load": (memory.getvalue(), lambda path: torch.load(path, weights_only=True)),
        "safetensors": (safetensors.torch.save(flat), lambda path: safetensors.torch.load_file(path)),
    }
    for name, (data, load) in read.items():
        whole = harness.digest({key: flat[key] for key in sorted(flat)})
        for _ in range(count):
            (folder / "other").write_bytes(_flipped(data, _place(rng, len(data)), rng.randrange(8)))
            part.count(f"{name}: flips")
            try:
                found = load(folder / "other")
                digest = harness.digest({key: found[key] for key in sorted(found)})
                part.count(f"{name}: other values, and no error", digest != whole)
            except Exception:
                part.count(f"{name}: noticed")


def _tensors(value: Any, name: str) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value.clone()}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {key: tensor for part, inner in parts for key, tensor in _tensors(inner, f"{name}.{part}").items()}
