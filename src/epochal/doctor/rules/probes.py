"""Rules that need passes of their own, on a copy: in eval mode, with one sample changed, with the data shuffled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from epochal.doctor.case import is_custom
from epochal.doctor.finding import Seen, rule
from epochal.doctor.rules.model import _depends_on_mode
from epochal.doctor.rules.symptoms import total
from epochal.doctor.trace import tensors
from epochal.losses import CLASS_INDEX
from epochal.objective import Supervised
from epochal.runtime.seeding import generator_states, set_generator_states

if TYPE_CHECKING:
    from epochal.doctor.probing import Probe

TOLERANCE = 1e-4  # of the size of the outputs


def differ(one: Any, other: Any, rows: slice | Tensor | None = None) -> float:
    """The largest difference between two outputs, of their size; over some rows of the batch."""
    worst = 0.0
    for a, b in zip(tensors(one), tensors(other)):
        if a.shape != b.shape or not a.is_floating_point():
            continue
        a, b = (
            (a.detach().double(), b.detach().double())
            if rows is None
            else (a.detach()[rows].double(), b.detach()[rows].double())
        )
        if a.numel():
            size = max(a.abs().max().item(), 1e-6)
            worst = max(worst, (a - b).abs().max().item() / size)
    return worst


@rule("eval-in-train-mode", "error", "probe")
def eval_in_train_mode(probe: Probe) -> Iterator[Seen]:
    """In train mode dropout draws and batch norm looks at the batch: what is validated is not the model that is used.

    Puts the copy into eval mode, and looks at the layers whose mode matters as they run: none may be in train mode. A
    ``train`` of the user's own that does not take the mode, or a forward that sets it, is to blame.
    """
    found = [layer for layer in probe.evaluated.layers if layer.is_training and _depends_on_mode(layer.module)]
    if found:
        yield Seen(
            "layers stay in train mode when the model is evaluated.",
            f"{len(found)} of the layers whose mode matters, after model.eval()",
            f"{found[0].path} ({type(found[0].module).__name__}) and so on",
            "leave train() and eval() to nn.Module: def train(self, mode=True): super().train(mode); return self",
        )


@rule("stochastic-eval", "warning", "probe")
def stochastic_eval(probe: Probe) -> Iterator[Seen]:
    """A model that draws in eval mode gives other predictions each time, and early stopping follows the noise.

    Calls the copy twice in eval mode, on the same batch: outputs differ by more than 1e-4 of their size. F.dropout needs
    training=self.training; a sampled latent needs its mean.
    """
    if is_custom(probe.case):
        return
    if (off := differ(probe.evaluated.outputs, probe.again.outputs)) > TOLERANCE:
        yield Seen(
            "the model gives different outputs for the same inputs in eval mode.",
            f"two calls differ by {off:.2g} of their size ({TOLERANCE:g} allowed)",
            f"{type(probe.model).__name__}; {probe.case.place}",
            "give F.dropout(x, p, training=self.training), and draw nothing when not self.training",
        )


@rule("batch-mixing", "warning", "probe")
def batch_mixing(probe: Probe) -> Iterator[Seen]:
    """The output for one sample must not depend on the others in its batch: when they are gone, it is another one.

    Changes one sample of a batch in eval mode: the outputs of all others stay as they are (lightning-bolts' verification).
    A reshape that mixes dimensions, or a recurrent network that wants (time, batch, features), is to blame. Exempt: an
    objective of the user's own, which may compare samples on purpose.
    """
    if (
        is_custom(probe.case)
        or probe.case.now.samples < 3
        or differ(probe.evaluated.outputs, probe.again.outputs) > TOLERANCE
    ):
        return
    count = probe.case.now.samples
    changed = probe.outputs(probe.with_row_changed(0))
    if changed is None or not all(one.dim() and one.shape[0] == count for one in tensors(changed)):
        return
    off = differ(probe.evaluated.outputs, changed, slice(1, None))
    if off > TOLERANCE:
        yield Seen(
            "the output for a sample depends on the other samples of its batch.",
            f"with sample 0 changed, those of others move by {off:.2g} of their size ({TOLERANCE:g} allowed), in eval mode",
            f"{type(probe.model).__name__}; {probe.case.place}",
            "look at every view, reshape and transpose: dimension 0 stays the batch; nn.LSTM(..., batch_first=True)",
        )


@rule("causal-leak", "error", "probe")
def causal_leak(probe: Probe) -> Iterator[Seen]:
    """A model that predicts what comes next, and can see it, copies it: its loss falls to 0, and it can predict nothing.

    Where targets are the inputs moved by one place (as for a language model), changes the last place of the inputs: the
    outputs of earlier places stay as they are. Where they are the inputs themselves, moved by none, that is the leak.
    """
    inputs, targets = probe.sequence()
    if inputs is None or targets is None:
        return
    if inputs.shape == targets.shape and bool((inputs == targets).all()):
        if not inputs.is_floating_point() and len(inputs.unique()) > 2:
            yield Seen(
                "the targets are the inputs themselves.",
                f"all of {inputs.numel()} entries of the first batch are equal",
                probe.case.place,
                "move them by one place: inputs = x[:, :-1], targets = x[:, 1:]",
            )
        return
    if not bool((inputs[:, 1:] == targets[:, :-1]).float().mean() > 0.99):
        return
    late = inputs.clone()
    late[:, -1] = inputs[:, -1].roll(1, 0) if not inputs.is_floating_point() else inputs[:, -1] + 1
    if bool((late == inputs).all()):
        return
    changed = probe.outputs(probe.with_inputs([late]))
    time, off = inputs.shape[1], 0.0
    for before, after in zip(tensors(probe.evaluated.outputs), tensors(changed)):
        axis = next((at for at in (1, 2) if before.dim() > at and before.shape[at] == time), None)
        if axis is not None and before.is_floating_point():
            early = [one.detach().double().narrow(axis, 0, time - 1) for one in (before, after)]
            off = max(off, (early[0] - early[1]).abs().max().item() / max(early[0].abs().max().item(), 1e-6))
    if off > TOLERANCE:
        yield Seen(
            "the model sees what it is to predict.",
            f"with the last of {time} places changed, outputs of earlier ones move by {off:.2g} of their size ({TOLERANCE:g} allowed)",
            f"{type(probe.model).__name__}; {probe.case.place}",
            "give the attention a causal mask, nn.Transformer.generate_square_subsequent_mask(T); pad a convolution on the left",
        )


@rule("inputs-ignored", "warning", "dependence")
def inputs_ignored(probe: Probe) -> Iterator[Seen]:
    """A model whose output is the same for all samples has learned the mean of the targets, and nothing of the inputs.

    Looks at the trained copy: on a batch whose inputs and targets differ, and on noise, its outputs are the same within 2e-7
    of their size; or one of several inputs can be shuffled, and nothing changes.
    """
    model, case = probe.trained, probe.case
    if model is None or case.now.samples < 4:
        return
    outputs = probe.outputs(case.now.batch, model)
    found = [
        one.detach().double()
        for one in tensors(outputs)
        if one.is_floating_point() and one.dim() and one.shape[0] == case.now.samples
    ]
    if found and not is_custom(case) and probe.targets_vary():
        spread = _spread(found)
        other = [
            one.detach().double()
            for one in tensors(probe.outputs(probe.with_noise(), model))
            if one.is_floating_point()
        ]
        if spread < 2e-7 and (not other or _spread(other) < 2e-7):
            yield Seen(
                "the outputs are the same for all inputs.",
                f"after {probe.updates} updates those of {case.now.samples} samples differ by {spread:.1g} of their size (2e-7 at least)",
                f"{case.output_layer()}; {case.place}",
                "look in the forward at what becomes of x: an unused variable, a layer that was not called, a unit that is dead",
            )
            return
    yield from _one_ignored(probe, model)


def _spread(outputs: list[Tensor]) -> float:
    """How far the outputs of samples lie apart, of their size."""
    return max((one - one[:1]).abs().max().item() / max(one.abs().max().item(), 1e-6) for one in outputs)


def _one_ignored(probe: Probe, model: Any) -> Iterator[Seen]:
    parts = probe.parts()
    if len(parts) < 2:
        return
    for name, part in parts:
        if part.dim() == 0 or part.shape[0] != probe.case.now.samples or bool((part == part[:1]).all()):
            continue
        states = generator_states()
        plain = probe.loss(probe.case.now.batch, model)
        set_generator_states(states)
        mixed = probe.loss(probe.with_part(name, part.roll(1, 0)), model)
        set_generator_states(states)
        if plain is not None and mixed is not None and abs(plain - mixed) <= 1e-9 * max(1.0, abs(plain)):
            yield Seen(
                "one of the inputs has no influence.",
                f"with input {name!r} of the samples exchanged, the loss stays {plain:.6g}",
                f"{type(probe.model).__name__}; {probe.case.place}",
                "use it in the forward, or leave it out of the data",
            )
            return


@rule("logit-threshold", "warning", "probe")
def logit_threshold(probe: Probe) -> Iterator[Seen]:
    """A threshold of 0.5, or rounding, is for probabilities; of scores, 0 is the middle. An argmax over one column is 0.

    Looks at the metrics and the loss as they are called: what is compared with 0.5 (or rounded) lies outside of 0..1; or
    argmax is taken over a dimension of size 1.
    """
    for operation in probe.metric_operations():
        (args, kwargs), name = operation.inputs, operation.name
        given = args[0]
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.numel() < 4:
            continue
        low, high = given.min().item(), given.max().item()
        if name == "argmax":
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            if isinstance(dim, int) and given.dim() > 1 and given.shape[dim] == 1:
                yield Seen("an argmax is taken over a single column, and is always 0.",
                           f"argmax over dimension {dim} of {tuple(given.shape)}", operation.place,
                           "compare the score with 0: (outputs > 0)")  # fmt: skip
                return
            continue
        bound = 0.5 if name == "round" else args[1] if len(args) > 1 else None
        bound = bound.item() if isinstance(bound, Tensor) and bound.numel() == 1 else bound
        if isinstance(bound, float) and bound == 0.5 and (low < -0.05 or high > 1.05):
            yield Seen(
                "scores are cut at 0.5, which is for probabilities.",
                f"they go from {low:.3g} to {high:.3g}",
                operation.place,
                "compare them with 0, or take torch.sigmoid(outputs) > 0.5",
            )
            return


@rule("wrong-average", "warning", "probe")
def wrong_average(probe: Probe) -> Iterator[Seen]:
    """A metric that is no mean over samples (a root, an f1, a correlation) is another one when it is averaged over batches.

    Computes a metric function of the user's over all of val at once, and as the mean over batches: they differ by more than
    5 of 100.
    """
    for name, whole, mean in probe.averaged_metrics():
        if abs(whole - mean) > 0.05 * max(abs(whole), abs(mean), 1e-9):
            yield Seen(
                f"the metric {name!r} is averaged over batches, and is no mean.",
                f"{mean:.4g} averaged over the batches of val, {whole:.4g} over all of it (5 % allowed)",
                f"metrics=, {name}",
                "give epochal.Metric or a torchmetrics metric, which keeps what it needs of each batch",
            )


@rule("impossible-metric", "error", "probe")
def impossible_metric(probe: Probe) -> Iterator[Seen]:
    """A share above 1, or below 0, is none: the metric counts something twice, or divides by the wrong number.

    Looks at metrics whose names say accuracy, precision, recall, f1 or auc, over val.
    """
    for name, whole, mean in probe.averaged_metrics():
        is_share = any(word in name.lower() for word in ("accuracy", "acc", "precision", "recall", "f1", "auc"))
        for value in (whole, mean):
            if is_share and not -1e-6 <= value <= 1 + 1e-6:
                yield Seen(
                    f"{name} is {value:.4g}, which no share can be.",
                    f"{value:.4g} over val (0 to 1 allowed)",
                    f"metrics=, {name}",
                    "divide by the number of samples, and look at the shapes: (n,) == (n, 1) compares each with each",
                )
                return


@rule("labels-unrelated", "warning", "probe")
def labels_unrelated(probe: Probe) -> Iterator[Seen]:
    """Labels that belong to other samples can be learned by heart, and never predicted.

    Asks three times, of rows that were not learned from: whether the nearest neighbours, a linear model, and the trained
    copy tell more than always the same answer. None does. A file sorted anew, or a shuffle of one array alone, is to blame.
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
            "look at how inputs and labels are put side by side: look at some pairs, and shuffle both by the same index",
        )


@rule("stuck-at-chance", "warning", "capacity")
def learns_nothing(probe: Probe) -> Iterator[Seen]:
    """The inputs tell the labels, and the model does not learn it: it cannot see what they depend on.

    Asks of rows that were held out whether neighbours or a linear model tell more than twice what chance does, while the
    trained copy, after at least 60 updates, is no better than at its start.
    """
    asked = probe.relation
    if asked is not None and isinstance(probe.case.objective, Supervised) and probe.updates >= 60:
        if asked.explained > 2 * asked.chance and not asked.is_learned:
            yield Seen(
                "the model learns nothing of what the inputs tell.",
                f"of {asked.rows} rows held out, neighbours or a linear model explain {asked.explained:.0%} of the targets "
                f"({asked.chance:.0%} is chance), and a copy trained for {probe.updates} updates nothing",
                f"{type(probe.model).__name__}; {probe.case.place}",
                "give the model what the answer depends on: order and positions, all of the inputs, more width",
            )


@rule("penalty-dominates", "warning", "probe")
def weights_shrink(probe: Probe) -> Iterator[Seen]:
    """The penalty is larger than the error: the weights shrink towards 0 instead of learning.

    Looks at the trained copy: its weights are less than half of what they began with, and the loss of torch's inside of
    what is minimised has not come down by a tenth.
    """
    vitals = probe.trial.vitals if probe.trial is not None else None
    if probe.trained is None or vitals is None or len(vitals.looks) < 2:
        return
    first, last = (
        math.sqrt(sum(size**2 for size in look.weight.values())) for look in (vitals.looks[0], vitals.looks[-1])
    )
    before, after = probe.known_loss(probe.model), probe.known_loss(probe.trained)
    if before and after and last < 0.5 * first and after > 0.9 * before:
        yield Seen(
            "the weights shrink, and the error does not.",
            f"after {probe.updates} updates their norm is {last / first:.2g} of what it was (0.5 allowed), the error {after:.3g} "
            f"where it was {before:.3g}",
            probe.case.place,
            "make the penalty smaller: weight_decay=0.01 with adamw, or a factor of 1e-4 in the objective",
        )


@rule("tiny-batch-norm", "warning", "probe")
def statistics_off(probe: Probe) -> Iterator[Seen]:
    """Batch norm with other statistics in eval mode than in train mode makes another model of it.

    Looks at the trained copy, with batch norms: on the same batch its loss in eval mode is more than twice that in train
    mode, and half as much again as that of knowing nothing (a momentum that is too small, statistics of other data).
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
            f"the loss of one batch is {evaluated:.3g} in eval mode and {trained:.3g} in train mode (twice allowed), after {probe.updates} updates",
            f"{type(probe.model).__name__}; {probe.case.place}",
            "leave momentum at 0.1 (it is the share of the new batch), or take nn.GroupNorm",
        )


@rule("saturation", "warning", "probe")
def saturation(probe: Probe) -> Iterator[Seen]:
    """A sigmoid or a tanh at its ends is flat: nothing goes back through it, and the units before it stand still.

    Looks at the first passes, and at the trained copy: more than 70 of 100 of what a sigmoid, a tanh or a recurrent layer
    gives inside of the model lies within 0.01 of its ends.
    """
    shares = [probe.saturated(one) for one in probe.case.passes]
    for name in shares[0] if shares else ():
        every = [one.get(name, 0.0) for one in shares]
        if min(every) > 0.7:
            yield Seen(
                "most units of a layer are at the ends of their activation.",
                f"{min(every):.0%} of what {name} gives is within 0.01 of its ends (70 % allowed), in {len(every)} batches",
                f"{name} of {type(probe.model).__name__}",
                "normalise what goes into it, initialise smaller, nn.init.xavier_normal_, or take nn.ReLU()",
            )
            return


@rule("vanishing-gradient", "warning", "probe")
def fades_over_time(probe: Probe) -> Iterator[Seen]:
    """What comes early in a sequence has no influence on the loss where the gradient fades on the way back to it.

    Looks at the gradient of the loss by each place of a sequence of at least 8, while the loss of the trial does not fall: at
    the first place it is below 1e-5 of what it is at the last.
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

    Looks at the gradient of the loss by each place of a sequence of at least 8: at the first place it is more than 1000 times
    what it is at the last; or at its norm in the first pass: more than 50 times that of all weights.
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
    if looks and (size := total(looks[0].gradient) / max(total(looks[0].weight), 1e-12)) > 50:
        yield Seen(
            "the gradient is huge from the start.",
            f"its norm is {size:.3g} times that of the weights in the first update (50 allowed)",
            probe.case.place,
            "give clip=1.0, initialise smaller, put norms between the layers, or scale the targets",
        )


@rule("loss-metric-disagree", "warning", "probe")
def loss_metric_disagree(probe: Probe) -> Iterator[Seen]:
    """A metric that is computed over another dimension than the loss says nothing of what is learned.

    Looks at the argmax of the model's outputs in a metric: for scores (n, classes, ...) it is taken over dimension 1.
    """
    classes = {
        call.outputs.shape: call.outputs.shape[1]
        for call in probe.case.now.calls
        if call.name in CLASS_INDEX and call.outputs.dim() > 2
    }
    for operation in probe.metric_operations():
        (args, kwargs), name = operation.inputs, operation.name
        given = args[0]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if name != "argmax" or not isinstance(given, Tensor) or given.shape not in classes or not isinstance(dim, int):
            continue
        if dim % given.dim() != 1:
            yield Seen(
                "a metric takes the argmax over another dimension than the classes.",
                f"argmax over dimension {dim % given.dim()} of {tuple(given.shape)}; the loss has its classes in dimension 1",
                operation.place,
                "take outputs.argmax(1)",
            )
            return


@rule("cannot-fit", "warning", "symptom")
def cannot_fit(case: object) -> Iterator[Seen]:
    """A model that cannot learn sixteen samples by heart will not learn more of them.

    Told by ``epochal check`` where a training goes badly: a copy is trained on sixteen samples alone, at the planned rate and
    at ten times that, and keeps more than half of the loss it began with.
    """
    return iter(())
