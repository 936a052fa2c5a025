"""Rules over the targets: their form, their range, and how many there are of each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from epochal import losses
from epochal.doctor.case import Case
from epochal.doctor.finding import Seen, rule


@rule("target-format", "error", "batch")
def target_format(case: Case) -> Iterator[Seen]:
    """Classes are given as indices, or as probabilities that sum to 1; anything else is not what the loss computes
    with.

    Looks at the targets of cross_entropy: floating point rows that are negative, or do not sum to 1 within 0.001 (to
    less, in all of them: a warning); and at those of a binary cross-entropy without weights: they lie from 0 to 1.
    """
    # Else something may be left out of it.
    for call in (one for one in case.now.calls if one.reduction != "none" and not one.is_weighted):
        targets, shapes = call.targets.detach(), (tuple(call.outputs.shape), tuple(call.targets.shape))
        if call.name == "cross_entropy" and targets.is_floating_point() and targets.shape == call.outputs.shape:
            off = (targets.sum(1) - 1).abs().max().item()
            is_less = targets.sum(1).max().item() < 1 + 1e-3 and targets.min().item() >= 0
            if off > 1e-3 or targets.min().item() < -1e-6:
                yield Seen(
                    "the targets of cross_entropy are neither class indices nor probabilities.",
                    f"the rows of targets {shapes[1]} sum to 1 within {off:.3g} (0.001 allowed), "
                    f"and go from {targets.min().item():.3g} to {targets.max().item():.3g}",
                    case.at(call.place),
                    'give y.argmax(1) if they are scores; loss="bce_with_logits" if several classes hold at once',
                    level=None if not is_less and case.is_given(targets) else "warning",  # samples may be weighted
                )
        if call.name in losses.BINARY:
            low, high = targets.min().item(), targets.max().item()
            if low < -1e-6 or high > 1 + 1e-6:
                yield Seen(
                    "the targets of a binary cross-entropy are not from 0 to 1.",
                    f"they go from {low:.3g} to {high:.3g}",
                    case.at(call.place),
                    "give 0.0 and 1.0, for example (y > 0).float()",
                    level=None if case.is_given(targets) else "warning",  # it may play with them
                )


@rule("targets-ignored", "warning", "batch")
def targets_ignored(case: Case) -> Iterator[Seen]:
    """Targets that equal ignore_index count nothing: where nearly all do, nearly nothing is learned.

    Looks at the class indices of the first batches: more than 95 of 100 equal ignore_index in all of them.
    """
    for call in case.now.calls:
        if call.name not in losses.CLASS_INDEX or call.targets.is_floating_point():
            continue
        index = call.ignore_index
        share = (call.targets == index).float().mean().item()
        if share > 0.95:
            yield Seen(
                "all targets of a batch are ignored." if share == 1 else "nearly all targets of a batch are ignored.",
                f"{share:.0%} of {call.targets.numel()} equal ignore_index={index} (95 % allowed)",
                case.at(call.place),
                "look at what makes the labels: the padding, the mask, the shift",
            )


def class_counts(case: Case) -> tuple[Tensor, int] | None:
    """How many targets there are of each class, and how many classes the model gives scores for."""
    call = next((one for one in case.now.calls if one.name in losses.CLASS_INDEX), None)
    if call is None or call.targets.is_floating_point() or call.targets.dim() != 1 or case.sample is None:
        return None
    targets, classes = case.sample[1], call.outputs.shape[1] if call.outputs.dim() > 1 else 0
    if targets is None or targets.is_floating_point() or targets.dim() != 1 or not classes:
        return None
    targets = targets[(targets >= 0) & (targets < classes)]
    return torch.bincount(targets, minlength=classes), classes


@rule("missing-class", "warning", "data")
def missing_class(case: Case) -> Iterator[Seen]:
    """A class that never occurs is never learned; where it is class 0, or the last one, the labels are probably off
    by one.

    Looks at the class indices: some class that the model has an output for does not occur, among at least 20 labels for
    each class.
    """
    found = class_counts(case)
    if found is None:
        return
    counts, classes = found
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty or int(counts.sum()) < 20 * classes:
        return
    from_one = empty == [0]
    yield Seen(
        "class 0 never occurs: the labels seem to start at 1."
        if from_one
        else "the model has outputs for classes that never occur.",
        f"of {classes} classes {len(empty)} have no label, among {int(counts.sum())}",
        f"class {', '.join(map(str, empty[:8]))}; {case.place}",
        "give y - 1, and one output less"
        if from_one
        else f"give the model {classes - len(empty)} outputs, or the missing labels",
    )


@rule("missing-class", "info", "data")
def missing_label(case: Case) -> Iterator[Seen]:
    """A label that is never set, or always, tells a model nothing.

    Looks at targets of 0 and 1, several labels a sample, over at least 200 samples.
    """
    targets = case.sample[1] if case.sample is not None else None
    if targets is None or targets.dim() != 2 or not any(call.name in losses.BINARY for call in case.now.calls):
        return
    constant = (targets == targets[0]).all(0).nonzero().flatten().tolist() if len(targets) >= 200 else []
    if constant and targets.shape[1] > 1:
        yield Seen("some labels are the same for all samples.", f"{len(constant)} of {targets.shape[1]}, over "
                   f"{len(targets)} samples", f"labels {', '.join(map(str, constant[:8]))}; {case.place}",
                   "leave these outputs out, or look for what became of the labels")  # fmt: skip


@rule("targets-ignored", "warning", "batch")
def one_class_counts(case: Case) -> Iterator[Seen]:
    """Where all that counts is one class, a model learns to say it always: the mask may be the wrong way round.

    Looks at the class indices of the first batches: some equal ignore_index, and all others are the same class.
    """
    for call in case.now.calls:
        if call.name not in losses.CLASS_INDEX or call.targets.is_floating_point():
            continue
        index = call.ignore_index
        counted = call.targets[call.targets != index]
        if 8 < len(counted) < call.targets.numel() and bool((counted == counted[0]).all()):
            yield Seen(
                "all targets that count are of one class.",
                f"{len(counted)} of {call.targets.numel()}, all of class {int(counted[0])}; the others equal "
                "ignore_index",
                case.at(call.place),
                "look at what makes the labels: ignore the padding, and not all but the padding",
            )


@rule("class-imbalance", "info", "data")
def class_imbalance(case: Case) -> Iterator[Seen]:
    """Where one class is much more frequent, a model that always says it has a high accuracy.

    Looks at the class indices, or at targets of 0 and 1: the most frequent is more than 10 times as frequent as the
    rarest, and the loss has no class weights, and the loader no sampler.
    """
    counts = _counts(case)
    loss, loader = getattr(case.objective, "loss", None), getattr(case.run.train, "loader", None)
    if counts is None or getattr(loss, "weight", None) is not None or getattr(loss, "pos_weight", None) is not None:
        return
    if "Weighted" in type(getattr(loader, "sampler", None)).__name__:
        return
    counts = counts[counts > 0]
    if len(counts) > 1 and int(counts.sum()) >= 100 and (ratio := float(counts.max() / counts.min())) > 10:
        yield Seen(
            "some classes are much rarer than others.",
            f"the most frequent is {ratio:.0f} times as frequent as the rarest (10 allowed); always saying it is right "
            f"for {float(counts.max() / counts.sum()):.0%}",
            f"targets of train; {case.place}",
            'give loss=nn.CrossEntropyLoss(weight=...), or metrics=["f1"], which does not forgive it',
        )


def _counts(case: Case) -> Tensor | None:
    if (found := class_counts(case)) is not None:
        return found[0]
    targets = case.sample[1] if case.sample is not None else None
    if targets is None:
        return None
    call = next((one for one in case.now.calls if one.name in losses.CLASS_INDEX), None)
    if call is not None and not targets.is_floating_point():
        kept = targets[(targets != call.ignore_index) & (targets >= 0)]
        return torch.bincount(kept.long(), minlength=2) if kept.numel() and kept.max() < 100_000 else None
    if not any(call.name in losses.BINARY for call in case.now.calls):
        return None
    flat = targets.flatten()  # of several labels, all together
    if not bool(((flat == 0) | (flat == 1)).all()):
        return None
    return torch.bincount(flat.long(), minlength=2)


@rule("class-imbalance", "warning", "data")
def weights_reversed(case: Case) -> Iterator[Seen]:
    """Class weights that favour the frequent classes make an imbalance worse: they are to be like 1 / count.

    Looks at ``weight`` of the loss, where the most frequent class is more than twice as frequent as the rarest, and
    counts more than twice as much; and at ``pos_weight`` of a single output, which has to be above 1 where the
    positive ones are the rarer ones.
    """
    counts, loss = _counts(case), getattr(case.objective, "loss", None)
    weight, positive = getattr(loss, "weight", None), getattr(loss, "pos_weight", None)
    told = None
    if counts is None or int(counts.sum()) < 100:
        return
    if isinstance(weight, Tensor) and weight.dim() == 1 and len(weight) == len(counts):
        most, least = int(counts.argmax()), int(counts.argmin())
        if counts[most] > 2 * counts[least] > 0 and weight[most] > 2 * weight[least]:
            told = (
                f"class {most} of {int(counts[most])} samples weighs {weight[most].item():.3g}, "
                f"class {least} of {int(counts[least])} {weight[least].item():.3g}"
            )
    elif isinstance(positive, Tensor) and positive.numel() == 1 and len(counts) == 2:
        negatives, positives, factor = *counts.tolist(), positive.item()
        if (positives < negatives / 2 and factor < 0.8) or (positives > 2 * negatives and factor > 1.25):
            told = f"pos_weight {factor:.3g}, with {positives} positive and {negatives} negative samples"
    if told:
        yield Seen(
            "the weights of the loss favour what is frequent already.",
            told,
            f"the loss, {case.place}",
            "weigh classes by 1 / count, and give pos_weight = negatives / positives",
        )


@rule("unscaled-targets", "info", "data")
def unscaled_targets(case: Case) -> Iterator[Seen]:
    """Targets far from 0, or far apart, take thousands of updates until the last layer reaches their size.

    Looks at the targets of a loss of differences: a deviation above 50, or a mean of more than 10 deviations, while the
    outputs of the model are a hundredth of it.
    """
    call = next((one for one in case.now.calls if one.name in losses.ELEMENTWISE - losses.BINARY), None)
    targets = case.sample[1] if case.sample is not None else None
    if call is None or targets is None or not targets.is_floating_point() or len(targets) < 20:
        return
    targets = targets if targets.shape[1:] == call.targets.shape[1:] else call.targets.detach()
    spread, mean, size = targets.std().item(), targets.mean().abs().item(), call.outputs.detach().abs().mean().item()
    if (spread > 50 or mean > 10 * spread > 0) and size < 0.1 * max(spread, mean):
        yield Seen(
            "the targets are far larger than what the model gives.",
            f"their mean is {mean:.4g}, their deviation {spread:.4g} (50, or a tenth of the mean); outputs are "
            f"{size:.3g} in size",
            f"targets of train; {case.place}",
            "train on (y - y.mean()) / y.std(), and turn predictions back",
            level="warning" if max(spread, mean / 10) > 50 and size < 0.01 * max(spread, mean) else None,
        )


def _wrong_classes(case: Case) -> Iterator[tuple[str, Seen]]:
    """The first class index out of range, over all targets that are like those of the loss."""
    whole = case.sample[1] if case.sample is not None else None
    for call in case.now.calls:
        if call.name not in losses.CLASS_INDEX or call.targets.is_floating_point() or call.outputs.dim() < 2:
            continue
        ignored, classes = call.ignore_index, call.outputs.shape[1]
        parts, given = [call.targets], case.now.targets
        is_given = (
            isinstance(given, Tensor) and given.shape == call.targets.shape and bool((given == call.targets).all())
        )
        if whole is not None and is_given and whole.dtype == call.targets.dtype:
            parts.append(whole)
        for part in parts:
            if (wrong := losses.wrong_class(part, classes, ignored)) is not None:
                target, place, fix, code = wrong
                place = case.row_of(place) if part is whole and part.dim() == 1 else place
                what = f"a target is outside the {classes} classes that the model gives scores for."
                yield (
                    code,
                    Seen(
                        what,
                        f"target {target} (0 to {classes - 1} allowed)",
                        f"position {place}; {case.at(call.place)}",
                        fix,
                    ),
                )
                return


@rule("label-out-of-range", "error", "data")
def label_out_of_range(case: Case) -> Iterator[Seen]:
    """A class index that is not among the model's outputs cannot be learned; on a GPU it ends the process.

    Looks at all class indices where they are in memory, else at those of each batch: they go from 0 to the number of
    outputs, less one; the ignore_index does not count.
    """
    yield from (seen for code, seen in _wrong_classes(case) if code == "label-out-of-range")


@rule("too-few-outputs", "error", "data")
def too_few_outputs(case: Case) -> Iterator[Seen]:
    """The model has fewer outputs than there are classes.

    Looks at all class indices where they are in memory: they go on, without a gap, where the model's outputs end.
    """
    yield from (seen for code, seen in _wrong_classes(case) if code == "too-few-outputs")
