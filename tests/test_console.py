from __future__ import annotations

import contextlib
import doctest
import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
import torch

from epochal.errors import PlanError
from epochal.events import Best, Ended, Evaluated, Saved, Started, StepDone, StopReason
from epochal.observe import console as console_module
from epochal.observe import fitting as fitting_module
from epochal.observe.console import Console, fitting, number
from epochal.observe.fitting import overfitting_since
from epochal.protocols import StepResult

FACTS = {"model": "Sequential, 4,810 parameters", "optimizer": "AdamW, lr 0.001"}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Run:
    """The events of a run, given to a console; an evaluation takes ``seconds`` of the console's clock."""

    def __init__(self, stream=None, seconds: float = 0.5, **options):
        self.clock, self.seconds = Clock(), seconds
        self.console = Console(stream, clock=self.clock, **options)
        self.best: Best | None = None
        self.epochs = self.steps = 0

    def start(self, epochs=3, steps=None, config=None, facts=FACTS, monitor="val_loss", **more):
        self.console(Started(facts, config or {}, epochs, steps, monitor, **more))
        return self

    def step(self, loss=0.5, epoch=1, seconds=0.01):
        self.steps += 1
        self.clock.now += seconds
        result = StepResult(torch.tensor(loss), 32)
        self.console(StepDone(self.steps, epoch, 1000 + 32 * self.steps, result))  # a resumed run has seen some
        return self

    def row(self, val_loss, train_loss=None, epoch=None, step=None, **more):
        self.epochs = self.epochs + 1 if epoch is None else epoch
        self.clock.now += self.seconds
        row = {"epoch": self.epochs, "step": step or 32 * self.epochs, "lr": 0.001, "time": self.clock.now - 100}
        row |= {"train_loss": val_loss if train_loss is None else train_loss, "val_loss": val_loss, **more}
        is_best = val_loss < (self.best.value if self.best else math.inf)
        if is_best:
            self.best = Best(row["epoch"], row["step"], "val_loss", val_loss)
        self.console(Evaluated(row, is_best, self.best))
        return self

    def end(self, reason=StopReason.EPOCHS, message=None, restored=True, seconds=1.5):
        message = reason.message if message is None else message
        self.console(Ended(reason, message, self.best, restored, self.epochs, 32 * self.epochs, seconds))
        return self


# -- off a terminal --


@pytest.mark.parametrize("module", [console_module, fitting_module])
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.failed == 0 < result.attempted


def test_the_whole_text_of_a_short_run():
    out = io.StringIO()
    run = Run(out).start()
    run.row(0.9, 1.0, train_accuracy=0.5, val_accuracy=0.45, val_confusion=[[1, 0], [0, 1]])
    run.row(0.25, 0.75, train_accuracy=0.75, val_accuracy=0.7)
    run.row(math.nan, 1e-5, train_accuracy=1.0, val_accuracy=0.7).end()
    assert out.getvalue() == (
        "model      Sequential, 4,810 parameters\n"
        "optimizer  AdamW, lr 0.001\n"
        "\n"
        "epoch 1/3  train_loss 1.0000  val_loss 0.9000  train_accuracy 0.5000  val_accuracy 0.4500"
        "  lr 0.001     dur  0.50s  best\n"
        "epoch 2/3  train_loss 0.7500  val_loss 0.2500  train_accuracy 0.7500  val_accuracy 0.7000"
        "  lr 0.001     dur  0.50s  best\n"
        "epoch 3/3  train_loss 1.000e-05  val_loss    nan  train_accuracy 1.0000  val_accuracy 0.7000"
        "  lr 0.001     dur  0.50s\n"
        "\n"
        "ended    all epochs are done\n"
        "best     epoch 2, val_loss 0.2500\n"
        "weights  those of epoch 2, the best\n"
        "trained  3 epochs, 96 steps in 1.50 s\n"
    )


def test_without_validation_and_without_epochs():
    out = io.StringIO()
    console = Console(out, clock=Clock())
    console(Started({}, {}, None, 50, "train_loss"))
    best = Best(1, 50, "train_loss", 0.5)
    console(Evaluated({"epoch": 1, "step": 50, "lr": 0.1, "time": 0.1, "train_loss": 0.5}, True, best))
    console(Ended(StopReason.MAX_STEPS, StopReason.MAX_STEPS.message, best, False, 1, 50, 3700.4))
    assert out.getvalue() == (
        "epoch 1  train_loss 0.5000  lr 0.1       dur  0.00s  best\n"
        "\n"
        "ended    max_steps is reached\n"
        "best     epoch 1, train_loss 0.5000\n"
        "weights  those of epoch 1, the best\n"
        "trained  1 epoch, 50 steps in 1:01:40\n"
    )


def test_a_run_of_nothing_but_nan_has_no_best():
    run = Run(out := io.StringIO()).start(epochs=None, facts={}).row(math.nan)
    run.end(StopReason.NONFINITE, "the loss at step 32 is nan", restored=False)
    assert out.getvalue() == (
        "epoch 1  train_loss    nan  val_loss    nan  lr 0.001     dur  0.50s\n"
        "\n"
        "ended    the loss at step 32 is nan\n"
        "best     none: the monitored value was never finite\n"
        "trained  1 epoch, 32 steps in 1.50 s\n"
    )


def test_a_run_without_an_evaluation_says_why_it_ended():
    Run(out := io.StringIO()).start(facts={}).end(StopReason.INTERRUPTED, "")
    assert out.getvalue() == "\nended    interrupted\ntrained  0 epochs, 0 steps in 1.50 s\n"


def test_an_interrupted_run_of_a_script_says_how_to_go_on():
    def last_line(reason, **started):
        Run(out := io.StringIO()).start(facts={}, **started).end(reason, "")
        return out.getvalue().splitlines()[-1]

    told = "next     fit(..., run='runs/a', resume=True) goes on from here"
    assert last_line(StopReason.INTERRUPTED, run=Path("runs/a")) == told
    assert last_line(StopReason.INTERRUPTED, run=Path("runs/a"), command=("demo",)).startswith("trained")
    assert last_line(StopReason.INTERRUPTED).startswith("trained")
    assert last_line(StopReason.EPOCHS, run=Path("runs/a")).startswith("trained")


def test_several_evaluations_an_epoch_show_the_step():
    out = io.StringIO()
    run = Run(out).start(epochs=1, config={"evaluate_every": "500 steps"}, facts={})
    run.row(0.5, epoch=1, step=500).row(0.4, epoch=1, step=1000).end()
    assert out.getvalue() == (
        "epoch 1/1  step    500  train_loss 0.5000  val_loss 0.5000  lr 0.001     dur  0.50s  best\n"
        "epoch 1/1  step   1000  train_loss 0.4000  val_loss 0.4000  lr 0.001     dur  0.50s  best\n"
        "\n"
        "ended    all epochs are done\n"
        "best     epoch 1, step 1,000, val_loss 0.4000\n"
        "weights  those of epoch 1, step 1,000, the best\n"
        "trained  1 epoch, 32 steps in 1.50 s\n"
    )


def told(text: str) -> list[int]:
    """The epochs of the printed lines."""
    return [int(epoch) for epoch in re.findall(r"^epoch +(\d+)", text, flags=re.MULTILINE)]


def test_ten_lines_at_once_then_one_in_two_seconds():
    out = io.StringIO()
    run = Run(out, seconds=0.5).start(epochs=100)
    for n in range(100):
        run.row(1 - n / 1000 if n != 70 else 0.1)
    run.end()
    # The last one (100) was due between two lines, and is told at the end; the summary tells of the best (71).
    assert told(out.getvalue()) == [*range(1, 11), *range(14, 100, 4), 100]


def test_withheld_lines_are_not_told_twice():
    out = io.StringIO()
    run = Run(out, seconds=0.5).start(epochs=12)
    for n in range(12):
        run.row(1 - n / 100)  # the last is the best
    run.end()
    assert told(out.getvalue()) == [*range(1, 11), 12]
    run = Run(again := io.StringIO(), seconds=2.0).start(epochs=12)
    for _ in range(12):
        run.row(0.5)
    run.end()
    assert told(again.getvalue()) == list(range(1, 13))


def test_every_tenth_line_and_the_last():
    out = io.StringIO()
    run = Run(out, seconds=5, every=10).start(epochs=25)
    for n in range(1, 26):
        run.row(0.1 if n == 17 else 0.5)
    run.end()
    assert told(out.getvalue()) == [10, 20, 25]


@pytest.mark.parametrize("every", [0, -1, 0.5])
def test_every_must_be_a_count(every):
    with pytest.raises(PlanError) as error:
        Console(every=every)
    assert str(error.value) == (
        f"every must be at least 1, and is {every}.\n  where: Console(every=...)\n"
        "  fix:   give a whole number, for example 10 for every tenth evaluation"
    )


def test_other_events_print_nothing(tmp_path):
    out = io.StringIO()
    run = Run(out).start(facts={})
    for _ in range(1000):
        run.step()
    run.console(Saved(tmp_path, 1000))
    assert out.getvalue() == ""


def test_stderr_is_looked_up_when_writing():
    console = Console(clock=Clock())
    with contextlib.redirect_stderr(io.StringIO()) as out:
        console(Started(FACTS, {}, 1, 1, "val_loss"))
    assert out.getvalue().startswith("model      Sequential")


def test_force_color_colours_a_pipe_and_no_color_wins(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    run = Run(out := io.StringIO()).start().row(0.5).end()
    assert "\x1b[1mmodel    \x1b[0m  Sequential" in out.getvalue() and "\x1b[32mbest\x1b[0m\n" in out.getvalue()
    assert "\x1b[2K" not in out.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    run = Run(out := io.StringIO()).start().row(0.5).end()
    assert "\x1b" not in out.getvalue() and run.epochs == 1


def test_off_a_terminal_rich_is_not_imported():
    code = """
import io, sys
from epochal.events import Best, Ended, Evaluated, Started, StopReason
from epochal.observe.console import Console
console = Console(io.StringIO())
console(Started({"model": "m"}, {}, 1, 1, "train_loss"))
console(Evaluated({"epoch": 1, "step": 1, "lr": 0.1, "time": 0.1, "train_loss": 0.5}, True, None))
console(Ended(StopReason.EPOCHS, "done", None, False, 1, 1, 0.1))
assert not {"rich", "torch"} & set(sys.modules)
"""
    env = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


# -- a stream that breaks --


def whole_run(stream) -> Run:
    run = Run(stream).start()
    for _ in range(3):
        run.step().row(0.5)
    return run.end()


def test_a_closed_stream_does_not_end_the_training():
    out = io.StringIO()
    out.close()
    assert whole_run(out).epochs == 3


def test_a_stream_closed_in_between_does_not_either():
    out = io.StringIO()
    run = Run(out).start().row(0.5)
    out.close()
    assert run.row(0.4).end().epochs == 2


def test_a_broken_pipe_does_not_either():
    reading, writing = os.pipe()
    os.close(reading)
    out = os.fdopen(writing, "w")
    assert whole_run(out).epochs == 3
    with pytest.raises(BrokenPipeError):  # what was left in its buffer
        out.close()


def test_a_full_disk_does_not_either():
    with contextlib.suppress(OSError), open("/dev/full", "w") as out:
        assert whole_run(out).epochs == 3


def test_no_stderr_at_all_is_no_trouble(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert whole_run(None).epochs == 3


def test_letters_that_the_stream_does_not_know_are_replaced():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", newline="\n")
    Run(out).start(facts={"run": "läufe/π"})
    assert raw.getvalue() == b"run  l?ufe/?\n\n"


def test_two_runs_do_not_interfere():
    first, second = io.StringIO(), io.StringIO()
    a, b = Run(first).start(epochs=2), Run(second).start(epochs=3)
    a.row(0.5)
    b.row(0.25, val_accuracy=1.0)
    a.row(0.75).end()
    b.row(0.125, val_accuracy=1.0).end()
    alone = io.StringIO()
    Run(alone).start(epochs=2).row(0.5).row(0.75).end()
    assert first.getvalue() == alone.getvalue()
    assert "val_accuracy" in second.getvalue() and told(second.getvalue()) == [1, 2]


def test_a_console_can_watch_one_run_after_another():
    out = io.StringIO()
    run = Run(out).start(facts={}).row(0.5).end()
    first = out.getvalue()
    out.truncate(out.seek(0))
    run.epochs, run.best = 0, None
    run.start(facts={}).row(0.5).end()
    assert out.getvalue() == first


# -- on a terminal --


class Terminal:
    """A pseudo-terminal of a given width; ``text`` is all that was written to it."""

    def __init__(self, width: int = 90):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        self.stream = os.fdopen(slave, "w")
        self._pieces: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # the other side was closed
            while piece := os.read(self._master, 4096):
                self._pieces.append(piece)

    def text(self) -> str:
        self.stream.close()
        self._reader.join()
        os.close(self._master)
        return b"".join(self._pieces).decode().replace("\r\n", "\n")


def in_colour(text: str) -> str:
    """What is left to see: each line after its last emptying."""
    return "\n".join(line.rpartition("\r\x1b[2K")[2] for line in text.split("\n"))


def screen(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", in_colour(text))


def a_run_on(terminal: Terminal) -> Run:
    run = Run(terminal.stream).start(steps=96)
    for epoch, val_loss in enumerate((0.5, 0.25, 0.75), 1):
        for _ in range(32):
            run.step(epoch=epoch)
        run.row(val_loss, 1 / epoch, epoch=epoch, train_accuracy=epoch / 4, val_accuracy=0.5)
    return run.end()


TABLE = """\
model      Sequential, 4,810 parameters
optimizer  AdamW, lr 0.001

epoch  train_loss   val_loss  train_accuracy  val_accuracy        lr     dur
    1      1.0000     0.5000          0.2500        0.5000     0.001    0.82  *
    2      0.5000     0.2500          0.5000        0.5000     0.001    0.82  *
    3      0.3333     0.7500          0.7500        0.5000     0.001    0.82

ended    all epochs are done
best     epoch 2, val_loss 0.2500
weights  those of epoch 2, the best
trained  3 epochs, 96 steps in 1.50 s
"""


def test_what_is_left_on_the_screen():
    terminal = Terminal()
    a_run_on(terminal)
    assert screen(terminal.text()) == TABLE


def test_the_best_value_of_each_column_is_coloured():
    terminal = Terminal()
    a_run_on(terminal)
    rows = [line for line in in_colour(terminal.text()).split("\n") if re.match(r" +\d  ", line)]
    green = [re.findall(r"\x1b\[32m *([\d.]+)\x1b\[0m", row) for row in rows]
    assert green == [["1.0000", "0.5000", "0.2500", "0.5000"], ["0.5000", "0.2500", "0.5000"], ["0.3333", "0.7500"]]
    assert [row.partition("\x1b[1;32m*\x1b[0m")[1] != "" for row in rows] == [True, True, False]


def test_no_color_leaves_no_colour_and_the_same_text(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    a_run_on(terminal)
    text = terminal.text()
    assert not re.search(r"\x1b\[[0-9;]*m", text)
    assert screen(text) == TABLE


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    a_run_on(terminal)
    text = terminal.text()
    assert "\x1b" not in text and told(text) == [1, 2, 3]


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        (96, "epoch 2/3   step 40/96   0:04 elapsed   0:05 left   loss 0.5000   320 samples/s"),
        (None, "epoch 2/3   step 40   0:04 elapsed   loss 0.5000   320 samples/s"),
    ],
)
def test_the_live_line(monkeypatch, steps, line):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    run = Run(terminal.stream, seconds=0).start(steps=steps, facts={})
    for _ in range(32):
        run.step(seconds=0.1)
    run.row(0.5)
    for _ in range(8):
        run.step(epoch=2, seconds=0.1001)
    lines = terminal.text().split("\r\x1b[2K")
    assert lines[-1] == line
    assert "step 1" in lines[0] and lines[1].startswith("epoch 1/3")


def test_evaluation_does_not_slow_the_samples_per_second(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    run = Run(terminal.stream, seconds=60).start(facts={}).step(seconds=0.25).step(seconds=0.25).row(0.5)
    run.step(epoch=2, seconds=0.25)
    assert terminal.text().endswith("   128 samples/s")


def test_a_narrow_terminal_gets_a_short_live_line_and_few_columns(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal(width=40)
    a_run_on(terminal)
    text = terminal.text()
    pieces = re.split(r"\r\x1b\[2K|\n", text)
    assert max(len(piece) for piece in pieces) <= 40
    assert "epoch 1/3   step 11/96   0:00 elapsed" in pieces
    assert "epoch  train_loss   val_loss     dur" not in pieces and "epoch  train_loss   val_loss" in pieces


def test_ten_thousand_steps_cost_few_writes_and_fewer_looks_at_the_device():
    class Tty(io.StringIO):
        writes = 0

        def isatty(self):
            return True

        def write(self, text):
            self.writes += 1
            return super().write(text)

    class Loss(torch.Tensor):
        looks = 0

        def item(self):
            Loss.looks += 1
            return super().item()

    out = Tty()
    run = Run(out).start(facts={}, steps=10_000)
    result = StepResult(torch.tensor(0.5).as_subclass(Loss), 32)
    for step in range(1, 10_001):
        run.clock.now += 0.001  # ten seconds in all
        run.console(StepDone(step, 1, 32 * step, result))
    assert 80 <= out.writes <= 101
    assert 15 <= Loss.looks <= 21


# -- the columns and the numbers --

NAMES = ["epoch", "step", "train_loss", "val_loss", "train_f1", "val_f1", "val_accuracy", "lr", "dur"]


@pytest.mark.parametrize(
    ("width", "missing"),
    [
        (94, []),
        (93, ["train_f1"]),
        (82, ["train_f1", "lr"]),
        (72, ["train_f1", "lr", "dur"]),
        (64, ["train_f1", "lr", "dur", "val_f1"]),
        (53, ["train_f1", "lr", "dur", "val_f1", "step"]),
        (44, ["train_f1", "lr", "dur", "val_f1", "step", "train_loss"]),
        (32, ["train_f1", "lr", "dur", "val_f1", "step", "train_loss", "val_loss"]),
        (5, ["train_f1", "lr", "dur", "val_f1", "step", "train_loss", "val_loss"]),
    ],
)
def test_columns_leave_a_narrow_table_in_order(width, missing):
    assert fitting(NAMES, width, "val_accuracy") == tuple(name for name in NAMES if name not in missing)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"), (0.12345, "0.1235"), (-0.5, "-0.5000"), (999.0, "999.0000"), (1234.5678, "1234.57"),
        (2e6, "2.000e+06"), (0.001, "0.0010"), (0.00099, "9.900e-04"), (7, "7"), (math.nan, "nan"), (-math.inf, "-inf"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


# -- overfitting --


def losses(val: list[float], train: list[float]) -> list[dict]:
    return [{"epoch": n, "val_loss": v, "train_loss": t} for n, (v, t) in enumerate(zip(val, train), 1)]


@pytest.mark.parametrize(
    ("val", "train", "since"),
    [
        ([3, 2, 1, 2, 3, 4], [6, 5, 4, 3, 2, 1], 4),
        ([3, 2, 1, 2, 3], [6, 5, 4, 3, 2], None),  # only two evaluations
        ([3, 2, 1, 2, 3, 4], [6, 5, 4, 4, 4, 4], None),  # train_loss does not fall
        ([3, 2, 1, 2, 3, 1], [6, 5, 4, 3, 2, 1], None),  # back at the minimum
        ([1, 2, 1, 2, 2, 2], [6, 5, 4, 3, 2, 1], 4),  # the last of equal minima counts
        ([1, 2, math.nan, 2, 2], [5, 4, 3, 2, 1], 2),  # a nan is no evaluation
        ([math.nan], [1], None),
        ([], [], None),
    ],
)
def test_overfitting_since(val, train, since):
    assert overfitting_since(losses(val, train)) == since


def test_without_validation_there_is_no_overfitting_to_see():
    assert overfitting_since([{"epoch": n, "train_loss": 1 / n} for n in range(1, 9)]) is None


def test_the_summary_says_so():
    out = io.StringIO()
    run = Run(out).start(facts={})
    for val, train in zip((0.5, 0.4, 0.5, 0.6, 0.7), (0.5, 0.4, 0.3, 0.2, 0.1)):
        run.row(val, train)
    run.end(StopReason.EARLY_STOPPING, "val_loss has not improved for 3 evaluations", restored=False)
    assert out.getvalue().endswith(
        "\n"
        "ended    val_loss has not improved for 3 evaluations\n"
        "best     epoch 2, val_loss 0.4000\n"
        "weights  those of the last step\n"
        "trained  5 epochs, 160 steps in 1.50 s\n"
        "fit      overfitting since epoch 3: val_loss rose from 0.4 to 0.7 while train_loss fell to 0.1; "
        "train_loss 0.1000, val_loss 0.7000: a gap of 0.6000; the run was stopped, and the last weights are kept\n"
    )


def test_long_facts_are_wrapped_between_words_on_a_terminal_and_the_end_has_no_period(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal(width=80)
    run = Run(terminal.stream).start(facts={})
    for val, train in zip((0.5, 0.4, 0.5, 0.6, 0.7), (0.5, 0.4, 0.3, 0.2, 0.1)):
        run.row(val, train)
    run.end(StopReason.NONFINITE, "the loss is nan.")
    assert screen(terminal.text()).endswith(
        "\n"
        "ended    the loss is nan\n"
        "best     epoch 2, val_loss 0.4000\n"
        "weights  those of epoch 2, the best\n"
        "trained  5 epochs, 160 steps in 1.50 s\n"
        "fit      overfitting since epoch 3: val_loss rose from 0.4 to 0.7 while\n"
        "         train_loss fell to 0.1; train_loss 0.1000, val_loss 0.7000: a gap of\n"
        "         0.6000; the weights of epoch 2 are back\n"
    )
