"""Rules over an update: what a step of the user's called, in which order, and whether the weights moved as they
should."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from epochal.doctor.finding import Seen, rule
from epochal.doctor.rules.wiring import named
from epochal.doctor.trace import tensors

if TYPE_CHECKING:
    from torch import Tensor

    from epochal.doctor.case import Case
    from epochal.doctor.watch import Look


@rule("missing-zero-grad", "error", "step")
def missing_zero_grad(seen: Look) -> Iterator[Seen]:
    """Gradients add up: without zero_grad() every update follows the sum of all gradients since the start.

    Watches a step of the user's: an optimizer steps with a gradient that holds that of an update before, which another
    step has already used, and nobody has cleared.
    """
    if "stale step" in seen.events:
        yield Seen(
            "the gradients of the last update are still in those of this one.",
            f"the optimizer stepped with them in update {seen.step}, and they were not cleared since",
            f"step=, in this order: {', '.join(seen.events)}",
            "call optimizer.zero_grad() before loss.backward()",
        )


@rule("detached-loss", "error", "step")
def detached_step(seen: Look) -> Iterator[Seen]:
    """The backward passes of a step lead to no weight: the loss was cut off from the model.

    Watches a step of the user's: it goes back, no weight of the model is reached, and its optimizer finds no gradient.
    """
    if seen.is_own and "backward" in seen.events and "empty step" in seen.events and not seen.reaches:
        yield Seen(
            "nothing leads back from the loss to a weight: it is cut off from the model.",
            f"the backward pass of update {seen.step} reached no weight",
            f"step=, in this order: {', '.join(seen.events)}",
            "leave out .item(), .detach(), torch.tensor(...), argmax and requires_grad_() on the way to the loss",
        )


@rule("step-without-effect", "error", "step")
def step_without_effect(seen: Look) -> Iterator[Seen]:
    """An update that moves no weight trains nothing, however long it runs.

    Watches a step of the user's: its optimizer steps when no parameter has a gradient (it was cleared between backward
    and step, or there was no backward); or gradients are cleared, and no optimizer has stepped in the first three
    updates. (A step may gather the gradients of several updates.)
    """
    if seen.has_moved or not seen.applied or not seen.is_own or any(detached_step(seen)):
        return
    is_empty = 0 < seen.events.count("step") == seen.events.count("empty step")
    order = ", ".join(seen.events) or "no backward and no optimizer.step()"
    if "foreign step" in seen.events and not seen.reaches:
        yield Seen(
            "the step trains another model than the plan's.",
            f"no backward pass reached a weight of it, and none moved in update {seen.step}",
            f"step=, in this order: {order}",
            "call state.model in the step, and make the optimizer over its parameters()",
            level="warning",  # which may have its turn later
        )
    if "foreign step" in seen.events:
        return
    if is_empty:
        yield Seen(
            "the optimizer steps when no parameter has a gradient.",
            f"no weight moved in update {seen.step}",
            f"step=, in this order: {order}",
            "call them in this order: zero_grad(), loss.backward(), optimizer.step()",
        )
    elif "step" not in seen.events and seen.step >= 2 and (seen.throws_away or "backward" not in seen.events):
        yield Seen(
            "the step moves no weight.",
            f"no weight moved in update {seen.step}, and no optimizer stepped",
            f"step=, in this order: {order}",
            "call optimizer.zero_grad(), loss.backward() and optimizer.step() in it",
            level="warning",
        )


@rule("foreign-parameters", "warning", "step")
def foreign_step(seen: Look) -> Iterator[Seen]:
    """The optimizer of the step moves tensors that the model does not compute with: the model was copied or rebuilt.

    Watches a step of the user's: an optimizer steps that holds no parameter of the plan's model, no other one does, and
    no weight of the model moves.
    """
    if "foreign step" in seen.events and not seen.has_moved and seen.reaches:
        yield Seen(
            "the optimizer of the step holds the parameters of another model.",
            f"no weight of the plan's model moved in update {seen.step}",
            f"step=, in this order: {', '.join(seen.events)}",
            "make the optimizer over the parameters() of the model that is given to the plan",
        )


@rule("schedule-before-step", "error", "step")
def schedule_before_step(seen: Look) -> Iterator[Seen]:
    """A schedule that moves before the optimizer has stepped skips its first rate.

    Watches a step of the user's: its LRScheduler has moved when its optimizer makes the first step.
    """
    if "early schedule" in seen.events:
        yield Seen(
            "the schedule is stepped before the optimizer.",
            f"it had moved before the first step of the optimizer, in update {seen.step}",
            f"step=, in this order: {', '.join(seen.events)}",
            "call scheduler.step() after optimizer.step(), or give schedule= and leave it to epochal",
        )


@rule("gradient-ascent", "error", "step")
def update_climbs(seen: Look) -> Iterator[Seen]:
    """The weights move along the gradient, not against it: every update makes the loss larger.

    Watches a step of the user's: the cosine between the change of the weights and the gradient is above 0.5, and what
    went back has the sign of the loss that is reported.
    """
    if seen.is_own and seen.climb > 0.5:
        yield Seen(
            "the update goes up the gradient, not down.",
            f"the cosine between the change of the weights and the gradient is {seen.climb:.2f} (below 0 is down)",
            f"step=, update {seen.step}",
            "subtract the gradient: p -= lr * p.grad; or make the optimizer without maximize=True",
        )


@rule("unscaled-accumulation", "error", "step")
def unscaled_accumulation(seen: Look) -> Iterator[Seen]:
    """Gradients of micro-batches add up: without a division their sum is that of a rate so many times as high.

    Watches a step of the user's whose window has several micro-batches, and the factor of the loss in each backward
    pass: together they make 1. Where a loss counts words, each has the share of its words; the same for all is told
    as a warning (the mistake of many trainers until 2024).
    """
    shares, parts = seen.shares, max(seen.micro_batches, seen.passes)
    is_known = 1 < seen.micro_batches == len(shares)
    if seen.is_rescaled and (not is_known or abs(seen.shrunk - len(shares)) < 0.05 * len(shares)):
        return  # the gradients were divided
    is_divided = seen.micro_batches > 1 or parts == seen.forwards > 2  # and not several losses of one pass
    if not is_known and is_divided and abs(seen.summed - parts) < 0.02 * parts:
        yield Seen(
            "what goes back in an update is a sum over its parts, not their mean.",
            f"{parts} parts, and {seen.summed:.4g} times the loss that is reported",
            f"step=, update {seen.step}",
            "divide: (loss / parts).backward()",
            level="warning",
        )
    if not is_known:
        return
    total, factors, counts = sum(one for one, _ in shares), [one for one, _ in shares], [count for _, count in shares]
    is_even = max(factors) - min(factors) < 1e-6 * max(factors)
    if is_even and abs(total - len(shares)) < 1e-3 * len(shares):
        yield Seen(
            "the gradients of micro-batches are added up, and not averaged.",
            f"the factors of {len(shares)} backward passes make {total:.4g} (1 is the mean)",
            f"step=, update {seen.step}",
            "divide: (loss / len(window.batches)).backward(), or by samples, size / window.samples",
            level="warning" if seen.is_rescaled else None,
        )
    elif is_even and abs(total - 1) < 1e-3 and min(counts) > 0 and max(counts) > 1.5 * min(counts):
        yield Seen(
            "each micro-batch counts the same, though they hold different numbers of targets.",
            f"from {min(counts)} to {max(counts)} targets, each with the factor {factors[0]:.4g} (half as many "
            "more allowed)",
            f"step=, update {seen.step}",
            "weigh by what is counted: (loss * counted / total).backward()",
            level="warning",
        )


@rule("fp16-unscaled", "warning", "step")
def fp16_unscaled(seen: Look) -> Iterator[Seen]:
    """In fp16 small gradients are 0: a loss has to be multiplied before it goes back, and the gradients divided
    afterwards.

    Watches a step of the user's: layers compute in fp16 under autocast, or have weights in it, and there is no
    torch.amp.GradScaler in the step.
    """
    if "unscaled fp16" in seen.events:
        yield Seen(
            "what goes back is in fp16, and the loss is not scaled.",
            f"layers compute in float16 in update {seen.step}, and no GradScaler is used",
            "step=",
            "scale it: scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update(); or compute in bfloat16",
        )


@rule("fp16-unscaled", "warning", "batch")
def unscaled_objective(case: Case) -> Iterator[Seen]:
    """The same in a model or an objective that computes in fp16 by itself: nobody scales its loss.

    Looks at what layers give in a pass: fp16 with a gradient, where the precision of the plan is another one.
    """
    made = [layer.path for layer in case.now.layers for one in tensors(layer.output)
            if one.dtype is torch.float16 and one.requires_grad]  # fmt: skip
    if made and case.plan.step is None and case.plan.precision != "fp16":
        yield Seen(
            "what goes back is in fp16, and the loss is not scaled.",
            f"{len(made)} layers compute in float16, and precision is {case.plan.precision!r}",
            f"{named(path or 'the model' for path in made)}; {case.place}",
            'leave out autocast and .half(), and give precision="fp16", which scales the loss, or "bf16"',
        )


@rule("lost-updates", "warning", "step")
def lost_updates(seen: Look) -> Iterator[Seen]:
    """A weight in bf16 has 8 bits: an update that is smaller than a 256th of it is rounded away, and it never moves.

    Looks at weights of half precision in the updates that are watched: more than half of the numbers have a gradient
    and did not change.
    """
    lost = {name: share for name, share in seen.lost.items() if share > 0.5 and seen.gradient.get(name, 0) > 0}
    if lost and len(lost) * 2 >= len(seen.lost) and seen.rate > 0:
        worst = max(lost.values())
        yield Seen(
            "updates are rounded away: the weights are in half precision.",
            f"{worst:.0%} of the numbers have a gradient and did not change (half allowed)",
            named(lost),
            'keep the weights in fp32, model.float(), and give precision="bf16", which computes in bf16',
        )


@rule("symmetric-init", "error", "step")
def symmetric_init(seen: Look) -> Iterator[Seen]:
    """Units that begin alike and get the same gradient stay alike for ever: the layer has one unit, however many are
    paid for.

    Looks at the weights of each layer in the first update: rows that are equal, and whose gradients are equal, too
    (or all 0, of a layer beside others that are), or whose results count the same for the next layer. A layer that
    begins at 0 on purpose (the last of a residual branch, the B of LoRA, a head) gets gradients that differ, and is not
    told; nor is a last layer of zeros, whose first batch may have none of several labels.
    """
    after = _read_alike(seen)
    last = next(reversed([name for name, (weight, _) in seen.begun.items() if weight.dim() > 1]), None)
    for name, (weight, gradient) in seen.begun.items():
        if weight.dim() < 2 or weight.shape[0] < 2 or weight[0].numel() < 2 or gradient is None or gradient.is_sparse:
            continue
        if name == last and not bool(weight.any()) and bool(gradient.any()):
            continue
        rows, slopes = weight.flatten(1), gradient.flatten(1)
        largest = slopes.abs().max()
        # A weight of the user's own may have its units in columns; those of a layer are its inputs.
        has_columns = weight.dim() == 2 and weight.shape[1] > 1 and not name.endswith("weight")
        ways = [(rows, slopes), *([(rows.T, slopes.T)] if has_columns else [])]
        is_read_alike = name in after and bool((rows == rows[0]).all())
        is_read_alike = is_read_alike and bool((slopes - slopes[0]).abs().max() <= 1e-5 * _largest(seen))
        if not any(_are_alike(*way, largest) for way in ways) and not is_read_alike:
            continue
        if not _largest(seen) > 0 or (not bool(largest > 0) and not _are_all_still(seen) and not is_read_alike):
            continue
        is_constant = bool((rows == rows[0, 0]).all())
        yield Seen(
            "all units of a layer begin with the same weights, and get the same gradient.",
            f"{weight.shape[0]} equal rows"
            + (", which the next layer reads alike" if is_read_alike else " with equal gradients")
            + (f"; all its weights are {rows[0, 0].item():g}" if is_constant else ""),
            name,
            "leave the weights to torch's initialisation, or nn.init.kaiming_normal_(layer.weight)",
        )
        return


def _are_alike(rows: Tensor, slopes: Tensor, largest: Tensor) -> bool:
    return bool((rows == rows[0]).all()) and bool((slopes - slopes[0]).abs().max() <= 1e-5 * largest)


def _largest(seen: Look) -> float:
    """The largest number of all gradients."""
    known = [gradient for _, gradient in seen.begun.values() if gradient is not None and not gradient.is_sparse]
    return max((gradient.abs().max().item() for gradient in known if gradient.numel()), default=0.0)


def _read_alike(seen: Look) -> set[str]:
    """The matrices whose units begin with equal biases, and all count the same for the next layer: then the gradient is
    the same for each, or 0 but for rounding.
    """
    found, names = set(), [name for name, (weight, _) in seen.begun.items() if weight.dim() == 2]
    for name, then in pairwise(names):
        weight, after = seen.begun[name][0], seen.begun[then][0]
        bias = seen.begun.get(f"{name.removesuffix('weight')}bias")
        is_even = bias is None or bool((bias[0] == bias[0].flatten()[0]).all())
        follows = after.shape[1] == weight.shape[0] > 1 and after.shape[0] > 1
        if is_even and follows and bool((after == after[:, :1]).all() and (after != 0).any()):
            found.add(name)
    return found


def _are_all_still(seen: Look) -> bool:
    """Whether no matrix has a gradient, as where all of them are 0."""
    matrices = [name for name, (weight, _) in seen.begun.items() if weight.dim() > 1]
    return all(not seen.gradient[name] > 0 or math.isnan(seen.gradient[name]) for name in matrices)
