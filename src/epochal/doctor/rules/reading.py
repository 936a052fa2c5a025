"""Rules over the way in which data are read: their order, their workers, and whether a sample stays itself."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from epochal.data.batch import split
from epochal.data.loader import Loader
from epochal.doctor.case import Case, some_of
from epochal.doctor.finding import Seen, rule
from epochal.doctor.trace import tensors
from epochal.runtime.seeding import generators_in


@rule("unshuffled", "warning", "data")
def unshuffled(case: Case) -> Iterator[Seen]:
    """Sorted data in their order give batches of one class: the model learns them in turns, and forgets.

    Looks at the order of the data where they are read one after the other: the batches have, in the mean, less than
    0.3 of the entropy of all labels (or of the variance, for numbers). Rows that are next to each other in time may
    be meant so.
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
    if ratio < (0.3 if is_class else 0.1) and _is_sorted(whole):
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
        whole = split(train.source.parts, case.objective.target)[2]  # type: ignore[union-attr]
        targets = list(whole.split(train.batch_size)) if isinstance(whole, Tensor) else []
    elif type(train.loader) is DataLoader and _reads_in_order(train.loader):
        targets = [split(batch, getattr(case.objective, "target", ()))[2] for batch in some_of(train, 100)]
    else:
        return None
    if not all(isinstance(one, Tensor) and one.dim() >= 1 for one in targets):
        return None
    return [one.reshape(len(one), -1)[:, 0] for one in targets if one.numel() == len(one)]


def _reads_in_order(loader: DataLoader) -> bool:
    if isinstance(loader.dataset, IterableDataset):
        return not loader.num_workers
    return isinstance(loader.sampler, SequentialSampler)


def _is_sorted(targets: Tensor) -> bool:
    """Whether they lie class by class, or go up or down; what only drifts, as a series in time, does not."""
    steps = targets[1:] - targets[:-1]
    if not targets.is_floating_point():
        return int((steps != 0).sum()) <= 2 * len(targets.unique())
    return max(float((steps >= 0).float().mean()), float((steps <= 0).float().mean())) > 0.95


def _disorder(targets: Tensor) -> float:
    if targets.is_floating_point() and not bool((targets == targets.round()).all()):
        return targets.var().item()
    shares = torch.unique(targets, return_counts=True)[1].float() / len(targets)
    return float(-(shares * shares.log()).sum())


@rule("same-order", "warning", "data")
def same_order(case: Case) -> Iterator[Seen]:
    """Data in the same order in each epoch are the same batches again and again: their noise no longer cancels out.

    Looks at the indices that the sampler of a DataLoader gives for two epochs, and at the first batches of a stream:
    they are the same, and not in order. (epochal's own loader, and torch's with shuffle=True, draw anew.)
    """
    loader = getattr(case.run.train, "loader", None)
    if loader is None:
        return
    stream = isinstance(loader.dataset, IterableDataset)
    sampler = loader.batch_sampler if getattr(loader, "batch_sampler", None) is not None else loader.sampler
    if type(loader.sampler) in (SequentialSampler, RandomSampler) and not stream:
        generator = getattr(loader.sampler, "generator", None)
        if type(loader.sampler) is SequentialSampler and len(loader) > 1:
            yield Seen("the data come in the same order in each epoch: nothing shuffles them.",
                       f"{len(loader)} batches of a DataLoader with shuffle=False", case.place,
                       "give DataLoader(..., shuffle=True), unless the order matters", level="info")  # fmt: skip
        if type(loader.sampler) is SequentialSampler or generator is None:
            return
    if stream:
        if loader.num_workers:
            return
        orders = [[_digest_of(batch) for batch in islice(case.run.train.batches(epoch), 4)] for epoch in (0, 1)]
        again = [_digest_of(batch) for batch in islice(iter(loader.dataset), 64)]
        is_sorted = not _is_drawn(loader.dataset) or len(set(again)) < 2
    else:
        orders, counting = [], [part for part in (loader.sampler, sampler) if hasattr(part, "set_epoch")]
        before = [getattr(part, "epoch", 0) for part in counting]
        for epoch in (0, 1):
            for part in counting:
                part.set_epoch(epoch)
            orders.append(
                [index for one in islice(iter(sampler), 1000) for index in (one if isinstance(one, list) else [one])]
            )
        for part, epoch in zip(counting, before):
            part.set_epoch(epoch)
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

    Looks at a DataLoader with several workers: the first batches of two are the same; or the data set has a generator
    of its own and there is no worker_init_fn (a warning).
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
                "divide it: in __iter__, itertools.islice(samples, get_worker_info().id, None, "
                "get_worker_info().num_workers)",
            )
        return
    own = [place for place in generators_in(loader.dataset) if place]
    if own and loader.worker_init_fn is None:
        yield Seen(
            "the workers have copies of one generator, and draw the same random numbers.",
            f"{workers} workers, and a generator of the data set's own",
            f"{type(loader.dataset).__name__}{own[0]}; {case.place}",
            "draw from torch's own generator (torch.rand), which each worker seeds differently, or seed it in "
            "worker_init_fn",
            level="warning",
        )


@rule("random-validation", "warning", "data")
def random_validation(case: Case) -> Iterator[Seen]:
    """A sample of val that is another one each time makes two evaluations differ, and augmented ones are not the task.

    Fetches two samples of val twice, by their index, and makes the first batch twice.
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
    given = getattr(loader, "loader", None)
    if given is not None and not given.num_workers and isinstance(given.sampler, SequentialSampler):
        began, one = time.perf_counter(), _digest_of(next(iter(given)))
        if time.perf_counter() - began < 0.5 and _digest_of(next(iter(given))) != one:
            yield Seen("a batch of val is another one each time it is made.", "the first batch, made twice, differs",
                       f"val, collate_fn of the DataLoader; {case.place}",
                       "draw nothing in the collate_fn of val")  # fmt: skip
