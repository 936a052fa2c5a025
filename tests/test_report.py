from __future__ import annotations

import copy
import doctest
import math
import pickle
import struct
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epochal.errors import FileError, PlanError, TableError, UnknownNameError
from epochal.events import Best
from epochal.report import history as history_module
from epochal.report import rows as rows_module
from epochal.report.history import History
from epochal.report.plots import draw, save


def rows_of(epochs: int, **changed) -> list[dict]:
    """Losses that fall, an accuracy that rises, val_loss least at epoch 4; ``changed``: functions of the epoch."""
    shapes = {
        "epoch": lambda e: e,
        "step": lambda e: 32 * e,
        "lr": lambda e: 0.001,
        "time": lambda e: 0.5 * e,
        "train_loss": lambda e: 1 / e,
        "train_accuracy": lambda e: 1 - 0.5 / e,
        "val_loss": lambda e: 0.25 + 0.01 * (e - 4) ** 2,
        "val_accuracy": lambda e: 0.9 - 0.5 / e,
    } | changed
    return [{name: shape(epoch) for name, shape in shapes.items()} for epoch in range(1, epochs + 1)]


BEST = Best(epoch=4, step=128, metric="val_loss", value=0.25)


# -- History: rows and columns --


@pytest.mark.parametrize("module", [history_module, rows_module])
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.failed == 0 < result.attempted


def test_a_history_is_a_sequence_of_rows():
    rows = rows_of(3)
    history = History(rows)
    assert len(history) == 3
    assert list(history) == history.rows == rows
    assert history[-1] == rows[-1] and history[1:] == rows[1:]
    assert rows[0] in history
    assert history.columns == tuple(rows[0])


def test_a_history_keeps_its_own_rows():
    rows = rows_of(2)
    history = History(rows)
    rows[0]["val_loss"] = -1.0
    rows.clear()
    assert history.val_loss == [row["val_loss"] for row in rows_of(2)]


def test_a_column_by_attribute_and_by_name():
    history = History(rows_of(3))
    assert history.train_loss == history["train_loss"] == [1.0, 0.5, 1 / 3]
    assert history.epoch == [1, 2, 3]
    assert "val_accuracy" in dir(history)


def test_a_missing_value_is_nan():
    history = History([{"epoch": 1}, {"epoch": 2, "f1": 0.5, "val_loss": None}])
    assert math.isnan(history.f1[0]) and history.f1[1] == 0.5
    assert all(map(math.isnan, history.val_loss))


def test_both_losses_may_always_be_asked_for():
    assert History([]).train_loss == History([]).val_loss == []
    assert math.isnan(History([{"epoch": 1, "train_loss": 0.5}]).val_loss[0])


UNKNOWN = """\
'val_acuracy' is not a known column of the history.
  fix:   did you mean 'val_accuracy'? known: epoch, lr, step, time, \
train_accuracy, train_loss, val_accuracy, val_loss"""


def test_an_unknown_column_is_told_with_the_nearest():
    history = History(rows_of(1))
    with pytest.raises(UnknownNameError) as item:
        history["val_acuracy"]
    assert str(item.value) == UNKNOWN
    with pytest.raises(AttributeError) as attribute:
        history.val_acuracy
    assert str(attribute.value) == UNKNOWN
    assert not hasattr(history, "f1")


def test_an_unknown_mode_is_told():
    with pytest.raises(UnknownNameError) as error:
        History([], mode="mim")
    assert str(error.value) == (
        "'mim' is not a known mode.\n  where: History(mode=...)\n  fix:   did you mean 'min'? known: max, min"
    )


def test_a_history_can_be_copied_and_pickled():
    history = History(rows_of(3), best=BEST)
    for other in (copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
        assert other.rows == history.rows and other.best == BEST


# -- History: the best --


def test_the_best_is_the_one_the_run_gives():
    assert History(rows_of(8), best=BEST).best == BEST


def test_the_best_is_found_by_monitor_and_mode():
    rows = rows_of(8)
    assert History(rows, monitor="val_loss").best == BEST
    assert History(rows, monitor="val_accuracy", mode="max").best == Best(8, 256, "val_accuracy", 0.9 - 0.5 / 8)
    assert History(rows).best is None


def test_a_nan_is_never_best_and_the_first_of_equals_is():
    values = {1: math.nan, 2: 0.5, 3: 0.5, 4: math.inf}
    rows = rows_of(4, val_loss=values.get)
    assert History(rows, monitor="val_loss").best == Best(2, 64, "val_loss", 0.5)
    assert History(rows_of(2, val_loss=lambda e: math.nan), monitor="val_loss").best is None


def test_repr():
    assert repr(History([])) == "History: no rows"
    assert repr(History(rows_of(1))) == (
        "History: 1 row, epoch 1\n  last  epoch 1  train_loss 1  train_accuracy 0.5  val_loss 0.34  val_accuracy 0.4"
    )
    assert repr(History(rows_of(6, val_confusion=lambda e: [[1, 0], [0, 1]]), best=BEST)) == (
        "History: 6 rows, epochs 1 to 6\n"
        "  last  epoch 6  train_loss 0.1667  train_accuracy 0.9167  val_loss 0.29  val_accuracy 0.8167\n"
        "  best  epoch 4  val_loss 0.25  train_loss 0.25  train_accuracy 0.875  val_accuracy 0.775"
    )


# -- History: tables --


def test_to_polars():
    frame = History([{"epoch": 1, "val_loss": 1}, {"epoch": 2, "val_loss": 0.5, "c": [[1, 2], [3, 4]]}]).to_polars()
    assert frame.to_dict(as_series=False) == {"epoch": [1, 2], "val_loss": [1.0, 0.5], "c": [None, [[1, 2], [3, 4]]]}
    assert History([]).to_polars().shape == (0, 0)


def test_the_csv_is_plain(tmp_path):
    path = tmp_path / "results.csv"
    rows = [
        {"epoch": 1, "lr": 1e-05, "train_loss": 0.1 + 0.2, "val_confusion": [[1]], "note": "warm"},
        {"epoch": 2, "lr": 1e-05, "train_loss": math.nan, "val_loss": math.inf},
    ]
    History(rows).to_csv(path)
    assert path.read_text() == "epoch,lr,train_loss,val_loss\n1,1e-05,0.30000000000000004,\n2,1e-05,nan,inf\n"
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(), st.integers()), max_size=5))
def test_csv_and_back_is_exact(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("csv") / "results.csv"
    rows = [{"epoch": n, "loss, in °C": number} for number, n in pairs]
    History(rows).to_csv(path)
    back = History.from_csv(path)
    assert [row["epoch"] for row in back] == [row["epoch"] for row in rows]
    for before, after in zip(rows, back):
        a, b = before["loss, in °C"], after["loss, in °C"]
        assert (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)


def test_a_csv_may_be_monitored(tmp_path):
    path = tmp_path / "results.csv"
    History(rows_of(6)).to_csv(path)
    assert History(History.from_csv(path), monitor="val_loss").best == BEST
    assert History.from_csv(path).rows == rows_of(6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "epoch,val_loss\n1,0.5\n2\n",
            "the line is not one of numbers, one a column.\n  where: {}, line 3\n  fix:   mend or remove the line",
        ),
        (
            "epoch,val_loss\n1,low\n",
            "the line is not one of numbers, one a column.\n  where: {}, line 2\n  fix:   mend or remove the line",
        ),
        (
            None,
            "the history cannot be read: No such file or directory.\n  where: {}\n"
            "  fix:   name a results.csv that epochal has written",
        ),
    ],
)
def test_a_csv_that_is_none_is_told(tmp_path, text, message):
    path = tmp_path / "results.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TableError) as error:
        History.from_csv(path)
    assert str(error.value) == message.format(path)


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "results.csv").mkdir()
    with pytest.raises(FileError) as error:
        History(rows_of(1)).to_csv(tmp_path / "results.csv")
    assert str(error.value) == (
        f"results.csv cannot be written: Is a directory.\n  where: {tmp_path / 'results.csv'}\n"
        "  fix:   free some space, or choose another place"
    )
    assert len(list(tmp_path.iterdir())) == 1


# -- the picture --


def panels(figure) -> dict:
    """The panels by title, without the axis of the learning rate."""
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def curve(axes, label):
    return next(line for line in axes.lines if line.get_label() == label)


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_train_and_val_share_a_panel():
    figure = draw(rows_of(8), best=BEST, title="digits")
    assert list(panels(figure)) == ["loss", "accuracy"]
    assert figure.get_suptitle() == "digits" and figure.dpi == 150
    for name, axes in panels(figure).items():
        assert axes.get_xlabel() == "epoch"
        for side in ("train", "val"):
            line = curve(axes, side)
            assert list(line.get_xdata()) == list(range(1, 9))
            assert list(line.get_ydata()) == [row[f"{side}_{name}"] for row in rows_of(8)]
        assert curve(axes, "train").get_linewidth() < curve(axes, "val").get_linewidth()


def test_the_best_epoch_is_on_every_panel():
    loss, accuracy = panels(draw(rows_of(8), best=BEST)).values()
    assert legend(loss) == ["train", "val", "best 0.25 at epoch 4"]
    assert legend(accuracy) == ["train", "val", "0.775 at the best epoch"]
    assert curve(loss, "best 0.25 at epoch 4").get_xydata().tolist() == [[4, 0.25]]
    assert curve(accuracy, "0.775 at the best epoch").get_xydata().tolist() == [[4, 0.775]]
    for axes in (loss, accuracy):
        assert [list(line.get_xdata()) for line in axes.lines if line.get_label().startswith("_")] == [[4, 4]]


def test_a_best_that_the_rows_do_not_hold_is_marked_at_its_epoch():
    loss, accuracy = panels(draw(rows_of(8), best=Best(3, 70, "val_loss", 0.2))).values()
    assert curve(loss, "best 0.2 at epoch 3").get_xydata().tolist() == [[3, 0.2]]
    assert legend(accuracy) == ["train", "val"]


def test_without_a_best_nothing_is_marked():
    loss, accuracy = panels(draw(rows_of(8))).values()
    assert len(loss.lines) == len(accuracy.lines) == 2


def test_without_val_there_is_one_curve():
    rows = [{name: row[name] for name in row if not name.startswith("val_")} for row in rows_of(4)]
    loss, accuracy = panels(draw(rows, best=Best(4, 128, "train_loss", 0.25))).values()
    assert legend(loss) == ["train", "best 0.25 at epoch 4"] and legend(accuracy) == [
        "train",
        "0.875 at the best epoch",
    ]


def test_each_metric_has_a_panel_and_three_make_a_row():
    rows = rows_of(3, train_d_loss=lambda e: 0.7, train_g_loss=lambda e: 0.8, val_f1=lambda e: 0.5, grad_norm=float)
    figure = draw(rows)
    assert list(panels(figure)) == ["loss", "accuracy", "d_loss", "g_loss", "f1", "grad_norm"]
    places = [axes.get_subplotspec() for axes in panels(figure).values()]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2),
    ]  # fmt: skip
    assert legend(panels(figure)["f1"]) == ["val"] and legend(panels(figure)["grad_norm"]) == ["grad_norm"]


def test_a_constant_rate_is_said_and_not_drawn():
    figure = draw(rows_of(8))
    assert len(figure.axes) == 2
    assert panels(figure)["loss"].get_title(loc="right") == "lr 0.001"


@pytest.mark.parametrize(
    ("rate", "scale"), [(lambda e: 0.001 / e, "linear"), (lambda e: 10.0**-e, "log"), (lambda e: 8.0 - e, "linear")]
)
def test_a_changing_rate_has_an_axis_of_its_own(rate, scale):
    figure = draw(rows_of(8, lr=rate))
    *_, second = figure.axes
    assert second.get_ylabel() == "lr" and second.get_yscale() == scale
    assert list(second.lines[0].get_ydata()) == [rate(e) for e in range(1, 9)]
    assert legend(panels(figure)["loss"])[-1] == "lr"


def test_losses_of_a_wide_range_are_on_a_log_scale():
    assert panels(draw(rows_of(8)))["loss"].get_yscale() == "linear"
    wide = panels(draw(rows_of(8, train_loss=lambda e: 10.0**-e, train_accuracy=lambda e: 10.0**-e)))
    assert wide["loss"].get_yscale() == "log" and wide["accuracy"].get_yscale() == "linear"
    assert panels(draw(rows_of(8, train_loss=lambda e: 5.0 - e)))["loss"].get_yscale() == "linear"


def test_one_row_is_visible():
    for axes in panels(draw(rows_of(1))).values():
        assert curve(axes, "val").get_marker() == "o" and curve(axes, "val").get_markevery() == [0]
        assert axes.get_xlim()[0] < 1 < axes.get_xlim()[1]


def test_a_nan_leaves_a_gap_and_a_lone_value_is_marked():
    holes = {6, 8, 30}
    rows = rows_of(40, val_loss=lambda e: math.nan if e in holes else math.inf if e == 20 else 0.5)
    line = curve(panels(draw(rows))["loss"], "val")
    assert [e for e, value in zip(line.get_xdata(), line.get_ydata()) if math.isnan(value)] == [6, 8, 20, 30]
    assert line.get_markevery() == [6]  # epoch 7, between two gaps


def test_a_curve_of_nothing_but_nan_is_named_so():
    assert legend(panels(draw(rows_of(3, val_loss=lambda e: math.nan)))["loss"]) == ["train", "val (all nan)"]


def test_several_rows_an_epoch_lie_between_the_epochs():
    rows = [{"epoch": math.ceil(k / 4), "step": 10 * k, "train_loss": 1 / k} for k in range(1, 9)]
    figure = draw(rows, best=Best(2, 70, "train_loss", 1 / 7))
    (loss,) = panels(figure).values()
    assert list(curve(loss, "train").get_xdata()) == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    assert curve(loss, "best 0.1429 at epoch 2").get_xydata().tolist() == [[1.75, 1 / 7]]


def test_rows_may_begin_at_a_later_epoch():
    rows = rows_of(12)[9:]
    assert list(curve(panels(draw(rows))["loss"], "val").get_xdata()) == [10, 11, 12]


def test_the_last_confusion_matrix_is_drawn():
    figure = draw(rows_of(3, val_confusion=lambda e: [[30 + e, 2], [1, 40]], logits=lambda e: [1.0, 2.0]))
    *_, axes = figure.axes
    assert axes.get_title(loc="left") == "confusion (val, epoch 3)"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "target")
    assert [text.get_text() for text in axes.texts] == ["33", "2", "1", "40"]
    assert axes.images[0].get_array().tolist() == [[33 / 35, 2 / 35], [1 / 41, 40 / 41]]
    assert len(panels(figure)) == 3


def test_many_classes_are_not_labelled_and_an_empty_class_is_no_trouble():
    matrix = [[0] * 13 for _ in range(13)]
    *_, axes, bar = draw(rows_of(1, val_confusion=lambda e: matrix)).axes
    assert len(axes.texts) == 0 and bar.get_ylabel() == "share of the target's samples"


def test_no_rows_are_no_trouble():
    (axes,) = draw([]).axes
    assert [text.get_text() for text in axes.texts] == ["no evaluation yet"]


# -- the file --


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG\r\n"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_a_picture_is_written_by_its_suffix(tmp_path, suffix, magic):
    path = tmp_path / f"results{suffix}"
    History(rows_of(8), best=BEST).plot(path)
    assert path.read_bytes().startswith(magic) and path.stat().st_size > 8_000
    first = path.read_bytes()
    save(draw(rows_of(8), best=BEST), path)
    assert path.read_bytes() == first  # the same rows, the same file


def test_the_picture_shows_the_curves(tmp_path):
    from matplotlib.image import imread

    save(draw(rows_of(8), best=BEST), tmp_path / "results.png")
    pixels = imread(tmp_path / "results.png")
    height, width, _ = pixels.shape
    assert (width, height) == (1410, 525)
    for color in ("#f2a65a", "#0b5394", "#b3261e"):  # train, val, best
        wanted = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        assert (abs(pixels[:, :, :3] - wanted).max(axis=2) < 0.02).sum() > 30


def test_an_unknown_suffix_is_told_with_the_known_ones(tmp_path):
    with pytest.raises(PlanError) as error:
        History(rows_of(1)).plot(tmp_path / "results.pgn")
    assert str(error.value) == (
        f"'.pgn' is not a known suffix of a picture.\n  where: {tmp_path / 'results.pgn'}\n"
        "  fix:   did you mean '.png'? known: .pdf, .png, .svg"
    )


def test_a_folder_that_is_not_there_is_told(tmp_path):
    path = tmp_path / "nowhere" / "results.png"
    with pytest.raises(FileError) as error:
        save(draw(rows_of(1)), path)
    assert str(error.value) == (
        f"results.png cannot be written: its folder does not exist.\n  where: {path}\n  fix:   make the folder first"
    )


def test_a_notebook_can_show_the_figure_itself():
    figure = History(rows_of(2)).plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(b"\x89PNG")


def test_drawing_leaves_no_setting_behind_and_takes_none_over(tmp_path):
    import matplotlib as mpl

    with mpl.rc_context({"lines.linewidth": 7.0, "axes.facecolor": "black"}):
        before = dict(mpl.rcParams)
        figure = History(rows_of(2)).plot(tmp_path / "results.png")
        assert dict(mpl.rcParams) == before
    assert panels(figure)["loss"].get_facecolor()[:3] == (1, 1, 1)


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = """
import sys
from epochal.report.history import History
import epochal.report.plots
assert not {"torch", "matplotlib", "polars"} & set(sys.modules)
History([{"epoch": 1, "train_loss": 0.5}]).plot()
assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
