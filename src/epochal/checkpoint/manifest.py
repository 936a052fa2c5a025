"""A checkpoint's manifest: what is in its files, and whether they still hold it. Nothing is taken on trust."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import psutil
import torch
from msgspec import Meta, Struct
from torch import Tensor

from epochal.checkpoint import files, tensors
from epochal.checkpoint.files import Data
from epochal.checkpoint.sharded import put_together
from epochal.errors import CheckpointError

FORMAT, WITH_PIECES = 1, 2  # the second: tensors that several processes have written, each a part
ROWS = "epochal.rows"  # metadata of a file: of the tensors that stand there in part, the row at which the part begins
MANIFEST, STATE = "manifest.json", "state.json"
LARGEST = 16 * 2**20  # bytes of a manifest; one of a hundred thousand tensors has about ten million
SIZES = {name: torch.empty(0, dtype=dtype).element_size() for dtype, name in tensors.DTYPES.items()}
NAME = re.compile(r"tensors-\d{5}\.safetensors|state\.json")

Count = Annotated[int, Meta(ge=0, le=2**62)]


class File(Struct, frozen=True, forbid_unknown_fields=True):
    """size: in bytes. sha256: of the bytes that were meant to be written, as hexadecimal digits."""

    size: Count
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """files: by name. tensors: dtype and shape of the whole, by name."""

    format: int
    step: Count
    files: dict[str, File]
    tensors: dict[str, tuple[str, list[Count]]]


class _Versioned(Struct):
    format: int


class Written(NamedTuple):
    """What one process has written: its files, what they hold that nobody else tells of, and whether in pieces."""

    files: dict[str, File]
    tensors: dict[str, tuple[str, list[int]]]
    in_pieces: bool


def describe(step: int, written: Sequence[Written]) -> bytes:
    """The manifest of what the processes have written, as the bytes of its own file."""
    files = {name: file for one in written for name, file in one.files.items()}
    named = {name: tensor for one in written for name, tensor in one.tensors.items()}
    version = WITH_PIECES if any(one.in_pieces for one in written) else FORMAT
    return msgspec.json.encode(Manifest(version, step, files, named))


def described(named: Mapping[str, Tensor]) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape by name."""
    return {name: (tensors.DTYPES[tensor.dtype], list(tensor.shape)) for name, tensor in named.items()}


def facts(chunks: Sequence[Data]) -> File:
    """What a manifest says of a file that holds these."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return File(sum(memoryview(chunk).nbytes for chunk in chunks), digest.hexdigest())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, examined as far as it can be without its files. Raises CheckpointError."""
    try:
        if os.path.islink(folder) or not os.path.isdir(folder):
            raise damaged(folder, "it is not a folder")
        data = files.read(folder / MANIFEST, most=LARGEST)
        version = msgspec.json.decode(data, type=_Versioned).format
        if version not in (FORMAT, WITH_PIECES):
            what = f"the checkpoint has format {version}, and this version of epochal reads {FORMAT} and {WITH_PIECES}."
            fix = "read it with the version of epochal that wrote it, or a newer one"
            raise CheckpointError(what, where=str(folder), fix=fix)
        manifest = msgspec.json.decode(data, type=Manifest)
    except FileNotFoundError as error:
        raise damaged(folder, f"it has no {MANIFEST}") from error
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise damaged(folder, f"its {MANIFEST} cannot be read: {why}") from error
    if msgspec.json.encode(manifest) != data:  # a name that stands there twice, say
        raise damaged(folder, f"its {MANIFEST} is not as epochal writes it")
    if STATE not in manifest.files or not all(map(NAME.fullmatch, manifest.files)):
        raise damaged(folder, f"its {MANIFEST} names other files than a checkpoint has")
    for name, (dtype, shape) in manifest.tensors.items():
        if dtype not in SIZES or SIZES[dtype] * math.prod(shape) >= 2**63:
            raise damaged(folder, f"its {MANIFEST} gives {name!r} a type or a shape that no tensor has")
    return manifest


def read_files(folder: Path, manifest: Manifest) -> tuple[bytes, dict[str, Tensor]]:
    """The text of the state and all tensors, each file compared with the manifest. Raises CheckpointError."""
    needed = 2 * sum(file.size for file in manifest.files.values())  # once as bytes, once as tensors
    if needed > psutil.virtual_memory().available:
        raise damaged(folder, f"reading it would take {needed / 2**30:,.1f} GiB of memory")
    found: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, expected in sorted(manifest.files.items()):
        if name != STATE:
            part, rows = _parsed(folder, name, expected)
            for tensor, row in rows.items():
                if tensor not in part or row in pieces[tensor]:
                    raise damaged(folder, f"a piece of {tensor!r} is missing, or is there twice")
                pieces[tensor][row] = part.pop(tensor)
            if found.keys() & part.keys():
                raise damaged(folder, "a tensor stands in two of its files")
            found |= part
    if bool(pieces) != (manifest.format == WITH_PIECES):
        raise damaged(folder, "tensors stand there in pieces against what its manifest says")
    if found.keys() & pieces.keys() or not pieces.keys() <= manifest.tensors.keys():
        raise damaged(folder, "a tensor stands there as a whole and in pieces")
    for name, rows in pieces.items():
        try:
            found[name] = put_together(manifest.tensors[name][1], rows)
        except (ValueError, RuntimeError, TypeError) as error:
            raise damaged(folder, f"{name!r}: {error}") from error
    if described(found) != manifest.tensors:
        raise damaged(folder, "its tensors are not those that its manifest names")
    return _read(folder, STATE, manifest.files[STATE]), found


def verify(folder: Path, names: Collection[str]) -> None:
    """Compares these files with the manifest, without keeping what they hold. Raises CheckpointError."""
    for name, expected in read_manifest(folder).files.items():
        if name in names:
            _read(folder, name, expected)


def _read(folder: Path, name: str, expected: File) -> bytes:
    try:
        data = files.read(folder / name, size=expected.size)
    except OSError as error:
        raise damaged(folder, f"{name} cannot be read: {error.strerror or error}") from error
    if hashlib.sha256(data).hexdigest() != expected.sha256:
        raise damaged(folder, f"{name} is not what was written")
    return data


def _parsed(folder: Path, name: str, expected: File) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of a file, and the rows at which those begin that stand there in part."""
    data = _read(folder, name, expected)
    part = tensors.parse(data, str(folder / name))
    try:
        return part, msgspec.json.decode(tensors.metadata(data).get(ROWS, "{}"), type=dict[str, Count])
    except ValueError as error:
        raise damaged(folder, f"the rows in {name} cannot be read: {error}") from error


def damaged(folder: Path, why: str) -> CheckpointError:
    """What to raise for a checkpoint that cannot be used."""
    return CheckpointError(f"the checkpoint is damaged: {why}.", where=str(folder), fix="use an older one")
