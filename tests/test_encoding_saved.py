"""The saved form of an encoding: exact, plain JSON, and checked as a stranger's file."""

from __future__ import annotations

import contextlib
import copy
import json
import math

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from epochal.data.encoding import Encoding
from epochal.errors import CheckpointError, TableError

HOUSES = pl.DataFrame(
    {
        "rooms": [3, 4, None, 3, 5, 3, 4, 2],
        "town": ["Ulm", "Bonn", "Ulm", None, "Ulm", "Bonn", "Kiel", "Ulm"],
        "garden": [True, False, True, None, False, True, True, False],
        "sold": [True, False, True, True, False, True, True, False],
        "one": [1] * 8,
        "price": [310.5, 420.0, 250.5, 300.0, 510.5, 305.5, 415.0, 220.5],
    }
)


def test_the_saved_form_is_plain_json():
    frame = pl.DataFrame({"x": [1.0, None, 3.0], "y": ["a", "b", "a"]})
    assert Encoding.learn(frame, "y").to_json() == {
        "format": 1,
        "task": "classification",
        "target_names": ["y"],
        "columns": [
            {"kind": "number", "name": "x", "mean": 2.0, "std": 1.0, "fill": 2.0, "indicator": True, "boolean": False}
        ],
        "classes": ["a", "b"],
        "target_mean": [],
        "target_scale": [],
        "dropped": [],
        "notes": [
            "task: classification, because the target 'y' holds text with 2 different values",
            "filled missing numbers with the median: 'x' (1 rows, 2)",
        ],
    }


values = st.one_of(
    st.lists(st.none() | st.floats(allow_infinity=False), min_size=12, max_size=12),
    st.lists(st.none() | st.integers(-(2**60), 2**60), min_size=12, max_size=12),
    st.lists(st.none() | st.booleans(), min_size=12, max_size=12),
    st.lists(st.none() | st.sampled_from(["a", "b", "other", "missing", "é "]), min_size=12, max_size=12),
)
targets = st.lists(st.sampled_from("ab"), min_size=12, max_size=12) | st.lists(
    st.floats(-9, 9), min_size=12, max_size=12
)


@settings(max_examples=100, deadline=None)
@given(st.lists(values, min_size=1, max_size=4), targets)
def test_what_is_saved_comes_back(table, target):
    frame = pl.DataFrame([pl.Series(str(i), column, strict=False) for i, column in enumerate([*table, target])])
    name = str(len(table))
    try:
        learned = Encoding.learn(frame, name)
    except TableError:
        assume(False)
    again = Encoding.from_json(json.loads(json.dumps(learned.to_json())))
    assert again == learned
    features = again.features(frame)
    assert features.shape == (12, learned.width) and features.dtype == np.float32 and np.isfinite(features).all()
    np.testing.assert_array_equal(features, learned.features(frame))
    np.testing.assert_array_equal(again.targets(frame), learned.targets(frame))
    assert again.unseen(frame) == {} and again.extra(frame) == ()


def test_all_types_of_polars_columns():
    frame = pl.DataFrame(
        {
            "decimal": pl.Series([1, 2, 4] * 9).cast(pl.Decimal(10, 2)),
            "category": pl.Series(["u", "v", "w"] * 9, dtype=pl.Categorical),
            "enum": pl.Series(["u", "v", "v"] * 9, dtype=pl.Enum(["u", "v"])),
            "small": pl.Series([1, 2, 4] * 9, dtype=pl.Int8),
            "single": pl.Series([0.1, 0.2, 0.4] * 9, dtype=pl.Float32),
            "hash": pl.Series([2**63 + 1, 2**63 + 2, 2**64 - 1] * 9, dtype=pl.UInt64),
        }
    )
    for target in frame.columns:
        learned = Encoding.learn(frame, target, task="classification")
        assert learned.width == {"category": 6, "enum": 7}.get(target, 8)
        np.testing.assert_array_equal(learned.targets(frame), [0, 1, 1 if target == "enum" else 2] * 9)
        assert Encoding.from_json(learned.to_json()) == learned


def places(data, path=()):
    """The path to every part of the saved form."""
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


@pytest.mark.parametrize("target", ["price", "town", "sold"])
def test_a_tampered_file_is_refused_or_harmless(target):
    saved = Encoding.learn(HOUSES.drop_nulls(target), target).to_json()
    for path in places(saved):
        for junk in (None, "", "x", -1, 0.0, math.nan, math.inf, 10**400, True, [], [[]], {}, {"name": 1}):
            data = copy.deepcopy(saved)
            parent = data
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = junk
            with contextlib.suppress(CheckpointError):
                learned = Encoding.from_json(data)
                assert learned.to_json() == data and learned.width


SAVED = Encoding.learn(HOUSES, "price").to_json()
UNSOUND = [
    ([], "", "it is a list, not a dictionary"),
    ({**SAVED, "code": "x"}, "", "the key 'code' is unknown"),
    ({key: SAVED[key] for key in SAVED if key != "task"}, "", "'task' is missing or not what it should be"),
    ({**SAVED, "columns": [{}]}, ", columns[0]", "'kind' is missing or not what it should be"),
    ({**SAVED, "target_scale": [0.0]}, "", "'target_scale' is missing or not what it should be"),
    ({**SAVED, "target_scale": [1.0, 1.0]}, "", "the number of its targets and of their scales differ"),
    ({**SAVED, "classes": ["a"]}, "", "its classes do not fit a regression"),
    ({**SAVED, "dropped": ["price"]}, "", "a name stands in it twice"),
]


@pytest.mark.parametrize(("data", "place", "reason"), UNSOUND, ids=[reason for _, _, reason in UNSOUND])
def test_an_unsound_file(data, place, reason):
    with pytest.raises(CheckpointError) as caught:
        Encoding.from_json(data)
    assert str(caught.value) == (
        f"the transformation is not sound: {reason}.\n  where: the saved transformation{place}\n"
        "  fix:   train again, or copy it again"
    )


def test_another_format():
    with pytest.raises(CheckpointError) as caught:
        Encoding.from_json({**SAVED, "format": 2}, where="table.json")
    assert str(caught.value) == (
        "the transformation has format 2, and this epochal reads format 1.\n  where: table.json\n"
        "  fix:   use the version of epochal that wrote it, or a newer one"
    )
