"""How far diabetes has gone after a year, from ten measurements of 442 patients: regression on a table.

Shows a table with ``target``: the other columns are standardised with the numbers of the training rows. The
target is learned as it stands, here in hundreds of points, so that the network's outputs start near it.

    epochal train examples/diabetes.py
    epochal train examples/diabetes.py --hidden 8 --epochs 40
"""

from __future__ import annotations

import polars as pl
from torch import nn

import epochal
from epochal.errors import MissingPackageError

try:
    from sklearn.datasets import load_diabetes
except ModuleNotFoundError as missing:
    raise MissingPackageError(
        f"{missing.name} is not installed.",
        where="examples/diabetes.py reads the patients of scikit-learn",
        fix="pip install --no-deps -r examples/requirements.txt",
    ) from missing


def plan(hidden: int = 16, dropout: float = 0.2, epochs: int = 200, lr: float = 3e-3) -> epochal.Plan:
    """A multilayer perceptron on the table of 442 patients.

    Args:
        hidden: units in the hidden layer.
        dropout: the share of them that is silent at each update.
    """
    data = load_diabetes(scaled=False)
    patients = pl.DataFrame(data.data, schema=data.feature_names).with_columns(target=data.target / 100)
    width = len(data.feature_names)  # a column of numbers without gaps is one feature
    return epochal.Plan(
        nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1)),
        patients,
        val=0.2,
        target="target",
        loss="mse",
        optimizer="adamw",
        lr=lr,
        weight_decay=0.1,
        metrics=["r2", "mae"],
        epochs=epochs,
        patience=30,
    )
