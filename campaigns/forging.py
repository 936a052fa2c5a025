"""Checkpoints put together by hand, every hash right, so that what is wrong with them is met in a deeper layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from epochal.checkpoint import codec

STEP = 1
NAME = f"step-{STEP:08d}"
WEIGHT = b"".join(bytes((0, 0, 128, 63 + i)) for i in range(4))  # four float32
PLAIN_TREE = {"model": {"weight": {"$tensor": "state.model.weight"}}, "step": 1}
PLAIN_TENSORS = {"state.model.weight": ("F32", [4])}


def header(entries: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header: JSON from a value, or text as it is."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    """What a safetensors header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


PLAIN_FILE = header({"state.model.weight": entry()}, WEIGHT)


def manifest(
    files: Mapping[str, bytes], tensors: Any = None, *, version: Any = 1, step: Any = STEP, **more: Any
) -> bytes:
    """The bytes of a manifest for these files."""
    described = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    named = PLAIN_TENSORS if tensors is None else tensors
    return msgspec.json.encode({"format": version, "step": step, "files": described, "tensors": named, **more})


def state_json(tree: Any) -> bytes:
    """The bytes of a state, of a tree as the codec writes it, or of text as it is with the room that it needs."""
    if isinstance(tree, bytes):
        return tree.ljust(8 * (tree.count(b"{") + tree.count(b"[")))
    return codec.dumps(tree)


def contents(tree: Any = PLAIN_TREE, tensors: bytes | None = PLAIN_FILE, named: Any = None, **facts: Any) -> dict:
    """The files of a checkpoint with this state and these tensors, and a manifest that fits them."""
    files = {"state.json": state_json(tree)}
    if tensors is not None:
        files["tensors-00000.safetensors"] = tensors
    return {**files, "manifest.json": manifest(files, named, **facts)}


def lay(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Writes the files into the folder of a checkpoint."""
    path = folder / "checkpoints" / NAME
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path
