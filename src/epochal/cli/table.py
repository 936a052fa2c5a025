"""``epochal fit``, ``predict`` and ``eval``: from a table to a network, and back to a table."""

from __future__ import annotations

import json as text
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from epochal.cli.options import Config, Device, Epochs, Json, Precision, Processes, Restarts, Resume, Run, Seed
from epochal.errors import PlanError
from epochal.runtime.launched import launches, together
from epochal.runtime.world import announced

if TYPE_CHECKING:
    import polars as pl

    from epochal.data.encoding import Encoding

Target = Annotated[str, Parameter(help="The column to predict.")]
Drop = Annotated[list[str], Parameter(show_default=False, help="A column to leave out; several times.")]
Val = Annotated[float | Path, Parameter(help="The fraction of the rows to hold back for validation, or a file.")]
Hidden = Annotated[str, Parameter(help="The sizes of the hidden layers.")]
Output = Annotated[str, Parameter(name=("--output", "-o"), help="A .csv or .parquet file; - is stdout, as CSV.")]


def fit(
    data: Annotated[Path, Parameter(help="A .csv, .tsv or .parquet file with a row a sample.")],
    /,
    *,
    target: Target,
    task: Annotated[Literal["auto", "regression", "classification"], Parameter(help="What the target is.")] = "auto",
    val: Val = 0.2,
    epochs: Epochs = 200,
    patience: Annotated[int, Parameter(help="Stop after so many epochs without a better val_loss.")] = 20,
    lr: Annotated[float, Parameter(help="The learning rate.")] = 0.001,
    batch_size: Annotated[
        int | None, Parameter(help="Rows in a batch; by default 32 to 1024, as there are rows.")
    ] = None,
    hidden: Hidden = "64,64",
    drop: Drop = [],  # noqa: B006  (it is only read)
    run: Run = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    seed: Seed = 0,
    processes: Processes = None,
    restarts: Restarts = None,
    config: Config = None,
    resume: Resume = False,
) -> None:
    """Train a network on a table, from a file to a run folder.

    Numbers are standardised, missing ones filled in, categories made one feature each; columns that cannot teach
    anything are left out, and named. A target of text, booleans or few whole numbers is taken for classes.
    """
    flags = {name: value for name, value in locals().items() if name != "data"}
    if launches(processes, restarts):
        return
    import torch

    import epochal
    from epochal.cli import network, training
    from epochal.data.sources import encoded

    sizes = _sizes(hidden)
    encoding, train, held = together(lambda: _read(data, val, seed, target, task, drop))
    torch.manual_seed(seed)
    metrics = network.metrics_of(encoding)
    counts = train[target].value_counts(name="rows of it")["rows of it"].to_numpy()
    if encoding.task == "classification" and counts.min() * 2 > counts.mean():
        metrics = ["accuracy"]  # f1 only where classes are so uneven that the accuracy alone could flatter
    plan = epochal.Plan(
        network.MLP(encoding, sizes), encoded(encoding, train, where="train"), encoded(encoding, held, where="val"),
        loss=network.loss_of(encoding), optimizer="adamw", lr=lr, epochs=epochs, patience=patience, metrics=metrics,
        batch_size=batch_size or min(1024, max(32, 2 ** (len(train) // 400).bit_length())),
        device=device, precision=precision, seed=seed, run=run, resume=resume,
    )  # fmt: skip
    if announced().is_first:
        print(*encoding.notes, "", sep="\n", file=sys.stderr)
    files = {"table.json": network.saved(encoding, sizes)}
    command = ["fit", str(data.absolute())]
    training.train(plan, command, flags, files, "epochal predict {run} NEW.csv -o OUT.csv")


def _sizes(hidden: str) -> list[int]:
    try:
        sizes = [int(size) for size in hidden.split(",") if size.strip()]
    except ValueError:
        sizes = [0]
    if any(size < 1 for size in sizes):
        what = "the hidden layers are whole numbers of at least 1, with commas between them."
        raise PlanError(what, where=f"--hidden {hidden}", fix="try --hidden 64,64")
    return sizes


def _read(
    data: Path, val: float | Path, seed: int, target: str, task: str, drop: list[str]
) -> tuple[Encoding, pl.DataFrame, pl.DataFrame]:
    """The transformation, learned from the rows for training alone; those rows; and those for validation."""
    from epochal.data.encoding import Encoding
    from epochal.data.tables import read_table
    from epochal.feeding import divide_table

    learn = partial(Encoding.learn, target=target, task=task, where=str(data), drop=drop)
    if isinstance(val, Path):
        train = read_table(data)
        return learn(train), train, read_table(val, where="val")
    if not 0 < val < 1:
        fix = "try --val 0.2, or name a file"
        raise PlanError("a fraction for val lies between 0 and 1.", where=f"--val {val:g}", fix=fix)
    return divide_table(read_table(data), val, seed, learn)


def predict(
    run: Annotated[Path, Parameter(help="The run folder of a fit.")],
    data: Annotated[Path, Parameter(help="A table with the columns of the training table; a target is not needed.")],
    /,
    *,
    output: Output = "-",
    force: Annotated[bool, Parameter(help="Write over a file that exists.")] = False,
) -> None:
    """Predict the target of a run of fit for new rows.

    One row for each of the table, in its order: the target in its own unit, or the class and its probability.
    """
    path = None if output == "-" else Path(output)
    if path and path.suffix.lower() not in (".csv", ".parquet"):
        raise PlanError("predictions are written as .csv or .parquet.", where=f"-o {path}", fix="try -o out.csv")
    if path and path.exists() and not force:
        raise PlanError("the file exists.", where=f"-o {path}", fix="choose another name, or give --force")

    from epochal.checkpoint.files import replace
    from epochal.cli import network
    from epochal.data.tables import read_table
    from epochal.result import predict

    encoding, model = network.load(run)
    frame = read_table(data, where="data")
    features = encoding.features(frame, where=str(data))
    _tell_differences(encoding, frame)
    predictions = _named(encoding, predict(model, features, batch_size=4096))
    if path is None:
        print(predictions.write_csv(), end="")
    else:
        replace(path, predictions.write_csv if path.suffix.lower() == ".csv" else predictions.write_parquet)


def _tell_differences(encoding: Encoding, frame: pl.DataFrame) -> None:
    if extra := encoding.extra(frame):
        print(f"not used, as they were not there in training: {', '.join(map(repr, extra))}", file=sys.stderr)
    for column, values in encoding.unseen(frame).items():
        shown = ", ".join(map(repr, values[:5])) + (f" and {len(values) - 5} more" if len(values) > 5 else "")
        print(f"{column!r} holds categories that were not there in training: {shown}", file=sys.stderr)


def _named(encoding: Encoding, outputs: Any) -> pl.DataFrame:
    import polars as pl

    if encoding.task == "regression":
        return pl.DataFrame(encoding.decode_regression(outputs), schema=list(encoding.target_names))
    best = outputs.double().softmax(dim=1).max(dim=1)
    classes = [encoding.classes[index] for index in best.indices.tolist()]
    return pl.DataFrame([pl.Series(encoding.target_names[0], classes), pl.Series("probability", best.values.numpy())])


def evaluate(
    run: Annotated[Path, Parameter(help="The run folder of a fit.")],
    data: Annotated[Path, Parameter(help="A table with the columns of the training table, the target too.")],
    /,
    *,
    json: Json = False,
) -> None:
    """Measure a run of fit on a table with the target."""
    from epochal.cli import network
    from epochal.cli.folders import print_facts
    from epochal.data.sources import encoded
    from epochal.data.tables import read_table
    from epochal.observe.console import number
    from epochal.result import evaluate

    encoding, model = network.load(run)
    frame = read_table(data, where="data")
    arrays = encoded(encoding, frame, where=str(data))
    _tell_differences(encoding, frame)
    metrics = network.metrics_of(encoding)
    measured = evaluate(model, arrays, loss=network.loss_of(encoding), metrics=metrics, batch_size=4096)
    if json:
        print(text.dumps({"samples": len(frame), **measured}))
    else:
        print_facts({"samples": f"{len(frame):,}", **{name: number(value) for name, value in measured.items()}})
