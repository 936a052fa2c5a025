"""How large the batches of a validation may be: what a row of the history says must not depend on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from epochal.buffers import Buffers
from epochal.data.loader import Loader
from epochal.metrics.metric import first_tensor
from epochal.protocols import Loss
from epochal.runtime import seeding

BYTES = 2**18  # of inputs and targets in a batch: more is not quicker, as a processor's caches are not larger
MADE = 2**22  # of outputs; what a model makes of a sample may be far larger than the sample
MOST = 4096  # samples
TOLERANCE = 1e-5  # between means over the same samples, in fp32
HALF_TOLERANCE = 2e-3


class Noting:
    """An objective that notes how many bytes the outputs of a sample have, at most; None where they are not given."""

    def __init__(self, objective: Callable[..., Loss]):
        self.objective, self.bytes = objective, 0.0
        self.is_known = True

    def __call__(self, forward: Callable, batch: Any) -> Loss:
        loss = self.objective(forward, batch)
        outputs = first_tensor(loss.outputs)
        if outputs is None or not outputs.dim():
            self.is_known = False
        else:
            self.bytes = max(self.bytes, outputs.nbytes / max(1, len(outputs)))
        return loss


def could_be_wider(loader: Loader, modules: Sequence[nn.Module]) -> bool:
    """Whether it is still to be found out. Hooks may count or keep what passes, and a batch norm without running
    statistics takes those of the batch: models with some are left alone.
    """
    parts = [part for module in modules for part in module.modules()]
    hooks = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    norms = any(isinstance(part, _BatchNorm) and part.running_mean is None for part in parts)
    return loader.wide is None and loader.row_bytes is not None and not (hooks or norms)


def widen(
    loader: Loader, found: dict[str, Any], noted: Noting, evaluate: Callable[[Iterable[Any]], dict[str, Any]],
    modules: Sequence[nn.Module], buffers: Buffers, *, tolerance: float,
) -> None:  # fmt: skip
    """After a validation in the usual batches: larger ones from now on, if all of the data give the same in them.

    found, noted: what that validation said. evaluate: the loss and the metrics over some batches, by name.

    Loss and metrics are known to be means over samples. A model in which the samples of a batch meet (padding to the
    longest sample, say) says something else then, as does one that draws random numbers: it keeps its batches. So does
    what raises, for a model may want batches of one size.
    Buffers, generators and attributes of the modules are as they were afterwards.
    """
    small, row_bytes = loader.batch_size, loader.row_bytes
    loader.wide = small
    if not row_bytes or not noted.is_known:
        return
    wide = int(min(MOST, BYTES // row_bytes, MADE // max(1.0, noted.bytes), loader.samples or 0))
    if wide < 2 * small:
        return
    generators = seeding.generator_states()
    attributes = [(part, part.__dict__.copy()) for module in modules for part in module.modules()]
    buffers.keep()
    try:
        loader.wide = wide
        is_same = _are_close(found, evaluate(loader.batches(epoch=0)), tolerance)
    except Exception:
        is_same = False
    finally:
        for part, before in attributes:
            part.__dict__.clear()
            part.__dict__.update(before)
        buffers.put_back()
        seeding.set_generator_states(generators)
    if not is_same:
        loader.wide = small


def _are_close(some: Any, others: Any, tolerance: float) -> bool:
    if isinstance(some, dict):
        return some.keys() == others.keys() and all(_are_close(some[key], others[key], tolerance) for key in some)
    if isinstance(some, list):
        return len(some) == len(others) and all(_are_close(*pair, tolerance) for pair in zip(some, others))
    return math.isclose(some, others, rel_tol=tolerance, abs_tol=tolerance**2)
