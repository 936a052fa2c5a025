"""The network of ``epochal fit``: how it is made for a table, measured, saved and found again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct, json
from torch import nn

from epochal.checkpoint.weights import load_into, load_weights
from epochal.cli.folders import existing
from epochal.data.encoding import Encoding
from epochal.errors import CheckpointError, RunFolderError
from epochal.metrics.metric import Metric, ratio
from epochal.metrics.regression import absolute_sums, root_ratio, square_sums

WIDEST = 65_536  # of a layer: a file that says more is not sound


class Saved(Struct, frozen=True, forbid_unknown_fields=True):
    """What ``table.json`` holds: with ``model.safetensors`` all that a prediction needs."""

    format: Literal[1]
    encoding: Encoding
    hidden: tuple[Annotated[int, Meta(gt=0, le=WIDEST)], ...]


class MLP(nn.Sequential):
    """Linear layers with ReLU between them, from (rows, features) to (rows, classes), or (rows, 1) for a quantity."""

    def __init__(self, encoding: Encoding, hidden: Sequence[int]):
        sizes = [encoding.width, *hidden, len(encoding.classes) or 1]
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        super().__init__(*layers[:-1])


def loss_of(encoding: Encoding) -> str:
    return "cross_entropy" if encoding.task == "classification" else "mse"


def metrics_of(encoding: Encoding) -> list[str | Metric]:
    """Of classes accuracy and f1; of a quantity the errors in its own unit, and r2."""
    if encoding.task == "classification":
        return ["accuracy", "f1"]
    (unit,) = encoding.target_scale
    mae = Metric("mae", absolute_sums, lambda sums: unit * ratio(sums), higher_is_better=False)
    rmse = Metric("rmse", square_sums, lambda sums: unit * root_ratio(sums), higher_is_better=False)
    return [mae, rmse, "r2"]


def saved(encoding: Encoding, hidden: Sequence[int]) -> str:
    """The text of ``table.json``."""
    return json.format(json.encode(Saved(1, encoding, tuple(hidden))), indent=1).decode()


def load(run: Path) -> tuple[Encoding, MLP]:
    """The transformation and the network of a run of ``epochal fit``.

    Raises RunFolderError if it is no such run, CheckpointError if its files are not sound.
    """
    path = existing(run) / "table.json"
    if not path.exists():
        what = "the run was not made by epochal fit: it holds no table.json, and only your code knows its model."
        fix = "load its model.safetensors into the model in Python (the README shows it), and call epochal.predict"
        raise RunFolderError(what, where=str(run), fix=fix)
    try:
        found = json.decode(path.read_bytes(), type=Saved)
    except (OSError, ValueError) as error:
        fix = "train again, copy it again, or use the epochal that wrote it"
        raise CheckpointError(f"the file cannot be read: {error}.", where=str(path), fix=fix) from error
    model = MLP(found.encoding, found.hidden)
    weights = run / "model.safetensors"
    load_into(model, load_weights(weights), where=str(weights))
    return found.encoding, model
