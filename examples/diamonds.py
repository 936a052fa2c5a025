"""The prices of 53,940 diamonds: regression on a table of numbers and categories.

Shows a large table: the price goes into the table as its logarithm, because prices are judged by ratios;
each category of cut, color and clarity becomes a feature, so the first layer is a lazy one, which learns
how wide a row is when it sees one.

    epochal train examples/diamonds.py
    epochal train examples/diamonds.py --hidden 64 --epochs 15 --rows 5000
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import polars as pl
from torch import nn

import epochal
from epochal.errors import MissingPackageError


def plan(hidden: int = 128, epochs: int = 15, lr: float = 2e-3, rows: int | None = None) -> epochal.Plan:
    """A multilayer perceptron on the table of 53,940 diamonds.

    Args:
        hidden: units in each of the two hidden layers.
        rows: so many diamonds, drawn at random; all by default.
    """
    diamonds = table() if rows is None else table().sample(rows, seed=0)
    model = nn.Sequential(nn.LazyLinear(hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    return epochal.Plan(
        model,
        diamonds,
        val=0.1,
        target="log_price",
        loss="huber",
        optimizer="adamw",
        lr=lr,
        schedule="cosine",
        batch_size=256,
        metrics=["r2"],
        epochs=epochs,
    )


def table() -> pl.DataFrame:
    """Carat, cut, color, clarity, depth, table, x, y, z and log_price, one row a diamond."""
    plotnine = find_spec("plotnine")  # found, not imported: of the package only this file is needed
    if plotnine is None:
        raise MissingPackageError(
            "plotnine is not installed.",
            where="examples/diamonds.py reads the diamonds of plotnine",
            fix="pip install --no-deps -r examples/requirements.txt",
        )
    diamonds = pl.read_csv(Path(plotnine.origin).parent / "data" / "diamonds.csv")
    return diamonds.with_columns(log_price=pl.col("price").log()).drop("price")
