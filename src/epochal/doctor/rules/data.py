"""Rules over the numbers of the data: their scale, their shape, and what is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from epochal.doctor.case import NORMS, Case
from epochal.doctor.finding import Seen, rule

LARGE = 10.0  # root mean square of what the first layer gets
SMALL = 0.02
UNEVEN = 1e3  # between the deviations of two features


def _entries(case: Case) -> Iterator[tuple[str, Tensor]]:
    """What the first weighted layers of the pass get, with their paths; nothing where a norm comes first."""
    for layer in case.now.entries:
        is_weighted = not isinstance(layer.module, (*NORMS, nn.Embedding))
        if is_weighted and layer.input is not None and layer.input.is_floating_point() and layer.input.dim() > 1:
            yield layer.path, layer.input.detach().float()


def _of_data(case: Case, path: str, given: Tensor) -> Tensor:
    """More rows of the same input, where the layer gets the data as they are."""
    if case.sample is not None:
        for whole, part in zip(case.sample[0], case.now.inputs):
            if part.shape == given.shape and part.is_floating_point() and torch.equal(part.float(), given):
                return whole.float()
    return given


@rule("unnormalised-inputs", "warning", "data")
def unnormalised_inputs(case: Case) -> Iterator[Seen]:
    """Layers are initialised for inputs of about 1 in size: large ones saturate them, uneven ones hide each other.

    Looks at what the first layer with weights gets, after all that is done to the data, unless a norm comes first: a
    root mean square above 10 (bytes of images have about 100), or deviations of features that differ more than 1000
    times.
    """
    for path, given in _entries(case):
        values = _of_data(case, path, given)
        rows = values.flatten(1)
        size = rows.pow(2).mean().sqrt().item()
        highest = rows.abs().max().item()
        spreads = rows.std(0) if values.dim() == 2 and len(rows) > 8 else torch.ones(1)
        known = spreads[spreads > 0]
        ratio = (known.max() / known.median()).item() if len(known) > 1 else 1.0
        is_large = size > LARGE and highest > 20
        if not is_large and not (ratio > UNEVEN and highest > 20):
            continue
        yield Seen(
            "the inputs are not normalised.",
            f"root mean square {size:.4g} ({LARGE:g} allowed), largest {highest:.4g}"
            + (
                f"; the deviations of two features differ {ratio:.3g} times ({UNEVEN:g} allowed)"
                if ratio > UNEVEN
                else ""
            ),
            f"what {path} gets; {case.place}",
            "give X / 255 for bytes of images, or (X - X_train.mean(0)) / X_train.std(0), for val too"
            if _are_bytes(rows)
            else "give (X - X_train.mean(0)) / X_train.std(0), for val too",
        )
        return


def _are_bytes(rows: Tensor) -> bool:
    return bool(rows.min() >= 0) and 128 < rows.max().item() <= 255 and bool((rows == rows.round()).all())


@rule("unnormalised-inputs", "warning", "data")
def scaled_apart(case: Case) -> Iterator[Seen]:
    """What val is scaled by has to be what train is scaled by: else the model is asked about numbers it never saw.

    Looks at floating point inputs of train and val, at 30 rows of each at least: the deviation of all numbers differs
    more than 4 times, or their means by more than 3 deviations.
    """
    if case.sample is None or case.val_sample is None:
        return
    for one, two in zip(case.sample[0], case.val_sample[0]):
        if min(len(one), len(two)) < 30 or one.shape[1:] != two.shape[1:] or not one.is_floating_point():
            continue
        spreads = [part.float().std().item() for part in (one, two)]
        means = [part.float().mean().item() for part in (one, two)]
        if min(spreads) <= 0:
            continue
        ratio, apart = max(spreads) / min(spreads), abs(means[0] - means[1]) / max(spreads)
        if ratio > 4 or apart > 3:
            yield Seen(
                "the inputs of val are on another scale than those of train.",
                f"mean {means[0]:.4g} and deviation {spreads[0]:.4g} in train, {means[1]:.4g} and {spreads[1]:.4g} in "
                "val (4 times, or 3 deviations, allowed)",
                f"train, val; {case.place}",
                "scale both by the numbers of train: (X - X_train.mean(0)) / X_train.std(0)",
            )
            return


@rule("normalised-twice", "warning", "data")
def normalised_twice(case: Case) -> Iterator[Seen]:
    """Inputs close to 0 leave nothing but the biases to learn from; they were probably scaled twice.

    Looks at what the first layer with weights gets, unless a norm comes first: a root mean square below 0.02 (images
    divided by 255 twice have about 0.002).
    """
    for path, given in _entries(case):
        values = _of_data(case, path, given)
        size = values.pow(2).mean().sqrt().item()
        if 0 < size < SMALL and values.shape[0] > 1:
            yield Seen(
                "the inputs are nearly 0: they may have been scaled twice.",
                f"root mean square {size:.3g} ({SMALL:g} at least), largest {values.abs().max().item():.3g}",
                f"what {path} gets; {case.place}",
                "scale them once, in the data or in the model: (X - X_train.mean(0)) / X_train.std(0)",
            )
            return


@rule("constant-feature", "info", "data")
def constant_feature(case: Case) -> Iterator[Seen]:
    """A feature that never changes tells nothing; a column may have been lost when the data were made.

    Looks at floating point inputs over at least 100 rows: at columns, at the features of series (n, time, features),
    and at the channels of images.
    """
    if case.sample is None:
        return
    for part in case.sample[0]:
        if not 2 <= part.dim() <= 4 or not part.is_floating_point() or len(part) < 100:
            continue
        rows = part if part.dim() == 2 else part.movedim(1 if part.dim() == 4 else 2, -1).flatten(0, -2)
        constant = (rows == rows[0]).all(0).nonzero().flatten().tolist()
        if constant and len(constant) < rows.shape[1]:
            yield Seen(
                "some features have one value only.",
                f"{len(constant)} of {rows.shape[1]}, over {len(part)} rows",
                f"{'channels' if part.dim() == 4 else 'columns'} {', '.join(map(str, constant[:8]))} of the inputs",
                "look at how they are made, or leave them out",
            )


@rule("image-layout", "warning", "batch")
def image_layout(case: Case) -> Iterator[Seen]:
    """Convolutions take images as (samples, channels, height, width): with the channels last, rows of pixels are mixed.

    Looks at what the first convolution over images gets: the last dimension is 1, 3 or 4 wide, the second is not.
    """
    for layer in case.now.layers:
        if isinstance(layer.module, nn.modules.conv._ConvNd) and len(layer.shape) == 4:
            shape = layer.shape
            if shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4) and shape[1] == shape[2]:
                yield Seen(
                    "images are given with their channels last.",
                    f"{shape}: the last dimension looks like channels, the second like a height",
                    f"{layer.path} ({type(layer.module).__name__})",
                    "give X.permute(0, 3, 1, 2)",
                )
            return


@rule("image-layout", "warning", "data")
def scrambled_images(case: Case) -> Iterator[Seen]:
    """A reshape does not exchange dimensions: it deals the pixels of an image out to others.

    Looks at inputs of 2 to 4 channels that go into a convolution: neighbouring pixels differ as much as any two, and
    far less where the memory is read with the channels last.
    """
    first = next((layer for layer in case.now.layers if isinstance(layer.module, nn.Conv2d)), None)
    given = first.input.detach().float() if first is not None and first.input is not None else None
    if given is None or given.dim() != 4 or given.shape[1] not in (2, 3, 4) or min(given.shape[2:]) < 4:
        return
    n, channels, height, width = given.shape
    turned = given.reshape(n, height, width, channels).permute(0, 3, 1, 2)
    rough, smooth = _roughness(given), _roughness(turned)
    if rough > 0.4 and smooth < 0.65 * rough:
        yield Seen(
            "the pixels of the images lie in another order than that of their shape.",
            f"neighbours differ by {rough:.2f} of what any two do, and by {smooth:.2f} where the channels are "
            "read as the last "
            "dimension (a third less is enough to tell)",
            f"what {first.path if first is not None else ''} gets, {tuple(given.shape)}",
            "exchange dimensions with X.permute(0, 3, 1, 2), not with reshape or view",
        )


def _roughness(images: Tensor) -> float:
    """The squared difference between neighbours, of that between any two pixels of a channel."""
    spread = 2 * images.flatten(2).var(2).mean().item()
    steps = [
        (images[..., 1:] - images[..., :-1]).pow(2).mean(),
        (images[..., 1:, :] - images[..., :-1, :]).pow(2).mean(),
    ]
    return float(sum(steps)) / 2 / max(spread, 1e-12)


@rule("small-val", "info", "data")
def small_val(case: Case) -> Iterator[Seen]:
    """What is measured on a handful of samples is mostly chance, and so is what is chosen by it.

    Looks at the number of samples of val: below 30.
    """
    loader = case.run.validation.loader
    if loader is not None and loader.samples is not None and loader.samples < 30:
        yield Seen(
            "the validation is made on very few samples.",
            f"{loader.samples} (30 at least)",
            f"val; {case.place}",
            "give val=0.2, or divide the data several times and take the mean",
        )


@rule("nonfinite-inputs", "error", "data")
def nonfinite_inputs(case: Case) -> Iterator[Seen]:
    """A NaN or an infinity in the inputs makes the loss of its batch NaN, and the weights with it.

    Looks at all inputs that are in memory, else at those of the first batches; only what makes the loss of its own
    sample not finite counts, so that a marker of missing values which the model masks is left alone.
    """
    yield from _nonfinite(case, case.sample[0] if case.sample is not None else [], "inputs")
    for part in case.val_sample[0] if case.val_sample is not None else ():
        rows = (~torch.isfinite(part)).reshape(len(part), -1).any(1).nonzero().flatten().tolist()
        if rows and case.is_harmed_by(rows[0], of_val=True):
            yield Seen(
                "the inputs of val hold values that are not finite.",
                f"{len(rows)} of {len(part)} rows that were looked at",
                f"val, rows {', '.join(str(case.row_of(row, of_val=True)) for row in rows[:8])}; {case.place}",
                "leave these rows out, or fill them: val_loss is NaN with them, and no epoch is the best",
                level="warning",
            )
            return


@rule("nonfinite-targets", "error", "data")
def nonfinite_targets(case: Case) -> Iterator[Seen]:
    """A NaN or an infinity among the targets makes the loss of its batch NaN, and the weights with it.

    Looks at all targets that are in memory, else at those of the first batches; one that the loss masks is left alone.
    """
    yield from _nonfinite(
        case, [case.sample[1]] if case.sample is not None and case.sample[1] is not None else [], "targets"
    )


def _nonfinite(case: Case, parts: Sequence[Tensor], what: str) -> Iterator[Seen]:
    for number, part in enumerate(parts):
        if not part.is_floating_point():
            continue
        spoilt = ~torch.isfinite(part).reshape(len(part), -1).all(1)
        rows = spoilt.nonzero().flatten().tolist()
        if rows and case.is_harmed_by(rows[0]):
            yield Seen(
                f"the {what} hold values that are not finite.",
                f"{len(rows)} of {len(part)} rows that were looked at",
                f"{what}{f' {number}' if len(parts) > 1 else ''} of train"
                f"{' without val' if isinstance(case.plan.val, float) else ''}, "
                f"rows {', '.join(str(case.row_of(row)) for row in rows[:8])}; {case.place}",
                "leave these rows out, or fill them: torch.nan_to_num(X), with the mean of the column say",
            )
            return
