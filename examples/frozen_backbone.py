"""What was learned on the digits 0 to 4, used for 5 to 9: a frozen backbone with a new head.

Shows that a frozen part stays as it is: without ``requires_grad`` the optimizer leaves its weights alone, and a part
in eval mode stays in eval mode, so its batch norm keeps its statistics.

    epochal train examples/frozen_backbone.py
    epochal train examples/frozen_backbone.py --channels 8 --epochs 10
"""

from __future__ import annotations

from torch import nn

import epochal
from epochal.errors import MissingPackageError

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    raise MissingPackageError(
        f"{missing.name} is not installed.",
        where="examples/frozen_backbone.py reads the digits of scikit-learn",
        fix="pip install --no-deps -r examples/requirements.txt",
    ) from missing


def plan(channels: int = 32, epochs: int = 20, lr: float = 1e-2, first_epochs: int = 10) -> epochal.Plan:
    """A new head for the digits 5 to 9 on convolutions that know 0 to 4.

    Args:
        channels: of the first convolution; the second has twice as many.
        first_epochs: how long the convolutions are trained on the digits 0 to 4.
    """
    digits = load_digits()
    images, labels = digits.images[:, None] / 16, digits.target
    low, high = labels < 5, labels >= 5

    backbone = convolutions(channels)
    first = nn.Sequential(backbone, nn.Linear(8 * channels, 5))
    epochal.fit(first, (images[low], labels[low]), loss="cross_entropy", epochs=first_epochs, observers=())

    backbone.requires_grad_(False).eval()
    return epochal.Plan(
        nn.Sequential(backbone, nn.Linear(8 * channels, 5)),
        (images[high], labels[high] - 5),
        val=0.2,
        loss="cross_entropy",
        optimizer="adam",
        lr=lr,
        metrics=["accuracy"],
        epochs=epochs,
    )


def convolutions(channels: int) -> nn.Module:
    """Images (n, 1, 8, 8) to features (n, 8 · channels)."""
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
    )
