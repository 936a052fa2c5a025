"""Several processes: the same samples in each update, the same numbers, whatever their number."""

import itertools
import os
import signal
from pathlib import Path

import group
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import epochal

pytestmark = pytest.mark.distributed
DIGITS = load_digits()


def digits():
    return torch.from_numpy(DIGITS.images[:, None]).float() / 16, torch.from_numpy(DIGITS.target).long()


def network(dropout=0.0):
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(256, 10),
    )  # fmt: skip


class Seen:
    """Watches which samples a process is given."""

    def __init__(self, images):
        self.numbers = {images[i].numpy().tobytes(): i for i in range(len(images))}
        self.updates = []


def curve(rank, strategy, options):
    images, labels = digits()
    result = epochal.fit(
        network(), (images, labels), val=0.2, loss="cross_entropy", optimizer="adam", lr=1e-3, batch_size=64,
        metrics=["accuracy", "f1"], epochs=2, seed=3, strategy=strategy, observers=(), **options,
    )  # fmt: skip
    row = {name: value for name, value in result.history.rows[-1].items() if name != "time"}
    losses = [row[name] for row in result.history.rows for name in ("train_loss", "val_loss")]
    counted = np.sum(result.history.rows[-1].get("val_confusion", 0))
    return losses, row, counted


class Dies:
    """Watches, and ends its process after a step, as SIGKILL does."""

    def __init__(self, step):
        self.step = step

    def __call__(self, event):
        if isinstance(event, epochal.StepDone) and event.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def trained(rank, run, strategy, given):
    """The weights that a run leaves, as whole tensors, and its history."""
    images, labels = digits()
    options = {"epochs": 2, "accumulate": 3, "optimizer": "adam", "save": epochal.Saving("1 step", share=None)} | given
    result = epochal.fit(
        network(0.5), (images, labels), val=0.2, loss="cross_entropy", lr=1e-3, batch_size=64, metrics=["accuracy"],
        seed=3, strategy=strategy, run=run, **{"observers": (), **options},
    )  # fmt: skip
    weights = {name: whole(tensor).numpy() for name, tensor in result.model.state_dict().items()}
    return weights, [{k: v for k, v in row.items() if k != "time"} for row in result.history.rows], result.message


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def alone(function, *given):
    return function(0, *given)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_processes_gives_the_same_loss_curve(size, strategy):
    options = {"accumulate": 3}  # 23 batches, the last of 29 samples; 8 windows, the last of 2 batches
    (losses, row, _) = alone(curve, "auto", options)
    found = group.run(curve, size, strategy, options)
    for other, their_row, _ in found:
        assert other == pytest.approx(losses, rel=1e-5)
        assert their_row["val_accuracy"] == pytest.approx(row["val_accuracy"], abs=1e-6)
    assert all(one == found[0] for one in found[1:])


@pytest.mark.parametrize(("size", "strategy"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")])
def test_a_run_is_resumed_to_the_bit(size, strategy):
    (weights, rows, _), *_ = group.run(trained, size, "runs/whole", strategy, {})
    outcomes = group.outcomes_of(trained, size, "runs/cut", strategy, {"observers": [Dies(13)]})
    assert outcomes[0] == (None, "the process is gone")
    assert "ProcessError: rank 0 is dead or stopped (last heard of at step " in outcomes[1][1]
    assert "where: rank 1, which waited for it after step 13; " in outcomes[1][1]
    (resumed, their_rows, _), *_ = group.run(trained, size, "runs/cut", strategy, {"resume": True})
    assert same(resumed, weights) and their_rows == rows
    for name in ("model.safetensors", "metrics.jsonl", "results.csv"):
        assert Path("runs/cut", name).read_bytes() == Path("runs/whole", name).read_bytes()


class Squares(Dataset):
    """Numbered samples (number, a draw), which tell who has seen them."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return torch.tensor([float(number)]), torch.tensor([number**2 / 100.0])


class Numbers(IterableDataset):
    """The same as a stream; split: whether it divides itself among the processes."""

    def __init__(self, count, split=False):
        self.count, self.split = count, split

    def __iter__(self):
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        mine = range(rank, self.count, size) if self.split else range(self.count)
        return iter([Squares(self.count)[number] for number in mine])


def read(kind, given):
    """What a kind of data is, as it is given to fit."""
    squares = Squares(53)
    every = [squares[number] for number in range(53)]
    return {
        "arrays": lambda: tuple(map(torch.stack, zip(*every))),
        "samples": lambda: squares,
        "stream": lambda: Numbers(53),
        "loader": lambda: DataLoader(squares, batch_size=8, shuffle=True, **given),
        "loader of its own": lambda: DataLoader(
            squares, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5), **given
        ),
        "whole batches": lambda: DataLoader(torch.stack([x for x, _ in every]).split(8), batch_size=None),
        "stream loader": lambda: DataLoader(Numbers(53), batch_size=8, **given),
        "split stream": lambda: DataLoader(Numbers(53, split=True), batch_size=4, **given),
    }[kind]()


def seen(rank, kind, options, given):
    """The numbers of the samples in each update, as this process sees them."""
    torch.manual_seed(11)
    updates = []

    def step(state, window):
        sizes = [[x[:counted, 0].tolist() for x, counted in zip(map(first_of, window.batches), window.sizes)]]
        updates.extend(sizes)
        return epochal.StepResult(torch.tensor(1.0), float(sum(window.sizes)))

    options = {"batch_size": 8} | options if "loader" not in kind and "batches" not in kind else options
    options = {name: value for name, value in options.items() if kind != "split stream" or name != "batch_size"}
    epochal.fit(nn.Linear(1, 1), read(kind, given), step=step, epochs=2, observers=(), **options)
    return updates


def first_of(batch):
    return batch[0] if isinstance(batch, list | tuple) else batch


KINDS = ["arrays", "samples", "stream", "loader", "loader of its own", "whole batches", "stream loader"]


@pytest.mark.parametrize(("kind", "size"), [*((kind, 4) for kind in KINDS), ("arrays", 2), ("loader in workers", 2)])
def test_each_update_has_the_same_samples(kind, size):
    kind, given = kind.removesuffix(" in workers"), {"num_workers": 2} if kind.endswith(" in workers") else {}
    options = {"seed": 3, "accumulate": 2}
    whole = alone(seen, kind, options, given)
    shares = group.run(seen, size, kind, options, given)
    for number, update in enumerate(whole):
        for place, batch in enumerate(update):
            assert list(itertools.chain(*(share[number][place] for share in shares))) == batch
    assert all(len(share) == len(whole) for share in shares)


def test_a_stream_that_divides_itself_ends_with_its_last_process():
    shares = group.run(seen, 3, "split stream", {}, {})
    for rank, share in enumerate(shares):
        assert len(share) == 10
        numbers = list(itertools.chain(*itertools.chain(*share)))
        assert numbers == 2 * [float(number) for number in range(rank, 53, 3)]
