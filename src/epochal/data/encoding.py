"""From a table to arrays: a transformation that is learned once, saved (by msgspec, as JSON), and used again.

Numbers are standardised and filled, booleans become 0 and 1, text becomes one feature a category (how, stands
in ``columns.py``). Columns that cannot teach anything are dropped; ``Encoding.notes`` says which, and why.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import numpy as np
import polars as pl
from msgspec import Meta, Struct

from epochal.data import columns as kinds
from epochal.data.columns import Category, Number, Scale
from epochal.errors import TableError, UnknownNameError

TASKS: Final = ("auto", "classification", "regression")
Columns = tuple[Number | Category, ...]
Task = Literal["classification", "regression"]
MOST_CLASSES = 20  # that a target of whole numbers can have without being asked for


class Encoding(Struct, frozen=True, forbid_unknown_fields=True):
    """What turns a table into features, float32 (rows, width), and targets.

    task: "regression" or "classification". columns: those that become features, in order. classes: the target's
    values in the order of their indices, for classification. target_mean, target_scale: mean and standard
    deviation of each target in its own unit, for regression. dropped: the columns left out. notes: the lines
    that say what was decided.

    A saved one may be anyone's file: msgspec checks the types, and ``__post_init__`` the rest.

    >>> import polars
    >>> table = polars.DataFrame({"size": [1.0, 2.0, None], "sold": [True, False, True]})
    >>> encoding = Encoding.learn(table, "sold")
    >>> encoding.feature_names, encoding.classes
    (('size', 'size is missing'), (False, True))
    >>> encoding.features(table).tolist(), encoding.targets(table).tolist()
    ([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [1, 0, 1])
    """

    task: Task
    target_names: Annotated[tuple[str, ...], Meta(min_length=1)]
    columns: Annotated[Columns, Meta(min_length=1)]
    classes: tuple[str | bool | int | float, ...] = ()
    target_mean: tuple[float, ...] = ()
    target_scale: tuple[Scale, ...] = ()
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError if the parts do not fit together."""
        names = [*self.target_names, *(column.name for column in self.columns), *self.dropped]
        groups = [names, self.classes, *(c.values for c in self.columns if isinstance(c, Category))]
        if any(len(set(group)) < len(group) for group in groups):
            raise ValueError("a name stands in it twice")
        targets, scales = len(self.target_names), (len(self.target_mean), len(self.target_scale))
        if self.task == "regression":
            sound = scales == (targets, targets) and not self.classes
        else:
            sound = (targets, scales) == (1, (0, 0)) and len(self.classes) > 1 == len(set(map(type, self.classes)))
        if not sound:
            raise ValueError(f"its targets, scales and classes do not fit a {self.task}")
        if any(type(value) is int and abs(value) >= 2**128 for value in self.classes):
            raise ValueError("a class is larger than the numbers of a table can be")

    @classmethod
    def learn(
        cls,
        frame: pl.DataFrame,
        target: str | Sequence[str],
        *,
        task: str = "auto",
        where: str = "train",
        drop: Sequence[str] = (),
    ) -> Encoding:
        """Learns the transformation from the training table.

        target: one column, or several for regression. drop: columns to leave out. task: "auto" takes text,
        booleans and whole numbers of few values (two; or at most 20, none of them alone, with five rows each
        on average) for classes, and any other target for a quantity.

        Raises TableError for what cannot be learned from: an unknown, constant, missing or infinite target, an
        infinite value, a column of lists, no column left. Rows are counted from 1, without the header.
        """
        targets = (target,) if isinstance(target, str) else tuple(target)
        _check_names(targets, drop, frame.columns, where)
        frame = kinds.plain(frame)
        _check_known(frame, targets, where)
        task, why = _choose_task(frame.select(targets), task, where)
        columns, reasons = _learn_columns(frame.drop(targets), drop, where)
        notes = (f"task: {task}, because {why}", *_notes(columns, reasons, frame))
        if task == "classification":
            classes = tuple(frame[targets[0]].unique().sort())
            return cls(task, targets, columns, classes, dropped=tuple(reasons), notes=notes)
        mean, scale = zip(*(kinds.mean_and_std(kinds.numbers(frame[name], where), name, where) for name in targets))
        return cls(task, targets, columns, (), mean, scale, tuple(reasons), notes)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """One name a feature: "age", "age is missing", "color=red", "color=other"."""
        return tuple(name for column in self.columns for name in column.feature_names)

    @property
    def width(self) -> int:
        """How many features there are."""
        return len(self.feature_names)

    def features(self, frame: pl.DataFrame, *, where: str = "train") -> np.ndarray:
        """The features, float32 (rows, width). Columns that were not there in training are ignored.

        Raises TableError if columns are missing, or hold what they did not hold in training.
        """
        frame = self._only(frame, [column.name for column in self.columns], where)
        parts = [column.encode(frame[column.name], where).astype(np.float32) for column in self.columns]
        return np.concatenate(parts, axis=1)

    def targets(self, frame: pl.DataFrame, *, where: str = "train") -> np.ndarray:
        """The targets: standardised, float32 (rows, targets); or the index of the class, int64 (rows,).

        Raises TableError if a target is missing, infinite, or of a class that was not there in training.
        """
        frame = self._only(frame, self.target_names, where)
        _check_known(frame, self.target_names, where)
        if self.task == "classification":
            return self._class_indices(frame[self.target_names[0]], where)
        parts = [
            kinds.standardised(kinds.numbers(frame[name], where), mean, scale, name, where)
            for name, mean, scale in zip(self.target_names, self.target_mean, self.target_scale)
        ]
        return np.column_stack(parts)

    def _class_indices(self, column: pl.Series, where: str) -> np.ndarray:
        text = kinds.texts(column, where)
        if isinstance(self.classes[0], bool):
            text = text.str.to_lowercase().replace({"0": "false", "1": "true"})
        whole = type(self.classes[0]) is int  # perhaps too large for a column of the usual type
        known = list(map(str, self.classes)) if whole else kinds.texts(pl.Series(self.classes), where).to_list()
        indices = kinds.positions(text, {value: index for index, value in enumerate(known)}, otherwise=-1)
        if (indices < 0).any():
            row = int(np.argmax(indices < 0))
            what = f"the target {column.name!r} holds {column[row]!r} in row {row + 1}, which is no class of training."
            raise TableError(what, where=where, fix=f"mend it or remove the row; the classes are {_some(self.classes)}")
        return indices

    def _only(self, frame: pl.DataFrame, names: Sequence[str], where: str) -> pl.DataFrame:
        if absent := [name for name in names if name not in frame.columns]:
            near = {name: difflib.get_close_matches(name, frame.columns, n=1) for name in absent}
            guesses = ", ".join(f"{guess!r} for {name!r}" for name in absent for guess in near[name])
            what = f"columns of the training table are missing: {', '.join(map(repr, absent))}."
            fix = (f"did you mean {guesses}? " if guesses else "") + f"the table has {_some(frame.columns)}"
            raise TableError(what, where=where, fix=fix)
        return kinds.plain(frame.select(names))

    def decode_regression(self, values: Any) -> np.ndarray:
        """Standardised values, (rows, targets), in the targets' own units: float64, the same shape."""
        return np.asarray(values, np.float64) * self.target_scale + self.target_mean

    def extra(self, frame: pl.DataFrame) -> tuple[str, ...]:
        """The columns of a table that were not there in training."""
        known = {*self.target_names, *self.dropped, *(column.name for column in self.columns)}
        return tuple(name for name in frame.columns if name not in known)

    def unseen(self, frame: pl.DataFrame, *, where: str = "data") -> dict[str, list[str]]:
        """The categories of a table that were not there in training, by column; "missing" for missing values."""
        categories = [column for column in self.columns if isinstance(column, Category)]
        frame = self._only(frame, [column.name for column in categories], where)
        found = {column.name: column.unseen(frame[column.name], where) for column in categories}
        return {name: values for name, values in found.items() if values}


def _some(names: Sequence[object]) -> str:
    return ", ".join(map(repr, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _check_names(targets: Sequence[str], drop: Sequence[str], present: Sequence[str], where: str) -> None:
    for name in (*targets, *drop):
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
            fix = (f"did you mean {near[0]!r}? " if near else "") + f"the table has {_some(present)}"
            raise TableError(f"there is no column {name!r} in the table.", where=where, fix=fix)
    if not targets or len(set(targets)) < len(targets) or set(targets) & set(drop):
        what = "there is no target, or it is named twice, or dropped."
        raise TableError(what, where=where, fix="name each target column once, and not among those to drop")


def _check_known(frame: pl.DataFrame, targets: Sequence[str], where: str) -> None:
    for column in frame.select(targets):
        absent = np.flatnonzero(column.is_null().to_numpy())
        if len(absent):
            rows = ", ".join(str(row + 1) for row in absent[:5]) + (", ..." if len(absent) > 5 else "")
            what = f"the target {column.name!r} is missing in {len(absent)} of {len(column)} rows."
            place = f"{where}, row{'s' * (len(absent) > 1)} {rows}"
            raise TableError(what, where=place, fix="remove these rows, or fill in the target")
        if column.dtype.is_float() and column.is_infinite().any():
            row = int(column.is_infinite().to_numpy().argmax())
            what = f"the target {column.name!r} holds {column[row]} in row {row + 1}."
            raise TableError(what, where=where, fix="mend the value, or remove the row")


def _choose_task(targets: pl.DataFrame, task: str, where: str) -> tuple[Task, str]:
    """The task, and why."""
    if task not in TASKS:
        raise UnknownNameError.of_name("task", task, TASKS, where=where)
    for column in targets:
        kind = kinds.kind_of(column)
        if kind not in kinds.LEARNABLE:
            what = f"the target {column.name!r} holds {kind}, which cannot be learned."
            raise TableError(what, where=where, fix="make it a number or a class first, in a column of its own")
        if column.n_unique() < 2:
            what = f"the target {column.name!r} is {column[0]!r} in every row, so there is nothing to learn."
            raise TableError(what, where=where, fix="give rows with other values, or name another target")
        if kind == "text" and (task == "regression" or targets.width > 1):
            what = f"the target {column.name!r} holds text ({column[0]!r} in row 1), and regression needs numbers."
            raise TableError(what, where=where, fix="make it numbers, or leave out --task regression")
    if targets.width > 1:
        if task == "classification":
            what = f"there are {targets.width} targets, and classification has one."
            raise TableError(what, where=where, fix="name one target")
        return "regression", "there are several targets"
    return (task, "it was asked for") if task != "auto" else _guess_task(targets.to_series(), where)


def _guess_task(target: pl.Series, where: str) -> tuple[Task, str]:
    kind, name, different = kinds.kind_of(target), target.name, target.n_unique()
    if kind == "text":
        if different > max(kinds.MOST_CATEGORIES, len(target) / 2):
            what = f"the target {name!r} holds text with {different} different values in {len(target)} rows."
            fix = "make it numbers for regression, or say --task classification if these are classes"
            raise TableError(what, where=where, fix=fix)
        return "classification", f"the target {name!r} holds text with {different} different values"
    if kind == "booleans":
        return "classification", f"the target {name!r} holds booleans (--task regression takes them as 0 and 1)"
    if kind == "whole numbers":
        rarest = target.value_counts(name="rows of it")["rows of it"].to_numpy().min()
        if different == 2 or (different <= MOST_CLASSES and 5 * different <= len(target) and rarest > 1):
            why = f"the target {name!r} has only {different} different whole numbers"
            return "classification", f"{why} (--task regression takes it as a quantity)"
    why = f"the target {name!r} holds {different} different numbers"
    return "regression", f"{why} (--task classification takes them as classes)"


def _learn_columns(frame: pl.DataFrame, drop: Sequence[str], where: str) -> tuple[Columns, dict[str, str]]:
    """The columns that become features; and why each of the others does not, by name."""
    columns, reasons = [], {}
    for column in frame:
        if reason := "as asked" if column.name in drop else kinds.reason_to_drop(column, where):
            reasons[column.name] = reason
            continue
        learned = (Category if kinds.kind_of(column) == "text" else Number).learn(column, where)
        if isinstance(learned, Category) and len(learned.values) < 2:
            reasons[column.name] = "every category is rare"
        else:
            columns.append(learned)
    if not columns:
        fix = "; ".join(("give a column that is a number or a category", *_dropped(reasons)))
        raise TableError("no column is left to learn from.", where=where, fix=fix)
    return tuple(columns), reasons


def _dropped(reasons: Mapping[str, str]) -> list[str]:
    """One line a reason."""
    named = {reason: [repr(name) for name in reasons if reasons[name] == reason] for reason in reasons.values()}
    return [f"dropped {', '.join(names)}: {reason}" for reason, names in named.items()]


def _notes(columns: Columns, reasons: Mapping[str, str], frame: pl.DataFrame) -> list[str]:
    gaps = [column for column in columns if isinstance(column, Number) and column.indicator]
    rare = [column for column in columns if isinstance(column, Category) and column.grouped]
    told = {
        "filled missing numbers with the median": [
            f"{column.name!r} ({frame[column.name].null_count()} rows, {column.fill:g})" for column in gaps
        ],
        'grouped rare categories as "other"': [f"{column.name!r} ({len(column.grouped)} of them)" for column in rare],
    }
    return _dropped(reasons) + [f"{what}: {', '.join(which)}" for what, which in told.items() if which]
