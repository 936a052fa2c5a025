"""The saved form of an encoding: exact, plain JSON, and checked as a stranger's file."""

from __future__ import annotations

import contextlib
import copy
import json
import math

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from epochal.data.encoding import Encoding
from epochal.errors import TableError

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


def to_json(encoding: Encoding):
    return json.loads(msgspec.json.encode(encoding))


def from_json(data) -> Encoding:
    return msgspec.json.decode(json.dumps(data), type=Encoding)


def test_the_saved_form_is_plain_json():
    frame = pl.DataFrame({"x": [1.0, None, 3.0], "y": ["a", "b", "a"]})
    assert to_json(Encoding.learn(frame, "y")) == {
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
    again = msgspec.json.decode(msgspec.json.encode(learned), type=Encoding)
    assert again == learned and list(map(type, again.classes)) == list(map(type, learned.classes))
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
        assert from_json(to_json(learned)) == learned


def places(data, path=()):
    """The path to every part of the saved form."""
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


@pytest.mark.parametrize("target", ["price", "town", "sold"])
def test_a_tampered_file_is_refused_or_harmless(target):
    saved = to_json(Encoding.learn(HOUSES.drop_nulls(target), target))
    for path in places(saved):
        for junk in (None, "", "x", -1, 0.0, math.nan, math.inf, 10**400, True, [], [[]], {}, {"name": 1}):
            data = copy.deepcopy(saved)
            parent = data
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = junk
            with contextlib.suppress(msgspec.DecodeError):
                learned = from_json(data)
                assert to_json(learned) == data and learned.width


SAVED = to_json(Encoding.learn(HOUSES, "price"))
CATEGORY = {"kind": "category", "name": "c", "values": ["a", "a"], "grouped": []}
UNSOUND = [
    ([], "Expected `object`, got `array`"),
    ({**SAVED, "code": "x"}, "Object contains unknown field `code`"),
    ({key: SAVED[key] for key in SAVED if key != "task"}, "Object missing required field `task`"),
    ({**SAVED, "columns": [{}]}, "Object missing required field `kind` - at `$.columns[0]`"),
    ({**SAVED, "columns": [{**CATEGORY, "mean": 1}]}, "Object contains unknown field `mean` - at `$.columns[0]`"),
    ({**SAVED, "columns": [{**CATEGORY, "values": []}]}, "Expected `array` of length >= 1 - at `$.columns[0].values`"),
    ({**SAVED, "columns": [CATEGORY]}, "a name stands in it twice"),
    ({**SAVED, "target_scale": [0.0]}, "Expected `float` > 0.0 - at `$.target_scale[0]`"),
    ({**SAVED, "target_mean": [math.nan]}, "JSON is malformed"),
    ({**SAVED, "target_scale": [1.0, 1.0]}, "its targets, scales and classes do not fit a regression"),
    ({**SAVED, "classes": ["a"]}, "its targets, scales and classes do not fit a regression"),
    ({**SAVED, "dropped": ["price"]}, "a name stands in it twice"),
]
CLASSES = {**SAVED, "task": "classification", "target_mean": [], "target_scale": []}
UNSOUND += [
    ({**CLASSES, "classes": classes}, "its targets, scales and classes do not fit a classification")
    for classes in ([], [1], [1, "a"], [2, True])
]
UNSOUND += [({**CLASSES, "classes": [1, 2**128]}, "a class is larger than the numbers of a table can be")]


@pytest.mark.parametrize(("data", "reason"), UNSOUND)
def test_an_unsound_file(data, reason):
    with pytest.raises(msgspec.DecodeError) as caught:
        from_json(data)
    assert reason in str(caught.value)


@pytest.mark.parametrize("start", ["[", '{"columns": [', '{"classes": [', '{"x": ["'])
def test_a_file_without_an_end_is_refused_at_once(start):
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(start + "[" * 1_000_000, type=Encoding)
