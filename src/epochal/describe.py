"""A prepared run in words: the header that people read, and the plan as the run folder records it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from epochal.cadence import Every
from epochal.checkpoint.store import Saving
from epochal.data.loader import Loader
from epochal.events import Started
from epochal.feeding import AnyLoader, Data, steps_of
from epochal.optim.schedules import Schedule
from epochal.runtime import device as devices
from epochal.runtime.processes import world
from epochal.runtime.strategy import Strategy

if TYPE_CHECKING:
    from epochal.plan import Plan
    from epochal.state import TrainState


def started(plan: Plan, state: TrainState, data: Data, device: torch.device, monitor: str, objective: str) -> Started:
    """The event that opens a run."""
    steps = steps_of(data.train, plan.accumulate, plan.epochs, plan.max_steps)
    each = f" × {plan.accumulate} a step" if plan.accumulate > 1 else ""
    each += f", {data.encoding.width} features" if data.encoding is not None else ""
    facts = {
        "model": f"{type(plan.model).__name__}, {_parameters(plan.model)}",
        "train": _samples(data.train, data.batch_size) + each,
        "val": _samples(data.val, data.batch_size) if data.val is not None else "none",
        "loss": objective,
        "optimizer": told_optimizer(state.optimizer),
        "device": f"{devices.describe(device)}, {plan.precision}{', compiled' if plan.compile else ''}",
        "until": _until(plan, monitor),
    }
    if (size := world().size) > 1:
        has = "a part of the model (fsdp)" if Strategy.of(plan.strategy).kind == "fsdp" else "the whole model (ddp)"
        facts["processes"] = f"{size}, each with {has} and its share of every batch"
    if plan.seed is not None:
        facts["seed"] = str(plan.seed)
    if plan.run is not None:
        facts["run"] = str(plan.run)
        if data.train.exactness is not None:
            facts["resume"] = data.train.exactness
    folder = Path(plan.run) if plan.run is not None else None
    resolved = {**config(plan), "device": str(device), "batch_size": _batch_size(data.train, data.batch_size) or 0}
    return Started(facts, resolved, plan.epochs, steps, monitor, folder, state.progress.epoch)


def _parameters(model: nn.Module) -> str:
    count = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return f"{count:,} parameters" + (f" ({frozen:,} frozen)" if frozen else "")


def _batch_size(loader: AnyLoader, batch_size: int) -> int | None:
    return batch_size if isinstance(loader, Loader) else loader.loader.batch_size


def _samples(loader: AnyLoader, batch_size: int) -> str:
    size = _batch_size(loader, batch_size)
    if loader.samples is not None:
        return f"{loader.samples:,} samples in batches of {size}"
    try:
        return f"{len(loader):,} batches" + (f" of {size}" if size else "")
    except TypeError:
        return f"a stream in batches of {size}" if size else "a stream of batches"


def told_optimizer(optimizer: Optimizer | None) -> str:
    if optimizer is None:
        return "in the step"
    # A schedule has already set the rate of the first step; what the user gave is beside it.
    given = [group.get("max_lr", group.get("initial_lr", group.get("lr"))) for group in optimizer.param_groups]
    rates = {float(rate) for rate in given if rate is not None}
    if not rates:
        return type(optimizer).__name__
    return f"{type(optimizer).__name__}, lr {' and '.join(f'{rate:g}' for rate in sorted(rates))}"


def _until(plan: Plan, monitor: str) -> str:
    limits = [
        f"{plan.epochs} epoch{'s' if plan.epochs != 1 else ''}" if plan.epochs else None,
        f"{plan.max_steps} steps" if plan.max_steps else None,
        str(plan.max_time) + (" s" if not isinstance(plan.max_time, str) else "") if plan.max_time else None,
    ]
    patience = plan.patience or (plan.early_stopping.patience if plan.early_stopping else None)
    if patience:
        limits.append(f"{patience} evaluations without a better {monitor}")
    return " or ".join(limit for limit in limits if limit)


def config(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: names and numbers as they are, objects by what they are called."""
    skipped = {"model", "train", "observers"} | (set() if isinstance(plan.val, float) else {"val"})
    options = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    plain = {name: _plain(value) for name, value in options.items() if name not in skipped and value is not None}
    return {"model": type(plan.model).__name__, **plain}


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | dict):
        return [_plain(part) for part in value]
    if isinstance(value, Optimizer):
        settings = {name: default for name, default in value.defaults.items() if isinstance(default, int | float | str)}
        return f"{type(value).__name__}({', '.join(f'{name}={setting!r}' for name, setting in settings.items())})"
    if isinstance(value, Schedule | Saving | Every | Path | Strategy | torch.device):
        return str(value)
    return getattr(value, "name", None) or getattr(value, "__name__", type(value).__name__)
