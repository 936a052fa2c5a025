"""Weights as one safetensors file: a state dict of tensors, nothing else, and no code when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
from torch import Tensor, nn

from epochal.checkpoint import files, tensors
from epochal.errors import CheckpointError

IMPORTED = "imported.safetensors"  # in a run folder: what a run begins with that has no checkpoint yet
SHARED = "epochal.shared"  # metadata: names that share a tensor -> the name it is stored under


def save_weights(weights: Mapping[str, Any], path: str | Path) -> None:
    """Writes a state dict, atomically. Tied tensors are stored once, and tied again by their names.

    Raises CheckpointError for an entry that is not a tensor, FileError where the file cannot be written.
    """
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, value in weights.items():
        if not isinstance(value, Tensor) or value.dtype not in tensors.DTYPES:
            what = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            what = f"{what} cannot be kept in a safetensors file."
            fix = 'keep other things out of get_extra_state(), or use torch\'s own format: result.save("model.pt")'
            raise CheckpointError(what, where=f"entry {name!r} of the state dict", fix=fix)
        place = _place(value)
        if place in first:
            shared[name] = first[place]
        else:
            first[place] = name
            kept[name] = value.detach().cpu().contiguous().resolve_conj().resolve_neg()
    ties = {SHARED: msgspec.json.encode(shared).decode()} if shared else {}
    files.replace_bytes(path, *tensors.chunks(kept, {"format": "pt", **ties}))


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads what :func:`save_weights` wrote, or any other safetensors file.

    Raises CheckpointError if it is missing or is not a safetensors file.
    """
    try:
        data = files.read(Path(path), most=psutil.virtual_memory().available // 2)  # as bytes, and as tensors
    except OSError as error:
        why = f"the weights cannot be read: {error.strerror or error}."
        raise CheckpointError(why, where=str(path), fix="give a .safetensors file that epochal wrote") from error
    found = tensors.parse(data, str(path))
    try:
        shared = msgspec.json.decode(tensors.metadata(data).get(SHARED, "{}"), type=dict[str, str])
    except ValueError as error:
        what = f"the names of shared weights cannot be read: {error}."
        raise CheckpointError(what, where=str(path), fix="use the file as epochal wrote it") from error
    return {**found, **{name: found[stored] for name, stored in shared.items() if stored in found}}


def refuse_another_model(own: Mapping[str, Any], weights: Mapping[str, Any], where: str) -> None:
    """CheckpointError with the names that are missing, unexpected or of another shape, if there are any."""
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} {_shape(weights[name])} for {_shape(own[name])}"
        for name in own.keys() & weights.keys()
        if _shape(weights[name]) != _shape(own[name])
    ]
    problems = [
        f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", sorted(shapes)))
        if names
    ]
    if problems:
        what = "these weights belong to another model."
        fix = "build the model as it was when they were saved"
        raise CheckpointError(what, where=f"{where}; {'; '.join(problems)}", fix=fix)


def load_into(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Puts weights into a module; missing, unexpected and mismatched names are an error, and nothing is loaded."""
    refuse_another_model(module.state_dict(), weights, where)
    module.load_state_dict(dict(weights))


def _shape(entry: Any) -> str:
    return str(tuple(entry.shape)) if isinstance(entry, Tensor) else type(entry).__name__


def _place(tensor: Tensor) -> tuple:
    """What tells two names of one tensor: its memory and its layout; an empty tensor is only itself."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def is_safetensors(path: str | Path) -> bool:
    """Whether a path is named like a safetensors file."""
    return Path(path).suffix == ".safetensors"


def save_state_dict(weights: Mapping[str, Any], path: str | Path) -> None:
    """A plain state dict in torch's own format, which torch itself reads with ``weights_only=True``."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # torch itself answers a full disk with a RuntimeError
            torch.save(dict(weights), file)

    files.replace(Path(path), write)
