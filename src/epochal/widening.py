"""How large the batches of a validation may be: what a row of the history says must not depend on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from epochal.buffers import Buffers
from epochal.data.batch import pieces
from epochal.data.loader import Loader
from epochal.runtime import seeding

BYTES = 2**18  # of inputs and targets in a batch: more is not quicker, as a processor's caches are not larger
MOST = 4096  # samples: what a model makes of them on its way may be far larger than they are
TOLERANCE = 1e-5  # between means over the same samples, in fp32
HALF_TOLERANCE = 2e-3


def widen(
    loader: Loader, evaluate: Callable[[Iterable[Any]], dict[str, Any]], buffers: Buffers, *, tolerance: float
) -> None:
    """Lets a loader of data in memory give larger batches, if the first one of them is evaluated as its pieces are.

    evaluate: the loss and the metrics over some batches, by name. buffers: of what is evaluated; nothing remains of it.

    A model or a loss in which the samples of a batch meet (batch norm without running statistics, a contrastive loss, a
    metric that is a mean over batches) says something else then, as does one that draws random numbers: they keep their
    batches. So does what raises, for a model may want batches of one size.
    """
    small, row_bytes = loader.batch_size, loader.row_bytes
    loader.wide = small
    wide = min(MOST, BYTES // row_bytes, loader.samples or 0) if row_bytes else 0
    if wide < 2 * small:
        return
    before = seeding.generator_states()
    buffers.keep()
    try:
        loader.wide = wide
        first = next(loader.batches(epoch=0))
        narrow = evaluate(pieces(first, small, loader.target) or [])
        is_same = _are_close(narrow, evaluate([first]), tolerance)
    except Exception:  # the validation itself says what is wrong, if anything is
        is_same = False
    finally:
        buffers.put_back()
        seeding.set_generator_states(before)
    if not is_same:
        loader.wide = small


def _are_close(some: Any, others: Any, tolerance: float) -> bool:
    if isinstance(some, dict):
        return some.keys() == others.keys() and all(_are_close(some[key], others[key], tolerance) for key in some)
    if isinstance(some, list):
        return len(some) == len(others) and all(_are_close(*pair, tolerance) for pair in zip(some, others))
    return math.isclose(some, others, rel_tol=tolerance, abs_tol=tolerance**2)
