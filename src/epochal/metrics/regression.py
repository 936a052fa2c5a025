"""The metrics of regression: how far the outputs are from the targets, over all elements.

Outputs and targets have the same shape (nothing is broadcast), and are widened to float64 before anything is
subtracted or summed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from epochal.errors import DataError
from epochal.metrics.metric import check_tensors, ratio, shapes, widest_float, with_count


def _widened(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    check_tensors(outputs, targets)
    if outputs.shape != targets.shape:
        shape = tuple(outputs.shape)
        reshape = f", for example targets.reshape{shape}" if outputs.numel() == targets.numel() else ""
        what = "a metric compares outputs and targets of different shapes."
        raise DataError(what, where=shapes(outputs, targets), fix=f"give targets the shape {shape}{reshape}")
    wide = widest_float(outputs.device)
    if outputs.is_complex() or targets.is_complex():
        wide = wide.to_complex()
    return outputs.to(wide), targets.to(wide)


def root_ratio(sums: Tensor) -> float:
    """The root of the mean over all elements (not, as scikit-learn has it, the mean of the roots of the columns)."""
    return math.sqrt(ratio(sums))


def absolute_sums(outputs: Any, targets: Any) -> Tensor:
    """(sum of |outputs − targets|, elements); float64."""
    outputs, targets = _widened(outputs, targets)
    return with_count((outputs - targets).abs().sum(), targets.numel())


def square_sums(outputs: Any, targets: Any) -> Tensor:
    """(sum of |outputs − targets|², elements); float64."""
    outputs, targets = _widened(outputs, targets)
    return with_count((outputs - targets).abs().square().sum(), targets.numel())  # of complex numbers the modulus


def r2_sums(outputs: Any, targets: Any) -> Tensor:
    """(rows, mean, M2, squared errors): M2 is the sum of squares about the mean, each for every column; (4·K,)."""
    outputs, targets = _widened(outputs, targets)
    if outputs.is_complex():
        fix = "take mse, or give torch.view_as_real of both"
        raise DataError("r2 is for real numbers.", where=shapes(outputs, targets), fix=fix)
    rows = targets.shape[0] if targets.ndim else 1
    columns = math.prod(targets.shape[1:])
    outputs, targets = outputs.reshape(rows, columns), targets.reshape(rows, columns)
    origin = targets[:1].sum(0)  # the first row, so that the mean of constant targets is exactly their value
    mean = origin + (targets - origin).sum(0) / max(rows, 1)
    squares, errors = (targets - mean).square().sum(0), (outputs - targets).square().sum(0)
    return torch.stack([torch.full_like(mean, rows), mean, squares, errors]).flatten()


def merge_r2(one: Tensor, other: Tensor) -> Tensor:
    """Chan, Golub and LeVeque (1979), "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", eq. 2.1 in the form of means: a sum of squares about a mean, unlike Σt² − (Σt)²/n, loses
    nothing where the mean is large.
    """
    n1, mean1, squares1, errors1 = one.view(4, -1)
    n2, mean2, squares2, errors2 = other.view(4, -1)
    rows = n1 + n2
    shift, share = mean2 - mean1, n2 / rows.clamp(min=1)
    squares = squares1 + squares2 + shift.square() * n1 * share
    return torch.stack([rows, mean1 + shift * share, squares, errors1 + errors2]).flatten()


def r2(sums: Tensor) -> float:
    """1 − SSE/SST, the mean over the columns; NaN for fewer than two rows.

    A column of constant targets counts as 1 if it is predicted perfectly, else as 0: scikit-learn's
    ``r2_score`` with its default ``force_finite=True``.
    """
    rows, _, squares, errors = sums.view(4, -1)
    if rows[0] < 2:
        return math.nan
    finite = torch.where(squares > 0, 1 - errors / squares, (errors == 0).double())
    # A NaN among the targets or outputs must not look like a constant column.
    return torch.where(errors.isnan() | squares.isnan(), math.nan, finite).mean().item()
