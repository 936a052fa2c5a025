"""The curves of a run as a picture. The only file that imports matplotlib, and only when it draws.

Nothing here touches pyplot or leaves a changed setting behind: figures are built from their classes,
under settings that are put back.
"""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epochal.checkpoint.files import replace_bytes
from epochal.errors import UnknownNameError
from epochal.events import Best, Row
from epochal.report.rows import row_of, scalar, scalar_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and orange stay apart for every kind of colour blindness, and in grey by their lightness.
VAL, TRAIN, BEST, RATE = "#0b5394", "#f2a65a", "#b3261e", "#9a9a9a"
INK, FAINT, LINE, PALE = "#333333", "#666666", "#bbbbbb", "#e6e6e6"
PANEL_WIDTH, PANEL_HEIGHT, PANELS_IN_A_ROW = 4.7, 3.5, 3  # inches
WIDE = 100  # a range of more than this many times is drawn on a log scale
BEHIND: dict[str, Any] = {"linewidth": 1.2, "markersize": 2.4, "zorder": 3}
FEW_ROWS = 25  # up to here every value gets a marker
FEW_CLASSES = 12  # up to here the cells of a confusion matrix are labelled
NOT_CURVES = ("epoch", "step", "time", "lr")
SUFFIXES = (".png", ".svg", ".pdf")

STYLE = {
    "font.size": 8.5,
    "text.color": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.formatter.useoffset": False,
    "grid.color": PALE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.borderaxespad": 0.1,
    "svg.hashsalt": "epochal",  # the same rows give the same file
}


def draw(rows: Sequence[Row], *, best: Best | None = None, title: str | None = None) -> Figure:
    """The curves over the epochs: a panel for the loss, and one for each metric with its train and val side.

    The best epoch is a line through every panel and a dot on the monitored curve; the learning rate has
    an axis of its own on the loss panel. With several rows an epoch the epochs are fractional. A nan
    leaves a gap. Of what is not a number only one confusion matrix, of the best epoch (rows: targets, columns:
    predictions) is drawn. 150 dots an inch.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels, confusion, x = _panels(rows), _confusion(rows, best), _places(rows)
    count = max(1, len(panels) + (confusion is not None))
    across = min(count, PANELS_IN_A_ROW)
    down = math.ceil(count / across)
    with _style():
        size = (PANEL_WIDTH * across, PANEL_HEIGHT * down + (0.35 if title else 0))
        figure = Figure(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1), facecolor="white")
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        cells = [figure.add_subplot(down, across, n + 1) for n in range(count)]
        for axes, (name, curves) in zip(cells, panels.items()):
            _draw_panel(axes, name, curves, rows, x, best)
        if panels:
            _draw_rate(cells[0], _values(rows, "lr"), x)
        if confusion is not None:
            _draw_confusion(cells[-1], *confusion)
        elif not panels:
            cells[0].set_axis_off()
            cells[0].text(0.5, 0.5, "no evaluation yet", ha="center", transform=cells[0].transAxes, color=FAINT)
    # A notebook asks for this; without pyplot nothing else would have told it how to show a figure.
    figure._repr_png_ = functools.partial(_picture, figure, "png")  # pyrefly: ignore
    return figure


def draw_parts(milliseconds: Mapping[str, float], title: str) -> Figure:
    """What the parts of an update take, as bars one below the other."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with _style():
        figure = Figure(figsize=(6.2, 0.32 * len(milliseconds) + 0.9), dpi=150, layout=ConstrainedLayoutEngine())
        axes = figure.add_subplot()
        bars = axes.barh(list(milliseconds), list(milliseconds.values()), color=VAL, height=0.62)
        axes.bar_label(bars, [f"{took:.3f}" for took in milliseconds.values()], padding=4, color=FAINT)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.margins(x=0.12)
        axes.set(title=title, xlabel="milliseconds")
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure as its suffix says: ``.png``, ``.svg`` or ``.pdf``.

    Raises ``UnknownNameError`` (a ``PlanError``) for another suffix, ``FileError`` where the file
    cannot be written.
    """
    replace_bytes(path, _picture(figure, kind_of(path)))


def kind_of(path: str | os.PathLike[str]) -> str:
    """The kind of picture that a path asks for; raises ``UnknownNameError`` for another one than SUFFIXES."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UnknownNameError.of_name("suffix of a picture", suffix, SUFFIXES, where=os.fspath(path))
    return suffix[1:]


def _picture(figure: Figure, kind: str) -> bytes:
    stream = io.BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with _style():
        figure.savefig(stream, format=kind, metadata=undated.get(kind))
    return stream.getvalue()


def _style() -> AbstractContextManager[None]:
    """matplotlib's own defaults and ours over them, whatever the user has set; theirs again afterwards."""
    from matplotlib import style

    return style.context(STYLE, after_reset=True)


def _panels(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The title of each panel and the columns in it, the loss first."""
    panels: dict[str, list[str]] = {}
    for name in scalar_columns(rows):
        if name not in NOT_CURVES:
            panels.setdefault(name.removeprefix("train_").removeprefix("val_"), []).append(name)
    return dict(sorted(panels.items(), key=lambda panel: panel[0] != "loss"))


def _places(rows: Sequence[Row]) -> list[float]:
    """Where each row lies on the x-axis.

    With one row an epoch, at its epoch. With several, at ``step / n``: a step of the epoch in hand e lies
    in ((e-1)·n, e·n], so the number of steps in an epoch n is at least step/e for every row, and equal to
    it as soon as one row lies at an epoch's end.
    """
    epochs = [float(row["epoch"]) for row in rows]
    if len(set(epochs)) == len(epochs):
        return epochs
    n = max(row["step"] / epoch for row, epoch in zip(rows, epochs))
    return [min(max(row["step"] / n, epoch - 1), epoch) for row, epoch in zip(rows, epochs)]


def _values(rows: Sequence[Row], name: str) -> list[float]:
    """A column with nan for all that cannot be drawn: missing, infinite."""
    values = (scalar(row.get(name), math.nan) for row in rows)
    return [value if math.isfinite(value) else math.nan for value in values]


def _marked(values: Sequence[float]) -> list[int]:
    """The indices to mark: all of a few, and those of many that stand alone, which no line would show."""
    known = [False, *map(math.isfinite, values), False]
    few = len(values) <= FEW_ROWS
    return [n for n in range(len(values)) if known[n + 1] and (few or not (known[n] or known[n + 2]))]


def _spans_widely(values: Sequence[float]) -> bool:
    known = [value for value in values if math.isfinite(value)]
    return bool(known) and min(known) > 0 and max(known) > WIDE * min(known)


def _draw_panel(axes: Axes, name: str, curves: list[str], rows, x: list[float], best: Best | None) -> None:
    from matplotlib.ticker import MaxNLocator

    columns = {curve: _values(rows, curve) for curve in curves}
    for curve, values in columns.items():
        side, _, measured = curve.partition("_")
        label = (side if measured == name else curve) + " (all nan)" * (not any(map(math.isfinite, values)))
        front = side != "train" or len(curves) == 1  # the train curve is the paler and finer one, behind
        widths: dict[str, Any] = {"linewidth": 1.9, "markersize": 3.2, "zorder": 4} if front else BEHIND
        color = TRAIN if side == "train" else VAL
        axes.plot(x, values, label=label, color=color, marker="o", markevery=_marked(values), **widths)
    everything = [value for values in columns.values() for value in values]
    if name.endswith(("loss", "mse", "mae", "rmse")) and _spans_widely(everything):
        axes.set_yscale("log")
    if best is not None:
        row = row_of(rows, best)
        _mark_best(axes, curves, row, x[rows.index(row)] if row else best.epoch, best)
    edge = 0.03 * (max(x) - min(x)) or 0.5
    axes.set_xlim(min(x) - edge, max(x) + edge)  # the same epochs on every panel
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.set_title(name, pad=20)
    axes.set_xlabel("epoch")
    _put_legend(axes)


def _mark_best(axes: Axes, curves: list[str], row: Row, x: float, best: Best) -> None:
    """A line at the best epoch; a full dot on the monitored curve, an open one on the others."""
    axes.axvline(x, color=BEST, linewidth=0.8, linestyle=(0, (1, 2)), zorder=2)
    if best.metric in curves:
        fill, y, label = BEST, best.value, f"best {best.value:.4g} at epoch {best.epoch}"
    else:
        fill, y = "white", scalar(row.get(curves[-1]), math.nan)
        label = f"{y:.4g} at the best epoch"
    if math.isfinite(y):
        axes.plot([x], [y], "o", color=BEST, markerfacecolor=fill, markersize=5.5, label=label, zorder=6)


def _draw_rate(axes: Axes, rates: list[float], x: list[float]) -> None:
    """The learning rate over the loss panel: a curve where it changes, a word where it does not."""
    known = {rate for rate in rates if math.isfinite(rate)}
    if len(known) == 1:
        title = f"lr {known.pop():.4g}"
        axes.set_title(title, loc="right", pad=20, color=FAINT, fontsize=8.5, fontweight="normal")
    if len(known) <= 1:
        return
    second = axes.twinx()
    (line,) = second.plot(x, rates, color=RATE, linewidth=1.0, linestyle=(0, (4, 2)), label="lr")
    second.set_ylabel("lr", color=FAINT)
    second.grid(False)
    if _spans_widely(rates):
        second.set_yscale("log")
    else:
        second.set_ylim(bottom=0)
        second.yaxis.set_major_formatter("{x:g}")
    second.set_zorder(axes.get_zorder() - 1)  # the loss stays in front
    axes.patch.set_visible(False)
    _put_legend(axes, [line])


def _put_legend(axes: Axes, more: Sequence[Any] = ()) -> None:
    """One line of names between the title and the curves, where it hides nothing."""
    handles = [*axes.get_legend_handles_labels()[0], *more]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=len(handles))


def _confusion(rows: Sequence[Row], best: Best | None) -> tuple[str, list[list[float]]] | None:
    """The title and the counts of the best epoch's confusion matrix, or the last; that of val where there is one."""
    rows = [row for row in rows if best and row.get("step") == best.step] or rows
    found = [(name, row) for row in rows for name in row if name.endswith("confusion") and isinstance(row[name], list)]
    if not found:
        return None
    name, row = sorted(found, key=lambda one: one[0].startswith("val_"))[-1]
    return f"confusion ({name.partition('_')[0]}, epoch {row['epoch']})", row[name]


def _draw_confusion(axes: Axes, title: str, matrix: list[list[float]]) -> None:
    """Counts as text, the share of each target's row as colour."""
    shares = [[value / (sum(line) or 1) for value in line] for line in matrix]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted", ylabel="target")
    axes.grid(False)
    if len(matrix) > FEW_CLASSES:
        axes.figure.colorbar(image, ax=axes, shrink=0.8, label="share of the target's samples")
        return
    axes.set(xticks=range(len(matrix)), yticks=range(len(matrix)))
    for i, line in enumerate(matrix):
        for j, value in enumerate(line):
            color = "white" if shares[i][j] > 0.55 else INK if value else LINE
            axes.text(j, i, f"{value:g}", ha="center", va="center", fontsize=10 - len(matrix) / 3, color=color)
