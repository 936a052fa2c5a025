"""Reading tables: CSV and Parquet files, and the tables of polars, pandas and arrow.

Everything arrives as a ``polars.DataFrame``. A CSV file is read as text first, and a column takes the
narrowest of four types that *all* its values can be read as (whole number, number, true/false, text),
so a late surprise in a long file changes a column's type and never crashes the reading.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epochal.errors import TableError

if TYPE_CHECKING:
    import polars as pl

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
MISSING = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?")  # what a file writes for a missing value
SEPARATORS = ",;\t|"


def is_table(source: Any) -> bool:
    """Whether ``read_table`` is the one to read ``source``: by its suffix or its attributes, without importing polars.

    >>> is_table("prices.csv"), is_table("prices.npz"), is_table([1, 2])
    (True, False, False)
    """
    if isinstance(source, str | os.PathLike):
        return str(source).lower().endswith(SUFFIXES)
    # One column alone (a polars or pandas Series) streams too, and is no table; a lazy table does not stream.
    kind = type(source)
    streams = hasattr(kind, "__arrow_c_stream__") or kind.__name__ == "LazyFrame"
    return streams and hasattr(kind, "columns")


def read_table(source: Any, *, where: str = "train") -> pl.DataFrame:
    """Reads a table of at least one row.

    ``source``: the path of a ``.csv``, ``.csv.gz``, ``.tsv``, ``.tsv.gz`` or ``.parquet`` file, or a table of
    polars (lazy or not), pandas or arrow. ``where`` names the source in errors.

    A CSV file is UTF-8 (with or without a byte order mark) and begins with a header. Its separator is the one of
    ``, ; tab |`` that gives the header the most fields. Spaces around a value are not part of it, blank lines are
    skipped, and a field that is empty, NA, N/A, NaN, nan, null, NULL, None or ? is missing.

    Raises ``TableError`` for what cannot be read without guessing: rows of the wrong length, repeated column
    names, other encodings, an empty file, a table without rows.
    """
    if isinstance(source, str | os.PathLike):
        where = f"{where}, {source}"
        frame = _read_file(Path(source), where)
    else:
        frame = _read_object(source, where)
    if not frame.width or not frame.height:
        what = "the table has columns and no rows." if frame.width else "the table has no columns."
        raise TableError(what, where=where, fix="give a table with at least one row")
    return frame


def _read_object(source: Any, where: str) -> pl.DataFrame:
    import polars as pl

    kind = f"{type(source).__module__.partition('.')[0]}.{type(source).__name__}"
    if not is_table(source):
        raise TableError(f"a {kind} is not a table.", where=where, fix="give a path or a polars, pandas or arrow table")
    try:
        return pl.DataFrame(source.collect() if isinstance(source, pl.LazyFrame) else source)
    except Exception as cause:
        what = f"the {kind} cannot be read as a table: {_first_line(cause)}."
        raise TableError(what, where=where, fix="give every column one type and a name of its own") from cause


def _read_file(path: Path, where: str) -> pl.DataFrame:
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        what = f"{path.name!r} is not a kind of file that can be read as a table."
        raise TableError(what, where=where, fix=f"give a file that ends in {', '.join(SUFFIXES)}")
    try:
        content = path.read_bytes()
        if name.endswith(".gz"):
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise TableError(f"there is no file {path.name!r}.", where=where, fix=_nearest_file(path)) from None
    except (OSError, EOFError, zlib.error) as cause:
        what = f"the file cannot be read: {cause}."
        raise TableError(what, where=where, fix="check that it is a file, whole, and readable by you") from cause
    content = content.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that Excel writes
    if not content.strip():
        raise TableError("the file is empty.", where=where, fix="give a file with a header and at least one row")
    if name.endswith(".parquet"):
        return _read_parquet(content, where)
    return _read_text(content, "\t" if ".tsv" in name else SEPARATORS, where)


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {str(path.parent)!r} either: check the path"
    present = [entry.name for entry in path.parent.iterdir() if is_table(entry)]
    near = difflib.get_close_matches(path.name, present, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "check the path"


def _read_parquet(content: bytes, where: str) -> pl.DataFrame:
    import polars as pl

    try:
        return pl.read_parquet(io.BytesIO(content))
    except (Exception, pl.exceptions.PanicException) as cause:  # a panic of polars is no Exception
        what = f"the file is not sound Parquet: {_first_line(cause)}."
        fix = "write it again as Parquet, or rename it after what it is"
        raise TableError(what, where=where, fix=fix) from cause


def _first_line(cause: BaseException) -> str:
    return str(cause).split("\n")[0].rstrip(".")


def _check_encoding(content: bytes, where: str) -> None:
    try:
        content.decode()
    except UnicodeDecodeError as cause:
        line = content.count(b"\n", 0, cause.start) + 1
        what = f"the file is not UTF-8: byte 0x{content[cause.start]:02x} in line {line}."
        fix = "save it as UTF-8 (iconv -f latin1 -t utf-8 OLD > NEW, where it is Latin-1)"
        raise TableError(what, where=where, fix=fix) from None


def _read_text(content: bytes, separators: str, where: str) -> pl.DataFrame:
    import polars as pl

    _check_encoding(content, where)
    # Without a line end, polars reads a last row "1,2," as two fields.
    content = content.rstrip(b"\r\n") + b"\n"
    # csv.Sniffer can take a letter or a decimal comma for the separator; the header tells more surely.
    separator = max(separators, key=lambda mark: len(next(filter(None, _reader(content, mark)))))
    names = _names(next(_rows(content, separator, where)), where)
    try:
        frame = pl.read_csv(content, separator=separator, infer_schema=False)
    except pl.exceptions.PolarsError:
        frame = pl.DataFrame()  # a ragged row, or a stray quote: Python's reader is slower and can say which
    # polars fills short rows with missing values, which always reaches the last column; a blank line too.
    doubtful = frame.width != len(names) or not frame.height or frame[:, -1].null_count()
    if doubtful and frame.shape != (sum(1 for _ in _rows(content, separator, where)) - 1, len(names)):
        rows = list(_rows(content, separator, where))[1:]
        frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
    return pl.DataFrame([_typed(column.alias(name)) for name, column in zip(names, frame)])


def _reader(content: bytes, separator: str, strict: bool = False) -> Any:
    lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", newline="")
    return csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=strict)


def _rows(content: bytes, separator: str, where: str) -> Iterator[list[str]]:
    """The rows with the header first; refuses those of another length than the header's, and open quotes."""
    reader, width, line = _reader(content, separator, strict=True), 0, 1
    try:
        for row in reader:
            width = width or len(row)
            if len(row) not in (0, width):  # a blank line is an empty list
                what = f"the row at line {line} has {len(row)} fields, and the header has {width}."
                raise TableError(what, where=where, fix=f"give it {width} fields; a separator inside one needs quotes")
            if row:
                yield row
            line = reader.line_num + 1
    except csv.Error as cause:
        fix = 'write a quote inside quotes twice ("") and close every quote'
        raise TableError(f"the row at line {line} cannot be read: {cause}.", where=where, fix=fix) from None


def _names(header: list[str], where: str) -> list[str]:
    names = [name.strip() or f"column {position}" for position, name in enumerate(header, start=1)]
    repeated = [repr(name) for name, count in Counter(names).items() if count > 1]
    if repeated:
        what = f"the header has more than one column of the name {', '.join(repeated)}."
        raise TableError(what, where=where, fix="give every column a name of its own")
    return names


def _typed(column: pl.Series) -> pl.Series:
    """The narrowest type that all values of a column of text can be read as."""
    import polars as pl

    text = column.str.strip_chars()
    text = text.set(text.is_in(MISSING).fill_null(False), None)
    for kind in (pl.Int64, pl.Float64):
        numbers = text.cast(kind, strict=False)
        if numbers.null_count() == text.null_count():
            return numbers
    lower = text.str.to_lowercase()
    return lower == "true" if lower.drop_nulls().is_in(("true", "false")).all() else text
