"""Rules that need passes of their own, on a copy: in eval mode, with one sample changed, with the data shuffled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from epochal.doctor.case import is_custom
from epochal.doctor.finding import Seen, rule
from epochal.doctor.rules.model import _depends_on_mode
from epochal.doctor.rules.symptoms import no_gradient_at_all
from epochal.doctor.trace import tensors
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
    ``train`` of the user's own that does not take the mode (a warning, for it may be meant so), or a forward that sets
    it, is to blame.
    """
    found = [layer for layer in probe.evaluated.layers if layer.is_training and _depends_on_mode(layer.module)]
    if found:
        is_meant = any(type(one).train is not nn.Module.train for one in (*probe.model.modules(), found[0].module))
        yield Seen(
            "layers stay in train mode when the model is evaluated.",
            f"{len(found)} of the layers whose mode matters, after model.eval()",
            f"{found[0].path} ({type(found[0].module).__name__}) and so on",
            "leave train() and eval() to nn.Module: def train(self, mode=True): super().train(mode); return self",
            level="warning" if is_meant else None,  # as of a dropout that estimates how sure it is
        )


@rule("stochastic-eval", "warning", "probe")
def stochastic_eval(probe: Probe) -> Iterator[Seen]:
    """A model that draws in eval mode gives other predictions each time, and early stopping follows the noise.

    Calls the copy twice in eval mode, on the same batch: outputs differ by more than 1e-4 of their size. F.dropout
    needs training=self.training; a sampled latent needs its mean. Under an objective of the user's own it is info.
    """
    off = differ(probe.evaluated.outputs, probe.again.outputs)
    if is_custom(probe.case):  # which may draw by itself
        once, again = (probe.outputs(probe.case.now.batch) for _ in range(2))
        off = differ(once, again) if once is not None else 0.0
    if off > TOLERANCE:
        yield Seen(
            "the model gives different outputs for the same inputs in eval mode.",
            f"two calls differ by {off:.2g} of their size ({TOLERANCE:g} allowed)",
            f"{type(probe.model).__name__}; {probe.case.place}",
            "give F.dropout(x, p, training=self.training), and draw nothing when not self.training",
            level="info" if is_custom(probe.case) else None,
        )


def _tolerance(model: nn.Module) -> float:
    """How far outputs may differ for no reason; in half precision they are rounded in other ways."""
    is_half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return 0.05 if is_half else TOLERANCE


@rule("batch-mixing", "warning", "probe")
def batch_mixing(probe: Probe) -> Iterator[Seen]:
    """The output for one sample must not depend on the others in its batch: when they are gone, it is another one.

    Changes one sample of a batch in eval mode: the outputs of all others stay as they are (lightning-bolts'
    verification). A reshape that mixes dimensions, or a recurrent network that wants (time, batch, features), is to
    blame. Under an objective of the user's own, which may compare samples on purpose, it is info, as it is
    where the batch is all of the data (the nodes of a graph, say).
    """
    count = probe.case.now.samples
    if count < 3 or differ(probe.evaluated.outputs, probe.again.outputs) > TOLERANCE:
        return
    changed = probe.outputs(probe.with_row_changed(0))
    if changed is None or not all(one.dim() and one.shape[0] == count for one in tensors(changed)):
        return
    plain = probe.outputs(probe.case.now.batch) if is_custom(probe.case) else probe.evaluated.outputs
    off = differ(plain, changed, slice(1, None))
    if off > _tolerance(probe.model):
        yield Seen(
            "the output for a sample depends on the other samples of its batch.",
            f"with sample 0 changed, those of others move by {off:.2g} of their size ({TOLERANCE:g} allowed), in "
            "eval mode",
            f"{type(probe.model).__name__}; {probe.case.place}",
            "look at every view, reshape and transpose: dimension 0 stays the batch; nn.LSTM(..., batch_first=True)",
            level="info" if is_custom(probe.case) or count == probe.case.run.train.samples else None,
        )


@rule("causal-leak", "error", "probe")
def causal_leak(probe: Probe) -> Iterator[Seen]:
    """A model that predicts what comes next, and can see it, copies it: its loss falls to 0, and it can predict
    nothing.

    Where targets are the inputs moved by one place (as for a language model), changes the last place of the inputs: the
    outputs of earlier places stay as they are. Where they are the inputs themselves, moved by none, and the model does
    not look ahead, that is the leak (an autoencoder looks at all of them).
    """
    inputs, targets = probe.sequence()
    if inputs is None or targets is None:
        return
    if bool((inputs == targets).all()):
        if not inputs.is_floating_point() and len(inputs.unique()) > 2 and not _looks_ahead(probe, inputs, 1):
            yield Seen(
                "the targets are the inputs themselves.",
                f"all of {inputs.numel()} entries of the first batch are equal",
                probe.case.place,
                "move them by one place: inputs = x[:, :-1], targets = x[:, 1:]",
                level="warning",  # it may be an autoencoder of single places
            )
        return
    moved = [at for at in range(1, inputs.dim()) if _is_moved(inputs, targets, at)]
    if not moved:
        return
    time, off = inputs.shape[moved[0]], _looks_ahead(probe, inputs, moved[0])
    if off > _tolerance(probe.model):
        yield Seen(
            "the model sees what it is to predict.",
            f"with the last of {time} places changed, outputs of earlier ones move by {off:.2g} of their size "
            f"({TOLERANCE:g} allowed)",
            f"{type(probe.model).__name__}; {probe.case.place}",
            "give the attention a causal mask, nn.Transformer.generate_square_subsequent_mask(T); pad a "
            "convolution on the left",
        )


def _looks_ahead(probe: Probe, inputs: Tensor, axis: int) -> float:
    """By how much the outputs of earlier places move, of their size, where the last place of the inputs is changed."""
    time, late = inputs.shape[axis], inputs.clone()
    last = late.select(axis, time - 1)
    last.copy_(last + 1 if inputs.is_floating_point() else last.roll(1, 0))
    before, after = probe.given(inputs), probe.given(late)
    if bool((late == inputs).all()) or before is None or after is None:
        return 0.0
    return max((_moves_early(one, other, time) for one, other in zip(tensors(before), tensors(after))), default=0.0)


def _moves_early(one: Tensor, other: Tensor, time: int) -> float:
    """By how much all places but the last differ, of their size; the least of all dimensions that may be the time."""
    found = []
    for along in (at for at in range(1, one.dim()) if one.shape[at] == time and one.is_floating_point()):
        early = [part.detach().double().narrow(along, 0, time - 1) for part in (one, other)]
        found.append((early[0] - early[1]).abs().max().item() / max(early[0].abs().max().item(), 1e-6))
    return min(found, default=0.0)


def _is_moved(inputs: Tensor, targets: Tensor, axis: int) -> bool:
    """Whether the targets are the inputs, one place later."""
    time = inputs.shape[axis]
    if time <= 2:
        return False
    now, then = inputs.narrow(axis, 1, time - 1), targets.narrow(axis, 0, time - 1)
    counts = (now != now.flatten().mode().values) | (then != then.flatten().mode().values)  # what is not mostly there
    return bool(counts.any()) and bool((now == then)[counts].float().mean() > 0.99)


@rule("inputs-ignored", "warning", "dependence")
def inputs_ignored(probe: Probe) -> Iterator[Seen]:
    """A model whose output is the same for all samples has learned the mean of the targets, and nothing of the inputs.

    Looks at the trained copy: on a batch whose inputs and targets differ, and on noise, its outputs are the same
    within 2e-7 of their size; or one of several inputs can be shuffled, and nothing changes.
    """
    model, case = probe.trained, probe.case
    if model is None or case.now.samples < 4 or any(share > 0.9 for _, share in probe.dead(model)):
        return
    if probe.trial is not None and any(no_gradient_at_all(probe.trial.vitals)):
        return  # which is why
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
                f"after {probe.updates} updates those of {case.now.samples} samples differ by {spread:.1g} of "
                "their size (2e-7 at least)",
                f"{case.output_layer()}; {case.place}",
                "look in the forward at what becomes of x: an unused variable, a layer that was not called, a "
                "unit that is dead",
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
