"""The history of a run: one row an evaluation, as rows, as columns, as a table, as a picture."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, final

from epochal.checkpoint.files import replace_bytes
from epochal.errors import TableError, UnknownNameError
from epochal.events import Best, Row
from epochal.report.rows import columns, row_of, scalar, scalar_columns

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

_ALWAYS = ("train_loss", "val_loss")  # may be asked for in every run, measured or not


@final
class History(Sequence[dict[str, Any]]):
    """Rows in the order of their evaluation, and every column by its name.

    ``rows``: one dict an evaluation, with ``epoch``, ``step``, ``lr``, ``time`` (seconds since the
    run's start), ``train_loss`` and what else was measured. ``best``: the best evaluation, where the
    run knows it; otherwise it is looked up in the column ``monitor`` (the least value for the mode
    ``"min"``, the greatest for ``"max"``; the earlier of equal ones; a nan is never best).

    A column holds a value a row, nan where a row has none:

    >>> history = History([{"epoch": 1, "val_loss": 0.5}, {"epoch": 2, "val_loss": 0.25}], monitor="val_loss")
    >>> history.val_loss, history["epoch"], history[-1]
    ([0.5, 0.25], [1, 2], {'epoch': 2, 'val_loss': 0.25})
    >>> history
    History: 2 rows, epochs 1 to 2
      last  epoch 2  val_loss 0.25
      best  epoch 2  val_loss 0.25

    An unknown column is an ``UnknownNameError`` by item and an ``AttributeError`` by attribute, both
    with the nearest name.
    """

    def __init__(
        self, rows: Iterable[Row] = (), monitor: str | None = None, mode: str = "min", best: Best | None = None
    ):
        if mode not in ("min", "max"):
            raise UnknownNameError.of_name("mode", mode, ("min", "max"), where="History(mode=...)")
        self.rows: list[dict[str, Any]] = [dict(row) for row in rows]
        self.monitor, self.mode = monitor, mode
        self._best = best

    @property
    def columns(self) -> tuple[str, ...]:
        """The names in the rows, in the order of their first appearance."""
        return columns(self.rows)

    @property
    def best(self) -> Best | None:
        """The best evaluation; None where nothing is monitored or no value of it was finite."""
        if self._best is not None or self.monitor is None:
            return self._best
        known = [row for row in self.rows if math.isfinite(scalar(row.get(self.monitor), math.nan))]
        if not known:
            return None
        row = (min if self.mode == "min" else max)(known, key=lambda row: row[self.monitor])
        return Best(row["epoch"], row.get("step", 0), self.monitor, row[self.monitor])

    def _column(self, name: str) -> list[Any]:
        known = {*self.columns, *_ALWAYS}
        if name not in known:
            raise UnknownNameError.of_name("column of the history", name, known)
        values = (row.get(name) for row in self.rows)
        return [math.nan if value is None else value for value in values]

    def __getattr__(self, name: str) -> list[Any]:
        if name.startswith("_") or "rows" not in self.__dict__:  # asked when it is copied, before there are rows
            raise AttributeError(name)
        try:
            return self._column(name)
        except UnknownNameError as error:
            raise AttributeError(str(error)) from None

    def __getitem__(self, key: int | slice | str) -> Any:
        """A row by its number, several by a slice, a column by its name."""
        return self._column(key) if isinstance(key, str) else self.rows[key]

    def __len__(self) -> int:
        return len(self.rows)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.columns, *_ALWAYS})

    def __repr__(self) -> str:
        if not self.rows:
            return "History: no rows"
        epochs = list(dict.fromkeys(self.rows[n]["epoch"] for n in (0, -1)))
        span = f"{len(self)} row{'s' * (len(self) > 1)}, epoch{'s' * (len(epochs) > 1)} {' to '.join(map(str, epochs))}"
        lines = [f"History: {span}", f"  last  {_line(self.rows[-1])}"]
        if best := self.best:
            told = {"epoch": best.epoch, best.metric: best.value, **row_of(self.rows, best)}
            lines.append(f"  best  {_line(told)}")
        return "\n".join(lines)

    def to_polars(self) -> pl.DataFrame:
        """The rows as a polars frame: a column a name, null where a row has no value."""
        import polars as pl

        return pl.DataFrame(self.rows, infer_schema_length=None, strict=False)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the numbers, one line a row, such that ``from_csv`` reads the same floats to the bit.

        What is not a number (a confusion matrix) is left out. Raises ``FileError``.
        """
        names = scalar_columns(self.rows)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for row in self.rows:
            writer.writerow(scalar(row.get(name), "") for name in names)
        replace_bytes(path, text.getvalue().encode())

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> History:
        """Reads what ``to_csv`` wrote. Raises ``TableError`` for a file that is missing or is not such a table."""
        rows = []
        try:
            with open(path, encoding="utf-8", newline="") as file:
                lines = csv.reader(file)
                names = next(lines, [])
                for line in lines:
                    rows.append({name: _number(text) for name, text in zip(names, line, strict=True) if text})
        except OSError as error:
            what, fix = f"the history cannot be read: {error.strerror}.", "name a results.csv that epochal has written"
            raise TableError(what, where=os.fspath(path), fix=fix) from error
        except (ValueError, csv.Error) as error:
            what, where = "the line is not one of numbers, one a column.", f"{os.fspath(path)}, line {len(rows) + 2}"
            raise TableError(what, where=where, fix="mend or remove the line") from error
        return cls(rows)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draws the curves (see ``plots.draw``); saves them too when a path (.png, .svg, .pdf) is given."""
        from epochal.report import plots

        figure = plots.draw(self.rows, best=self.best)
        if path is not None:
            plots.save(figure, path)
        return figure


def _line(row: Row) -> str:
    """The losses and metrics of a row in short, without what one rarely looks for."""
    numbers = {name: scalar(value) for name, value in row.items() if name not in ("epoch", "step", "lr", "time")}
    told = [f"{name} {value:.4g}" for name, value in numbers.items() if value is not None]
    return "  ".join([f"epoch {row['epoch']}", *told])


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdecimal() else float(text)
