"""A sign of overfitting: validation rises while training still falls."""

from __future__ import annotations

import math
from collections.abc import Sequence

from epochal.events import Row


def overfitting_since(rows: Sequence[Row], evaluations: int = 3) -> int | None:
    """The epoch since which ``val_loss`` has stayed above its minimum while ``train_loss`` went on falling.

    That is: at least ``evaluations`` rows follow the (last) minimum of ``val_loss``, all of them are above it,
    on average by a tenth of the range that ``val_loss`` has gone through until then (less is noise), and the mean
    of ``train_loss`` over them is below its value at the minimum. Otherwise None.

    >>> val, train = [0.9, 0.5, 0.6, 0.7, 0.8], [0.9, 0.5, 0.4, 0.3, 0.2]
    >>> overfitting_since([{"epoch": n + 1, "val_loss": val[n], "train_loss": train[n]} for n in range(5)])
    3
    """
    losses = [(row["epoch"], row.get("val_loss", math.nan), row.get("train_loss", math.nan)) for row in rows]
    known = [loss for loss in losses if math.isfinite(loss[1]) and math.isfinite(loss[2])]
    if not known:
        return None
    lowest = min(val for _, val, _ in known)
    at = max(n for n, (_, val, _) in enumerate(known) if val == lowest)
    since = known[at + 1 :]
    if len(since) < evaluations:
        return None
    rise = sum(val for _, val, _ in since) / len(since) - lowest
    span = max(val for _, val, _ in known[: at + 1]) - lowest
    if rise <= 0.1 * span or sum(train for *_, train in since) / len(since) >= known[at][2]:
        return None
    return since[0][0]
