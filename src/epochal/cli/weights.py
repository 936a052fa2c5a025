"""``epochal import-checkpoint`` and ``export``: weights between a run folder and the files of others."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from epochal.cli.folders import existing, held, print_facts
from epochal.errors import CheckpointError, PlanError, RunFolderError

Output = Annotated[Path | None, Parameter(name=("--output", "-o"), help="The file; by default one in the run folder.")]

HOMES = ("model_state_dict", "state_dict", "model")  # where a checkpoint keeps the weights, by custom
WRAPPERS = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}  # what they put before every name


def import_checkpoint(
    file: Annotated[Path, Parameter(help="A file that torch.save wrote: a state dict, or a dict that holds one.")],
    run: Annotated[Path, Parameter(help="The run folder, new or empty.")],
    /,
) -> None:
    """Begin a run folder with the weights of a .pt file.

    Only weights are taken: no code is run, and no state of an optimizer is read. The weights are those of the file
    itself, or of its entry model_state_dict, state_dict or model.
    """
    from epochal.checkpoint.files import replace_bytes
    from epochal.checkpoint.weights import IMPORTED, save_weights
    from epochal.observe.recorder import claim

    weights, digest = _read(file)
    lock = claim(run, resume=False)
    try:
        save_weights(weights, run / IMPORTED)
        facts = {"status": "imported", "from": file.name, "sha256": digest}
        replace_bytes(run / "run.json", json.dumps(facts, indent=1).encode() + b"\n")
    finally:
        lock.release()
    print_facts(
        {
            "weights": f"{len(weights):,} tensors, {sum(value.numel() for value in weights.values()):,} numbers",
            "files": f"{run}: {', '.join(held(run))}",
            "next": f"epochal train RECIPE.py --run {shlex.quote(str(run))} --resume",
        }
    )


def _read(file: Path) -> tuple[dict[str, Any], str]:
    """The weights in a file of torch's, and the sha256 of the file. Raises CheckpointError; nothing in it is run."""
    from epochal.checkpoint.imported import read_pt

    try:
        if file.exists() and not file.is_file():  # a pipe or a device may never end
            raise OSError("it is not a file")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:  # torch compresses nothing, so nothing can grow beyond the file
                if sum(entry.file_size for entry in archive.infolist()) > size:
                    raise ValueError("it is larger inside than outside")
        with warnings.catch_warnings(action="ignore"):
            found = read_pt(file)
    except OSError as error:
        what, fix = f"the file cannot be read: {error.strerror or error}.", "give a file that torch.save wrote"
        raise CheckpointError(what, where=str(file), fix=fix) from error
    except Exception as error:  # torch raises what it likes; it also likes to recommend reading without care
        named = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        what = f"the file holds more than weights: {named[1]}." if named else "the file cannot be read."
        fix = "save model.state_dict() where the file was made, and import that"
        raise CheckpointError(what, where=f"{file}; {type(error).__name__}", fix=fix) from error
    weights = _state_dict(found, file)
    odd = [name for name, value in weights.items() if not _is_plain(value)]
    places = {(value.data_ptr(), value.shape): value.nbytes for value in weights.values()} if not odd else {}
    if odd or sum(places.values()) > 2 * size:  # an expanded tensor takes no room there, and all of it here
        what, fix = "its tensors are not plain ones, or larger than the file.", "save dense tensors, each by itself"
        raise CheckpointError(what, where=f"{file}; {', '.join(odd[:5])}".rstrip("; "), fix=fix)
    return weights, digest


def _state_dict(found: Any, file: Path) -> dict[str, Any]:
    """The state dict that was found, its names without the prefix of a wrapper. Raises CheckpointError if none was."""
    held = found if isinstance(found, Mapping) else {}
    place = next((name for name in HOMES if _is_state_dict(held.get(name))), None)
    weights = dict(held if place is None else held[place])
    if not _is_state_dict(weights):
        kinds = [f"{name!r} ({type(value).__name__})" for name, value in list(held.items())[:8]]
        told = f"a {type(found).__name__}" + (f" with {', '.join(kinds)}" if kinds else "")
        fix = f"save model.state_dict(), alone or under {', '.join(HOMES)}"
        raise CheckpointError("the file holds no state dict of tensors.", where=f"{file}; {told[:400]}", fix=fix)
    if place is not None and (others := [str(name) for name in held if name != place]):
        print(f"taken: {place}; left out: {', '.join(others)[:400]}", file=sys.stderr)
    while prefix := next((one for one in WRAPPERS if all(name.startswith(one) for name in weights)), None):
        print(f"all names began with {prefix!r}, which {WRAPPERS[prefix]} adds; it is taken off", file=sys.stderr)
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _is_state_dict(value: Any) -> bool:
    import torch

    is_dict = isinstance(value, Mapping) and bool(value)
    return is_dict and all(type(name) is str and isinstance(one, torch.Tensor) for name, one in value.items())


def _is_plain(value: Any) -> bool:
    import torch

    from epochal.checkpoint.tensors import DTYPES

    plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
    return plain and value.dtype in DTYPES and not (value.is_meta or value.is_nested)


def export(
    run: Annotated[Path, Parameter(help="The run folder.")],
    /,
    *,
    to: Annotated[Literal["pt", "safetensors"], Parameter(help="torch's own format, or safetensors.")],
    output: Output = None,
    force: Annotated[bool, Parameter(help="Write over a file that exists.")] = False,
) -> None:
    """Write the weights of a run as one file.

    They are those that the run ended with, or while it has not ended those of its newest checkpoint. A file of torch's
    is a plain state dict, which torch reads with weights_only=True.
    """
    path = output or existing(run) / {"pt": "model.pt", "safetensors": "exported.safetensors"}[to]
    if (path.suffix == ".safetensors") != (to == "safetensors"):
        what, where = "the name of the file says another format.", f"--to {to} -o {path}"
        raise PlanError(what, where=where, fix=f"end it in .{to}")
    if path.exists() and not force:
        raise PlanError("the file exists.", where=str(path), fix="choose another name with -o, or give --force")

    from epochal.checkpoint.weights import save_state_dict, save_weights

    weights = _of_run(existing(run))
    (save_weights if to == "safetensors" else save_state_dict)(weights, path)
    print(path)


def _of_run(run: Path) -> dict[str, Any]:
    import torch

    from epochal.checkpoint.store import Checkpoints
    from epochal.checkpoint.weights import IMPORTED, load_weights
    from epochal.cli.runs import read_facts

    finals = {"ended": "model.safetensors", "imported": IMPORTED}
    if (name := finals.get(read_facts(run)["status"])) is not None:
        return load_weights(run / name)
    if (found := Checkpoints(run / "checkpoints").newest_whole()) is None:
        fix = "name a run that has saved a checkpoint, or has ended"
        raise RunFolderError("there are no weights in the folder yet.", where=str(run), fix=fix)
    for damaged in found.damaged:
        print(f"left out: {damaged.where}: {damaged.what}", file=sys.stderr)
    print(f"the run has not ended: these are the weights of {found.path.name}", file=sys.stderr)
    try:
        return {name: value for name, value in found.state["model"].items() if isinstance(value, torch.Tensor)}
    except (AttributeError, KeyError, TypeError) as error:
        what, fix = "the checkpoint holds no model.", "name a run of epochal's"
        raise CheckpointError(what, where=str(found.path), fix=fix) from error
