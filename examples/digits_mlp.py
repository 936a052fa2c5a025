"""Handwritten digits with a small multilayer perceptron: the shortest recipe.

Shows arrays as data, a part of them held back for validation, and early stopping.

    epochal train examples/digits_mlp.py
    epochal train examples/digits_mlp.py --hidden 32 --epochs 5
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
        where="examples/digits_mlp.py reads the digits of scikit-learn",
        fix="pip install --no-deps -r examples/requirements.txt",
    ) from missing


def plan(hidden: int = 128, dropout: float = 0.2, epochs: int = 60, lr: float = 2e-3) -> epochal.Plan:
    """A multilayer perceptron on handwritten digits.

    Args:
        hidden: units in the hidden layer.
        dropout: the share of them that is silent at each update.
    """
    digits = load_digits()
    pixels = digits.data / 16  # (1797, 64), from 0 to 1
    model = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 10))
    return epochal.Plan(
        model,
        (pixels, digits.target),
        val=0.2,
        loss="cross_entropy",
        optimizer="adamw",
        lr=lr,
        metrics=["accuracy"],
        epochs=epochs,
        patience=10,
    )
