"""Holding back a part of the training data for validation: seeded, and stratified where there are classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from epochal.data.order import SPLIT
from epochal.data.sources import Arrays, Samples, Source
from epochal.errors import DataError, PlanError
from epochal.runtime.seeding import derive


def hold_out(source: Source, fraction: float, *, seed: int, classes: Tensor | None = None) -> tuple[Source, Source]:
    """The source in two parts, (train, val), each in the order of the data.

    classes: int, shape (samples,); where given, each class is split by itself, so that both parts have the
    same shares of classes (to within one sample a class).

    Raises PlanError for a stream, DataError if there are too few samples.
    """
    if not isinstance(source, Arrays | Samples):
        fix = "give the validation data themselves as val="
        raise PlanError("a part of an iterable data set cannot be held back.", where=f"val={fraction}", fix=fix)
    train, val = split_indices(len(source), fraction, seed=seed, classes=classes)
    if isinstance(source, Samples):
        return Samples(Subset(source.dataset, train.tolist())), Samples(Subset(source.dataset, val.tolist()))
    device = source.tensors[0].device
    train, val = (Arrays(source.take(index.to(device)), source.encoding) for index in (train, val))
    return train, val


def split_indices(count: int, fraction: float, *, seed: int, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sorted indices of both parts, int64: a function of (count, fraction, seed, classes).

    >>> train, val = split_indices(10, 0.2, seed=0)
    >>> len(train), len(val)
    (8, 2)
    """
    if count < 2:
        fix = "give val= its own data"
        raise DataError("one sample cannot be split into train and val.", where=f"val={fraction}", fix=fix)
    wanted = min(count - 1, max(1, round(count * fraction)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derive(seed, SPLIT)))
    held = order[:wanted] if classes is None else _stratified(order, classes, wanted)
    is_val = torch.zeros(count, dtype=torch.bool)
    is_val[held] = True
    return (~is_val).nonzero()[:, 0], is_val.nonzero()[:, 0]


def _stratified(order: Tensor, classes: Tensor, wanted: int) -> Tensor:
    """Of each class its share of ``wanted``, the rest to the largest remainders; a lone sample stays in train."""
    names, counts = np.unique(classes.cpu().numpy(), return_counts=True)
    exact = counts * (wanted / len(order))
    quotas = np.minimum(np.floor(exact).astype(int), counts - 1)
    for index in np.argsort(-(exact - quotas), kind="stable"):
        if quotas.sum() >= wanted:
            break
        quotas[index] += quotas[index] < counts[index] - 1
    shuffled = classes.cpu()[order]
    return torch.cat([order[shuffled == int(name)][:quota] for name, quota in zip(names, quotas)])


def known_classes(source: Source, targets: Any) -> Tensor | None:
    """The class of each sample, where that is known without reading the samples."""
    if isinstance(source, Samples):
        targets = getattr(source.dataset, "targets", None)  # the convention of torchvision's data sets
        if targets is None or len(targets) != len(source):
            return None
        targets = torch.as_tensor(np.asarray(targets))
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex() or targets.dim() != 1:
        return None
    return targets
