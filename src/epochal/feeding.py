"""The plan's ``train`` and ``val`` as loaders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from msgspec.structs import replace
from torch import Tensor
from torch.utils.data import DataLoader

from epochal import losses
from epochal.data import split, tables
from epochal.data.batch import TARGET_KEYS
from epochal.data.given import GivenLoader
from epochal.data.loader import Loader
from epochal.data.share import Part
from epochal.data.shared import SharedLoader
from epochal.data.sources import Arrays, Source, as_tensor, encoded, learned, open_source
from epochal.errors import LossError, PlanError
from epochal.runtime import processes, seeding
from epochal.runtime.seeding import Alike

if TYPE_CHECKING:
    from epochal.plan import Plan

DEFAULT_BATCH = 32
AnyLoader = Loader | GivenLoader | SharedLoader
SHARE_OF_MEMORY = 0.2  # arrays that take less of the accelerator's free memory are moved there once


@dataclass(frozen=True)
class Data:
    """train, val: the loaders. seed: of the order. target: names of the targets in a dict batch. inputs: how
    many inputs a batch has, None where that is not known. train_targets, val_targets: all targets, where
    they are in memory. alike: of several processes, what they draw the order from.
    """

    train: AnyLoader
    val: AnyLoader | None
    seed: int
    batch_size: int
    target: list[str] = field(default_factory=list)
    inputs: int | None = None
    encoding: Any = None
    train_targets: Tensor | None = None
    val_targets: Tensor | None = None
    alike: Alike | None = None


def read(plan: Plan, kind: str | None, device: torch.device, dtype: torch.dtype) -> Data:
    """Opens the data of a plan. kind: the short name of the loss."""
    target = [plan.target] if isinstance(plan.target, str) else list(plan.target or ())
    seed = plan.seed if plan.seed is not None else 0
    if isinstance(plan.val, float):
        if isinstance(plan.train, DataLoader):
            fix = "give its data set as train"
            raise PlanError("a part of a DataLoader cannot be held back.", where=f"val={plan.val}", fix=fix)
        train, val = _divided(plan.train, plan.val, seed, target, dtype, kind)
    else:
        train, val = _open(plan.train, "train", target, dtype, kind), None
        if plan.val is not None:
            val = _open(plan.val, "val", target, dtype, kind, encoding=getattr(train, "encoding", None))
    if val is not None and plan.loss is None and plan.objective is None:
        fix = "give loss= or objective= beside step="
        raise PlanError("val has to be evaluated with something.", where="loss=None, objective=None", fix=fix)
    train_targets, val_targets = _targets(train, target), _targets(val, target)
    if kind in losses.CLASS_INDEX:
        _refuse_negative(train_targets, plan.loss)
    if plan.seed is None and not isinstance(train, DataLoader):
        seed = processes.first(
            seeding.draw
        )  # so that torch.manual_seed before fit decides, as it does for a DataLoader
    size = plan.batch_size or DEFAULT_BATCH
    shuffle = True if plan.shuffle is None else plan.shuffle
    world = processes.world()
    part = Part(world.rank, world.size)
    alike = Alike(processes.first(seeding.generator_states)) if world.size > 1 else None
    options = {"batch_size": size, "seed": seed, "workers": plan.workers or 0, "part": part}
    given = partial(_given, part=part, alike=alike, target=target)
    return Data(
        train=_loader(train, device, given, shuffle=shuffle, where="train", **options),
        val=None if val is None else _loader(val, device, given, shuffle=False, where="val", **options),
        alike=alike,
        seed=seed,
        batch_size=size,
        target=target,
        inputs=max(1, len(train.parts) - 1) if isinstance(train, Arrays) and isinstance(train.parts, tuple) else None,
        encoding=getattr(train, "encoding", None),
        train_targets=train_targets,
        val_targets=val_targets,
    )


def steps_of(train: AnyLoader, accumulate: int, epochs: int | None, max_steps: int | None) -> int | None:
    """How many updates the run will make, None where that is not known."""
    try:
        planned = -(-len(train) // accumulate) * epochs if epochs is not None else None
    except TypeError:
        planned = None
    return min((steps for steps in (planned, max_steps) if steps is not None), default=None)


def _open(
    data: Any, where: str, target: Sequence[str], dtype: torch.dtype, kind: str | None, encoding: Any = None
) -> Source | DataLoader:
    if isinstance(data, DataLoader):
        return data
    if tables.is_table(data):
        frame = tables.read_table(data, where=where)
        encoding = encoding or learned(frame, target, where=where, task=_task_of(kind))
        return _fitting(encoded(encoding, frame, where=where, dtype=dtype), target, kind)
    return _fitting(open_source(data, where=where, target=target, dtype=dtype), target, kind)


def _task_of(kind: str | None) -> str:
    """What a table is learned for, as the loss says it."""
    if kind is None:
        return "auto"
    return "regression" if kind in losses.ELEMENTWISE - losses.BINARY else "classification"


def _divided(
    data: Any, fraction: float, seed: int, target: Sequence[str], dtype: torch.dtype, kind: str | None
) -> Sequence[Source]:
    """Train and val out of one; a table is divided before anything is learned from it."""
    if tables.is_table(data):
        frame = tables.read_table(data, where="train")
        learn = partial(learned, target=target, where="train", task=_task_of(kind))
        encoding, *parts = divide_table(frame, fraction, seed, learn)
        return [_fitting(encoded(encoding, part, where="train", dtype=dtype), target, kind) for part in parts]
    source = _fitting(open_source(data, where="train", target=target, dtype=dtype), target, kind)
    classes = split.known_classes(source, _targets(source, target)) if kind in losses.CLASS_INDEX else None
    return split.hold_out(source, fraction, seed=seed, classes=classes)


def divide_table(frame: Any, fraction: float, seed: int, learn: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """What is learned from the rows for train alone, those rows, and those for val.

    learn: (rows, task=...) -> Encoding. The task is that of the whole table, as a few rows less could look like
    another one; if it is a classification, both parts have the same shares of classes.
    """
    whole = learn(frame)
    classes = as_tensor(whole.targets(frame), where="train") if whole.task == "classification" else None
    rows = split.split_indices(len(frame), fraction, seed=seed, classes=classes)
    train, val = (frame[index.tolist()] for index in rows)
    encoding = learn(train, task=whole.task)
    return replace(encoding, notes=(whole.notes[0], *encoding.notes[1:])), train, val


def _fitting(source: Source, target: Sequence[str], kind: str | None) -> Source:
    """Class indices of any integer type as the int64 that torch's losses take; a table's as the loss wants them."""
    targets = _targets(source, target)
    if targets is None or targets.is_floating_point() or not isinstance(source, Arrays):
        return source
    if kind in losses.CLASS_INDEX and targets.dtype != torch.int64:
        return source.map(lambda part: part.long() if part is targets else part)
    if kind in losses.BINARY and source.encoding is not None:
        return source.map(lambda part: part.to(torch.get_default_dtype())[:, None] if part is targets else part)
    return source


def _targets(source: Any, target: Sequence[str]) -> Tensor | None:
    parts = source.parts if isinstance(source, Arrays) else None
    if isinstance(parts, tuple):
        return parts[-1] if len(parts) > 1 else None
    if not isinstance(parts, dict):
        return None
    names = list(target) or [key for key in TARGET_KEYS if key in parts][:1]
    return parts.get(names[0]) if len(names) == 1 else None


def _refuse_negative(targets: Tensor | None, loss: Any) -> None:
    """A negative class can be known before there is a model; one that is too large only with its outputs."""
    if targets is None or targets.is_floating_point() or targets.numel() == 0:
        return
    wrong = (targets < 0) & (targets != losses.ignore_index(loss))
    if wrong.any():
        at = int(wrong.flatten().nonzero()[0])
        what = "a target is a negative class."
        fix = "number the classes from 0, or give the loss with ignore_index= set to this value"
        where = f"train, target {int(targets.flatten()[at])} at position {at}"
        raise LossError(what, where=where, fix=fix, code="label-out-of-range")


def _loader(
    source: Source | DataLoader, device: torch.device, given: Callable[[DataLoader], AnyLoader], **options: Any
) -> AnyLoader:
    if isinstance(source, DataLoader):
        return given(source)
    if isinstance(source, Arrays) and _fits(source, device):
        return Loader(source.to(device), **options)
    return Loader(source, pin_memory=device.type == "cuda", **options)


def _given(loader: DataLoader, *, part: Part, alike: Alike | None, target: Sequence[str]) -> AnyLoader:
    return GivenLoader(loader) if alike is None else SharedLoader(loader, part, alike, target)


def _fits(arrays: Arrays, device: torch.device) -> bool:
    """Whether in-memory data may live on the device, so that batches are made there."""
    if device.type != "cuda" or arrays.tensors[0].is_cuda:
        return True
    return arrays.nbytes < SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[0]
