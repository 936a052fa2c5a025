"""Rules over a schedule, which is run through to the end of the plan before anything is trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch.optim import lr_scheduler

from epochal.doctor.case import Case
from epochal.doctor.finding import Seen, rule
from epochal.feeding import steps_of

MOST = 20_000  # updates that are run through; of a longer plan it is not known


def rates(case: Case) -> list[float] | None:
    """The rate of each update to come; None where it depends on what is measured, or is not known."""
    return _rates(case.run) if case.run.state.schedule is not None else None


def _rates(run: Any) -> list[float] | None:
    scheduled, steps = run.state.schedule, run.started.steps
    if isinstance(scheduled.scheduler, lr_scheduler.ReduceLROnPlateau) or steps is None or steps > MOST:
        return None
    each = steps_of(run.train, run.accumulate, 1, None)
    optimizer = run.state.optimizer
    if each is None or not each:
        return None
    # A copy of the schedule over an optimizer with the same groups and nothing in them.
    groups = [
        {**{k: v for k, v in g.items() if k != "params"}, "params": [torch.zeros(1)]} for g in optimizer.param_groups
    ]
    hollow = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    hollow.param_groups[:] = [copy.deepcopy(one) for one in groups]
    again = copy.deepcopy(scheduled, {id(optimizer): hollow})
    found: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(steps):
            found.append(max(float(group["lr"]) for group in hollow.param_groups))
            again.after_step()
            if (step + 1) % each == 0:
                again.after_epoch()
    return found


@rule("schedule-horizon", "warning", "static")
def schedule_horizon(case: Case) -> Iterator[Seen]:
    """A schedule that is made for another length, or moved in another unit, ends too early or never gets anywhere.

    Runs the whole schedule through for the planned updates: for more than a twentieth of them the rate is below a
    thousandth of its highest; a one-cycle or a warm-up never reaches its peak; a cosine or a linear one ends above half
    of it, or goes up again.
    """
    found, scheduled = rates(case), case.run.state.schedule
    if not found or scheduled is None or len(found) < 4:
        return
    kind, per, highest = scheduled.scheduler, scheduled.per, max(found)
    fallen = found[found.index(highest) :]
    over = sum(rate < 1e-3 * highest for rate in fallen) / len(found)
    told = None
    if over > 0.05 and not isinstance(kind, lr_scheduler.CosineAnnealingWarmRestarts):
        first = found.index(highest) + next(at for at, rate in enumerate(fallen) if rate < 1e-3 * highest)
        told = (
            f"the rate is below a thousandth of its highest for {over:.0%} of the updates, from {first + 1} on "
            "(5 % allowed)"
        )
    elif isinstance(kind, lr_scheduler.OneCycleLR) and highest < 0.9 * max(
        g["max_lr"] for g in kind.optimizer.param_groups
    ):
        told = (
            f"the rate rises to {highest:.3g} in {len(found)} updates, and its peak would be "
            f"{kind.optimizer.param_groups[0]['max_lr']:.3g}"
        )
    elif isinstance(kind, lr_scheduler.CosineAnnealingLR | lr_scheduler.LinearLR | lr_scheduler.PolynomialLR):
        length = getattr(kind, "T_max", None) or getattr(kind, "total_iters", None)
        falls = not isinstance(kind, lr_scheduler.LinearLR) or kind.end_factor < kind.start_factor
        moves = len(found) if per == "step" else case.run.started.epochs
        if length and moves and falls and found[-1] > 0.5 * highest and length > 2 * moves:
            told = (
                f"it is made for {length} moves, and there are {moves}, one each {per}: the rate ends at "
                f"{found[-1]:.3g} of {highest:.3g}"
            )
        elif length and moves and falls and isinstance(kind, lr_scheduler.CosineAnnealingLR) and moves > 1.5 * length:
            told = f"it is made for {length} moves, and there are {moves}, one each {per}: the rate goes up again"
    elif (
        isinstance(kind, lr_scheduler.LambdaLR)
        and found[-1] == highest
        and found[0] < 0.5 * highest
        and len(set(found)) > len(found) // 2
    ):
        told = f"the rate is still rising at the end of {len(found)} updates: {found[-1]:.3g}"
    elif isinstance(kind, lr_scheduler.MultiStepLR | lr_scheduler.StepLR) and len(set(found)) == 1:
        told = f"it never moves in {len(found)} updates ({case.run.started.epochs} epochs), one move each {per}"
    if told:
        yield Seen(
            "the schedule is made for another length, or moves in another unit.",
            told,
            f"{type(kind).__name__}, moved each {per}; {case.place}",
            f'give epochal.Schedule(..., per="{"epoch" if per == "step" else "step"}"), or its length in {per}s: '
            f'{len(found) if per == "step" else case.run.started.epochs}; a name, schedule="cosine", takes the plan\'s',
        )


@rule("schedule-before-step", "warning", "static")
def begun_schedule(case: Case) -> Iterator[Seen]:
    """A schedule that moves before the optimizer has stepped skips its first rate.

    Looks at a schedule that is given: it has moved already, and its optimizer, which keeps something of each step, has
    never stepped.
    """
    scheduled, optimizer = case.run.state.schedule, case.optimizer
    if scheduled is None or optimizer is None or case.run.state.progress.step:
        return
    keeps = any(group.get("momentum") or group.get("betas") or group.get("alpha") for group in optimizer.param_groups)
    if keeps and not optimizer.state and (moved := scheduled.scheduler.last_epoch) > 0:
        yield Seen("the schedule has moved before the first update.", f"{moved} moves, and the optimizer has no state",
                   f"{type(scheduled.scheduler).__name__}; {case.place}",
                   "leave its step() to epochal, or to after optimizer.step()")  # fmt: skip


@rule("warmup-order", "warning", "static")
def warmup_order(case: Case) -> Iterator[Seen]:
    """A warm-up begins low and rises; one that comes too late, or jumps, hits the weights with the full rate at once.

    Runs the schedule through: between two neighbouring updates in the first tenth the rate rises more than 10 times, or
    it begins at its peak, falls, and is warmed up afterwards.
    """
    found = rates(case)
    if not found or len(found) < 10:
        return
    highest, kind = max(found), type(case.run.state.schedule.scheduler).__name__ if case.run.state.schedule else ""
    steps = [] if "Restarts" in kind or "Cyclic" in kind else list(pairwise(found))
    jump = next((at for at, (one, two) in enumerate(steps) if at > 1 and two > 10 * one and two > 0.3 * highest), None)
    lowest = found.index(min(found))
    rises_late = found[0] >= 0.99 * highest and max(found[lowest:]) > max(2 * found[lowest], 0.3 * highest)
    if any(word in kind for word in ("Restarts", "Cyclic", "CosineAnnealingLR")):
        rises_late = False
    if jump is None and not rises_late:
        return
    at = jump if jump is not None else lowest
    after = found[min(at + 1, len(found) - 1)]
    yield Seen(
        "the warm-up does not lead to the full rate.",
        f"update 1: {found[0]:.3g}; update {at + 1}: {found[at]:.3g}; update {at + 2}: {after:.3g}; the highest is "
        f"{highest:.3g} (10 times from one to the next allowed, and no warm-up after the peak)",
        f"{kind}; {case.place}",
        'give epochal.Schedule("cosine", warmup=100): it warms up first, and reaches the full rate',
    )
