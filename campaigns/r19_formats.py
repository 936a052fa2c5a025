"""R19: checkpoints of every earlier format are read bit for bit; a newer one is refused with clear words.

``fixtures/format-N/`` holds a checkpoint with every kind of value, as it was written at the time, and the digest
that it has to have. ``python -m campaigns.r19_formats`` makes those of the present formats, if they are missing.
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from campaigns import harness
from campaigns.harness import Outcome
from campaigns.harness import Part as Found
from epochal.checkpoint import codec
from epochal.checkpoint.manifest import FORMAT, MANIFEST, WITH_PIECES
from epochal.checkpoint.store import Checkpoints, Piece
from epochal.checkpoint.tensors import DTYPES
from epochal.data.share import Part
from epochal.errors import CheckpointError
from epochal.runtime.processes import join

WHAT = "checkpoints of earlier formats, and of newer ones"
FIXTURES = Path(__file__).parent / "fixtures"
STEP = 7
TYPES = (
    "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64 complex128 "
    "complex32 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2"
)
ARRAYS = "|b1 |i1 <i2 >i4 <i8 |u1 >u2 <u8 <f2 >f4 <f8 <c8 >c16 |S4 <M8[ns] >M8[D] <M8[25s] <M8 <m8[us]"


def run(scale: str) -> Outcome:
    """The same in both scales."""
    return harness.outcome("R19", WHAT, _work)


def bites() -> Outcome:
    """A reader that has forgotten what one mark means."""
    decode = codec._decode_mark

    def other(mark: str, content: Any, *given: Any) -> Any:
        return list(decode(mark, content, *given)) if mark == "$tuple" else decode(mark, content, *given)

    def work(part: Found, *given: Any) -> None:
        with harness.changed(codec, _decode_mark=other):
            _work(part, *given)

    return harness.outcome("R19", WHAT, work)


def _work(part: Found, rng: random.Random, share: int, shares: int) -> None:
    for number, state in STATES.items():
        folder = FIXTURES / f"format-{number}"
        part.tried += 1
        try:
            found = Checkpoints(folder).newest_whole()
        except CheckpointError as error:
            part.fail(f"format {number}: {error.describe()}")
            continue
        if found is None or harness.digest(found.state) != (folder / "digest").read_text().strip():
            part.fail(f"format {number}: it is read as something else")
        elif harness.digest(found.state) != harness.digest(state()):
            part.fail(f"format {number}: it is not what it was made of")
    for newer in (WITH_PIECES + 1, WITH_PIECES + 10, 10**6):
        part.tried += 1
        for problem in _newer(newer):
            part.fail(f"format {newer}: {problem}")


def _newer(number: int) -> list[str]:
    """A checkpoint of a newer format: other fields too, as it may well have."""
    with harness.scratch() as folder:
        path = Checkpoints(folder).save(STEP, {"a": 1})
        facts = msgspec.json.decode((path / MANIFEST).read_bytes())
        (path / MANIFEST).write_bytes(msgspec.json.encode({**facts, "format": number, "more": {"a": [1]}}))
        try:
            Checkpoints(folder).load(path)
        except CheckpointError as error:
            told = str(error)
            missing = [
                word for word in (f"format {number}", f"{FORMAT} and {WITH_PIECES}", "newer") if word not in told
            ]
            return [f"{missing} is not said: {told}"] if missing else []
        return ["it is read"]


def _bits(number: int) -> float:
    return struct.unpack(">d", struct.pack(">Q", number))[0]


def _noise(noise: np.ndarray, name: str) -> torch.Tensor:
    data = noise % 2 if name == "bool" else noise.copy()
    return torch.from_numpy(data).view(getattr(torch, name))


def everything() -> dict[str, Any]:
    """Every kind of value that the codec knows, the same each time."""
    weights = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 7
    noise = np.random.Generator(np.random.PCG64(5)).integers(0, 256, 64, np.uint8)
    dense = torch.tensor([[0.0, 1.5, 0.0, 2.5], [0.0, 0.0, 3.5, 0.0]])
    generator = torch.Generator().manual_seed(11)
    torch.rand(3, generator=generator)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for number, value in enumerate(model.state_dict().values()):
            value.fill_(number + 0.25)
    tensors = {
        "types": {name: _noise(noise, name) for name in TYPES.split()},
        "shapes": [torch.tensor(3.5), torch.empty(0), torch.empty(2, 0, 3, dtype=torch.int64)],
        "views": [weights, weights.T, weights[1:3, ::2], weights[0], weights.flatten()[5:9]],
        "tied": [weights, weights], "expanded": torch.tensor([1.0, 2.0]).expand(3, 2), "parameter": nn.Parameter(dense),
        "conjugate": torch.tensor([1 + 2j, -3j]).conj(), "negative": torch.tensor([1 + 2j]).conj().imag,
        "sparse": [dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc(), dense.to_sparse_bsr((1, 2)),
                   dense.to_sparse_bsc((1, 2))],
    }  # fmt: skip
    tensors["parameter"] = tensors["parameter"].detach()  # it comes back as a tensor
    numbers = [0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 2**64, -(2**200), True, False, None, 0.1, -0.0, 1e300, 5e-324]
    odd = [float("inf"), float("-inf"), float("nan"), _bits(0x7FF8_0000_DEAD_BEEF), complex(-0.0, float("nan")), 1 - 2j]
    return {
        "tensors": tensors, "numbers": [*numbers, *odd],
        "texts": ["", "ä€😀", "\0\x1f\"\\/", "\ud800 alone", "$tensor", b"", b"\0\xff", "a" * 300],
        "nested": [(), (1,), [(2, [3, ()])], {}, {"a": {"b": [{}]}}, (None, ("x", 1.5))],
        "keys": {1: "int", "1": "str", 1.5: "float", None: "none", (1, "a"): "tuple", "$a": "mark", "": "", 2**63: "u"},
        "plain": [torch.float32, torch.complex128, torch.device("cpu"), torch.device("cuda", 1)],
        "arrays": [noise[:32].view(np.dtype(name)) if name != "|b1" else noise[:32] % 2 > 0 for name in ARRAYS.split()],
        "strings": np.array([["ab", "ä"], ["", "xyz"]]), "no rows": np.empty((0, 3)),
        "scalars": [np.float32(0.1), np.int8(-3), np.uint64(2**64 - 1), np.complex64(1 - 2j), np.bool_(True)],
        "generators": {
            "python": random.Random(5).getstate(), "torch": generator.get_state(),
            "numpy": np.random.Generator(np.random.PCG64(5)).bit_generator.state,
            "legacy": np.random.RandomState(5).get_state(legacy=False),
        },
        "module": model.state_dict(),
    }  # fmt: skip


def pieces() -> dict[str, Any]:
    """What several processes write, some of it in parts: each type, with more and with fewer rows than processes."""
    rows = {name: torch.arange(15).reshape(5, 3).to(getattr(torch, name)) for name in ("float32", "bfloat16", "int64")}
    return {"rows": rows, "one": torch.tensor([2.5]), "whole": torch.arange(4.0), "state": everything()["plain"]}


def write_pieces(folder: Path) -> None:
    """Three processes' checkpoint; this is one of them."""
    group = join(torch.device("cpu"), timedelta(minutes=1))
    tree, named = codec.encode(pieces())
    mine, parts = {}, {}
    for name, tensor in named.items():
        rows = Part(group.rank, group.size).of(len(tensor))
        if name == "state.whole":
            mine |= {name: tensor} if group.rank == 1 else {}
        elif rows.start < rows.stop:
            whole = DTYPES[tensor.dtype], list(tensor.shape)
            parts[name] = Piece(tensor[rows].clone(), rows.start, whole)
    Checkpoints(folder).commit(STEP, tree, mine, parts)


def make() -> list[str]:
    """The fixtures; one that is there is never made again."""
    for number, state in STATES.items():
        folder = FIXTURES / f"format-{number}"
        if (folder / "digest").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        if number == FORMAT:
            Checkpoints(folder).save(STEP, state())
        else:
            launch = ["torch.distributed.run", "--nproc-per-node=3", "-m", "campaigns.r19_formats", str(folder)]
            subprocess.run([sys.executable, "-m", *launch], check=True)
        (folder / "digest").write_text(harness.digest(state()) + "\n")
    return [f"format-{number}" for number in STATES]


STATES = {FORMAT: everything, WITH_PIECES: pieces}

if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_pieces(Path(sys.argv[1]))
    else:
        sys.stdout.write(f"{' '.join(make())}\n")
