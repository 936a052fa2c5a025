"""Rules over a training as it goes: what looks ill while the loss does not fall."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from epochal.doctor.finding import Seen, rule
from epochal.doctor.rules.wiring import named

if TYPE_CHECKING:
    from epochal.doctor.watch import Look, Vitals

LOOKS = 3  # in a row
LEAST = 12  # updates, before anything is said of a loss


def trend(losses: Sequence[float]) -> float:
    """The mean of the last quarter of the losses, of that of the first quarter; 1 is no progress.

    >>> trend([4.0, 4.0, 2.0, 2.0])
    0.5
    """
    quarter = max(1, len(losses) // 4)
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    return last / first if first > 0 else math.nan


def is_stalled(losses: Sequence[float], least: float = 0.97) -> bool:
    """Whether a loss that is above 0 has not come down."""
    if len(losses) < LEAST or not all(map(math.isfinite, losses)):
        return False
    return trend(losses) > least


def goes_well(losses: Sequence[float]) -> bool:
    """Whether a loss above 0 has come down by a tenth at least, so that no symptom counts."""
    if len(losses) < LEAST or not all(map(math.isfinite, losses)):
        return False
    return losses[-1] > 0 and 0 < trend(losses) < 0.9


def goes_badly(losses: Sequence[float], least: float = 0.9) -> bool:
    """Whether a loss has not come down, from its first quarter or from where it began: the first updates may have
    thrown it up, and to come back from there is no progress.
    """
    quarter = max(1, len(losses) // 4)
    return trend(losses) > least or sum(losses[-quarter:]) / quarter > least * losses[0] > 0


def _recent(vitals: Vitals) -> list[Look]:
    return vitals.looks[-LOOKS:]


def _matrices(vitals: Vitals) -> list[str]:
    case = vitals.case
    return [name for name, p in case.trained.items() if p.dim() > 1] if case is not None else []


@rule("clipping", "warning", "symptom", told="probe")
def clipping(vitals: Vitals) -> Iterator[Seen]:
    """A gradient that is always cut down to a small part of itself is that of a rate so much lower.

    Looks at the norms before clipping, while the loss does not fall: in nine of ten updates more than 20 times what
    clip allows. In a step of the user's: the gradient that arrives is more than 20 times that with which the
    optimizer steps, three times in a row, after a loss scale is taken off (gradients that were clipped while they
    were scaled).
    """
    if not is_stalled(vitals.read(), 0.9) or vitals.case is None:
        return
    clip, norms = vitals.case.plan.clip, vitals.read_norms()
    told = None
    if clip is not None and len(norms) >= LEAST and sum(norm > 20 * clip for norm in norms) > 0.9 * len(norms):
        told = f"clip={clip:g}, and the gradient is {median(norms):.3g} in the median ({20 * clip:.3g} allowed)"
    shrunk = [seen.shrunk for seen in vitals.looks if seen.shrunk]
    if len(shrunk) >= LOOKS and min(shrunk[-LOOKS:]) > 20:
        told = (
            f"the gradient arrives {median(shrunk):.3g} times as large as that which the optimizer steps with "
            f"(20 allowed), in {len(shrunk)} looks"
        )
    if told:
        yield Seen(
            "gradients are always cut down to a small part of themselves.",
            told,
            vitals.case.place,
            "give clip=1.0, or none; with a loss scale, call scaler.unscale_(optimizer) before clip_grad_norm_",
        )


def update_ratio(seen: Look, names: Sequence[str]) -> float:
    """The median over matrices of the size of a change to that of the weight."""
    ratios = [seen.change[name] / seen.weight[name] for name in names if seen.weight[name] > 0]
    return median(ratios) if ratios else math.nan


@rule("lr-too-high", "warning", "symptom")
def lr_too_high(vitals: Vitals) -> Iterator[Seen]:
    """Updates that change the weights by a large part of themselves throw away what was learned.

    Looks at the changes of weights in three looks in a row, while the loss does not fall: their median is above a
    tenth of the weights (Karpathy's recipe asks for about a thousandth). ``epochal check`` tries a tenth and a
    hundredth of the rate on a copy.
    """
    losses = vitals.read()
    if len(losses) < LEAST or not all(map(math.isfinite, losses)) or not goes_badly(losses) or vitals.case is None:
        return
    ratios = [update_ratio(seen, _matrices(vitals)) for seen in _recent(vitals) if seen.rate > 0]
    if len(ratios) == LOOKS and min(ratios) > 0.1:
        yield Seen(
            "the learning rate is too high for this model.",
            f"an update changes the weights by {min(ratios):.3g} of themselves (0.1 allowed; 0.001 is usual), in "
            "three looks; "
            f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g}",
            vitals.case.place,
            f"give lr={_nice(vitals.looks[-1].rate / 100)}",
        )


@rule("lr-too-low", "warning", "symptom", told="trial")
def lr_too_low(vitals: Vitals) -> Iterator[Seen]:
    """Updates that change the weights by next to nothing will not get anywhere in the time that is planned.

    Looks at the changes of weights in three looks in a row, while the loss does not fall: at this pace the weights will
    have changed by less than 1 of 100 at the end of the plan. Not of a classifier that begins with a tenth of what
    knowing nothing costs. ``epochal check`` tries higher rates on a copy.
    """
    losses = vitals.read()
    if not is_stalled(losses, 0.97) or vitals.case is None or stands_still(vitals) or has_learned(vitals):
        return
    rates = [look.rate for look in vitals.looks]
    if rates[-1] < 0.01 * max(rates):
        return  # its schedule has come to an end
    planned = vitals.case.run.started.steps
    ratios = [update_ratio(seen, _matrices(vitals)) for seen in _recent(vitals)]
    if planned and len(ratios) == LOOKS and 0 < max(ratios) * planned < 0.01:
        yield Seen(
            "the learning rate is too low for this model.",
            f"an update changes the weights by {max(ratios):.2g} of themselves, and all {planned} by less than 1 "
            "%, in three "
            f"looks; the loss went from {losses[0]:.3g} to {losses[-1]:.3g}",
            vitals.case.place,
            f"give lr={_nice(vitals.looks[-1].rate * 1e-3 / max(ratios))}",
        )


def has_learned(vitals: Vitals) -> bool:
    """Whether a classifier began with a tenth of what knowing nothing costs: there is little left to gain."""
    losses = vitals.read()
    return vitals.classes > 1 and bool(losses) and losses[0] < 0.1 * math.log(vitals.classes)


def stands_still(vitals: Vitals) -> bool:
    """Whether gradients do not arrive: then no rate is to blame."""
    rules = vanishing_gradient, dead_units, zero_gradient, no_gradient_at_all
    return len(vitals.looks) >= LOOKS and any(any(one(vitals)) for one in rules)


def _nice(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-") if rate > 0 else "1e-3"


@rule("divergence", "warning", "symptom")
def divergence(vitals: Vitals) -> Iterator[Seen]:
    """A loss that rises and does not come back has left the region where updates help.

    Looks at the means of five windows in a row: all of the last three are above twice the lowest (TheDeepChecker), and
    above the first.
    """
    losses = vitals.read()
    if len(losses) < 25 or min(losses) <= 0 or not all(map(math.isfinite, losses)):
        return
    width = len(losses) // 5
    means = [sum(losses[at * width : (at + 1) * width]) / width for at in range(5)]
    if vitals.case is not None and vitals.case.plan.step is not None and means[-1] < 10 * min(means):
        return  # targets that a network makes may grow
    if all(mean > 2 * min(means) for mean in means[2:]) and means[-1] > means[0]:
        yield Seen(
            "the loss rises.",
            f"in fifths of {len(losses)} updates: {', '.join(f'{mean:.3g}' for mean in means)} (twice the lowest "
            "allowed)",
            vitals.case.place if vitals.case is not None else "",
            "lower lr, or give clip=1.0",
        )


@rule("dead-units", "warning", "symptom")
def dead_units(vitals: Vitals) -> Iterator[Seen]:
    """A unit behind a ReLU that is never above 0 gets no gradient, and does not come back.

    Looks at the gradients of weights in three looks in a row, while the loss does not fall: the rows of more than
    half of the units are exactly 0 (SageMaker's rule asks for half of a layer).
    """
    if not is_stalled(vitals.read()):
        return
    dead = {}
    for name in _matrices(vitals)[:-1]:
        shares = [seen.idle_rows.get(name, 0.0) for seen in _recent(vitals)]
        if min(shares) > 0.5 and name.endswith("weight") and not _is_embedding(vitals, name):
            dead[name] = min(shares)
    if dead:
        yield Seen(
            "most units of a layer are dead: they get no gradient.",
            ", ".join(f"{share:.0%} of {name}" for name, share in list(dead.items())[:3])
            + " (50 % allowed), in three looks",
            named(dead),
            "lower lr, initialise with nn.init.kaiming_normal_ and biases of 0, or take nn.LeakyReLU()",
        )


def _is_embedding(vitals: Vitals, name: str) -> bool:
    module = vitals.case.model.get_submodule(name.rpartition(".")[0]) if vitals.case is not None else None
    return "Embedding" in type(module).__name__


@rule("vanishing-gradient", "warning", "symptom")
def vanishing_gradient(vitals: Vitals) -> Iterator[Seen]:
    """Where the gradient shrinks from layer to layer, the first layers stand still, and what they give stays random.

    Looks at the gradients of weights in three looks in a row, while the loss does not fall: that of the first, of its
    size, is below a thousandth of that of the last (AUTOTRAINER); or that of any, below 1e-5 of it.
    """
    names = [name for name in _matrices(vitals) if not _is_embedding(vitals, name)]
    if len(names) < 3 or not is_stalled(vitals.read()):
        return
    last = names[-1]
    least = min(names[:-1], key=lambda name: _relative(vitals.looks[-1], name) or math.inf)
    first, allowed = (names[0], 1e-3) if _share(vitals.looks[-1], names[0], last) < 1e-3 else (least, 1e-5)
    ratios = [_share(seen, first, last) for seen in _recent(vitals)]
    opens = ratios[-1] > 10 * _share(vitals.looks[0], first, last)  # as a gate that was 0 does
    is_small = all(ratio < allowed for ratio in ratios)
    if is_small and not opens and all(seen.gradient[last] > 0 for seen in _recent(vitals)):
        yield Seen(
            "the gradient vanishes on its way to the first layers.",
            f"that of {first} is {max(ratios):.2g} of that of {last}, each of its weights ({allowed:g} allowed), in "
            "three looks",
            f"{first} to {last}",
            "take nn.ReLU() for sigmoid or tanh, nn.init.kaiming_normal_, residual connections, or norms between "
            "the layers",
        )


def _share(seen: Look, first: str, last: str) -> float:
    return _relative(seen, first) / max(_relative(seen, last), 1e-30)


def _relative(seen: Look, name: str) -> float:
    gradient, weight = seen.gradient.get(name, math.nan), seen.weight.get(name, 0.0)
    return 0.0 if math.isnan(gradient) else gradient / max(weight, 1e-12)


@rule("exploding-gradient", "warning", "symptom")
def exploding_gradient(vitals: Vitals) -> Iterator[Seen]:
    """Where the gradient grows from layer to layer, an update of any rate that moves the last layers destroys the
    first.

    Looks at the gradients of weights in three looks in a row, while the loss does not fall: the norm of all of them is
    above 100 times that of the weights.
    """
    losses = vitals.read()
    if len(losses) < LOOKS or (not is_stalled(losses, 0.9) and all(map(math.isfinite, losses))):
        return
    sizes = [total(seen.gradient) / max(total(seen.weight), 1e-12) for seen in _recent(vitals)]
    if min(sizes) > 100:
        yield Seen(
            "the gradient is huge.",
            f"its norm is {min(sizes):.3g} times that of the weights (100 allowed), in three looks",
            "all weights",
            "give clip=1.0, initialise smaller, or put norms between the layers",
        )


def total(sizes: dict[str, float]) -> float:
    return math.sqrt(sum(size**2 for size in sizes.values() if math.isfinite(size)))


@rule("zero-gradient", "warning", "symptom")
def zero_gradient(vitals: Vitals) -> Iterator[Seen]:
    """A gradient of exactly 0 moves nothing: something on the way has no slope (a sign, a clamp, a dead unit, a
    factor of 0).

    Looks at the gradients of weights in three looks in a row: exactly 0 in all of them, beside others that are not.
    """
    looks = _recent(vitals)
    if len(vitals.read()) < LEAST:
        return
    names = [name for name in _matrices(vitals) if all(seen.gradient[name] == 0 for seen in vitals.looks)]
    others = [n for n in vitals.looks[-1].gradient if n not in names and all(seen.gradient[n] > 0 for seen in looks)]
    if names and len(vitals.looks) >= LOOKS + 1:
        yield Seen(
            "the gradient of some weights is exactly 0.",
            f"{len(names)} of {len(_matrices(vitals))} matrices in all {len(vitals.looks)} looks"
            + ("" if others else ", and no other weight has one"),
            named(names),
            "look for torch.sign, round, clamp, a comparison, or a factor of 0 after these layers",
        )


@rule("zero-gradient", "warning", "symptom", told="batch")
def no_gradient_at_all(vitals: Vitals) -> Iterator[Seen]:
    """Every gradient is exactly 0: between the weights and the loss stands something without a slope.

    Looks at all weights in all of at least five looks: their gradients are exactly 0, and the loss is not.
    """
    looks = vitals.looks
    sizes = [size for seen in looks for size in seen.gradient.values() if not math.isnan(size)]
    if len(looks) > LOOKS + 1 and sizes and not any(sizes) and vitals.read()[-1] != 0:
        yield Seen(
            "the gradient of every weight is exactly 0.",
            f"all {len(looks[0].gradient)} of them in all {len(looks)} looks",
            named(looks[0].gradient),
            "look for torch.sign, round, clamp, argmax, a comparison, or a factor of 0 on the way to the loss",
        )


@rule("gradient-ascent", "warning", "symptom")
def falls_without_end(vitals: Vitals) -> Iterator[Seen]:
    """A loss that falls below 0 quicker and quicker has no lowest value: the sign of a term may be the wrong one.

    Looks at the means of four quarters of at least 24 updates: each falls by more than half as much again as the one
    before, and the last is below 0 and 5 times as large as the first. (A likelihood can be negative, but falls ever
    more slowly.)
    """
    losses = vitals.read()
    if len(losses) < 24 or vitals.case is None or not all(map(math.isfinite, losses)):
        return
    width = len(losses) // 4
    means = [sum(losses[at * width : (at + 1) * width]) / width for at in range(4)]
    falls = [one - two for one, two in pairwise(means)]
    quickens = falls[0] > 0 and all(two > 1.5 * one for one, two in pairwise(falls))
    if quickens and means[-1] < 0 and abs(means[-1]) > 5 * abs(means[0]):
        yield Seen(
            "the loss falls below 0, quicker and quicker.",
            f"in quarters of {len(losses)} updates: {', '.join(f'{mean:.3g}' for mean in means)}",
            vitals.case.place,
            "look at the sign of each term: minimise -log_prob, the error and not its negative, + KL",
        )


@rule("stuck-at-chance", "warning", "symptom")
def stuck_at_chance(vitals: Vitals) -> Iterator[Seen]:
    """A classifier whose loss stays at ln(classes) says the same of every sample: it has learned nothing of the inputs.

    Looks at cross_entropy over class indices: within 2 of 100 of ln(classes) in the last quarter of at least 60
    updates, and no lower than at the start, or than a while ago.
    """
    losses, case = vitals.read(), vitals.case
    if case is None or not case.passes or len(losses) < 60:
        return
    quarter = len(losses) // 4
    is_flat = len(losses) >= 100 and abs(trend(losses[-2 * quarter :]) - 1) < 0.01
    if not is_stalled(losses, 0.98) and not is_flat:
        return
    classes = vitals.classes
    if not classes:
        return
    last, chance = sum(losses[-len(losses) // 4 :]) / -(-len(losses) // 4), math.log(classes)
    if abs(last - chance) < 0.02 * chance:
        yield Seen(
            "the loss stays at what knowing nothing costs.",
            f"{last:.4g} over the last {-(-len(losses) // 4)} updates; ln({classes}) = {chance:.4g}, within 2 %",
            case.place,
            "give another lr, and look whether the inputs say anything about the labels; `epochal check` asks both",
        )
