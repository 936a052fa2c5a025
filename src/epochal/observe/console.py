"""The console: what a person sees of a run while it trains. Progress only, on stderr; results are not its job."""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple, TextIO, final

from epochal.errors import PlanError
from epochal.events import Ended, Evaluated, Event, Found, Noted, Row, Started, StepDone, StopReason
from epochal.observe.fitting import verdict

FIRST_LINES, SECONDS_A_LINE = 10, 2.0  # off a terminal: so many lines as they come, then one in so many seconds
SECONDS_A_REFRESH, SECONDS_A_LOSS = 0.1, 0.5  # of the live line; reading the loss waits for the device
CLEAR = "\r\x1b[2K"  # to the start of the line, and empty it
STRONG, GOOD, FAINT, ODD = "bold", "green", "bright_black", "yellow"
LOWER_IS_BETTER = ("loss", "mse", "mae", "rmse", "error", "perplexity")
HIGHER_IS_BETTER = ("accuracy", "top5", "precision", "recall", "f1", "r2", "auc")
WIDTHS = {"epoch": 5, "step": 7, "lr": 8, "dur": 6}  # of a column in letters; any other has 9, or its name

Paint = Callable[[str, str], str]  # (text, style) -> the text with the style's codes, or as it is


class Line(NamedTuple):
    """What the table says of one evaluation. ``leading``: the columns whose value is the best so far."""

    row: Row
    is_best: bool
    leading: set[str]


@final
class Console:
    """An observer that prints a header, a line for each evaluation, and a summary.

    ``stream``: where to; by default what ``sys.stderr`` is at the time of writing. ``every``: a line for
    every so many evaluations; the last one is told in any case. ``clock``: seconds, of
    which only differences count.

    On a terminal the lines make a table, the best value of each column so far in colour (not with
    ``NO_COLOR``), the best row with a star, and a live line below shows the progress. Elsewhere (a file,
    a pipe, a notebook) they are plain text, as they come for the first ten, then at most one in two
    seconds. A stream that breaks ends the telling, never the training.

    Raises ``PlanError`` where ``every`` is not at least 1.
    """

    def __init__(self, stream: TextIO | None = None, every: int = 1, *, clock: Callable[[], float] = time.monotonic):
        if not isinstance(every, int) or every < 1:
            fix = "give a whole number, for example 10 for every tenth evaluation"
            raise PlanError(f"every must be at least 1, and is {every!r}.", where="Console(every=...)", fix=fix)
        self._given, self._every, self._clock = stream, every, clock
        self._has_begun = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):  # first, for it comes most often
            if self._terminal:
                self._step_done(event)
        elif isinstance(event, Evaluated):
            self._evaluated(event)
        elif isinstance(event, Started):
            self._begin(event)
            if event.facts:
                self._write(aligned(event.facts, self._paint, self._width) + "\n")
        elif isinstance(event, Noted) and self._has_begun:
            self._write(self._paint(f"note: {event.message}", ODD) + "\n", live=self._live)
        elif isinstance(event, Found) and self._has_begun:
            self._found(event.finding)
        elif isinstance(event, Ended) and self._has_begun:  # a loop that was only prepared has nothing to tell
            self._ended(event)

    def _found(self, finding: Any) -> None:
        if finding.level != "info":
            self._write(self._paint(str(finding), ODD) + "\n", live=self._live)
        elif finding.code == "overfitting":  # in a line, when it begins; the summary says the rest
            self._write(self._paint(f"fit: {finding.what} {finding.measured}", ODD) + "\n", live=self._live)

    def _begin(self, started: Started) -> None:
        self._has_begun, self._started = True, started
        self._stream = sys.stderr if self._given is None else self._given
        self._terminal = is_terminal(self._stream)
        self._paint = painter(self._stream, self._terminal)
        self._by_step = "epoch" not in str(started.config.get("evaluate_every", "1 epoch"))
        # What was evaluated and told.
        self._rows: list[Row] = []
        self._leaders: dict[str, float] = {}  # the best value of each column so far
        self._layout: tuple[str, ...] = ()  # the columns of the header printed last
        self._told, self._told_at = 0, -math.inf
        self._withheld: Line | None = None  # the last one, where not told yet
        # The live line and what it counts.
        self._live = self._loss = ""
        self._refreshed_at = self._loss_at = -math.inf
        self._start = self._evaluated_at = self._rated_at = self._clock()
        self._steps = 0  # a resumed run took its earlier ones elsewhere
        self._samples = self._rated = 0  # in all, at the last step and where samples/s began to be counted

    @property
    def _width(self) -> int | None:
        return terminal_width(self._stream) if self._terminal else None

    def _write(self, text: str, live: str = "") -> None:
        """Puts the text where the live line was, and a live line below it, in one write."""
        if self._stream is None:
            return
        text = (CLEAR if self._live else "") + text + live
        if encoding := getattr(self._stream, "encoding", None):  # an old terminal may not know every letter of a path
            text = text.encode(encoding, "replace").decode(encoding)
        self._live = live
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # a broken pipe, a terminal that hung up, a full disk, a closed file
            self._stream = None

    # -- the live line --

    def _step_done(self, event: StepDone) -> None:
        now = self._clock()
        self._steps += 1
        self._samples = event.samples
        if self._steps == 1:  # slower than the others: it warms up, or compiles
            self._rated_at, self._rated = now, event.samples
        if now - self._refreshed_at >= SECONDS_A_REFRESH:
            self._refreshed_at = now
            self._write("", live=self._progress(event, now))

    def _progress(self, event: StepDone, now: float) -> str:
        """The live line, with as much of it as the terminal is wide."""
        if now - self._loss_at >= SECONDS_A_LOSS:
            self._loss, self._loss_at = number(event.result.loss.item()), now
        epochs, steps, elapsed = self._started.epochs, self._started.steps, now - self._start
        parts = [
            f"epoch {event.epoch}" + (f"/{epochs}" if epochs else ""),
            f"step {event.step:,}" + (f"/{steps:,}" if steps else ""),
            f"{stopwatch(elapsed)} elapsed",
        ]
        if steps:
            parts.append(f"{stopwatch(elapsed / self._steps * max(0, steps - event.step))} left")
        parts.append(f"loss {self._loss}")
        if now > self._rated_at:
            parts.append(f"{(event.samples - self._rated) / (now - self._rated_at):,.0f} samples/s")
        width = terminal_width(self._stream) - 1  # a full line would wrap, and could not be emptied
        while len(parts) > 1 and len("   ".join(parts)) > width:
            parts.pop()
        return self._paint("   ".join(parts)[:width], FAINT)

    # -- the lines of the table --

    def _evaluated(self, event: Evaluated) -> None:
        now = self._clock()
        self._rows.append(event.row)
        row = {name: value for name, value in event.row.items() if isinstance(value, Real)}
        row |= {"dur": now - self._evaluated_at}
        # The evaluation itself must not slow the samples/s.
        self._evaluated_at, self._rated_at, self._rated = now, now, self._samples
        line = Line(row, event.is_best, self._new_leaders(row, event.is_best))
        soon = not self._terminal and self._told >= FIRST_LINES and now - self._told_at < SECONDS_A_LINE
        self._withheld = line if len(self._rows) % self._every or soon else None
        if self._withheld is None:
            self._told, self._told_at = self._told + 1, now
            self._write(self._text(line), live=self._live)

    def _new_leaders(self, row: Row, is_best: bool) -> set[str]:
        """The columns whose value is better than all before; what is better is known for the monitored one."""
        monitor = self._started.monitor
        leading = {monitor} if is_best else set()
        for name, value in row.items():
            sign = -1 if name.endswith(LOWER_IS_BETTER) else 1 if name.endswith(HIGHER_IS_BETTER) else 0
            if sign and name != monitor and sign * value > self._leaders.get(name, -math.inf):
                self._leaders[name] = sign * value
                leading.add(name)
        return leading

    def _text(self, line: Line) -> str:
        names, header = self._names(line.row), ""
        if not self._terminal:
            return self._plain(line, names)
        layout = fitting(names, terminal_width(self._stream), self._started.monitor)
        if layout != self._layout:
            self._layout = layout
            header = self._paint("  ".join(name.rjust(width_of(name)) for name in layout), STRONG) + "\n"
        star = "  " + self._paint("*", f"{STRONG} {GOOD}") if line.is_best else ""
        return f"{header}{'  '.join(self._cell(name, line) for name in layout)}{star}\n"

    def _names(self, row: Row) -> list[str]:
        """The columns in their order: when, the losses, each metric of train and val, how."""
        first = ["epoch", *["step"] * self._by_step, "train_loss", "val_loss"]
        metrics = [name for name in row if name not in (*first, "step", "time", "lr", "dur")]
        stems = list(map(stem, metrics))
        metrics.sort(key=lambda name: (stems.index(stem(name)), name.startswith("val_")))
        return [name for name in (*first, *metrics, "lr", "dur") if name in row]

    def _cell(self, name: str, line: Line) -> str:
        text = value_text(name, line.row[name]).rjust(width_of(name)) if name in line.row else " " * width_of(name)
        if name in line.leading:
            return self._paint(text, GOOD)
        return self._paint(text, ODD) if text.endswith(("nan", "inf")) else text

    def _plain(self, line: Line, names: list[str]) -> str:
        epochs = str(self._started.epochs or "")
        parts = [f"epoch {line.row['epoch']:>{len(epochs)}}" + (f"/{epochs}" if epochs else "")]
        for name in names[1:]:
            text = value_text(name, line.row[name]) + "s" * (name == "dur")
            parts.append(f"{name} {text:<8}" if name == "lr" else f"{name} {text:>6}")
        if line.is_best:
            parts.append(self._paint("best", GOOD))
        return "  ".join(parts) + "\n"

    # -- the end --

    def _ended(self, event: Ended) -> None:
        self._has_begun = False
        told = self._text(self._withheld) if self._withheld else ""
        facts, started = summary(event, self._rows, self._by_step), self._started
        if event.reason is StopReason.INTERRUPTED and started.run and not started.command:  # a command says its own
            facts["next"] = f"fit(..., run={str(started.run)!r}, resume=True) goes on from here"
        self._write(f"{told}\n{aligned(facts, self._paint, self._width)}")


def summary(ended: Ended, rows: list[Row], by_step: bool = False) -> dict[str, str]:
    """The lines of the summary, label to text; ``by_step`` where an epoch has several evaluations."""
    lines = {"ended": (ended.message or ended.reason.message).removesuffix(".")}  # an error's is a sentence
    best = ended.best
    if best:
        at = f"epoch {best.epoch}" + (f", step {best.step:,}" if by_step else "")
        lines["best"] = f"{at}, {best.metric} {number(best.value)}"
        kept = ended.restored or best.step == ended.steps
        lines["weights"] = f"those of {at}, the best" if kept else "those of the last step"
    elif rows:
        lines["best"] = "none: the monitored value was never finite"
    took = f"{ended.seconds:.2f} s" if ended.seconds < 60 else stopwatch(ended.seconds)
    lines["trained"] = f"{counted(ended.epochs, 'epoch')}, {counted(ended.steps, 'step')} in {took}"
    if skipped := sum(row.get("skipped", 0) for row in rows):
        lines["trained"] += f"; {counted(skipped, 'update')} left out"
    stopped, restored = ended.reason is StopReason.EARLY_STOPPING, best.epoch if best and ended.restored else None
    if (told := verdict(rows, restored=restored, stopped=stopped)) is not None:
        lines["fit"] = told
    return lines


def as_it_is(text: str, style: str) -> str:
    return text


def aligned(facts: Mapping[str, str], paint: Paint = as_it_is, width: int | None = None) -> str:
    """One line a fact, the texts below one another, wrapped between words where a width (in letters) is given.

    >>> print(aligned({"model": "MLP", "parameters": "4,810 in three layers"}, width=32), end="")
    model       MLP
    parameters  4,810 in three
                layers
    """
    column = max(map(len, facts), default=0) + 2
    lines = []
    for label, text in facts.items():
        if width:
            room = max(20, width - column)
            text = textwrap.fill(text, room, break_long_words=False, break_on_hyphens=False)
        lines.append(paint(label.ljust(column - 2), STRONG) + "  " + text.replace("\n", "\n" + " " * column) + "\n")
    return "".join(lines)


def number(value: Any) -> str:
    """Four decimals, fewer for the large, powers of ten for the very small and very large.

    >>> [number(value) for value in (0.12344, 12, 1234.5678, 0.000123, float("nan"))]
    ['0.1234', '12', '1234.57', '1.230e-04', 'nan']
    """
    if isinstance(value, Integral):
        return str(int(value))
    size = abs(float(value))
    if 1e3 <= size < 1e6:
        return f"{value:.2f}"
    if size != 0 and math.isfinite(size) and not 1e-3 <= size < 1e6:
        return f"{value:.3e}"
    return f"{value:.4f}"


def value_text(name: str, value: Any) -> str:
    if name == "lr":
        return f"{value:.3g}"
    if name == "dur":
        return f"{value:.2f}" if value < 1000 else f"{value:.0f}"
    return number(value)


def stopwatch(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    >>> stopwatch(75), stopwatch(3675)
    ('1:15', '1:01:15')
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" + ("s" if count != 1 else "")


def stem(name: str) -> str:
    """What was measured, without where."""
    return name.removeprefix("train_").removeprefix("val_")


def width_of(name: str) -> int:
    return WIDTHS.get(name, max(9, len(name)))


def fitting(names: Iterable[str], width: int, monitor: str) -> tuple[str, ...]:
    """The columns that fit: train metrics leave first, then the lr, then others from the right."""
    ranks = {"lr": 1, "dur": 2, "train_loss": 4, "val_loss": 5, "epoch": 6, monitor: 6}

    def rank(name: str) -> int:
        return ranks.get(name, 0 if name.startswith("train_") else 3)

    left = list(names)
    leaving = sorted((name for name in reversed(left) if rank(name) < 6), key=rank)
    while leaving and sum(width_of(name) + 2 for name in left) + 1 > width:
        left.remove(leaving.pop(0))
    return tuple(left)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a live line can be drawn there."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # not quite a file, or closed
        return False


def terminal_width(stream: TextIO | None) -> int:
    """In letters; 80 where the terminal does not say."""
    try:
        given = int(os.environ.get("COLUMNS", 0))
        return given or os.get_terminal_size(stream.fileno() if stream else -1).columns or 80
    except (AttributeError, ValueError, OSError):
        return 80


def painter(stream: TextIO | None, terminal: bool) -> Paint:
    """Colours on a terminal or with ``FORCE_COLOR``, where rich finds the stream able; never with ``NO_COLOR``."""
    if os.environ.get("NO_COLOR") or not (terminal or os.environ.get("FORCE_COLOR")):
        return as_it_is
    from rich.console import Console as RichConsole
    from rich.style import Style

    if RichConsole(file=stream).color_system is None:
        return as_it_is
    return lambda text, style: Style.parse(style).render(text)
