"""Tables as arrays: what is learned from a table, what a new table may bring, and what is refused."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn import datasets
from sklearn.preprocessing import StandardScaler

from epochal.data import columns, encoding, tables
from epochal.data.encoding import Encoding
from epochal.data.tables import read_table
from epochal.errors import TableError, UnknownNameError


def real(name: str) -> pl.DataFrame:
    return pl.from_pandas(getattr(datasets, f"load_{name}")(as_frame=True).frame)


COLORS = ["red", "green", "blue", None] * 25


def mixed(rows: int = 100) -> pl.DataFrame:
    """Every kind of column."""
    frame = pl.DataFrame(
        {
            "id": range(1, 101),
            "age": [None if row % 10 == 0 else float(row % 7) for row in range(100)],
            "color": COLORS,
            "town": ["here" if row % 2 else "there" for row in range(97)] + ["Rome", "Oslo", "Bonn"],
            "paid": [row % 3 == 0 for row in range(100)],
            "one": [1] * 100,
            "none": [None] * 100,
            "day": [f"2024-01-{row % 28 + 1:02}" for row in range(100)],
            "note": [f"the long story of row {row}, told at leisure" for row in range(100)],
            "name": [f"n{row}" for row in range(100)],
            "y": [row * 0.5 for row in range(100)],
        }
    )
    return frame.head(rows)


@pytest.mark.parametrize("name", ["diabetes", "wine", "iris"])
def test_numbers_are_standardised_as_scikit_learn_does(name):
    frame = real(name)
    learned = Encoding.learn(frame, "target")
    expected = StandardScaler().fit_transform(frame.drop("target").to_numpy())
    features = learned.features(frame)
    assert features.dtype == np.float32 and learned.feature_names == tuple(frame.drop("target").columns)
    np.testing.assert_array_equal(features, expected.astype(np.float32))


def test_a_regression_target_and_its_unit():
    frame = real("diabetes")
    learned, raw = Encoding.learn(frame, "target"), frame["target"].to_numpy()
    targets = learned.targets(frame)
    assert learned.task == "regression" and targets.dtype == np.float32 and targets.shape == (442, 1)
    np.testing.assert_array_equal(targets, StandardScaler().fit_transform(raw[:, None]).astype(np.float32))
    assert learned.target_scale == pytest.approx([raw.std()], rel=1e-12)
    np.testing.assert_allclose(learned.decode_regression(targets)[:, 0], raw, rtol=1e-6)
    assert learned.decode_regression(targets).dtype == np.float64


def test_several_targets():
    learned = Encoding.learn(real("diabetes"), ["target", "bmi"])
    assert learned.targets(real("diabetes")).shape == (442, 2) and len(learned.target_scale) == 2
    assert learned.notes == ("task: regression, because there are several targets",)


def test_categories_are_one_hot_as_pandas_does():
    bunch = datasets.load_iris(as_frame=True)
    species = pl.Series("species", bunch.target_names[bunch.target].tolist())
    frame = pl.from_pandas(bunch.data).select("petal width (cm)").with_columns(species)
    learned = Encoding.learn(frame, "petal width (cm)")
    expected = pd.get_dummies(frame.to_pandas(), prefix_sep="=", columns=["species"]).drop(columns=frame.columns[0])
    assert list(learned.feature_names) == list(expected.columns)
    np.testing.assert_array_equal(learned.features(frame), expected.to_numpy(np.float32))


def test_every_kind_of_column():
    frame = mixed()
    learned = Encoding.learn(frame, "y", drop=["paid"])
    assert learned.feature_names == (
        *("age", "age is missing", "color=blue", "color=green", "color=red", "color=missing"),
        *("town=here", "town=there", "town=other"),
    )
    assert learned.width == 9 and learned.dropped == ("id", "paid", "one", "none", "day", "note", "name")
    assert learned.notes == (
        "task: regression, because the target 'y' holds 100 different numbers"
        " (--task classification takes them as classes)",
        "dropped 'id': whole numbers that count or name the rows; to use one as a quantity, write it with decimals"
        " (1.0)",
        "dropped 'paid': as asked",
        "dropped 'one', 'none': the same in every row",
        "dropped 'day': dates and times need a meaning as numbers: the month, say, or the days since a fixed day,"
        " in a column of its own",
        "dropped 'note': free text is not a category",
        "dropped 'name': most rows have a text of their own, so it names the row and not a category",
        "filled missing numbers with the median: 'age' (10 rows, 3)",
        "grouped rare categories as \"other\": 'town' (3 of them)",
    )
    known = frame["age"].drop_nulls().to_numpy()
    row = np.array([(3 - known.mean()) / known.std(), 1, 0, 0, 1, 0, 0, 1, 0], np.float32)
    np.testing.assert_array_equal(learned.features(frame)[0], row)
    np.testing.assert_array_equal(learned.features(frame)[-1, -3:], [0, 0, 1])


def test_booleans_and_what_else_says_so():
    learned = Encoding.learn(mixed(), "y")
    flags = [[True, False], [1, 0], ["true", "FALSE"], [" 1", "0"], [1.0, 0.0]]
    for values in flags:
        features = learned.features(mixed(2).with_columns(pl.Series("paid", values)))
        np.testing.assert_array_equal(features[:, learned.feature_names.index("paid")], [1, 0])


def test_a_new_table_may_differ_in_small_things():
    learned, frame = Encoding.learn(mixed(), "y"), mixed(4)
    new = frame.with_columns(age=pl.Series(["1", "", "3", None]).replace("", None), paid=None, color=pl.lit("pink"))
    new = new.with_columns(town=pl.Series(["Rome", "Paris", None, "here"]), more=1)
    features = dict(zip(learned.feature_names, learned.features(new.drop("y", "id", "note")).T))
    np.testing.assert_array_equal(features["age is missing"], [0, 1, 0, 1])
    np.testing.assert_array_equal(features["paid"], [0, 0, 0, 0])
    assert not any(features[name].any() for name in features if name.startswith("color"))
    np.testing.assert_array_equal(features["town=other"], [1, 1, 1, 0])
    assert learned.unseen(new) == {"color": ["pink"], "town": ["Paris", "missing"]}
    assert learned.unseen(mixed()) == {} and learned.extra(new) == ("more",) and learned.extra(frame) == ()


def test_rare_is_one_percent_and_two_to_ten_rows_and_the_fifty_most_frequent():
    def kept(*counts: int) -> int:
        values = [f"c{index:03}" for index, count in enumerate(counts) for _ in range(count)]
        return len(columns.Category.learn(pl.Series("c", values), "train").values)

    assert kept(50, 2) == 2 and kept(50, 2, 1) == 3  # the third is "other"
    assert kept(495, 5) == 2 and kept(496, 4) == 2 and kept(400, 5, 4, 91) == 4
    assert kept(5000, 10) == 2 and kept(5000, 4000, 9) == 3
    assert kept(*[20] * 60) == 51


@pytest.mark.parametrize(
    ("values", "task", "why"),
    [
        (["a", "b", "a", "b"], "classification", "the target 'y' holds text with 2 different values"),
        (
            [True, False, True, True],
            "classification",
            "the target 'y' holds booleans (--task regression takes them as 0 and 1)",
        ),
        (
            [0, 1, 1, 1],
            "classification",
            "the target 'y' has only 2 different whole numbers (--task regression takes it as a quantity)",
        ),
        (
            [3, 4, 5] * 5,
            "classification",
            "the target 'y' has only 3 different whole numbers (--task regression takes it as a quantity)",
        ),
        (
            [3, 4, 5] * 4,
            "regression",
            "the target 'y' holds 3 different numbers (--task classification takes them as classes)",
        ),
        (
            [3, 4] * 9 + [5],
            "regression",
            "the target 'y' holds 3 different numbers (--task classification takes them as classes)",
        ),
        (
            [1.0, 2.0] * 9,
            "regression",
            "the target 'y' holds 2 different numbers (--task classification takes them as classes)",
        ),
    ],
)
def test_the_task_is_chosen_and_said(values, task, why):
    frame = pl.DataFrame({"x": [0.5 * row for row in range(len(values))], "y": values})
    learned = Encoding.learn(frame, "y")
    assert learned.task == task and learned.notes == (f"task: {task}, because {why}",)


@pytest.mark.parametrize(
    "values", [["b", "a", "c", "b"], [True, False, False, True], [7, -3, 7, 5], [0.5, 2.0, 2.0, 0.5]]
)
def test_classes_are_kept_as_they_were(values, tmp_path):
    frame = pl.DataFrame({"x": [0.5, 1.5, 2.5, 3.5], "y": values})
    learned = Encoding.learn(frame, "y", task="classification")
    indices = learned.targets(frame)
    assert indices.dtype == np.int64 and [learned.classes[index] for index in indices] == values
    assert learned.classes == tuple(sorted(set(values)))
    frame.write_csv(tmp_path / "t.csv")
    np.testing.assert_array_equal(learned.targets(read_table(tmp_path / "t.csv")), indices)
    np.testing.assert_array_equal(learned.targets(frame[2:3]), indices[2:3])


def test_iris_by_its_species():
    bunch = datasets.load_iris(as_frame=True)
    frame = pl.from_pandas(bunch.data).with_columns(species=pl.Series(bunch.target_names[bunch.target].tolist()))
    learned = Encoding.learn(frame, "species")
    assert learned.classes == ("setosa", "versicolor", "virginica") and learned.task == "classification"
    np.testing.assert_array_equal(learned.targets(frame), bunch.target)


def test_a_column_of_rare_categories_alone_is_dropped():
    frame = pl.DataFrame({"x": [0.5 * row for row in range(400)], "c": [f"c{row // 3}" for row in range(400)]})
    learned = Encoding.learn(frame.with_columns(y=pl.col("x") * 2), "y")
    assert learned.notes[1:] == ("dropped 'c': every category is rare",)


def test_row_numbers_are_found_in_a_part_of_a_table_too():
    part = mixed(100).sample(80, seed=0)
    assert "id" in Encoding.learn(part, "y").dropped
    assert "CustomerID" in Encoding.learn(part.with_columns(CustomerID=pl.col("id") * 977), "y").dropped
    assert "size" not in Encoding.learn(part.with_columns(size=pl.col("id") * 977), "y").dropped
    assert "rank" not in Encoding.learn(part.with_columns(rank=pl.col("id").cast(pl.Float64)), "y").dropped


# ---- what is refused


def error_of(call, kind=TableError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def with_cell(row: int, name: str, value) -> pl.DataFrame:
    """The table with one value, in the row of this number, replaced."""
    values = mixed()[name].to_list()
    values[row - 1] = value
    return mixed().with_columns(pl.Series(name, values, strict=False))


ALL = "the table has 'id', 'age', 'color', 'town', 'paid', 'one', 'none', 'day', 'note', 'name', 'y'"
TO_NUMBERS = "make it numbers for regression, or say --task classification if these are classes"
LEARNING = [
    (mixed(), {"target": "yy"}, "there is no column 'yy' in the table.", f"did you mean 'y'? {ALL}"),
    (mixed(), {"target": "y", "drop": ["hue"]}, "there is no column 'hue' in the table.", ALL),
    (
        mixed(),
        {"target": ["y", "y"]},
        "there is no target, or it is named twice, or dropped.",
        "name each target column once, and not among those to drop",
    ),
    (
        mixed(),
        {"target": "one"},
        "the target 'one' is 1 in every row, so there is nothing to learn.",
        "give rows with other values, or name another target",
    ),
    (mixed(), {"target": "name"}, "the target 'name' holds text with 100 different values in 100 rows.", TO_NUMBERS),
    (
        mixed(),
        {"target": "town", "task": "regression"},
        "the target 'town' holds text ('there' in row 1), and regression needs numbers.",
        "make it numbers, or leave out --task regression",
    ),
    (
        mixed(),
        {"target": ["y", "paid"], "task": "classification"},
        "there are 2 targets, and classification has one.",
        "name one target",
    ),
    (
        mixed().with_columns(y=pl.date_range(pl.date(2024, 1, 1), pl.date(2024, 4, 9))),
        {"target": "y"},
        "the target 'y' holds dates or times, which cannot be learned.",
        "make it a number or a class first, in a column of its own",
    ),
    (
        mixed().with_columns(y=pl.concat_list("id")),
        {"target": "y"},
        "the target 'y' holds values of type List, which cannot be learned.",
        "make it a number or a class first, in a column of its own",
    ),
    (
        with_cell(3, "y", math.inf),
        {"target": "y"},
        "the target 'y' holds inf in row 3.",
        "mend the value, or remove the row",
    ),
    (
        with_cell(4, "age", -math.inf),
        {"target": "y"},
        "the column 'age' holds -inf in row 4, which is no usable number.",
        "mend the value, or remove the row",
    ),
    (
        with_cell(4, "age", 1e300),
        {"target": "y"},
        "the column 'age' holds 1e+300 in row 4, which is no usable number.",
        "mend the value, or remove the row",
    ),
    (
        mixed().with_columns(age=pl.concat_list("id", "y")),
        {"target": "y"},
        "the column 'age' holds values of type List.",
        "make it text or numbers, one value a row, or drop the column",
    ),
    (
        mixed().select("y", "one", "none"),
        {"target": "y"},
        "no column is left to learn from.",
        "give a column that is a number or a category; dropped 'one', 'none': the same in every row",
    ),
    (
        mixed().select("y"),
        {"target": "y"},
        "no column is left to learn from.",
        "give a column that is a number or a category",
    ),
]


@pytest.mark.parametrize(("frame", "options", "what", "fix"), LEARNING, ids=[what for _, _, what, _ in LEARNING])
def test_what_cannot_be_learned_from(frame, options, what, fix):
    assert error_of(lambda: Encoding.learn(frame, **options)) == f"{what}\n  where: train\n  fix:   {fix}"


def test_rows_without_a_target_are_counted_and_named():
    gaps = pl.when(pl.int_range(pl.len()) % 10 != 1).then("y")
    fix = "\n  fix:   remove these rows, or fill in the target"
    few, many = with_cell(7, "y", math.nan), mixed().with_columns(y=gaps)
    assert error_of(lambda: Encoding.learn(few, "y", where="val")) == (
        "the target 'y' is missing in 1 of 100 rows.\n  where: val, row 7" + fix
    )
    assert error_of(lambda: Encoding.learn(mixed(), "y").targets(many)) == (
        "the target 'y' is missing in 10 of 100 rows.\n  where: train, rows 2, 12, 22, 32, 42, ..." + fix
    )


def test_an_unknown_task():
    assert error_of(lambda: Encoding.learn(mixed(), "y", task="regresion"), UnknownNameError) == (
        "'regresion' is not a known task.\n  where: train\n"
        "  fix:   did you mean 'regression'? known: auto, classification, regression"
    )


MEND = "mend the value, or remove the row"
NEW = [
    (
        mixed().rename({"age": "Age", "color": "hue"}),
        "columns of the training table are missing: 'age', 'color'.",
        "did you mean 'Age' for 'age'? " + ALL.replace("'age', 'color'", "'Age', 'hue'"),
    ),
    (with_cell(5, "age", "old"), "the column 'age' holds 'old' in row 5, and held numbers in training.", MEND),
    (with_cell(5, "age", math.inf), "the column 'age' holds inf in row 5, which is no usable number.", MEND),
    (with_cell(2, "paid", "maybe"), "the column 'paid' holds 'maybe' in row 2, and held booleans in training.", MEND),
    (
        mixed().with_columns(paid=pl.col("age")),
        "the column 'paid' holds 2.0 in row 3, and held booleans in training.",
        MEND,
    ),
    (
        mixed().with_columns(age=pl.duration(seconds="id")),
        "the column 'age' holds dates or times, and held numbers in training.",
        "give it as it was in training",
    ),
    (
        mixed().with_columns(color=pl.concat_list("y")),
        "the column 'color' holds values of type List, and held categories in training.",
        "give it as it was in training",
    ),
]


@pytest.mark.parametrize(("frame", "what", "fix"), NEW, ids=[what for _, what, _ in NEW])
def test_what_a_new_table_cannot_bring(frame, what, fix):
    learned = Encoding.learn(mixed(), "y")
    assert error_of(lambda: learned.features(frame, where="data")) == f"{what}\n  where: data\n  fix:   {fix}"


def test_targets_of_a_new_table():
    frame = pl.DataFrame({"x": [0.5, 1.5, 2.5], "y": [1, 2, 1]})
    learned = Encoding.learn(frame, "y")
    assert error_of(lambda: learned.targets(frame.with_columns(y=pl.Series([1, 7, 2])))) == (
        "the target 'y' holds 7 in row 2, which is no class of training.\n  where: train\n"
        "  fix:   mend it or remove the row; the classes are 1, 2"
    )
    assert error_of(lambda: learned.targets(frame.drop("y"))) == (
        "columns of the training table are missing: 'y'.\n  where: train\n  fix:   the table has 'x'"
    )


@pytest.mark.parametrize("module", [columns, encoding, tables])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


def test_row_numbers_in_small_integers():
    from epochal.data.columns import _names_rows

    assert _names_rows(pl.Series("x", range(100), dtype=pl.Int8))
