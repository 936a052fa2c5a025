"""What would make a plan train faster on this machine, measured on its own model and data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from epochal.copies import untouched
from epochal.runtime.seeding import generator_states, set_generator_states
from epochal.speed.trial import Trial, check, tried

if TYPE_CHECKING:
    from epochal.plan import Plan

WORTH = 0.95  # of the time before: what saves less is not suggested
AGAIN = 2  # times that what is suggested is measured, beside the first
EXACT = "the same numbers but for the order in which they are added (the last bits)"
TF32 = "factors are rounded to 3 digits before they are multiplied (TF32): look whether the metric is as good as before"
BF16 = "products are rounded to 3 digits (bf16): look whether the metric is as good as before"


@dataclass(frozen=True)
class Setting:
    """What is tried: options of the plan, the threads of the host, whether images lie with their channels last, and
    whether a CUDA device multiplies in TF32.
    """

    options: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    channels_last: bool = False
    tf32: bool = False

    @property
    def name(self) -> str:
        parts = [f"{self.threads} thread{'s' if self.threads != 1 else ''}"] if self.threads else []
        parts += ["channels last"] if self.channels_last else []
        parts += ["tf32"] if self.tf32 else []
        parts += [name if value is True else f"{name} {value}" for name, value in self.options.items()]
        return ", ".join(parts) or "as planned"

    @property
    def price(self) -> str:
        price = BF16 if self.options.get("precision") == "bf16" else TF32 if self.tf32 else EXACT
        return f"{price}; dropout draws other masks" if "compile" in self.options else price

    def also(self, other: Setting) -> Setting:
        """Both together; where they say something of the same, the other one counts."""
        return Setting(
            {**self.options, **other.options}, other.threads or self.threads,
            self.channels_last or other.channels_last, self.tf32 or other.tf32,
        )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A setting, what came of it (None: it cannot be, and ``why`` says why), and the seconds that the whole run would
    take with it, None where the number of its updates is not known.
    """

    setting: Setting
    trial: Trial | None
    projected: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Tuning:
    """rows: all that was tried, the plan as it is first. best: the row that is suggested; the first one, if nothing is
    worth it. factors: how many times as fast an update is with it, measured several times, from the least to the most.
    """

    rows: list[Row]
    best: Row
    factors: tuple[float, ...] = (1.0,)

    @property
    def factor(self) -> float:
        """The middle one of ``factors``."""
        return self.factors[len(self.factors) // 2]

    def code(self) -> list[str]:
        """The suggestion as lines of Python."""
        setting = self.best.setting
        lines = [f"torch.set_num_threads({setting.threads})"] if setting.threads else []
        if setting.tf32:
            lines.append('torch.set_float32_matmul_precision("high")')
        if setting.channels_last:
            lines.append("model.to(memory_format=torch.channels_last)")
        if setting.options:
            given = ", ".join(f"{name}={value!r}" for name, value in setting.options.items())
            lines.append(f"epochal.fit(..., {given})")
        return lines

    def __str__(self) -> str:
        head = f"{'':40}{'ms a step':>10}{'samples/s':>11}{'peak MB':>9}{'start s':>9}{'whole run':>11}{'loss':>10}"
        lines = [head, *map(_line, self.rows), ""]
        if self.best is self.rows[0]:
            return "\n".join([*lines, "nothing that was tried is worth it: leave it as planned"])
        spread = f"({self.factors[0]:.2f} to {self.factors[-1]:.2f}, measured {len(self.factors)} times)"
        lines.append(f"suggested: {self.best.setting.name}, {self.factor:.2f} times as fast {spread}")
        lines.append(f"its price: {self.best.setting.price}")
        return "\n".join([*lines, *(f"    {line}" for line in self.code())])


def _line(row: Row) -> str:
    if (trial := row.trial) is None:
        return f"{row.setting.name[:39]:40}{'cannot be: ' + row.why:.78}"
    whole = _duration(row.projected)
    return (
        f"{row.setting.name[:39]:40}{trial.milliseconds:10.3f}{trial.samples_a_second:11.0f}{trial.megabytes:9.0f}"
        f"{trial.start:9.1f}{whole:>11}{trial.loss:10.4g}"
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return (
        f"{seconds:.1f} s"
        if seconds < 100
        else f"{seconds / 60:.1f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def tune_speed(plan: Plan, *, seconds: float = 1.0, tell: Callable[[Setting], Any] | None = None) -> Tuning:
    """Measures what would make ``plan`` train faster on this machine: threads, memory layout, precision, compiling,
    workers. Nothing of it is changed; it decides nothing, and what it suggests costs what ``Tuning.best`` says.

    Each setting trains a copy of the model on the plan's own data. What saves at least 5 % is kept while the next
    thing is tried; layout and precision that saved less are tried once more with all of it; and what is suggested in
    the end is measured again, in turns with the plan as it is. seconds: of training for each, after a few updates that
    do not count. tell: called with each setting before it is measured.

    Raises what training the plan raises, and PlanError for a plan with a step of its own.

    >>> import epochal
    >>> X = torch.randn(64, 3)
    >>> plan = epochal.Plan(nn.Linear(3, 1), (X, X[:, :1]), loss="mse", epochs=1, compile=True)
    >>> tune_speed(plan, seconds=0.01).rows[0].setting.name
    'as planned'
    """
    check(plan, seconds)

    def measure(setting: Setting) -> Row:
        if tell is not None:
            tell(setting)
        return _measured(plan, setting, seconds)

    with untouched(plan):
        with _alike():
            tried(plan, seconds=0.0)  # raises what is wrong; and what is imported and allocated once, is so now
        rows = [measure(Setting())]
        best = rows[0]
        for candidates in _dimensions(plan):
            found = [measure(best.setting.also(candidate)) for candidate in candidates]
            rows += found
            fastest = min(found, key=_cost, default=best)
            if _is_worth_it(fastest, best):
                best = fastest
        for left_out in _left_out(rows) if best is not rows[0] else ():
            setting = left_out.also(best.setting)
            if all(row.setting != setting for row in rows):
                rows.append(measure(setting))
                best = rows[-1] if _is_worth_it(rows[-1], best) else best
        if best is rows[0]:
            return Tuning(rows, best)
        # A machine has slow moments, and each was measured in its own.
        pairs = [(rows[0], best), *((measure(rows[0].setting), measure(best.setting)) for _ in range(AGAIN))]
    trials = [(before.trial, after.trial) for before, after in pairs]
    factors = sorted(one.milliseconds / other.milliseconds for one, other in trials if one and other)
    tuning = Tuning(rows, best, tuple(factors))
    return tuning if tuning.factor * WORTH > 1 else Tuning(rows, rows[0])


def _is_worth_it(row: Row, best: Row) -> bool:
    """Of the whole run and of an update: in a short run the start alone may differ by chance."""
    if row.trial is None or best.trial is None or _cost(row) >= WORTH * _cost(best):
        return False
    return row.trial.milliseconds < WORTH * best.trial.milliseconds


def _left_out(rows: Sequence[Row]) -> Iterator[Setting]:
    """What may save more of a faster update, of which less is overhead, where it has saved a little by itself."""
    for one in (Setting(channels_last=True), Setting({"precision": "bf16"})):
        known = next((row for row in rows if one.also(row.setting) == row.setting), None)
        if known is not None and _cost(known) < _cost(rows[0]):
            yield one


def _cost(row: Row) -> float:
    """The seconds of the whole run, or of an update where that is not known."""
    if row.trial is None:
        return math.inf
    return row.projected if row.projected is not None else row.trial.milliseconds


@contextmanager
def _alike() -> Iterator[None]:
    """Each trial begins alike, and as the program does."""
    threads, states, precision = torch.get_num_threads(), generator_states(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        set_generator_states(states)


def _measured(plan: Plan, setting: Setting, seconds: float) -> Row:
    try:
        with _alike():
            if setting.tf32:
                torch.set_float32_matmul_precision("high")
            if setting.threads is not None:
                torch.set_num_threads(setting.threads)
            options = {"channels_last": setting.channels_last, **setting.options}
            trial = tried(plan, seconds=seconds, warm_up=5, **options)
    except Exception as error:
        return Row(setting, None, why=next(iter(str(error).splitlines()), type(error).__name__))
    if why := next((note for note in trial.notes if "the model is not compiled" in note), None):
        return Row(setting, None, why=why.removeprefix("compile: "))
    if trial.planned is None:
        return Row(setting, trial)
    return Row(setting, trial, trial.start + trial.planned * trial.milliseconds / 1000)


def _dimensions(plan: Plan) -> Iterator[list[Setting]]:
    """What there is to choose, one thing after the other; what is chosen in one holds in the next."""
    on_host = torch.device("cpu") == _device(plan)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if on_host:
        counts = {2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores}
        yield [Setting(threads=count) for count in sorted(counts - {torch.get_num_threads()})]
    if _has_images(plan.model):
        yield [Setting(channels_last=True)]
    if not on_host and plan.precision == "fp32":
        yield [Setting(tf32=True)]
    if plan.precision == "fp32":
        yield [Setting({"precision": "bf16"})]
    if not plan.compile:
        yield [Setting({"compile": True}), *([Setting({"compile": "graph"})] if not on_host else [])]
    if isinstance(plan.train, Dataset) and type(plan.train) is not TensorDataset:
        yield [Setting({"workers": count}) for count in (1, 2, 4) if count <= cores and count != (plan.workers or 0)]


def _device(plan: Plan) -> torch.device:
    from epochal.runtime.device import choose

    return choose(plan.device)


def _has_images(model: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in model.modules())
