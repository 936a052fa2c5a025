"""Weights as one safetensors file: a state dict of tensors, nothing else, and no code when it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
from torch import Tensor, nn

from epochal.checkpoint import files, tensors
from epochal.errors import CheckpointError
from epochal.runtime.shards import all_like

IMPORTED = "imported.safetensors"  # in a run folder: what a run begins with that has no checkpoint yet
DIGEST = "epochal.sha256"  # metadata, as the next one
SHARED = "epochal.shared"  # metadata: names that share a tensor -> the name it is stored under


def save_weights(weights: Mapping[str, Any], path: str | Path) -> None:
    """Writes a state dict, atomically. Tied tensors are stored once, and tied again by their names.

    Raises CheckpointError for an entry that is not a tensor, FileError where the file cannot be written.
    """
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple, str] = {}
    refuse_unholdable(weights, 'keep it out of get_extra_state(), or use torch\'s own format: result.save("model.pt")')
    for name, value in weights.items():
        if (stored := first.setdefault(_place(value), name)) != name:
            shared[name] = stored
        else:
            kept[name] = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    facts = {"format": "pt"} | ({SHARED: msgspec.json.encode(shared).decode()} if shared else {})
    files.replace_bytes(path, *tensors.chunks(kept, {**facts, DIGEST: _digest(kept, facts)}))


def _digest(weights: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """sha256 of what the file would be without it, so that the file itself tells whether it is whole."""
    digest = hashlib.sha256()
    for chunk in tensors.chunks(weights, facts):
        digest.update(chunk)
    return digest.hexdigest()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state dict; a module's extra state, which may be anything, is in the checkpoints alone."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def refuse_unholdable(weights: Mapping[str, Any], fix: str) -> None:
    """CheckpointError for the first entry that a safetensors file cannot hold."""
    for name, value in weights.items():
        is_tensor = isinstance(value, Tensor)
        if not is_tensor or value.dtype not in tensors.DTYPES or value.layout is not torch.strided:
            what = f"a tensor ({value.dtype}, {value.layout})" if is_tensor else f"a {type(value).__name__}"
            where = f"entry {name!r} of the state dict"
            raise CheckpointError(f"{what} cannot be kept in a safetensors file.", where=where, fix=fix)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads what :func:`save_weights` wrote, or any other safetensors file.

    Raises CheckpointError if it is missing, is not a safetensors file, or is not what epochal wrote.
    """
    try:
        data = files.read(Path(path), most=psutil.virtual_memory().available // 2)  # as bytes, and as tensors
    except OSError as error:
        why = f"the weights cannot be read: {error.strerror or error}."
        raise CheckpointError(why, where=str(path), fix="give a .safetensors file that epochal wrote") from error
    found, facts = tensors.parse(data, str(path)), tensors.metadata(data)
    if (written := facts.pop(DIGEST, None)) is not None and written != _digest(found, facts):
        fix = "copy it from a backup; in a run folder, resume the run, or export a checkpoint of it"
        raise CheckpointError("the weights are damaged: they are not what was written.", where=str(path), fix=fix)
    try:
        shared = msgspec.json.decode(facts.get(SHARED, "{}"), type=dict[str, str])
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
    own = module.state_dict()
    refuse_another_model(own, weights, where)
    module.load_state_dict(all_like(dict(weights), own))


def _shape(entry: Any) -> str:
    return str(tuple(entry.shape)) if isinstance(entry, Tensor) else type(entry).__name__


def _place(tensor: Tensor) -> tuple:
    """What tells two names of one tensor: its memory and its layout; an empty tensor is only itself."""
    if tensor.numel() == 0:
        return (id(tensor),)
    layout = tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return (tensor.device, tensor.data_ptr(), *layout)


def save_state_dict(weights: Mapping[str, Any], path: str | Path) -> None:
    """A plain state dict in torch's own format, which torch itself reads with ``weights_only=True``."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # torch itself answers a full disk with a RuntimeError
            torch.save(dict(weights), file)

    files.replace(Path(path), write)
