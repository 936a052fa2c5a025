"""Reading tables: CSV and Parquet as they come, and what is refused."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from sklearn import datasets

from epochal.data import tables
from epochal.data.tables import is_table, read_table
from epochal.errors import TableError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(content: str | bytes, name: str = "x.csv") -> pl.DataFrame:
    with open(name, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return read_table(name)


def error_of(call) -> str:
    with pytest.raises(TableError) as caught:
        call()
    return str(caught.value)


def real(name: str) -> pl.DataFrame:
    return pl.from_pandas(getattr(datasets, f"load_{name}")(as_frame=True).frame)


@pytest.mark.parametrize("name", ["diabetes", "iris", "wine"])
def test_a_real_table_is_the_same_by_every_way(name):
    frame = real(name)
    frame.write_csv("t.csv")
    frame.write_csv("t.tsv", separator="\t")
    frame.write_parquet("t.parquet")
    with gzip.open("t.csv.gz", "wb") as file:
        frame.write_csv(file)
    arrow, columns = frame.to_arrow(), frame.to_dict(as_series=False)
    ways = ["t.csv", "t.tsv", "t.parquet", "t.csv.gz", frame, frame.lazy(), pd.DataFrame(columns), arrow]
    for way in [*ways, pa.RecordBatch.from_pydict(columns)]:
        assert is_table(way)
        assert_frame_equal(read_table(way), frame)


def test_pandas_gaps_and_categoricals_arrive():
    frame = pd.DataFrame({"a": [1.5, math.nan], "b": ["x", None], "c": pd.Categorical(["u", "v"])}, index=[7, 9])
    assert read_table(frame).rows() == [(1.5, "x", "u"), (None, None, "v")]


def test_what_is_a_table():
    assert is_table("a.CSV") and is_table("a.tsv.gz") and not is_table("a.npz") and not is_table("a.txt")
    for other in ([1], (1, 2), {"a": 1}, np.ones(3), pl.Series([1]), pd.Series([1]), None):
        assert not is_table(other)


def test_dispatch_does_not_import_polars():
    code = "import sys, epochal.plan; from epochal.data import tables; assert tables.is_table('a.csv')"
    code += "; assert 'polars' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("a,b\n1,2\n3,4", [(1, 2), (3, 4)]),
        ("\ufeffa,b\r\n1,2\r\n3,4\r\n", [(1, 2), (3, 4)]),
        ("a,b\r1,2\r3,4\r", [(1, 2), (3, 4)]),
        ("\n\na,b\n1,2\n\n3,4\n\n\n", [(1, 2), (3, 4)]),
        ("a;b\n1;2,5\n", [(1, "2,5")]),
        ("a|b\n1|x\n", [(1, "x")]),
        ("a\tb\n1\tx\n", [(1, "x")]),
        ('a,b\n"x, ""y""\nz",3\n', [('x, "y"\nz', 3)]),
        ('a, b\n "x, y", 3\n', [("x, y", 3)]),
        ('a,b\n5" pipe,3\n6" pipe,4\n', [('5" pipe', 3), ('6" pipe', 4)]),
        ("a,b\n1,x\n2,\n", [(1, "x"), (2, None)]),
        ("a,b\n1,True\n2,false\n,\n", [(1, True), (2, False), (None, None)]),
        ("a,b\n1,1\n1e3,99999999999999999999\n", [(1.0, 1.0), (1000.0, 1e20)]),
        ("a,b\n" + "1,1\n" * 2000 + "1.5,x\n", [(1.0, "1")] * 2000 + [(1.5, "x")]),
    ],
)
def test_csv_as_it_comes(content, rows):
    assert read(content).rows() == rows


@pytest.mark.parametrize("missing", ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?", '""', " NA "])
def test_missing_values(missing):
    assert read(f"a,b\n1,x\n{missing},y\n2,{missing}\n").rows() == [(1, "x"), (None, "y"), (2, None)]


def test_names_of_columns():
    assert read(',"a\nb", c \n1,2,3\n').columns == ["column 1", "a\nb", "c"]


READING = {
    "\na,b\n1,2\n\n4\n": (
        "the row at line 5 has 1 fields, and the header has 2.\n  where: train, x.csv\n"
        "  fix:   give it 2 fields; a separator inside one needs quotes"
    ),
    "a,b,c\n1,2,3\n4,5\n": (
        "the row at line 3 has 2 fields, and the header has 3.\n  where: train, x.csv\n"
        "  fix:   give it 3 fields; a separator inside one needs quotes"
    ),
    'a,b\n"x\ny",2\n4,5,6\n': (
        "the row at line 4 has 3 fields, and the header has 2.\n  where: train, x.csv\n"
        "  fix:   give it 2 fields; a separator inside one needs quotes"
    ),
    "a,b\n1,2,": (
        "the row at line 2 has 3 fields, and the header has 2.\n  where: train, x.csv\n"
        "  fix:   give it 2 fields; a separator inside one needs quotes"
    ),
    'a,b\n1,2\n"5,3\n6,4\n': (
        "the row at line 3 cannot be read: unexpected end of data.\n  where: train, x.csv\n"
        '  fix:   write a quote inside quotes twice ("") and close every quote'
    ),
    " \n": "the file is empty.\n  where: train, x.csv\n  fix:   give a file with a header and at least one row",
    "a,b\n": "the table has columns and no rows.\n  where: train, x.csv\n  fix:   give a table with at least one row",
    "a,b, a\n1,2,3\n": (
        "the header has more than one column of the name 'a'.\n  where: train, x.csv\n"
        "  fix:   give every column a name of its own"
    ),
    b"a,b\n1,caf\xe9\n": (
        "the file is not UTF-8: byte 0xe9 in line 2.\n  where: train, x.csv\n"
        "  fix:   save it as UTF-8 (iconv -f latin1 -t utf-8 OLD > NEW, where it is Latin-1)"
    ),
}


@pytest.mark.parametrize(("content", "text"), READING.items())
def test_what_a_csv_cannot_be(content, text):
    assert error_of(lambda: read(content)) == text


def test_files_that_cannot_be_read(folder):
    (folder / "prices.csv").write_text("a,b\n1,2\n")
    assert error_of(lambda: read_table("pricse.csv", where="val")) == (
        "there is no file 'pricse.csv'.\n  where: val, pricse.csv\n  fix:   did you mean 'prices.csv'?"
    )
    assert error_of(lambda: read_table("gone/x.csv")) == (
        "there is no file 'x.csv'.\n  where: train, gone/x.csv\n"
        "  fix:   there is no folder 'gone' either: check the path"
    )
    assert error_of(lambda: read_table("x.xlsx")) == (
        "'x.xlsx' is not a kind of file that can be read as a table.\n  where: train, x.xlsx\n"
        "  fix:   give a file that ends in .csv, .csv.gz, .tsv, .tsv.gz, .parquet"
    )
    (folder / "dir.csv").mkdir()
    assert error_of(lambda: read_table("dir.csv")) == (
        "the file cannot be read: [Errno 21] Is a directory: 'dir.csv'.\n  where: train, dir.csv\n"
        "  fix:   check that it is a file, whole, and readable by you"
    )
    assert error_of(lambda: read(b"plain", "x.csv.gz")) == (
        "the file cannot be read: Not a gzipped file (b'pl').\n  where: train, x.csv.gz\n"
        "  fix:   check that it is a file, whole, and readable by you"
    )
    fix = "\n  where: train, x.parquet\n  fix:   write it again as Parquet, or rename it after what it is"
    for content in (b"a,b\n1,2\n", b"PAR1 and only a part of it", b"PAR1 but nothing of it PAR1"):
        unsound = error_of(lambda content=content: read(content, "x.parquet"))
        assert unsound.startswith("the file is not sound Parquet: ") and unsound.endswith("." + fix)


def test_objects_that_are_no_tables():
    assert error_of(lambda: read_table([1, 2])) == (
        "a builtins.list is not a table.\n  where: train\n  fix:   give a path or a polars, pandas or arrow table"
    )
    twice = pd.DataFrame([[1, 2]], columns=["a", "a"])
    assert error_of(lambda: read_table(twice)) == (
        "the pandas.DataFrame cannot be read as a table: Pandas dataframe contains non-unique indices and/or column"
        " names. Polars dataframes require unique string names for columns.\n  where: train\n"
        "  fix:   give every column one type and a name of its own"
    )
    assert error_of(lambda: read_table(pl.DataFrame())) == (
        "the table has no columns.\n  where: train\n  fix:   give a table with at least one row"
    )


cells = st.text(st.sampled_from("ab019.-,;|\"\n\t é'"), max_size=6) | st.sampled_from(
    ["NA", "true", "False", "1", "2.5"]
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6),
    st.sampled_from(",;\t|"),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["", "\ufeff"]),
)
def test_a_csv_is_read_as_it_was_written(rows, separator, end, quoting, mark):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerows([["one", "the, second", "three"], *rows])
    frame = read(mark + text.getvalue())
    for column, values in zip(frame, zip(*rows)):
        stripped = [None if value.strip() in tables.MISSING else value.strip() for value in values]
        assert [None if a is None else as_read(b, a) for a, b in zip(column, stripped)] == column.to_list()
        assert [a is None for a in column] == [b is None for b in stripped]


def as_read(written: str, value):
    return written.lower() == "true" if isinstance(value, bool) else type(value)(written)


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from('ab1,;\t|\n"\r.\x00é'), max_size=40).map(str.encode) | st.binary(max_size=20))
def test_any_bytes_are_a_table_or_a_clear_error(content):
    with contextlib.suppress(TableError):
        assert read(content).height > 0
