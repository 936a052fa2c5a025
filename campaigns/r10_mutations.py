"""R10: a million mutated checkpoints: typed errors, or a state that can be used; no crash, no hang, no runaway memory.

A quarter each: bytes of any file, hashes as they were (the state that is read must be the same one then); the manifest,
edited as JSON; the state, edited as bytes or as JSON, and the tensors' header, edited likewise, both with hashes that
fit, so that the layers behind them are reached.
"""

from __future__ import annotations

import copy
import json
import random
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from campaigns import harness
from campaigns.forging import manifest as forged
from campaigns.harness import Outcome, Part
from campaigns.r19_formats import everything
from epochal.checkpoint import codec
from epochal.checkpoint import tensors as files_of_tensors
from epochal.checkpoint.store import Checkpoints
from epochal.errors import EpochalError

WHAT = "mutated checkpoints and manifests"
COUNT = {"small": 3_000, "full": 1_000_000}
CHUNK = 5_000  # mutations that one child does: a crash costs no more, and says where it was
SECONDS = 2.0
ROOM = 256 * 2**20  # bytes that a child may grow by in all


class Hang(BaseException):
    """It took too long."""


def run(scale: str) -> Outcome:
    """Mutations by number: each is the same every time."""
    shares = 2 if scale == "full" else 1
    return harness.outcome("R10", WHAT, lambda *given: _chunks(*given, COUNT[scale], _mutate), shares=shares)


def bites() -> Outcome:
    """A decoder that does not look at where a view ends, and lets python's own errors through."""

    def careless(tree: Any, path: tuple, stored: Any) -> Any:
        if type(tree) is list:
            return [careless(part, path, stored) for part in tree]
        if type(tree) is not dict:
            return tree
        if not any(key.startswith("$") for key in tree):
            return {key: careless(part, path, stored) for key, part in tree.items()}
        ((mark, content),) = tree.items()
        return codec._decode_mark(mark, content, path, stored)

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.changed(codec, _decode=careless):
            _chunks(part, rng, share, shares, 1_000, _mutate)

    return harness.outcome("R10", WHAT, work)


def _chunks(part: Part, rng: random.Random, share: int, shares: int, count: int, mutate: Callable[..., None]) -> None:
    for first in range(share * CHUNK, count, shares * CHUNK):
        numbers = range(first, min(first + CHUNK, count))
        ended = harness.ask(lambda: _chunk(numbers, mutate), timeout=600)  # noqa: B023
        if ended.error is not None:
            part.fail(f"one of the mutations {numbers[0]} to {numbers[-1]}: {ended.error}")
        else:
            part.add(Part(**ended.value))


def _chunk(numbers: range, mutate: Callable[..., None]) -> dict[str, Any]:
    part = Part()

    def hang(signum: int, frame: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with harness.scratch() as folder:
        path = Checkpoints(folder).save(1, everything())
        contents = {file.name: file.read_bytes() for file in sorted(path.iterdir())}
        whole = harness.digest(Checkpoints(folder).load(path))
        for number in numbers:
            part.tried += 1
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                mutate(part, random.Random(number), path, contents, whole)
            except EpochalError:
                part.count("refused")
            except Hang:
                part.fail(f"mutation {number}: more than {SECONDS} seconds")
            except Exception as error:
                part.fail(f"mutation {number}: {type(error).__name__}: {str(error)[:200]}")
            signal.setitimer(signal.ITIMER_REAL, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    part.most("most MiB that a process grew by", grown / 2**20)
    if grown > ROOM:
        part.fail(f"mutations {numbers[0]} to {numbers[-1]}: {grown / 2**20:,.0f} MiB of memory")
    return vars(part)


def _mutate(part: Part, rng: random.Random, path: Path, contents: dict[str, bytes], whole: str) -> None:
    """One mutation, and what is read of it."""
    state, data = contents["state.json"], contents["tensors-00000.safetensors"]
    match rng.randrange(4):
        case 0:
            name = rng.choice(list(contents))
            _read(part, path, {name: edited(contents[name], rng)}, contents, whole)
        case 1:
            facts = msgspec.json.encode(reshaped(msgspec.json.decode(contents["manifest.json"]), rng))
            _read(part, path, {"manifest.json": facts}, contents, whole)
        case 2:
            if rng.random() < 0.3:
                state = edited(state, rng)
            else:
                state = codec.dumps(reshaped(msgspec.json.decode(state), rng))
            harness.digest(codec.decode(codec.loads(state), files_of_tensors.parse(data, "mutated")))
            part.count("other states that can be used")
        case _:
            size = 8 + int.from_bytes(data[:8], "little")
            if rng.random() < 0.5:
                data = edited(data[:size], rng) + data[size:]
            else:
                header = json.dumps(reshaped(json.loads(data[8:size]), rng), separators=(",", ":")).encode()
                header += b" " * (-len(header) % 8)
                data = len(header).to_bytes(8, "little") + header + data[size:]
            found = files_of_tensors.parse(data, "mutated")
            named = {name: (files_of_tensors.DTYPES[t.dtype], list(t.shape)) for name, t in found.items()}
            files = {"state.json": state, "tensors-00000.safetensors": data}
            _read(part, path, {**files, "manifest.json": forged(files, named)}, contents, None)


def _read(part: Part, path: Path, changed: dict[str, bytes], contents: dict[str, bytes], whole: str | None) -> None:
    """Reads the checkpoint with some files changed; what is read is ``whole``, or can be used if that is None."""
    for name, data in changed.items():
        (path / name).write_bytes(data)
    try:
        digest = harness.digest(Checkpoints(path.parent).load(path))
        part.count("the same state" if digest == whole else "other states that can be used")
        if whole is not None and digest != whole:
            raise AssertionError("another state is read, and nothing is said")
    finally:
        for name in changed:
            (path / name).write_bytes(contents[name])


def edited(data: bytes, rng: random.Random) -> bytes:
    """A few edits of bytes: flipped, put in, taken out, doubled, moved; numbers and marks replaced."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 8, 100))
        match rng.randrange(6):
            case 0:
                data = data[:at] + bytes(byte ^ (1 << rng.randrange(8)) for byte in data[at : at + 1]) + data[at + 1 :]
            case 1:
                data = data[:at] + rng.choice((rng.randbytes(length), b"[" * length, b'"', b"0", b"{}")) + data[at:]
            case 2:
                data = data[:at] + data[at + length :]
            case 3:
                data = data[:at] + data[at : at + length] * rng.choice((2, 10)) + data[at + length :]
            case 4:
                to = rng.randrange(len(data) + 1)
                data = data[:at] + data[to : to + length] + data[at + length :]
            case _ if numbers := list(re.finditer(rb"\d+", data[at : at + 2000])):
                found = rng.choice(numbers)
                data = data[: at + found.start()] + rng.choice(NUMBERS) + data[at + found.end() :]
    return data


NUMBERS = (b"0", b"1", b"-1", b"4", b"1e9", b"2.5", b"9223372036854775807", b"18446744073709551616", b"99999999999")
VALUES = (
    None,
    True,
    0,
    1,
    -1,
    2,
    3,
    2**31,
    2**62,
    2**63,
    0.5,
    1e300,
    "",
    "float32",
    "F32",
    "state",
    "$tuple",
    [],
    {},
    [0],
    [1, 1],
)
MARKS = """$tensor $view $tuple $dict $state_dict $int $float $complex $str $bytes $dtype $device $array $scalar $coo
$csr"""


def reshaped(value: Any, rng: random.Random) -> Any:
    """A few edits of JSON: entries replaced, exchanged, moved, taken out, doubled, wrapped in a mark, renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 4))):
        owners = _owners(value, rng)
        if not owners:
            return value
        owner, key = owners[-1] if rng.random() < 0.5 else rng.choice(owners)
        other, there = rng.choice(owners)
        match rng.randrange(6):
            case 0:
                owner[key] = copy.deepcopy(rng.choice(VALUES))
            case 1:
                owner[key] = copy.deepcopy(other[there])
            case 2:
                del owner[key]
            case 3 if isinstance(owner, list):
                owner.insert(key, copy.deepcopy(rng.choice((owner[key], *VALUES))))
            case 4:
                owner[key] = {rng.choice(MARKS.split()): owner[key]}
            case _ if isinstance(owner, dict):
                owner[rng.choice((*MARKS.split(), *map(str, owner), "a"))] = owner.pop(key)
    return value


def _owners(value: Any, rng: random.Random) -> list[tuple[Any, Any]]:
    """A random way down into the value: each list or dict on it, and the entry taken."""
    way = []
    while isinstance(value, dict | list) and value:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        way.append((value, key))
        value = value[key]
        if rng.random() < 0.1:
            break
    return way
