"""Rules over the data: what is in them, in which order they come, and what train and val have in common."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from epochal.data.batch import split
from epochal.data.loader import Loader
from epochal.doctor.case import NORMS, Case
from epochal.doctor.finding import Seen, rule
from epochal.doctor.trace import tensors
from epochal.runtime.seeding import generators_in

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

    Looks at what the first layer with weights gets, after all that is done to the data, unless a norm comes first: a root
    mean square above 10 (bytes of images have about 100), or deviations of features that differ more than 1000 times.
    """
    for path, given in _entries(case):
        values = _of_data(case, path, given)
        rows = values.flatten(1) if values.dim() == 2 else values.flatten(1)
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

    Looks at the columns of floating point inputs, two-dimensional, over at least 100 rows.
    """
    if case.sample is None:
        return
    for part in case.sample[0]:
        if part.dim() != 2 or not part.is_floating_point() or len(part) < 100:
            continue
        constant = (part == part[0]).all(0).nonzero().flatten().tolist()
        if constant and len(constant) < part.shape[1]:
            yield Seen(
                "some features have one value only.",
                f"{len(constant)} of {part.shape[1]} columns, over {len(part)} rows",
                f"columns {', '.join(map(str, constant[:8]))} of the inputs",
                "look at how they are made, or leave them out",
            )


@rule("image-layout", "warning", "batch")
def image_layout(case: Case) -> Iterator[Seen]:
    """Convolutions take images as (samples, channels, height, width): with the channels last, rows of pixels are mixed.

    Looks at what the first convolution over images gets: the last dimension is 1, 3 or 4 wide, the second is not.
    """
    for layer in case.now.layers:
        if isinstance(layer.module, nn.modules.conv._ConvNd) and layer.input is not None and layer.input.dim() == 4:
            shape = tuple(layer.input.shape)
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

    Looks at inputs of 2 to 4 channels that go into a convolution: neighbouring pixels differ as much as any two, and far less
    where the memory is read with the channels last.
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
            f"neighbours differ by {rough:.2f} of what any two do, and by {smooth:.2f} where the channels are read as the last "
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


def _digests(inputs: Sequence[Tensor], targets: Tensor | None) -> list[bytes]:
    parts = [
        part.detach().cpu().contiguous().flatten(1) if part.dim() > 1 else part.detach().cpu()[:, None]
        for part in inputs
    ]
    arrays = [part.contiguous().view(torch.uint8).reshape(len(part), -1).numpy() for part in parts if part.numel()]
    return [hashlib.blake2b(b"".join(row.tobytes() for row in rows), digest_size=12).digest() for rows in zip(*arrays)]


@rule("duplicates-in-val", "warning", "data")
def duplicates_in_val(case: Case) -> Iterator[Seen]:
    """Samples of val that are in train, too, make the validation too good: it asks what was already told.

    Looks at the bytes of the inputs: more than 1 of 100 samples of val are in train, and few inputs are the same by
    nature (as where they are few words or classes: then train has as many twins in itself).
    """
    if case.sample is None or case.val_sample is None:
        return
    train, val = case.sample, case.val_sample
    if not train[0] or not val[0] or [p.shape[1:] for p in train[0]] != [p.shape[1:] for p in val[0]]:
        return
    one, two = Counter(_digests(*train)), _digests(*val)
    if not two or len(one) < 2:
        return
    shared = sum(digest in one for digest in two) / len(two)
    twins = 1 - len(one) / sum(one.values())
    is_fine = any(part.is_floating_point() and part[0].numel() > 1 and _is_fine(part) for part in train[0])
    if shared > 0.01 and shared * len(two) >= 2 and (is_fine or shared > 5 * twins):
        yield Seen(
            "samples of val are in train, too.",
            f"{shared:.1%} of {len(two)} have the same inputs as a sample of train (1 % allowed)",
            f"val; {case.place}",
            "divide after duplicates are taken out, and before anything is copied or augmented",
        )


def _is_fine(part: Tensor) -> bool:
    """Whether the numbers are so many different ones that two equal samples are no chance."""
    column = part[:1000].flatten(1)
    return max(
        len(column[:, at].unique()) for at in range(0, column.shape[1], max(1, column.shape[1] // 32))
    ) > 0.2 * len(column)


@rule("conflicting-labels", "info", "data")
def conflicting_labels(case: Case) -> Iterator[Seen]:
    """The same inputs with different labels cannot both be learned; somebody has labelled them twice.

    Looks at the bytes of the inputs: more than 1 of 200 samples have a twin with another class.
    """
    if case.sample is None or case.sample[1] is None or case.sample[1].is_floating_point() or case.sample[1].dim() != 1:
        return
    if not any(part.is_floating_point() for part in case.sample[0]):
        return
    known: dict[bytes, set[int]] = {}
    digests = _digests(*case.sample)
    for digest, label in zip(digests, case.sample[1].tolist()):
        known.setdefault(digest, set()).add(label)
    share = sum(len(known[digest]) > 1 for digest in digests) / max(1, len(digests))
    if share > 0.005:
        yield Seen(
            "the same inputs have different labels.",
            f"{share:.1%} of {len(digests)} samples have a twin of another class (0.5 % allowed)",
            f"train; {case.place}",
            "keep one label for each, by a vote say",
        )


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


@rule("unshuffled", "warning", "data")
def unshuffled(case: Case) -> Iterator[Seen]:
    """Sorted data in their order give batches of one class: the model learns them in turns, and forgets.

    Looks at the order of the data where they are read one after the other: the batches have, in the mean, less than 0.3 of
    the entropy of all labels (or of the variance, for numbers). Rows that are next to each other in time may be meant so.
    """
    targets = _in_order(case)
    if targets is None or len(targets) < 3:
        return
    whole, parts = torch.cat(targets), [_disorder(one) for one in targets if len(one) > 1]
    every = _disorder(whole)
    if not parts or every <= 0:
        return
    ratio = sum(parts) / len(parts) / every
    is_class = not whole.is_floating_point()
    if ratio < (0.3 if is_class else 0.1):
        yield Seen(
            "the data are sorted by their targets, and are not shuffled.",
            f"a batch has {ratio:.0%} of the {'entropy of the labels' if is_class else 'variance of the targets'} "
            f"that the data have ({30 if is_class else 10} % at least), over {len(targets)} batches",
            f"train; {case.place}",
            "give shuffle=True, or a DataLoader with shuffle=True",
        )


def _in_order(case: Case) -> list[Tensor] | None:
    """The targets of the first batches and of some later ones, where they are read in order."""
    train = case.run.train
    if isinstance(train, Loader):
        if train.shuffle or case.sample is None or case.sample[1] is None or train.samples is None:
            return None
        source = getattr(train.source, "tensors", None)
        if source is None:
            return None
        whole = split(train.source.take(torch.arange(len(train.source))), case.objective.target)[2]  # type: ignore[union-attr]
        targets = list(whole.split(train.batch_size)) if isinstance(whole, Tensor) else []
    elif isinstance(getattr(train.loader, "sampler", None), SequentialSampler) and type(train.loader) is DataLoader:
        targets = [
            split(batch, getattr(case.objective, "target", ()))[2] for batch in islice(train.batches(epoch=0), 100)
        ]
    else:
        return None
    if not all(isinstance(one, Tensor) and one.dim() >= 1 for one in targets):
        return None
    return [one.reshape(len(one), -1)[:, 0] for one in targets if one.numel() == len(one)]


def _disorder(targets: Tensor) -> float:
    if targets.is_floating_point() and not bool((targets == targets.round()).all()):
        return targets.var().item()
    shares = torch.unique(targets, return_counts=True)[1].float() / len(targets)
    return float(-(shares * shares.log()).sum())


@rule("same-order", "warning", "data")
def same_order(case: Case) -> Iterator[Seen]:
    """Data in the same order in each epoch are the same batches again and again: their noise no longer cancels out.

    Looks at the indices that the sampler of a DataLoader gives for two epochs, and at the first batches of a stream: they
    are the same, and not in order. (epochal's own loader, and torch's with shuffle=True, draw anew.)
    """
    loader = getattr(case.run.train, "loader", None)
    if loader is None:
        return
    stream = isinstance(loader.dataset, IterableDataset)
    sampler = loader.batch_sampler if getattr(loader, "batch_sampler", None) is not None else loader.sampler
    if type(loader.sampler) in (SequentialSampler, RandomSampler) and not stream:
        generator = getattr(loader.sampler, "generator", None)
        if type(loader.sampler) is SequentialSampler or generator is None:
            return
    if stream:
        if loader.num_workers:
            return
        orders = [[_digest_of(batch) for batch in islice(case.run.train.batches(epoch), 4)] for epoch in (0, 1)]
        again = [_digest_of(batch) for batch in islice(iter(loader.dataset), 64)]
        is_sorted = not _is_drawn(loader.dataset) or len(set(again)) < 2
    else:
        orders = []
        for epoch in (0, 1):
            for part in (loader.sampler, sampler):
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
            orders.append(
                [index for one in islice(iter(sampler), 1000) for index in (one if isinstance(one, list) else [one])]
            )
        is_sorted = orders[0] == sorted(orders[0]) or orders[0] == sorted(orders[0], reverse=True)
    if orders[0] and orders[0] == orders[1] and not is_sorted and len(orders[0]) > 2:
        yield Seen(
            "the data come in the same shuffled order in each epoch.",
            f"the first {len(orders[0])} {'batches' if stream else 'indices'} of two epochs are the same",
            f"{type(loader.dataset if stream else loader.sampler).__name__}; {case.place}",
            "draw from one generator that is made once, or from (seed, epoch) with set_epoch(epoch)",
        )


def _is_drawn(dataset: Any) -> bool:
    """Whether the code of a stream draws an order."""
    names = set(getattr(getattr(type(dataset).__iter__, "__code__", None), "co_names", ()))
    return bool(
        names
        & {"randperm", "shuffle", "permutation", "sample", "manual_seed", "default_rng", "Random", "choice", "seed"}
    )


def _digest_of(batch: Any) -> bytes:
    parts = [part.detach().cpu().contiguous() for part in tensors(batch)]
    if not parts:
        return repr(batch).encode()
    return hashlib.blake2b(
        b"".join(part.reshape(-1).view(torch.uint8).numpy().tobytes() for part in parts if part.numel())
    ).digest()


@rule("worker-randomness", "error", "data")
def worker_randomness(case: Case) -> Iterator[Seen]:
    """Every worker has a copy of the data set: a stream that is not divided comes once from each, and a generator of
    its own gives all of them the same random numbers.

    Looks at a DataLoader with several workers: the first batches of two are the same; or the data set has a generator of
    its own and there is no worker_init_fn (a warning).
    """
    loader = getattr(case.run.train, "loader", None)
    workers = getattr(loader, "num_workers", 0)
    if loader is None or workers < 2:
        return
    if isinstance(loader.dataset, IterableDataset):
        firsts = [_digest_of(batch) for batch in islice(case.run.train.batches(epoch=0), 2 * workers)]
        case.run.train.close()
        if len(firsts) > 1 and len(set(firsts)) <= len(firsts) // 2:
            yield Seen(
                "every worker reads the whole stream: each sample comes several times.",
                f"of the first {len(firsts)} batches of {workers} workers {len(set(firsts))} are different",
                f"{type(loader.dataset).__name__}; {case.place}",
                "divide it: in __iter__, itertools.islice(samples, get_worker_info().id, None, get_worker_info().num_workers)",
            )
        return
    own = [place for place in generators_in(loader.dataset) if place]
    if own and loader.worker_init_fn is None:
        yield Seen(
            "the workers have copies of one generator, and draw the same random numbers.",
            f"{workers} workers, and a generator of the data set's own",
            f"{type(loader.dataset).__name__}{own[0]}; {case.place}",
            "draw from torch's own generator (torch.rand), which each worker seeds differently, or seed it in worker_init_fn",
            level="warning",
        )


@rule("random-validation", "warning", "data")
def random_validation(case: Case) -> Iterator[Seen]:
    """A sample of val that is another one each time makes two evaluations differ, and augmented ones are not the task.

    Fetches two samples of val twice, by their index.
    """
    loader = case.run.validation.loader
    dataset = getattr(getattr(loader, "loader", None), "dataset", None)
    dataset = dataset if dataset is not None else getattr(getattr(loader, "source", None), "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return
    for at in (0, len(dataset) // 2):
        if _digest_of(dataset[at]) != _digest_of(dataset[at]):
            yield Seen(
                "a sample of val is another one each time it is fetched.",
                f"sample {at}, fetched twice, differs",
                f"val, {type(dataset).__name__}; {case.place}",
                "augment train only: give val a data set without random transforms",
            )
            return


@rule("nonfinite-inputs", "error", "data")
def nonfinite_inputs(case: Case) -> Iterator[Seen]:
    """A NaN or an infinity in the inputs makes the loss of its batch NaN, and the weights with it.

    Looks at all inputs that are in memory, else at those of the first batches; only what makes the loss of its own sample
    not finite counts, so that a marker of missing values which the model masks is left alone.
    """
    yield from _nonfinite(case, case.sample[0] if case.sample is not None else [], "inputs")


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
                f"{what}{f' {number}' if len(parts) > 1 else ''}, rows {', '.join(map(str, rows[:8]))}; {case.place}",
                "leave these rows out, or fill them: torch.nan_to_num(X), with the mean of the column say",
            )
            return
