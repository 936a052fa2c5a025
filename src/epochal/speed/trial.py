"""A plan tried out for some updates: on copies, and afterwards everything is as it was."""

from __future__ import annotations

import copy
import math
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

from epochal import loop
from epochal.data.workers import end_workers
from epochal.errors import ModelError, PlanError
from epochal.events import Noted, StepDone
from epochal.feeding import steps_of
from epochal.protocols import Stateful
from epochal.runtime import device as devices
from epochal.runtime.seeding import generator_states, own_states, set_generator_states, set_own_states

if TYPE_CHECKING:
    from epochal.plan import Plan
    from epochal.run import Run

ENDLESS: dict[str, Any] = {
    "epochs": 10**6, "max_steps": None, "max_time": None, "evaluate_every": "1000000000 steps",
}  # fmt: skip
LOOKED_AT = 20  # updates of which the loss is compared
COPIED = ("model", "loss", "objective", "optimizer", "schedule", "step", "metrics")  # together, as one may hold another


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


class _Held:
    """A module as it is: an objective may hold it, and not take the copy that it is given."""

    def __init__(self, module: nn.Module):
        known = [one for one in (*module.parameters(), *module.buffers()) if not is_lazy(one)]
        self._tensors = [(one, one.detach().clone()) for one in known if not one.is_meta]
        held = [(p, p.requires_grad, p.grad) for p in module.parameters()]
        self._parameters = [(*one, one[-1] if one[-1] is None else one[-1].detach().clone()) for one in held]
        self._modes = [(part, part.training) for part in module.modules()]
        self._drawn = [(part, own_states(part)) for part in module.modules()]

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, values in self._tensors:
            if not torch.equal(tensor, values):
                tensor.copy_(values)
        for parameter, is_trained, gradient, values in self._parameters:
            if parameter.requires_grad is not is_trained:
                parameter.requires_grad_(is_trained)
            parameter.grad = gradient
            if gradient is not None and values is not None and not torch.equal(gradient, values):
                gradient.copy_(values)
        loop.set_modes(self._modes)
        for part, states in self._drawn:
            set_own_states(part, states)


@contextmanager
def untouched(plan: Plan) -> Iterator[None]:
    """Inside, generators, threads and the place in the data may change; afterwards they are as before.

    What a data set or a loader counts in attributes of its own, and cannot be asked for, is that of after these reads.
    """
    given = list({id(data): data for data in (plan.train, plan.val) if isinstance(data, Dataset | DataLoader)}.values())
    parts = [part for data in given for part in (getattr(data, "dataset", None), data) if isinstance(part, Stateful)]
    with ExitStack() as after:  # from the last to the first, and all of them
        after.callback(set_generator_states, generator_states())
        after.callback(torch.set_num_threads, torch.get_num_threads())
        for data in given:
            after.callback(set_own_states, data, own_states(data))
        for part in parts:
            after.callback(part.load_state_dict, copy.deepcopy(part.state_dict()))
        for module in (plan.model, plan.loss):
            if isinstance(module, nn.Module):
                after.callback(_Held(module).put_back)
        for data in given:
            if (
                isinstance(data, DataLoader) and data.persistent_workers and data._iterator is None
            ):  # those that are started here
                after.callback(_end_workers_of, data)
        with warnings.catch_warnings():
            # A schedule marks the step of its optimizer, and a copy of the optimizer does not have the mark.
            warnings.filterwarnings("ignore", message=r"Seems like `optimizer\.step\(\)` has been overridden")
            yield


def _end_workers_of(loader: Any) -> None:
    batches, loader._iterator = loader._iterator, None
    end_workers(batches)


def check(plan: Plan, seconds: float) -> None:
    """Refuses a time that never ends, and a step of the user's: it may hold its model and optimizer, and train them."""
    if not 0 <= seconds < math.inf:
        fix = "give the seconds of training for each measurement, 1.0 for example"
        raise PlanError("the time to measure must be a number of seconds.", where=f"seconds={seconds}", fix=fix)
    if plan.step is not None:
        what = "a step of your own cannot be tried out on a copy, and its parts are not known."
        raise PlanError(what, where="step=", fix="measure it with torch.profiler, or give loss= or objective=")


def copied(plan: Plan, *, channels_last: bool = False, **changes: Any) -> Plan:
    """The plan over copies of its model and of all that belongs to it; it writes nothing, and nobody watches."""
    try:
        parts = copy.deepcopy({name: getattr(plan, name) for name in COPIED})
    except Exception as error:
        what = f"the model, or what belongs to it, cannot be copied: {error}."
        raise ModelError(what, where="the plan", fix="let copy.deepcopy copy it: it is tried out on a copy") from error
    if channels_last:
        devices.to_channels_last(parts["model"])
    silent = {"run": None, "resume": False, "save": None, "observers": (), "strategy": "auto", "early_stopping": None}
    return plan.replace(**parts, **silent, patience=None, **changes)


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


def heed(run: Run) -> None:
    """Ends what is measured if a signal came, which ends the run and not by itself what it is run for."""
    if run.signals.received is not None:
        raise KeyboardInterrupt


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
