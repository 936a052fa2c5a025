"""Where the time of an update goes, part by part, and what bounds it."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from epochal.checkpoint import codec
from epochal.checkpoint.files import replace_bytes
from epochal.copies import copied, heed, untouched
from epochal.data.batch import size
from epochal.errors import PlanError
from epochal.events import StepDone
from epochal.observe.console import Console
from epochal.protocols import StepResult
from epochal.runtime import device as devices
from epochal.speed.trial import ENDLESS, Trial, check, tried
from epochal.step import Update

if TYPE_CHECKING:
    from epochal.data.window import Window
    from epochal.plan import Plan
    from epochal.run import Run

PARTS = ("data", "transfer", "forward", "backward", "optimizer", "rest", "watchers")
DATA_BOUND = 0.3  # of an update: above, the data are what is waited for
LAUNCH_BOUND = 1.4  # times as long for twice the samples: below, time goes into calls and not into arithmetic


@dataclass(frozen=True)
class Profile:
    """milliseconds: of each of PARTS in an update, the medians; ``rest`` is what an update of ``fit`` takes above the
    others (metrics, the look for what is not finite, sums), and the noise between two measurements. whole: of an update
    of ``fit``. samples: of an update. saving: milliseconds that the training waits for a checkpoint, and its megabytes.
    growth: how many times as long forward and backward take for twice the samples, None where a batch cannot be
    doubled. bound: ``data``, ``launches`` or ``arithmetic``, None where it is not known. advice: what to try first.
    """

    milliseconds: dict[str, float]
    whole: float
    samples: float
    saving: tuple[float, float]
    growth: float | None
    bound: str | None
    advice: str = ""

    @property
    def shown(self) -> dict[str, float]:
        """The parts, without the watchers where nobody asked for them."""
        return {name: took for name, took in self.milliseconds.items() if took or name != "watchers"}

    def __str__(self) -> str:
        widest, total = max(self.milliseconds.values()) or 1.0, sum(self.milliseconds.values()) or 1.0
        lines = [f"{'an update':12}{self.whole:10.3f} ms  {1000 * self.samples / self.whole:,.0f} samples/s"]
        for name, took in self.shown.items():
            bar = "█" * round(30 * took / widest)
            lines.append(f"{name:12}{took:10.3f} ms {100 * took / total:5.1f} %  {bar}".rstrip())
        lines.append(
            f"{'a saving':12}{self.saving[0]:10.3f} ms  {self.saving[1]:.1f} MB; a thread writes them meanwhile"
        )
        if self.growth is not None:
            lines.append(f"forward and backward over a batch of twice the samples take {self.growth:.2f} times as long")
        if self.bound is not None:
            lines.append(f"bound by {self.bound}: {self.advice}")
        return "\n".join(lines)


def profile(plan: Plan, *, seconds: float = 1.0, trace: str | Path | None = None, observers: bool = False) -> Profile:
    """Measures where the time of an update of ``plan`` goes, on a copy: nothing of the plan is changed.

    seconds: for each of the two measurements, of the parts and of the whole. trace: where to write what torch's
    profiler saw of some updates, as JSON for https://ui.perfetto.dev. observers: whether copies of the plan's own
    observers are called with updates that never were, to find out what they take; they may write files.

    Raises PlanError for a plan with a step of its own, whose parts only it knows. A plan that compiles is looked at
    as it is without.

    >>> import epochal
    >>> X = torch.randn(64, 3)
    >>> found = profile(epochal.Plan(torch.nn.Linear(3, 1), (X, X[:, :1]), loss="mse", epochs=1), seconds=0.01)
    >>> list(found.milliseconds)
    ['data', 'transfer', 'forward', 'backward', 'optimizer', 'rest', 'watchers']
    """
    check(plan, seconds)
    if trace is not None:
        refuse_trace(Path(trace))
    eager = plan.replace(compile=False)  # the parts of a graph cannot be told apart
    with untouched(eager):
        whole = tried(eager, seconds=seconds)
        parts, saving, growth = _parts(eager, seconds)
        parts["rest"] = max(0.0, whole.milliseconds - sum(parts.values()))
        parts["watchers"] = _watchers(eager, whole) if observers else 0.0
        if trace is not None:
            _trace(eager, Path(trace))
    total = whole.milliseconds + parts["watchers"]
    bound = _bound(parts, max(total, sum(parts.values())), growth)
    advice = "" if bound is None else _advice(bound, plan)
    return Profile({name: parts[name] for name in PARTS}, total, whole.samples, saving, growth, bound, advice)


def refuse_trace(path: Path) -> None:
    """Before anything is measured for a file that could not be written, or is something else."""
    fix = "name a file that ends in .json, in a folder that exists"
    if path.suffix != ".json" or path.is_dir():
        raise PlanError("a trace is a JSON file.", where=f"trace={path}", fix=fix)
    if not path.parent.is_dir():
        raise PlanError("there is no such folder.", where=f"trace={path}", fix=fix)


def _bound(parts: dict[str, float], total: float, growth: float | None) -> str | None:
    if parts["data"] + parts["transfer"] >= DATA_BOUND * total:
        return "data"
    if growth is None:
        return None
    return "launches" if growth < LAUNCH_BOUND else "arithmetic"


def _advice(bound: str, plan: Plan) -> str:
    """What to try first, of what is not so already."""
    larger = "a larger batch_size with the learning rate that belongs to it"
    if bound == "data" and not isinstance(plan.train, Dataset | DataLoader):
        return f"the data are in memory, and are read by an index operation for each batch: try {larger}"
    if bound == "data":
        ways = "give workers= (or a DataLoader with num_workers), keep what is decoded, or give arrays, which are read"
        return f"the update waits for data: {ways} by one index operation"
    if bound == "launches":
        told = "twice the samples take hardly longer, so the time goes into calling operations"
        if plan.compile:
            return f"{told}; compile=True, as planned, saves these, and was left out here. Beyond that: {larger}"
        return f"{told}: try compile=True, or {larger}"
    tries = ['precision="bf16"'] if plan.precision == "fp32" else []
    tries += ["channels last"] if any(isinstance(part, nn.Conv2d) for part in plan.model.modules()) else []
    return f"the time goes into arithmetic: try {', '.join([*tries, 'threads'])}; epochal tune-speed measures them"


def _parts(plan: Plan, seconds: float) -> tuple[dict[str, float], tuple[float, float], float | None]:
    times: dict[str, list[float]] = {name: [] for name in PARTS[:5]}
    with copied(plan, **ENDLESS).prepare() as run:
        clock, last = _Clock(run.setting.device), None
        windows, began = _windows(run), time.perf_counter()
        while len(times["data"]) < 12 or time.perf_counter() - began < seconds:
            clock.start()
            last = next(windows)
            clock.stop(times["data"])
            _update(run, last, clock, times)
            heed(run)
        growth = _growth(run, last, clock)
        saving = _saving(run)
    return {name: 1000 * statistics.median(took[2:]) for name, took in times.items()}, saving, growth


class _Clock:
    """Times parts; on an accelerator it waits until each is really done."""

    def __init__(self, device: torch.device):
        self._waits, self._device, self._began = devices.moves(device), device, 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self, times: list[float]) -> None:
        if self._waits:
            torch.accelerator.synchronize(self._device)
        now = time.perf_counter()
        times.append(now - self._began)
        self._began = now


def _windows(run: Run) -> Iterator[Window]:
    epoch = 0
    while True:
        run.state.progress.epoch, run.state.progress.windows = epoch, 0
        yield from run._windows(run.state.progress)
        epoch += 1


def _update(run: Run, window: Window, clock: _Clock, times: dict[str, list[float]]) -> None:
    """What an update computes, and nothing else: no guard, no clipping, no sums."""
    step, state = run.step, run.state
    assert isinstance(step, Update)
    optimizer = step.fused(state)
    spent = dict.fromkeys(("transfer", "forward", "backward"), 0.0)
    state.optimizer.zero_grad()
    clock.start()
    for batch in window.batches:
        took: list[float] = []
        batch = devices.move(batch, step.device)
        clock.stop(took)
        with step.autocast:
            loss = step.objective(state.model, batch)
        clock.stop(took)
        (loss.value * (loss.weight / window.samples) if len(window.batches) > 1 else loss.value).backward()
        clock.stop(took)
        spent = {name: before + now for (name, before), now in zip(spent.items(), took)}
    optimizer([p.grad for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None])
    clock.stop(times["optimizer"])
    for name, took_in_all in spent.items():
        times[name].append(took_in_all)


def _growth(run: Run, window: Window | None, clock: _Clock) -> float | None:
    """How many times as long forward and backward take over a batch that is there twice."""
    step = run.step
    assert isinstance(step, Update) and window is not None
    batch = devices.move(window.batches[0], step.device)
    twice = _doubled(batch, size(batch, run.setting.target))
    if twice is None:
        return None
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(12):
        for number, one in ((1, batch), (2, twice)):
            clock.start()
            try:
                with step.autocast:
                    step.objective(run.state.model, one).value.backward()
            except Exception:  # it wants batches of one size
                return None
            clock.stop(times[number])
    return statistics.median(times[2][2:]) / statistics.median(times[1][2:])


def _doubled(batch: Any, count: int) -> Any:
    """The batch with its samples twice; None where it is not known how."""
    if isinstance(batch, Tensor):
        return torch.cat([batch, batch]) if batch.dim() and len(batch) == count else None
    if isinstance(batch, dict):
        parts = {key: _doubled(part, count) for key, part in batch.items()}
        return None if any(part is None for part in parts.values()) else parts
    if type(batch) in (list, tuple):
        parts = [_doubled(part, count) for part in batch]
        return None if any(part is None for part in parts) else type(batch)(parts)
    return None


def _saving(run: Run) -> tuple[float, float]:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        _, tensors = codec.encode(run.state.state_dict())
        copies = [tensor.clone() for tensor in tensors.values()]
        times.append(time.perf_counter() - began)
    return 1000 * min(times), sum(one.nbytes for one in copies) / 2**20


def _watchers(plan: Plan, whole: Trial) -> float:
    """What copies of the plan's own observers take of an update; 0 for what cannot be copied, or wants to know more.

    The console, which is there by default, writes to a terminal ten times a second at most, whatever an update takes.
    """
    result, times = StepResult(torch.tensor(whole.loss), whole.samples), []
    try:
        observers = copy.deepcopy([one for one in plan.observers or () if not isinstance(one, Console)])
        for step in range(1, 13):
            event = StepDone(step, 1, int(step * whole.samples), result)
            began = time.perf_counter()
            for observer in observers:
                observer(event)
            times.append(time.perf_counter() - began)
    except Exception:
        return 0.0
    return 1000 * statistics.median(times) if observers else 0.0


def _trace(plan: Plan, path: Path, updates: int = 10) -> None:
    """What torch's profiler sees of some updates of ``fit``, after ten that warm up."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with copied(plan, **ENDLESS).prepare() as run:
        events = (event for event in run if isinstance(event, StepDone))
        for _ in range(10):
            next(events)
        with profiled(activities=kinds) as seen:
            for _ in range(updates):
                next(events)
                heed(run)
        events.close()
    with tempfile.TemporaryDirectory() as folder:  # torch writes it in place, and does not say if it cannot
        written = Path(folder, "trace.json")
        seen.export_chrome_trace(str(written))
        replace_bytes(path, written.read_bytes())
