"""Handwritten digits with a convolutional network.

Shows an optimizer and a schedule made by functions of your own, for settings that have no name here:
SGD with Nesterov momentum, its rate lowered by half every five epochs.

    epochal train examples/digits_cnn.py
    epochal train examples/digits_cnn.py --channels 4 --epochs 3
"""

from __future__ import annotations

from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import epochal
from epochal.errors import MissingPackageError

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    raise MissingPackageError(
        f"{missing.name} is not installed.",
        where="examples/digits_cnn.py reads the digits of scikit-learn",
        fix="pip install --no-deps -r examples/requirements.txt",
    ) from missing


def plan(channels: int = 32, epochs: int = 25, lr: float = 0.05) -> epochal.Plan:
    """A convolutional network on handwritten digits.

    Args:
        channels: of the first convolution; the second has twice as many.
        lr: the learning rate of the first epochs.
    """
    digits = load_digits()
    images = digits.images[:, None] / 16  # (1797, 1, 8, 8), from 0 to 1
    return epochal.Plan(
        network(channels),
        (images, digits.target),
        val=0.2,
        loss="cross_entropy",
        optimizer=lambda parameters: SGD(parameters, lr=lr, momentum=0.9, nesterov=True),
        schedule=lambda optimizer: StepLR(optimizer, step_size=5, gamma=0.5),
        metrics=["accuracy", "f1"],
        epochs=epochs,
    )


def network(channels: int) -> nn.Module:
    """Images (n, 1, 8, 8) to scores (n, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(2 * channels * 2 * 2, 10),
    )
