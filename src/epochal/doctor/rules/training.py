"""Rules over a copy that was trained for a while: what it learned, and what stood in its way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _BatchNorm

from epochal.doctor.finding import Seen, rule
from epochal.doctor.rules.model import init_scale, told_of_pairs
from epochal.doctor.rules.symptoms import is_stalled, total
from epochal.objective import Supervised

if TYPE_CHECKING:
    from epochal.doctor.probing import Probe


@rule("labels-unrelated", "warning", "probe")
def labels_unrelated(probe: Probe) -> Iterator[Seen]:
    """Labels that belong to other samples can be learned by heart, and never predicted.

    Asks three times, of rows that were not learned from: whether the nearest neighbours, a linear model, and the
    trained copy tell more than always the same answer. None does. A file sorted anew, or a shuffle of one array
    alone, is to blame.
    """
    if not isinstance(probe.case.objective, Supervised):
        return
    asked = probe.relation
    if asked is not None and asked.explained < asked.chance and not asked.is_learned:
        yield Seen(
            "the labels seem to have nothing to do with the inputs.",
            f"of {asked.rows} rows held out, neighbours and a linear model explain {max(0.0, asked.explained):.1%} "
            f"({asked.chance:.1%} is chance), and a trained copy no more",
            f"train; {probe.case.place}",
            "look at how inputs and labels are put side by side: look at some pairs, and shuffle both by the "
            "same index",
        )


@rule("stuck-at-chance", "warning", "capacity")
def learns_nothing(probe: Probe) -> Iterator[Seen]:
    """The inputs tell the labels, and the model does not learn it: it cannot see what they depend on.

    Asks of rows that were held out whether neighbours or a linear model tell more than twice what chance does, while
    the trained copy, after at least 60 updates, is no better than at its start.
    """
    asked = probe.relation
    if asked is None or not isinstance(probe.case.objective, Supervised) or probe.updates < 60 or asked.is_learned:
        return
    if probe.trial is None or not is_stalled(probe.trial.losses, 0.93):
        return  # it learns, if slowly; or by heart
    if asked.explained > 2 * asked.chance:
        yield Seen(
            "the model learns nothing of what the inputs tell.",
            f"of {asked.rows} rows held out, neighbours or a linear model explain {asked.explained:.0%} of the targets "
            f"({asked.chance:.0%} is chance), and a copy trained for {probe.updates} updates nothing",
            f"{type(probe.model).__name__}; {probe.case.place}",
            "give the model what the answer depends on: order and positions, all of the inputs, more width",
        )


@rule("missing-nonlinearity", "warning", "probe")
def lacks_nonlinearity(probe: Probe) -> Iterator[Seen]:
    """Two linear layers in a row are one linear layer, and here the data ask for more.

    Looks at linear layers in a row of one part of the model, while the trial has kept more than three quarters of its
    loss, or neighbours explain a tenth more of the targets than a linear model.
    """
    told, asked = told_of_pairs(probe.case), probe.relation
    if told is None or not told[1] or probe.trial is None:
        return
    is_curved = asked is not None and asked.explained > asked.linear + 0.1
    if is_curved or is_stalled(probe.trial.losses, 0.75):
        yield told[0]


@rule("init-scale", "warning", "probe")
def badly_begun(probe: Probe) -> Iterator[Seen]:
    """Where layers blow their inputs up, or let them fade, and the training goes badly, that is why.

    Looks at the deviation over samples in the first pass, at the trial, whose loss has not fallen, and at the weights:
    the deviation of most, times the root of the inputs, is not from 0.1 to 10 (torch's own is about 0.6).
    """
    layers = [p.detach() for p in probe.case.trained.values() if p.dim() > 1]
    gains = [p.std().item() * math.sqrt(p[0].numel()) for p in layers if p.numel() > 1]
    if probe.is_stalled() and gains and not 0.1 < median(gains) < 10:
        yield from init_scale(probe.case)


@rule("dead-units", "warning", "probe")
def dead_at_once(probe: Probe) -> Iterator[Seen]:
    """A layer whose units are dead before the first update was initialised so.

    Looks at what activations give in a pass over a batch, before anything is trained: 0 for all samples in nine of ten
    units, and in the trained copy, too.
    """
    begun = {path for path, share in probe.dead(probe.model) if share > 0.9}
    if begun:
        yield from (seen for seen in all_dead(probe) if seen.where.partition(" ")[0] in begun)


@rule("dead-units", "warning", "probe", told="capacity")
def all_dead(probe: Probe) -> Iterator[Seen]:
    """A unit behind a ReLU that is never above 0 gets no gradient, and does not come back.

    Looks at the layers of the trained copy in a pass in eval mode: what an activation gives is 0 for all samples in
    nine of ten units.
    """
    model, case = probe.trained, probe.case
    if model is None or case.now.samples < 8:
        return
    for path, share in probe.dead(model):
        if share > 0.9:
            yield Seen(
                "nearly all units of a layer are dead.",
                f"{share:.0%} give 0 for all {case.now.samples} samples of a batch (90 % allowed), after "
                f"{probe.updates} updates",
                f"{path} of {type(model).__name__}",
                "initialise biases with 0 and weights with nn.init.kaiming_normal_, lower lr, or take nn.LeakyReLU()",
            )
            return


@rule("penalty-dominates", "warning", "probe")
def weights_shrink(probe: Probe) -> Iterator[Seen]:
    """The penalty is larger than the error: the weights shrink towards 0 instead of learning.

    Looks at the trained copy: the loss of torch's inside of what is minimised has not come down by a tenth, and its
    weights are less than half of what they began with, or what is minimised has halved.
    """
    trial = probe.trial
    if trial is None or probe.trained is None or len(trial.vitals.looks) < 2:
        return
    vitals = trial.vitals
    first, last = (
        math.sqrt(sum(size**2 for size in look.weight.values())) for look in (vitals.looks[0], vitals.looks[-1])
    )
    before, after = probe.known_loss(probe.model), probe.known_loss(probe.trained)
    if not before or not after or after < 0.9 * before:
        return
    whole = [probe.loss(probe.case.now.batch, model) or 0.0 for model in (probe.model, probe.trained)]
    if whole[1] < 0.5 * whole[0] and whole[0] > 2 * before:
        yield Seen(
            "what is added to the error is all that gets smaller.",
            f"what is minimised went from {whole[0]:.3g} to {whole[1]:.3g}, the error inside of it from "
            f"{before:.3g} to "
            f"{after:.3g}",
            probe.case.place,
            "make the other terms smaller: a factor of 0.01, or one that rises from 0",
        )
    elif last < 0.5 * first:
        yield Seen(
            "the weights shrink, and the error does not.",
            f"after {probe.updates} updates their norm is {last / first:.2g} of what it was (0.5 allowed), the "
            f"error {after:.3g} "
            f"where it was {before:.3g}",
            probe.case.place,
            "make the penalty smaller: weight_decay=0.01 with adamw, or a factor of 1e-4 in the objective",
        )


@rule("tiny-batch-norm", "warning", "probe")
def statistics_off(probe: Probe) -> Iterator[Seen]:
    """Batch norm with other statistics in eval mode than in train mode makes another model of it.

    Looks at the trained copy, with batch norms: on the same batch its loss in eval mode is more than twice that in
    train mode, and half as much again as that of knowing nothing (a momentum that is too small, statistics of other
    data).
    """
    model = probe.trained
    if model is None or probe.updates < 20 or not any(isinstance(part, _BatchNorm) for part in model.modules()):
        return
    evaluated, trained = probe.loss(probe.case.now.batch, model), probe.loss(probe.case.now.batch, model, training=True)
    if evaluated is None or trained is None or trained <= 0 or probe.trial is None:
        return
    if evaluated > 2 * trained and evaluated - trained > 0.3 * probe.trial.first:
        yield Seen(
            "batch norm makes another model in eval mode than in train mode.",
            f"the loss of one batch is {evaluated:.3g} in eval mode and {trained:.3g} in train mode (twice "
            f"allowed), after {probe.updates} updates",
            f"{type(probe.model).__name__}; {probe.case.place}",
            "leave momentum at 0.1 (it is the share of the new batch), or take nn.GroupNorm",
        )


@rule("saturation", "warning", "probe")
def saturation(probe: Probe) -> Iterator[Seen]:
    """A sigmoid or a tanh at its ends is flat: nothing goes back through it, and the units before it stand still.

    Looks at the first passes, and at the trained copy: more than 70 of 100 of what a sigmoid, a tanh or a recurrent
    layer gives inside of the model lies within 0.01 of its ends.
    """
    last = probe.case.output_layer().partition(" ")[0]  # whose ends may be the answer
    shares = [{name: share for name, share in probe.saturated(one).items() if name.partition(" ")[0] != last}
              for one in probe.case.passes]  # fmt: skip
    for name in shares[0] if shares else ():
        every = [one.get(name, 0.0) for one in shares]
        if min(every) > 0.7:
            yield Seen(
                "most units of a layer are at the ends of their activation.",
                f"{min(every):.0%} of what {name} gives is within 0.01 of its ends (70 % allowed), in "
                f"{len(every)} batches",
                f"{name} of {type(probe.model).__name__}",
                "normalise what goes into it, initialise smaller, nn.init.xavier_normal_, or take nn.ReLU()",
            )
            return


@rule("vanishing-gradient", "warning", "probe")
def fades_over_time(probe: Probe) -> Iterator[Seen]:
    """What comes early in a sequence has no influence on the loss where the gradient fades on the way back to it.

    Looks at the gradient of the loss by each place of a sequence of at least 8, while the loss of the trial does not
    fall: at the first place it is below 1e-5 of what it is at the last.
    """
    for ratio, length in probe.over_time():
        if ratio < 1e-5 and probe.is_stalled():
            yield Seen(
                "the gradient vanishes on its way back through the sequence.",
                f"by the first of {length} places it is {ratio:.2g} of that by the last (1e-5 allowed)",
                f"{type(probe.model).__name__}; {probe.case.place}",
                "take nn.LSTM or nn.GRU, initialise recurrent weights with nn.init.orthogonal_, or use attention",
            )


@rule("exploding-gradient", "warning", "probe")
def grows_over_time(probe: Probe) -> Iterator[Seen]:
    """A gradient that grows on the way back through a sequence, or through the layers, makes every rate too high.

    Looks at the gradient of the loss by each place of a sequence of at least 8: at the first place it is more than
    1000 times what it is at the last; or at its norm in the first pass, where the training goes badly: more
    than 50 times that of all weights.
    """
    for ratio, length in probe.over_time():
        if ratio > 1e3:
            yield Seen(
                "the gradient explodes on its way back through the sequence.",
                f"by the first of {length} places it is {ratio:.3g} times that by the last (1000 allowed)",
                f"{type(probe.model).__name__}; {probe.case.place}",
                "give clip=1.0, initialise recurrent weights with nn.init.orthogonal_, or take nn.LSTM",
            )
            return
    looks = probe.trial.vitals.looks if probe.trial is not None else []
    weights = total(looks[0].weight) if looks else 0.0
    goes_badly = probe.trial is not None and (probe.trial.error is not None or probe.is_stalled())
    if goes_badly and weights > 1e-3 and (size := total(looks[0].gradient) / weights) > 50:
        yield Seen(
            "the gradient is huge from the start.",
            f"its norm is {size:.3g} times that of the weights in the first update (50 allowed)",
            probe.case.place,
            "give clip=1.0, initialise smaller, put norms between the layers, or scale the targets",
        )


@rule("cannot-fit", "warning", "symptom")
def cannot_fit(case: object) -> Iterator[Seen]:
    """A model that cannot learn sixteen samples by heart will not learn more of them.

    Told by ``epochal check`` where a training goes badly: a copy is trained on sixteen samples alone, at the planned
    rate and at ten times that, and keeps more than half of the loss it began with.
    """
    return iter(())
