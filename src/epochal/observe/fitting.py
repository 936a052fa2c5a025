"""What the rows say of how the model fits: too closely, not yet, or no better any more."""

from __future__ import annotations

import math
from collections.abc import Sequence

from epochal.events import Row


def overfitting_since(rows: Sequence[Row], evaluations: int = 3) -> int | None:
    """The epoch since which ``val_loss`` has stayed above its minimum while ``train_loss`` went on falling.

    That is: at least ``evaluations`` rows follow the (last) minimum of ``val_loss``, all of them are above it,
    on average by a tenth of the range that ``val_loss`` has gone through until then (less is noise), and the mean
    of ``train_loss`` over them is below its value at the minimum; and in the end both differ by more than a tenth of
    ``train_loss``. Otherwise None.

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
    last = known[-1]
    if last[1] - last[2] <= 0.1 * abs(last[2]):  # SageMaker Debugger's rule
        return None
    if rise <= 0.1 * span or sum(train for *_, train in since) / len(since) >= known[at][2]:
        return None
    return since[0][0]


def improvement(rows: Sequence[Row], share: float = 0.2) -> float | None:
    """By how much the loss still fell in each of the last evaluations (a fifth of them, at least two), of its value; of
    ``val_loss``, or of ``train_loss`` where there is no val. None for fewer than three rows.

    >>> round(improvement([{"train_loss": 1.0}, {"train_loss": 0.8}, {"train_loss": 0.6}]), 2)
    0.2
    """
    name = "val_loss" if rows and "val_loss" in rows[-1] else "train_loss"
    values = [row.get(name, math.nan) for row in rows]
    count = max(2, round(len(values) * share))
    if len(values) < 3 or not all(map(math.isfinite, values)) or values[-count - 1] <= 0:
        return None
    if min(values[-count:]) > min(values[:-count]):
        return 0.0
    return (values[-count - 1] - values[-1]) / values[-count - 1] / count


def gap(row: Row) -> str:
    """What was measured of both, and how far they lie apart: of a metric, else of the loss.

    >>> gap({"train_loss": 0.1, "val_loss": 0.4, "train_accuracy": 0.98, "val_accuracy": 0.9})
    'train_accuracy 0.9800, val_accuracy 0.9000: a gap of 0.0800'
    """
    stems = [name.removeprefix("val_") for name in row if name.startswith("val_") and name != "val_loss"]
    for stem in (*stems, "loss"):
        train, val = row.get(f"train_{stem}"), row.get(f"val_{stem}")
        if isinstance(train, float) and isinstance(val, float):
            return f"train_{stem} {train:.4f}, val_{stem} {val:.4f}: a gap of {abs(train - val):.4f}"
    return ""


def verdict(rows: Sequence[Row], *, restored: int | None = None, stopped: bool = False) -> str | None:
    """How the model fits, in words; None where the rows do not say. restored: the epoch whose weights were put back.
    stopped: whether early stopping ended the run.
    """
    if (since := overfitting_since(rows)) is not None:
        best = min(
            (row for row in rows if math.isfinite(row.get("val_loss", math.nan))), key=lambda row: row["val_loss"]
        )
        last = rows[-1]
        done = [*(["the run was stopped"] if stopped else [])]
        done += [f"the weights of epoch {restored} are back" if restored is not None else "the last weights are kept"]
        return (
            f"overfitting since epoch {since}: val_loss rose from {best['val_loss']:.4g} to "
            f"{last['val_loss']:.4g} while "
            f"train_loss fell to {last['train_loss']:.4g}; {gap(last)}; {', and '.join(done)}"
        )
    better = improvement(rows)
    if better is not None and better > 0.01:
        name = "val_loss" if "val_loss" in rows[-1] else "train_loss"
        return f"still improving: {name} fell by {better:.1%} an evaluation at the end; more epochs would help"
    if better is not None and len(rows) >= 5 and abs(better) < 0.002:
        return f"levelled off: the loss no longer falls; {gap(rows[-1])}".rstrip("; ")
    return None
