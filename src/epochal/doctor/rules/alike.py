"""Rules over samples that are too much alike: in train and val, with other labels, or one part of them like another."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from epochal.doctor.case import Case
from epochal.doctor.finding import Seen, rule
from epochal.doctor.rules.wiring import val_in_train
from epochal.losses import CLASS_INDEX


@rule("causal-leak", "warning", "data")
def target_among_inputs(case: Case) -> Iterator[Seen]:
    """A column of the inputs that is the target tells the answer, and will not be there when it is asked for.

    Looks at two-dimensional floating point inputs of several columns: one of them equals the target in all of at least
    50 rows.
    """
    targets = case.sample[1] if case.sample is not None else None
    if case.sample is None or targets is None or targets.numel() != len(targets) or len(targets) < 50:
        return
    wanted = targets.reshape(-1).float()
    for part in case.sample[0]:
        if part.dim() != 2 or part.shape[1] < 2 or not part.is_floating_point() or bool((wanted == wanted[0]).all()):
            continue
        same = (part.float() == wanted[:, None]).all(0).nonzero().flatten().tolist()
        if same:
            yield Seen(
                "the target is among the inputs.",
                f"column {same[0]} of {part.shape[1]} equals it in all of {len(wanted)} rows",
                f"train; {case.place}",
                "leave the column out of the inputs",
            )
            return


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
    nature (as where they are few words or classes: then train has as many twins in itself). Of series it looks at what
    is moved by one place, too, and of numbers, each column by its deviation, at what is closer to a sample of train
    than a thousandth of the distance between any two, and than a three hundredth of that to the tenth nearest: in more
    than 5 of 100. Where all of val is in train, it is an
    error.
    """
    if case.sample is None or case.val_sample is None or any(val_in_train(case)):
        return
    train, val = case.sample, case.val_sample
    if not train[0] or not val[0] or [p.shape[1:] for p in train[0]] != [p.shape[1:] for p in val[0]]:
        return
    one, two = Counter(_digests(*_counted(case, train))), _digests(*_counted(case, val))
    if not two or len(one) < 2:
        return
    shared = sum(digest in one for digest in two) / len(two)
    twins = 1 - len(one) / sum(one.values())
    is_fine = any(part.is_floating_point() and part[0].numel() > 1 and _is_fine(part) for part in train[0])
    told = f"{shared:.1%} of {len(two)} have the same inputs as a sample of train (1 % allowed)"
    if not (shared > 0.01 and shared * len(two) >= 2 and (is_fine or shared > 5 * twins)):
        moved, near = (_moved(train[0], val[0]), _near(train[0], val[0])) if is_fine else (0.0, 0.0)
        told = f"{near:.0%} of {len(two)} are next to a sample of train (5 % allowed)" if near > 0.05 else ""
        if moved > 0.05:
            told = f"{moved:.0%} of {len(two)} are a sample of train, moved by one place (5 % allowed)"
    is_same = shared > 0.99 and is_fine
    if told:
        yield Seen(
            "all samples of val are in train, too." if is_same else "samples of val are in train, too.",
            told,
            f"val; {case.place}",
            "give val=0.2, which divides train, or data that train does not have"
            if is_same
            else "divide after duplicates are taken out, and before anything is copied, cut into windows or augmented",
            level="error" if is_same else None,
        )


def _counted(case: Case, sample: tuple[list[Tensor], Tensor | None]) -> tuple[list[Tensor], Tensor | None]:
    """The samples whose target is not ignored."""
    inputs, targets = sample
    ignored = next((call.ignore_index for call in case.now.calls if call.name in CLASS_INDEX), None)
    if ignored is None or targets is None or targets.dim() != 1 or targets.is_floating_point():
        return sample
    counts = targets != ignored
    return [part[counts] for part in inputs], targets[counts]


def _moved(train: Sequence[Tensor], val: Sequence[Tensor]) -> float:
    """The share of series of val that a series of train continues, or that continue one."""
    one, two = train[0], val[0]
    if one.dim() not in (2, 3) or one.shape[1] < 8 or not one.is_floating_point():
        return 0.0
    begins, ends = ({*_digests([part], None)} for part in (one[:, :-1], one[:, 1:]))
    pairs = list(zip(_digests([two[:, 1:]], None), _digests([two[:, :-1]], None)))
    return sum(late in begins or early in ends for late, early in pairs) / len(pairs)


def _near(train: Sequence[Tensor], val: Sequence[Tensor]) -> float:
    """The share of samples of val that nearly are one of train."""
    numbers = ([part.float().flatten(1) for part in parts if part.is_floating_point()] for parts in (train, val))
    one, two = (torch.cat(parts, 1) if parts else torch.ones(2, 1) for parts in numbers)
    if one.shape[1] < 4:
        return 0.0
    every = slice(None, None, -(-one.shape[1] // 256))
    scale = one.std(0).clamp(min=1e-12)[every]  # else a large column would be all that counts
    some, known = two[:400, every] / scale, one[:2000, every] / scale
    apart = torch.cdist(some, known, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = apart.topk(min(10, len(known)), largest=False).values
    is_near = (nearest[:, 0] < 1e-3 * apart.median()) & (nearest[:, 0] < 3e-3 * nearest[:, -1])
    return is_near.float().mean().item()


def _is_fine(part: Tensor) -> bool:
    """Whether the numbers are so many different ones that two equal samples are no chance."""
    if part.is_complex() or not part.numel():
        return False
    column = part[:1000].reshape(min(1000, len(part)), -1)
    if not part.is_floating_point():  # of words or codes: how often two would be equal if columns had nothing to do
        column = column[:, :: -(-column.shape[1] // 256)]
        shares = [one.unique(return_counts=True)[1] / len(column) for one in column.T]
        return math.prod(float(one.square().sum()) for one in shares) * len(column) ** 2 < 1e-3
    return max(
        len(column[:, at].unique()) for at in range(0, column.shape[1], max(1, column.shape[1] // 32))
    ) > 0.2 * len(column)


@rule("conflicting-labels", "info", "data")
def conflicting_labels(case: Case) -> Iterator[Seen]:
    """The same inputs with different labels cannot both be learned; somebody has labelled them twice.

    Looks at the bytes of the inputs: more than 1 of 200 samples have a twin with another class; or, where the targets
    are numbers, more than a tenth of their variance lies between twins.
    """
    if case.sample is None or case.sample[1] is None:
        return
    yield from _apart(case)
    if case.sample[1].is_floating_point() or case.sample[1].dim() != 1:
        return
    if not any(part.is_floating_point() or _is_fine(part) for part in case.sample[0]):
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


def _apart(case: Case) -> Iterator[Seen]:
    inputs, targets = case.sample if case.sample is not None else ([], None)
    if targets is None or not targets.is_floating_point() or targets.numel() != len(targets) or len(targets) < 20:
        return
    if not any(part.is_floating_point() for part in inputs):
        return
    known: dict[bytes, list[float]] = {}
    for digest, value in zip(_digests(inputs, None), targets.reshape(-1).tolist()):
        known.setdefault(digest, []).append(value)
    twins = [values for values in known.values() if len(values) > 1]
    within = sum(torch.tensor(values).var(correction=0).item() * len(values) for values in twins) / len(targets)
    if twins and within > 0.1 * targets.float().var().item() > 0:
        yield Seen(
            "the same inputs have different targets.",
            f"{within / targets.float().var().item():.0%} of the variance of {len(targets)} targets is between samples "
            "with the same inputs (10 % allowed)",
            f"train; {case.place}",
            "give the inputs what tells them apart, or keep one target for each, the mean say",
        )
