"""Checkpoints of several processes: read by any number of them and under any strategy, to the bit."""

import itertools
import json
from pathlib import Path

import group
import numpy as np
import pytest
import torch
from test_processes import alone, digits, network, seen, whole

import epochal

pytestmark = pytest.mark.distributed
WRITERS = {"one": (1, "auto"), "two": (2, "ddp"), "four, sharded": (4, "fsdp")}
READERS = {"one": (1, "auto"), "two, sharded": (2, "fsdp"), "four": (4, "ddp")}


def plan(run, strategy, **options):
    images, labels = digits()
    return epochal.Plan(
        network(), (images[:500], labels[:500]), val=0.2, loss="cross_entropy", optimizer="adamw", lr=1e-3, epochs=2,
        batch_size=64, seed=3, strategy=strategy, observers=(), run=run, **options,
    )  # fmt: skip


def tensors(value, path=()):
    """All tensors in a state, put together, as arrays, by their path."""
    if isinstance(value, torch.Tensor):
        return {".".join(map(str, path)): whole(value).detach().numpy().copy()}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: array for key, part in items for name, array in tensors(part, (*path, key)).items()}


def kept(run):
    return {name: tensors(part) for name, part in run.state.state_dict().items() if name in ("model", "optimizer")}


def write(rank, run, strategy):
    """Trains, and gives what the newest checkpoint should hold."""
    with plan(run, strategy, restore_best=False).prepare() as prepared:
        for _ in prepared:
            pass
        return kept(prepared)


def read(rank, run, strategy):
    with plan(run, strategy, resume=True).prepare() as prepared:
        return kept(prepared)


def in_world(size, function, *given):
    return [alone(function, *given)] if size == 1 else group.run(function, size, *given)


def same(one, other):
    return one.keys() == other.keys() and all(
        one[part].keys() == other[part].keys()
        and all(np.array_equal(array, other[part][name]) for name, array in one[part].items())
        for part in one
    )


@pytest.mark.parametrize("writer", WRITERS)
def test_any_number_of_processes_reads_what_another_has_written(writer):
    size, strategy = WRITERS[writer]
    (written, *_) = in_world(size, write, "run", strategy)
    assert {"model", "optimizer"} == written.keys() and len(written["optimizer"]) == 3 * len(written["model"])
    manifest = json.loads(sorted(Path("run/checkpoints").iterdir())[-1].joinpath("manifest.json").read_text())
    assert manifest["format"] == (2 if strategy == "fsdp" else 1)
    assert len(manifest["files"]) == size + 1  # each has written one, and the first the state as well
    for size, strategy in READERS.values():
        for found in in_world(size, read, "run", strategy):
            assert same(found, written)


@pytest.mark.parametrize("kind", ["arrays", "loader", "loader of its own", "stream loader"])
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 4), (4, 1)])
def test_another_number_of_processes_goes_on_with_the_same_samples(kind, first, then):
    options = {"seed": 3, "accumulate": 2, "save": epochal.Saving("1 step", share=None)}
    uncut = alone(seen, kind, {**options, "run": "uncut"}, {})
    before = joined(in_world(first, seen, kind, {**options, "run": "run", "max_steps": 6}, {}))
    after = joined(in_world(then, seen, kind, {**options, "run": "run", "resume": True}, {}))
    assert [*before, *after] == uncut and len(before) == 6


def joined(shares):
    """Of each update the numbers of its samples, in order, whoever had them."""
    updates = zip(*shares, strict=True)
    return [[list(itertools.chain(*batch)) for batch in zip(*of_each, strict=True)] for of_each in updates]
