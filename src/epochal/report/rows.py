"""What the history and the plots both need to know of rows, and how they write a file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from epochal.errors import RunFolderError
from epochal.events import Row


def scalar(value: Any) -> int | float | None:
    """The value as a plain number, None for anything else (a matrix, a text, nothing).

    >>> scalar(3), scalar(0.5), scalar([1, 2])
    (3, 0.5, None)
    """
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    return None


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


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes the file under a temporary name beside it and renames: a full disk leaves the old file as it was.

    Raises ``RunFolderError`` where that cannot be done.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise RunFolderError(
            f"the file cannot be written: {error.strerror or error}.",
            where=str(path),
            fix="name a folder that exists and can be written to",
        ) from error
