"""The network of ``epochal fit``: how it is made for a table, measured, saved and found again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from epochal.checkpoint.weights import load_into, load_weights
from epochal.cli.folders import existing
from epochal.data.encoding import Encoding
from epochal.errors import CheckpointError, RunFolderError
from epochal.metrics.metric import Metric, ratio
from epochal.metrics.regression import absolute_sums, root_ratio, square_sums

FORMAT = 1
WIDEST = 65_536  # of a layer: a file that says more is not sound


class MLP(nn.Sequential):
    """Linear layers with ReLU between them: (rows, features) to (rows, classes) or (rows, targets)."""

    def __init__(self, encoding: Encoding, hidden: Sequence[int]):
        sizes = [encoding.width, *hidden, len(encoding.classes or encoding.target_names)]
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        super().__init__(*layers[:-1])


def loss_of(encoding: Encoding) -> str:
    return "cross_entropy" if encoding.task == "classification" else "mse"


def metrics_of(encoding: Encoding) -> list[str | Metric]:
    """Of classes accuracy and f1; of quantities r2, and the errors in the unit of each target."""
    if encoding.task == "classification":
        return ["accuracy", "f1"]
    errors: list[str | Metric] = ["r2"]
    for place, (target, scale) in enumerate(zip(encoding.target_names, encoding.target_scale)):
        suffix = f"_{target}" if len(encoding.target_names) > 1 else ""
        for name, sums, value in (("mae", absolute_sums, ratio), ("rmse", square_sums, root_ratio)):
            of_column, in_unit = partial(_sums_of_column, sums, place), partial(_scaled, value, scale)
            errors.append(Metric(name + suffix, of_column, in_unit, higher_is_better=False))
    return errors


def _sums_of_column(sums: Any, place: int, outputs: Tensor, targets: Tensor) -> Tensor:
    return sums(outputs[:, place], targets[:, place])


def _scaled(value: Any, scale: float, sums: Tensor) -> float:
    return scale * value(sums)


def saved(encoding: Encoding, hidden: Sequence[int]) -> str:
    """The text of ``table.json``: with ``model.safetensors`` all that a prediction needs."""
    return json.dumps({"format": FORMAT, "encoding": encoding.to_json(), "network": {"hidden": list(hidden)}}, indent=1)


def load(run: Path) -> tuple[Encoding, MLP]:
    """The transformation and the network of a run of ``epochal fit``.

    Raises RunFolderError if it is no such run, CheckpointError if its files are not sound.
    """
    path = existing(run) / "table.json"
    if not path.exists():
        what = "the run was not made by epochal fit: it holds no table.json."
        raise RunFolderError(what, where=str(run), fix="name the run folder of an epochal fit")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        known, encoding, hidden = data["format"] == FORMAT, data["encoding"], data["network"]["hidden"]
        if not known or not all(type(size) is int and 0 < size <= WIDEST for size in hidden):
            raise ValueError("it has another format, or sizes that no network has")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the file cannot be read: {error}.", where=str(path), fix="train again, or copy it again"
        ) from error
    encoding = Encoding.from_json(encoding, where=str(path))
    model = MLP(encoding, hidden)
    weights = run / "model.safetensors"
    load_into(model, load_weights(weights), where=str(weights))
    return encoding, model
