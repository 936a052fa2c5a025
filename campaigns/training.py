"""The training that the campaigns kill and resume: small, and with everything that has a state in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import epochal
from campaigns import harness
from epochal.checkpoint.store import Checkpoints
from epochal.state import unpacked


def model() -> nn.Module:
    """Dropout and running statistics; the same weights each time."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))


def plan(folder: Path, *, keep: int = 2, resume: bool = True, **options: Any) -> epochal.Plan:
    """A schedule, the best weights, early stopping; a checkpoint at every step."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(40, 6, generator=generator)
    targets = torch.randint(0, 2, (40,), generator=generator)  # nothing to learn: early stopping will stop it
    given: dict[str, Any] = {
        "loss": "cross_entropy", "optimizer": "adamw", "lr": 0.05, "schedule": "cosine", "metrics": ["accuracy"],
        "epochs": 6, "batch_size": 16, "patience": 2, "seed": 1, "observers": [],
        "save": epochal.Saving("1 steps", keep=keep, share=None), "model": options.pop("model", None) or model(),
        "train": (inputs[:32], targets[:32]), "val": (inputs[32:], targets[32:]), "run": folder, "resume": resume,
    }  # fmt: skip
    if isinstance(options.get("train"), DataLoader):
        del given["batch_size"]  # it has its own
    return epochal.Plan(**{**given, **options})


def fit(folder: Path, **options: Any) -> epochal.Result:
    """Trains to the end."""
    return plan(folder, **options).fit()


def trained(folder: Path, **options: Any) -> dict[str, str]:
    """Trains to the end, and gives digests of all that has to be the same then."""
    result = fit(folder, **options)
    return {"reason": result.reason.name, "in memory": harness.digest(result.model.state_dict()), **left(folder)}


def left(folder: Path) -> dict[str, str]:
    """Digests of what a run has left: the state of its newest checkpoint, its weights, its rows."""
    found = Checkpoints(folder / "checkpoints").newest_whole()
    state = dict(found.state) if found else {}
    state.pop("about", None)
    if found:
        state["rows"] = unpacked(state["rows"])
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    files = {name: harness.sha256(folder / name) for name in ("model.safetensors", "metrics.jsonl", "results.csv")}
    return {"state": harness.digest(state), "rows": str(len([json.loads(row) for row in rows])), **files}


def reference(**options: Any) -> dict[str, str]:
    """What an undisturbed run gives, from a child of its own."""
    with harness.scratch() as folder:
        harness.warm(lambda: fit(folder / "warm", **options))
        ended = harness.ask(lambda: trained(folder / "run", **options))
    if ended.error is not None:
        raise RuntimeError(ended.error)
    return ended.value


def differences(got: dict[str, str], expected: dict[str, str]) -> list[str]:
    """The names of what differs."""
    return [name for name in expected if got.get(name) != expected[name]]
