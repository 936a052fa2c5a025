"""What the history and the plots both need to know of rows."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from epochal.events import Best, Row


def scalar(value: Any, otherwise: Any = None) -> Any:
    """The value as a plain int or float; ``otherwise`` for anything else (a matrix, a text, nothing).

    >>> scalar(3), scalar(0.5), scalar([1, 2])
    (3, 0.5, None)
    """
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else otherwise


def row_of(rows: Iterable[Row], best: Best) -> Row:
    """The row of the best evaluation; an empty one where the rows do not hold it."""
    return next((row for row in rows if (row["epoch"], row.get("step", 0)) == (best.epoch, best.step)), {})


def columns(rows: Iterable[Row]) -> tuple[str, ...]:
    """The names in the rows, in the order of their first appearance."""
    return tuple(dict.fromkeys(name for row in rows for name in row))


def scalar_columns(rows: Iterable[Row]) -> tuple[str, ...]:
    """The names under which at least one row has a number, and no row anything but numbers."""
    rows = list(rows)

    def holds_numbers(name: str) -> bool:
        values = [row[name] for row in rows if row.get(name) is not None]
        return bool(values) and all(scalar(value) is not None for value in values)

    return tuple(name for name in columns(rows) if holds_numbers(name))
