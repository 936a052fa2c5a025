"""One column of a table as features: what it holds, whether it can teach anything, and how it is encoded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Annotated

import numpy as np
import polars as pl
from msgspec import Meta, Struct

from epochal.errors import TableError

MISSING, OTHER = "missing", "other"  # the categories of missing values and of grouped ones
LEARNABLE = ("text", "booleans", "whole numbers", "numbers")  # what a column can hold, in words
MOST_CATEGORIES = 50  # of one column; the less frequent ones are grouped
ISO_TIME = r"^(\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?|\d\d:\d\d(:\d\d(\.\d+)?)?)$"
ROW_NAMES = ("id", "index", "idx", "row", "row_number", "rownum", "uuid", "key")

Scale = Annotated[float, Meta(gt=0)]


class Number(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="number"):
    """A column of numbers, or of booleans: one feature, and a second where ``indicator`` is set.

    The feature is (value - mean) / std, with the mean and population standard deviation of the values known in
    training, in float64; a missing value counts as ``fill``, their median. Booleans stay 0 and 1.
    """

    name: str
    mean: float
    std: Scale
    fill: float
    indicator: bool
    boolean: bool

    @classmethod
    def learn(cls, column: pl.Series, where: str) -> Number:
        boolean = kind_of(column) == "booleans"
        values = numbers(column, where)
        mean, std = (0.0, 1.0) if boolean else mean_and_std(values, column.name, where)
        fill, gaps = float(np.nanmedian(values)), bool(np.isnan(values).any())
        return cls(column.name, mean, std, float(fill > 0.5) if boolean else fill, gaps, boolean)

    @property
    def feature_names(self) -> tuple[str, ...]:
        return (self.name, f"{self.name} is missing") if self.indicator else (self.name,)

    def encode(self, column: pl.Series, where: str) -> np.ndarray:
        """Shape (rows, 1), or (rows, 2) with the indicator."""
        values = numbers(column, where, boolean=self.boolean)
        absent = np.isnan(values)
        scaled = standardised(np.where(absent, self.fill, values), self.mean, self.std, self.name, where)
        return np.column_stack([scaled, absent] if self.indicator else [scaled])


class Category(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="category"):
    """A column of text: one feature, 0 or 1, for each of ``values``.

    Rare categories, those in fewer than 1 % of the training rows (at least 2 rows, at most 10) or not among the
    50 most frequent, are ``grouped``: they count as "other". So does an unseen category where there is an
    "other"; it is all zeros otherwise. A missing value counts as "missing".
    """

    name: str
    values: Annotated[tuple[str, ...], Meta(min_length=1)]
    grouped: tuple[str, ...]

    @classmethod
    def learn(cls, column: pl.Series, where: str) -> Category:
        counts = Counter(texts(column.drop_nulls(), where).to_list())
        least = min(10, max(2, math.ceil(len(column) / 100)))
        by_count = sorted(counts, key=lambda value: (-counts[value], value))
        often = sorted([value for value in by_count if counts[value] >= least][:MOST_CATEGORIES])
        special = [OTHER] * (len(often) < len(counts)) + [MISSING] * bool(column.null_count())
        values = tuple(dict.fromkeys(often + special))  # once, where the data have an "other" of their own
        return cls(column.name, values, tuple(sorted(set(counts) - set(often))))

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(f"{self.name}={value}" for value in self.values)

    def encode(self, column: pl.Series, where: str) -> np.ndarray:
        """Shape (rows, number of values)."""
        codes = {value: code for code, value in enumerate(self.values)}
        places = positions(texts(column, where).fill_null(MISSING), codes, otherwise=codes.get(OTHER, -1))
        return places[:, None] == np.arange(len(codes))

    def unseen(self, column: pl.Series, where: str) -> list[str]:
        present = texts(column, where).fill_null(MISSING).unique().to_list()
        return sorted(set(present) - set(self.values) - set(self.grouped))


def plain(frame: pl.DataFrame) -> pl.DataFrame:
    """The same table in fewer types: categoricals as text, decimals as floats, NaN as missing."""
    import polars as pl
    from polars import selectors

    return frame.with_columns(
        selectors.by_dtype(pl.Categorical, pl.Enum).cast(pl.String),
        selectors.decimal().cast(pl.Float64),
        selectors.float().cast(pl.Float64).fill_nan(None),
    )


def kind_of(column: pl.Series) -> str:
    """What a column holds, in words."""
    kind = column.dtype
    if kind == pl.Boolean:
        return "booleans"
    if kind == pl.String:
        return "text"
    if kind.is_integer():
        return "whole numbers"
    if kind.is_numeric() or kind == pl.Null:
        return "numbers"
    return "dates or times" if kind.is_temporal() else f"values of type {kind.base_type()}"


def numbers(column: pl.Series, where: str, *, boolean: bool = False) -> np.ndarray:
    """The column as float64, NaN where it is missing. Text that spells numbers (or booleans) is taken as such."""
    held = "booleans" if boolean else "numbers"
    _check_kind(column, held, where)
    source = column
    if kind_of(column) == "text":
        source = column.str.strip_chars().str.to_lowercase()
        source = source.replace({"true": "1", "false": "0"}) if boolean else source
    values = source.cast(pl.Float64, strict=False)
    wrong = column.is_not_null() & values.is_null()
    if boolean:
        wrong |= ~values.is_in([0.0, 1.0]).fill_null(True)
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        what = f"the column {column.name!r} holds {column[row]!r} in row {row + 1}, and held {held} in training."
        raise TableError(what, where=where, fix="mend the value, or remove the row")
    return values.fill_null(math.nan).to_numpy()


def texts(column: pl.Series, where: str) -> pl.Series:
    """The column as text; 2.0 is "2", so that whole numbers match however a file wrote them."""
    _check_kind(column, "categories", where)
    text = column.cast(pl.String)
    if column.dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        text = whole.cast(pl.String).zip_with((whole == column).fill_null(False), text)
    return text


def _check_kind(column: pl.Series, held: str, where: str) -> None:
    """Refuses dates, lists and the like where ``held`` is what there was in training."""
    kind = kind_of(column)
    if kind not in LEARNABLE:
        what = f"the column {column.name!r} holds {kind}, and held {held} in training."
        raise TableError(what, where=where, fix="give it as it was in training")


def positions(values: pl.Series, codes: Mapping[str, int], *, otherwise: int) -> np.ndarray:
    """The code of each text, int64 (rows,)."""
    return values.replace_strict(codes, default=otherwise, return_dtype=pl.Int64).to_numpy()


def mean_and_std(values: np.ndarray, name: str, where: str) -> tuple[float, float]:
    """Mean and population standard deviation of what is known; the latter is 1 where it would be 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(np.nanmean(values)), float(np.nanstd(values))
    if not math.isfinite(mean) or not math.isfinite(std):
        _refuse_value(values, int(np.nanargmax(np.abs(values))), name, where)
    return mean, std or 1.0


def standardised(values: np.ndarray, mean: float, std: float, name: str, where: str) -> np.ndarray:
    """(values - mean) / std, computed in float64 and given as float32; refuses what is not finite then."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = ((values - mean) / std).astype(np.float32)
    finite = np.isfinite(scaled)
    if not finite.all():
        _refuse_value(values, int(np.argmin(finite)), name, where)
    return scaled


def _refuse_value(values: np.ndarray, row: int, name: str, where: str) -> None:
    what = f"the column {name!r} holds {values[row]} in row {row + 1}, which is no usable number."
    raise TableError(what, where=where, fix="mend the value, or remove the row")


def reason_to_drop(column: pl.Series, where: str) -> str | None:
    """Why a column cannot teach anything, or None. Raises TableError for lists, and for numbers with a few words."""
    kind = kind_of(column)
    if kind not in (*LEARNABLE, "dates or times"):
        fix = "make it text or numbers, one value a row, or drop the column"
        raise TableError(f"the column {column.name!r} holds {kind}.", where=where, fix=fix)
    known = column.drop_nulls()
    if column.n_unique() == 1:
        return "the same in every row"
    if kind == "dates or times" or (kind == "text" and known.str.contains(ISO_TIME).all()):
        days = "the month, say, or the days since a fixed day, in a column of its own"
        return f"dates and times need a meaning as numbers: {days}"
    if kind == "whole numbers":
        why = "whole numbers that count or name the rows; to use one as a quantity, write it with decimals (1.0)"
        return why if _names_rows(column) else None
    if kind != "text":
        return None
    different = known.n_unique()
    long = known.str.len_chars().to_numpy().mean() > 40 or known.str.count_matches(r"\S+").to_numpy().mean() > 6
    wrong = column.is_not_null() & column.str.strip_chars().cast(pl.Float64, strict=False).is_null()
    if 0 < wrong.sum() <= 0.1 * len(known):
        row = int(wrong.arg_max() or 0)
        what = f"the column {column.name!r} holds numbers, but {column[row]!r} in row {row + 1}."
        raise TableError(what, where=where, fix="mend the value, leave it empty, or leave the column out (--drop)")
    if long and (different > 20 or different == len(known)):  # a survey's few long answers are categories
        return "free text is not a category"
    if different == len(known) or different > max(MOST_CATEGORIES, len(known) / 2):
        return "most rows have a text of their own, so it names the row and not a category"
    return None


def _names_rows(column: pl.Series) -> bool:
    """Whether every row has its own whole number, by its name or because they count the rows.

    Up to 2 * rows, as a part of a numbered table still has most of its numbers.
    """
    if column.null_count() or column.n_unique() < len(column):
        return False
    named = column.name.lower() in ROW_NAMES or column.name.endswith(("_id", " id", "Id", "ID"))
    values = column.to_list()
    return named or (min(values) >= 0 and max(values) <= 2 * len(values))
