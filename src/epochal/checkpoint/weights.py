"""Weights as one safetensors file: a state dict of tensors, nothing else, and no code when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from epochal.checkpoint.files import replace
from epochal.errors import CheckpointError

SHARED = "epochal.shared"  # metadata: names that share a tensor -> the name it is stored under


def save_weights(weights: Mapping[str, Any], path: str | Path) -> None:
    """Writes a state dict, atomically. Tied tensors are stored once, and tied again by their names.

    Raises CheckpointError for an entry that is not a tensor.
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"only tensors can be saved, not a {type(value).__name__}.",
                where=f"entry {name!r} of the state dict",
                fix="keep other things out of get_extra_state()",
            )
        place = _place(value)
        if place in first:
            shared[name] = first[place]
        else:
            first[place] = name
            tensors[name] = value.detach().contiguous().cpu()
    tensors = _apart(tensors)
    metadata = {"format": "pt", SHARED: json.dumps(shared)}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:  # the only word it has for a full disk
            raise OSError(str(error)) from error

    replace(Path(path), write)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads what :func:`save_weights` wrote, or any other safetensors file.

    Raises CheckpointError if it is missing or is not a safetensors file.
    """
    try:
        tensors = load_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            shared = json.loads((file.metadata() or {}).get(SHARED, "{}"))
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"the weights cannot be read: {error}.", where=str(path), fix="give a .safetensors file that epochal wrote"
        ) from error
    return {**tensors, **{name: tensors[stored] for name, stored in shared.items() if stored in tensors}}


def load_into(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Puts weights into a module; missing, unexpected and mismatched names are an error, and nothing is loaded."""
    own = module.state_dict()
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
        raise CheckpointError(
            "these weights belong to another model.",
            where=f"{where}; {'; '.join(problems)}",
            fix="build the model as it was when they were saved",
        )
    module.load_state_dict(dict(weights))


def _shape(entry: Any) -> str:
    return str(tuple(entry.shape)) if isinstance(entry, Tensor) else type(entry).__name__


def _place(tensor: Tensor) -> tuple:
    """What tells two names of one tensor: its memory and its layout; an empty tensor is only itself."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Overlapping, but not equal, tensors (views of one buffer) get memory of their own, as the format demands."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def is_safetensors(path: str | Path) -> bool:
    """Whether a path is named like a safetensors file."""
    return Path(path).suffix == ".safetensors"


def save_state_dict(weights: Mapping[str, Any], path: str | Path) -> None:
    """A plain state dict in torch's own format: ``torch.load(path, weights_only=True)`` reads it."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # torch itself answers a full disk with a RuntimeError
            torch.save(dict(weights), file)

    replace(Path(path), write)
