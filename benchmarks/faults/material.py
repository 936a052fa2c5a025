"""The data of the programs: small, real where it can be, and drawn from generators of their own."""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits(count: int = 1000) -> tuple[Tensor, Tensor]:
    """Handwritten digits: (count, 64) in 0..1, and their classes 0..9 as int64."""
    bunch = load_digits()
    return torch.from_numpy(bunch.data).float()[:count] / 16, torch.from_numpy(bunch.target).long()[:count]


def images(count: int = 600) -> tuple[Tensor, Tensor]:
    """The same as images, (count, 1, 8, 8), normalised."""
    x, y = digits(count)
    return ((x - 0.305) / 0.376).reshape(-1, 1, 8, 8), y


def diabetes() -> tuple[Tensor, Tensor]:
    """442 patients: (442, 10) of mean 0 and deviation 1, and a progression of mean 0 and deviation 1, (442, 1)."""
    bunch = load_diabetes()
    x, y = torch.from_numpy(bunch.data).float(), torch.from_numpy(bunch.target).float()[:, None]
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def blobs(count: int = 600, classes: int = 3, features: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian clouds around a centre for each class: (count, features) and classes as int64, in a random order."""
    draw = generator(seed)
    centres = 2 * torch.randn(classes, features, generator=draw)
    y = torch.randint(classes, (count,), generator=draw)
    x = centres[y] + torch.randn(count, features, generator=draw)
    return (x - x.mean(0)) / x.std(0), y


def binary(count: int = 600, features: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two clouds: (count, features) and targets 0.0 or 1.0, (count, 1)."""
    x, y = blobs(count, 2, features, seed)
    return x, y.float()[:, None]


def line(count: int = 600, features: int = 4, noise: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A linear relation with noise: (count, features) and (count, 1), both of deviation about 1."""
    draw = generator(seed)
    x = torch.randn(count, features, generator=draw)
    weights = torch.randn(features, 1, generator=draw)
    y = x @ weights / weights.norm() + noise * torch.randn(count, 1, generator=draw)
    return x, y


def text(count: int = 400, length: int = 12, words: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences of word numbers, (count, length) int64, each word following from the one before, mostly; and the
    words that come next, of the same shape."""
    draw = generator(seed)
    follows = torch.randperm(words, generator=draw)
    rows = [torch.randint(words, (count,), generator=draw)]
    for _ in range(length):
        stray = torch.rand(count, generator=draw) < 0.1
        rows.append(torch.where(stray, torch.randint(words, (count,), generator=draw), follows[rows[-1]]))
    whole = torch.stack(rows, 1)
    return whole[:, :-1].contiguous(), whole[:, 1:].contiguous()


def mlp(inputs: int, outputs: int, hidden: int = 32, seed: int = 0) -> nn.Sequential:
    """Two hidden layers with ReLU, initialised from ``seed``."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


def cnn(classes: int = 10, seed: int = 0) -> nn.Sequential:
    """Two convolutions with batch norm, for (n, 1, 8, 8)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, classes),
    )  # fmt: skip
