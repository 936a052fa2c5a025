"""A plan tried out for some updates: on copies, and afterwards everything is as it was."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch

from epochal.copies import copied, heed
from epochal.errors import PlanError
from epochal.events import Noted, StepDone
from epochal.feeding import steps_of
from epochal.runtime import device as devices

if TYPE_CHECKING:
    from epochal.plan import Plan
    from epochal.run import Run

ENDLESS: dict[str, Any] = {
    "epochs": 10**6, "max_steps": None, "max_time": None, "evaluate_every": "1000000000 steps",
}  # fmt: skip
LOOKED_AT = 20  # updates of which the loss is compared


@dataclass(frozen=True)
class Trial:
    """What some updates took. milliseconds: of an update, the median. samples: of an update. start: seconds that the
    first updates took longer than later ones, as when something is compiled for them. megabytes: of memory at its peak,
    above what there was before. loss: the training's, over the first LOOKED_AT updates. planned: updates of the whole
    plan, None where that is not known. notes: what was said meanwhile.
    """

    milliseconds: float
    samples: float
    start: float
    megabytes: float
    loss: float
    planned: int | None
    notes: tuple[str, ...] = ()

    @property
    def samples_a_second(self) -> float:
        return 1000 * self.samples / self.milliseconds


def check(plan: Plan, seconds: float) -> None:
    """Refuses a time that never ends, and a step of the user's: it may hold its model and optimizer, and train them."""
    if not 0 <= seconds < math.inf:
        fix = "give the seconds of training for each measurement, 1.0 for example"
        raise PlanError("the time to measure must be a number of seconds.", where=f"seconds={seconds}", fix=fix)
    if plan.step is not None:
        what = "a step of your own cannot be tried out on a copy, and its parts are not known."
        raise PlanError(what, where="step=", fix="measure it with torch.profiler, or give loss= or objective=")


def tried(plan: Plan, *, seconds: float, warm_up: int = 3, **changes: Any) -> Trial:
    """Trains a copy of the plan for about ``seconds``, and at least for ten updates.

    warm_up: updates that are not counted; what is compiled, is compiled in them.
    """
    given, plan = plan, copied(plan, **ENDLESS, **changes)
    ends: list[float] = []
    losses, notes, seen = [], [], 0
    began = time.perf_counter()
    with _peak(plan) as peak, plan.prepare() as run:
        for event in run.alone():
            heed(run)
            if isinstance(event, Noted):
                notes.append(event.message)
            if not isinstance(event, StepDone):
                continue
            _wait_for(run)
            ends.append(time.perf_counter())
            seen = event.samples
            if len(losses) < LOOKED_AT:
                losses.append(event.result.loss.item())
            if len(ends) >= max(LOOKED_AT, warm_up + 10) and ends[-1] - ends[warm_up - 1] >= seconds:
                break
        heed(run)
    times = [later - earlier for earlier, later in zip(ends[warm_up - 1 :], ends[warm_up:])]
    middle = sorted(times)[len(times) // 2]
    start = max(0.0, ends[warm_up - 1] - began - warm_up * middle)
    planned = steps_of(run.train, plan.accumulate, given.epochs, given.max_steps)
    loss = sum(losses) / len(losses)
    return Trial(1000 * middle, seen / len(ends), start, peak[0] / 2**20, loss, planned, tuple(notes))


def _wait_for(run: Run) -> None:
    if devices.moves(run.setting.device):
        torch.accelerator.synchronize(run.setting.device)


@contextmanager
def _peak(plan: Plan) -> Iterator[list[float]]:
    """The bytes of memory at its peak, above what there was before: of the device, or of this process."""
    device = devices.choose(plan.device)
    found = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device) - before
        return
    process, over = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not over.wait(0.005):
            with suppress(psutil.Error):
                found[0] = max(found[0], process.memory_info().rss - before)

    thread = threading.Thread(target=watch, daemon=True, name="memory")
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
