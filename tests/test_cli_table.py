"""``epochal fit``, ``predict`` and ``eval``, on real tables; what a bad table, run or file gets."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn import metrics as sk
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

from epochal.__main__ import main
from epochal.checkpoint.weights import load_weights
from epochal.data.split import split_indices


def diabetes():
    """442 patients: numbers, and a quantity to predict, the progression, from 25 to 346."""
    return pl.from_pandas(load_diabetes(as_frame=True, scaled=False).frame).rename({"target": "progression"})


def wine():
    """178 wines of three cultivars."""
    frame = load_wine(as_frame=True).frame
    return pl.from_pandas(frame).with_columns(cultivar="grown by " + pl.col("target").cast(str)).drop("target")


def cancer():
    """569 tumours; with a category, gaps, a number for each row and a constant added."""
    rows = pl.int_range(pl.len())
    return pl.from_pandas(load_breast_cancer(as_frame=True).frame).select(
        "mean radius",
        pl.when(rows % 7 != 0).then("mean texture").alias("mean texture"),
        pl.col("mean area"),
        clinic=pl.when(rows % 3 == 0).then(pl.lit("north")).otherwise(pl.lit("south")),
        patient=rows,
        country=pl.lit("us"),
        benign=pl.col("target") == 1,
    )


def write(frame, name):
    frame.write_parquet(name) if name.endswith(".parquet") else frame.write_csv(name)
    return name


def results(run):
    return list(csv.DictReader(Path(run, "results.csv").read_text().splitlines()))


def best_row(run):
    best = json.loads(Path(run, "run.json").read_text())["best"]
    return {name: float(value) for name, value in results(run)[best["epoch"] - 1].items()}


# -- a quantity --


def test_a_quantity_is_predicted_and_measured_in_its_own_unit(command):
    frame = diabetes()
    train, val = write(frame[:350], "train.csv"), write(frame[350:], "val.csv")
    code, out, err = command("fit", train, "--target", "progression", "--val", val, "--epochs", "40", "--run", "run")
    assert code == 0, err
    assert err.startswith(
        "task: regression, because the target 'progression' holds 190 different numbers"
        " (--task classification takes them as classes)\n\nmodel      MLP, 4,929 parameters\n"
    )
    assert out.endswith("next     epochal predict run NEW.csv -o OUT.csv\n")

    code, out, err = command("predict", "run", val)
    predicted = pl.read_csv(io.StringIO(out))
    assert (code, err, predicted.columns) == (0, "", ["progression"])
    truth, guess = frame[350:]["progression"].to_numpy(), predicted["progression"].to_numpy()
    expected = {
        "mae": sk.mean_absolute_error(truth, guess),
        "rmse": sk.root_mean_squared_error(truth, guess),
        "r2": sk.r2_score(truth, guess),
    }
    assert expected["r2"] > 0.4 and 30 < expected["mae"] < 60
    row = best_row("run")
    assert {name: row[f"val_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    measured = json.loads(command("eval", "run", val, "--json")[1])
    assert measured == pytest.approx({"samples": 92, "loss": row["val_loss"], **expected}, rel=1e-5)
    assert command("eval", "run", val)[1] == (
        f"samples  92\nloss     {measured['loss']:.4f}\nmae      {measured['mae']:.4f}\n"
        f"rmse     {measured['rmse']:.4f}\nr2       {measured['r2']:.4f}\n"
    )


def test_the_transformation_is_learned_from_the_rows_for_training_alone_and_is_data(command):
    frame = diabetes()
    write(frame, "diabetes.csv")
    assert (
        command("fit", "diabetes.csv", "--target", "progression", "--val", "0.25", "--epochs", "1", "--seed", "3")[0]
        == 0
    )
    saved = json.loads(Path("runs/diabetes-1/table.json").read_text())
    assert saved["format"] == 1 and saved["hidden"] == [64, 64]
    age = next(column for column in saved["encoding"]["columns"] if column["name"] == "age")
    train, _ = split_indices(len(frame), 0.25, seed=3)
    assert age["mean"] == pytest.approx(frame["age"].to_numpy()[train.numpy()].mean())
    assert age["mean"] != pytest.approx(frame["age"].mean())


def test_the_same_seed_gives_the_same_run(command):
    write(diabetes(), "diabetes.csv")
    for seed in (1, 1, 2):
        assert command("fit", "diabetes.csv", "--target", "progression", "--epochs", "2", "--seed", seed)[0] == 0
    one, other, third = (load_weights(f"runs/diabetes-{n}/model.safetensors")["0.weight"] for n in (1, 2, 3))
    assert torch.equal(one, other) and not torch.equal(one, third)


def test_options_of_fit_reach_the_plan(command):
    write(diabetes(), "diabetes.csv")
    words = ["--target", "progression", "--epochs", "4", "--patience", "3", "--lr", "0.01", "--batch-size", "64"]
    words += ["--hidden", "8", "--drop", "age", "--drop", "sex", "--precision", "bf16", "--device", "cpu"]
    code, _, err = command("fit", "diabetes.csv", *words)
    assert code == 0 and "dropped 'age', 'sex': as asked" in err and "MLP, 81 parameters" in err
    config = Path("runs/diabetes-1/config.toml").read_text()
    for line in ("epochs = 4", "patience = 3", "lr = 0.01", "batch_size = 64", 'precision = "bf16"', 'device = "cpu"'):
        assert line in config


# -- classes --


def test_classes_are_predicted_by_their_names(command):
    write(wine(), "wine.parquet")
    code, _, err = command("fit", "wine.parquet", "--target", "cultivar", "--lr", "0.01", "--run", "run")
    assert code == 0
    assert err.startswith("task: classification, because the target 'cultivar' holds text with 3 different values\n\n")
    assert "val_f1" not in results("run")[0]  # no class is rare

    code, out, err = command("predict", "run", "wine.parquet", "-o", "out.parquet")
    assert (code, out, err) == (0, "", "")
    predicted = pl.read_parquet("out.parquet")
    assert predicted.columns == ["cultivar", "probability"] and len(predicted) == 178
    right = (predicted["cultivar"] == wine()["cultivar"]).mean()
    assert right > 0.95
    assert predicted["probability"].is_between(1 / 3, 1).all()
    measured = json.loads(command("eval", "run", "wine.parquet", "--json")[1])
    assert measured["accuracy"] == pytest.approx(right)
    assert list(measured) == ["samples", "loss", "accuracy", "f1"]


def test_rows_are_predicted_one_by_one_in_their_order(command):
    frame = wine()
    write(frame, "wine.csv")
    assert command("fit", "wine.csv", "--target", "cultivar", "--epochs", "3", "--run", "run")[0] == 0
    write(frame[::-1].drop("cultivar"), "new.csv")
    turned = pl.read_csv(io.StringIO(command("predict", "run", "new.csv")[1]))[::-1]
    whole = pl.read_csv(io.StringIO(command("predict", "run", "wine.csv")[1]))
    assert turned["cultivar"].equals(whole["cultivar"])
    np.testing.assert_allclose(turned["probability"], whole["probability"], rtol=1e-5)


def test_booleans_categories_gaps_and_columns_that_teach_nothing(command):
    write(cancer(), "cancer.csv")
    code, _, err = command("fit", "cancer.csv", "--target", "benign", "--epochs", "5", "--run", "run")
    assert code == 0
    notes = err.partition("\n\n")[0].splitlines()
    assert notes[:3] == [
        "task: classification, because the target 'benign' holds booleans (--task regression takes them as 0 and 1)",
        "dropped 'patient': whole numbers that count or name the rows; to use one as a quantity, write it with"
        " decimals (1.0)",
        "dropped 'country': the same in every row",
    ]
    assert notes[3].startswith("filled missing numbers with the median: 'mean texture' (")
    assert set(pl.read_csv(io.StringIO(command("predict", "run", "cancer.csv")[1]))["benign"]) == {True, False}


def test_uneven_classes_are_measured_by_f1_too(command):
    frame = cancer()
    write(pl.concat([frame.filter("benign"), frame.filter(~pl.col("benign"))[:50]]), "uneven.csv")
    assert command("fit", "uneven.csv", "--target", "benign", "--epochs", "2")[0] == 0
    assert {"val_accuracy", "val_f1"} <= set(results("runs/uneven-1")[0])


def test_the_task_can_be_said(command):
    write(wine().with_columns(pl.col("cultivar").str.slice(-1)), "wine.csv")
    for task, start in (("auto", "classification"), ("regression", "regression"), ("classification", "classification")):
        code, _, err = command("fit", "wine.csv", "--target", "cultivar", "--task", task, "--epochs", "1")
        assert code == 0 and err.startswith(f"task: {start}, because ")


def test_a_rare_class_does_not_change_the_task_when_the_table_is_divided(command):
    frame = pl.DataFrame({"x": np.arange(82.0) ** 0.5, "y": [0] * 40 + [1] * 40 + [2] * 2})
    write(frame, "rare.csv")
    code, _, err = command("fit", "rare.csv", "--target", "y", "--val", "0.5", "--epochs", "1")
    assert code == 0
    assert err.startswith(
        "task: classification, because the target 'y' has only 3 different whole numbers"
        " (--task regression takes it as a quantity)\n"
    )


# -- what a new table may be --


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run over the tumours, that no test changes."""
    folder = tmp_path_factory.mktemp("trained")
    cancer().write_csv(folder / "cancer.csv")
    words = [folder / "cancer.csv", "--target", "benign", "--epochs", "3", "--run", folder / "run"]
    assert main(["fit", *map(str, words)]) == 0
    return folder / "run"


def test_extra_columns_and_unseen_categories_are_named_and_no_obstacle(command, trained):
    new = cancer()[:4].with_columns(clinic=pl.Series(["north", "west", "moon", "south"]), price=1.0).drop("benign")
    write(new, "new.csv")
    code, out, err = command("predict", trained, "new.csv")
    assert code == 0 and len(out.splitlines()) == 5
    assert err == (
        "not used, as they were not there in training: 'price'\n"
        "'clinic' holds categories that were not there in training: 'moon', 'west'\n"
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            "mean radius,mean texture,clinc\n1,2,north\n",
            """\
TableError: columns of the training table are missing: 'mean area', 'clinic'.
  where: new.csv
  fix:   did you mean 'mean radius' for 'mean area', 'clinc' for 'clinic'? the table has \
'mean radius', 'mean texture', 'clinc'
""",
        ),
        (
            "mean radius,mean texture,mean area,clinic\n1,2,many,north\n",
            """\
TableError: the column 'mean area' holds 'many' in row 1, and held numbers in training.
  where: new.csv
  fix:   mend the value, or remove the row
""",
        ),
        (
            "mean radius,mean texture,mean area,clinic\n",
            """\
TableError: the table has columns and no rows.
  where: data, new.csv
  fix:   give a table with at least one row
""",
        ),
        (
            "",
            """\
TableError: the file is empty.
  where: data, new.csv
  fix:   give a file with a header and at least one row
""",
        ),
    ],
)
def test_a_table_that_cannot_be_predicted(command, trained, content, text):
    Path("new.csv").write_text(content)
    assert command("predict", trained, "new.csv", "-o", "out.csv") == (1, "", text)
    assert not Path("out.csv").exists()


def test_eval_needs_the_target(command, trained):
    write(cancer()[:4].drop("benign"), "new.csv")
    assert command("eval", trained, "new.csv") == (
        1,
        "",
        """\
TableError: columns of the training table are missing: 'benign'.
  where: new.csv
  fix:   the table has 'mean radius', 'mean texture', 'mean area', 'clinic', 'patient', 'country'
""",
    )


def test_predictions_do_not_overwrite_unless_told(command, trained):
    write(cancer()[:3], "new.csv")
    assert command("predict", trained, "new.csv", "-o", "out.csv") == (0, "", "")
    before = Path("out.csv").read_bytes()
    Path("out.csv").write_text("mine")
    text = "PlanError: the file exists.\n  where: -o out.csv\n  fix:   choose another name, or give --force\n"
    assert command("predict", trained, "new.csv", "-o", "out.csv") == (2, "", text)
    assert Path("out.csv").read_text() == "mine"
    assert command("predict", trained, "new.csv", "-o", "out.csv", "--force") == (0, "", "")
    assert Path("out.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("output", "code", "text"),
    [
        (
            "out.txt",
            2,
            "PlanError: predictions are written as .csv or .parquet.\n  where: -o out.txt\n  fix:   try -o out.csv\n",
        ),
        (
            "none/out.csv",
            1,
            "FileError: out.csv cannot be written: its folder does not exist.\n  where: none/out.csv\n"
            "  fix:   make the folder first\n",
        ),
    ],
)
def test_predictions_that_cannot_be_written(command, trained, output, code, text):
    write(cancer()[:3], "new.csv")
    assert command("predict", trained, "new.csv", "-o", output) == (code, "", text)


# -- what a run may be --


def copy_of(run, **changes):
    Path("copy").mkdir()
    for name in ("table.json", "model.safetensors"):
        content = changes.get(name.partition(".")[0], (run / name).read_bytes())
        if content is not None:
            Path("copy", name).write_bytes(content)
    return Path("copy")


def test_a_run_folder_can_be_copied(command, trained):
    write(cancer(), "cancer.csv")
    assert command("predict", copy_of(trained), "cancer.csv") == command("predict", trained, "cancer.csv")


def test_a_run_that_is_not_one_of_fit(command):
    Path("runs/demo-1").mkdir(parents=True)
    write(cancer()[:3], "new.csv")
    assert command("predict", "runs/demo-1", "new.csv") == (
        1,
        "",
        """\
RunFolderError: the run was not made by epochal fit: it holds no table.json, and only your code knows its model.
  where: runs/demo-1
  fix:   load its model.safetensors into the model in Python (the README shows it), and call epochal.predict
""",
    )
    assert command("eval", "runs/demo-2", "new.csv") == (
        1,
        "",
        """\
RunFolderError: there is no such run folder.
  where: runs/demo-2
  fix:   did you mean runs/demo-1?
""",
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda saved: saved[:-5], "Input data was truncated"),
        (lambda saved: "[1]", "Expected `object`, got `array`"),
        (lambda saved: saved.replace('"format": 1', '"format": 2'), "Invalid enum value 2 - at `$.format`"),
        (lambda saved: saved.replace("64\n", "-64\n"), "Expected `int` >= 1 - at `$.hidden[1]`"),
        (lambda saved: saved.replace("64\n", "65537\n"), "Expected `int` <= 65536 - at `$.hidden[1]`"),
        (
            lambda saved: saved.replace('"classification"', '"regression"'),
            "its targets, scales and classes do not fit a regression - at `$.encoding`",
        ),
    ],
)
def test_a_damaged_transformation(command, trained, change, reason):
    write(cancer()[:3], "new.csv")
    run = copy_of(trained, table=change((trained / "table.json").read_text()).encode())
    code, out, err = command("predict", run, "new.csv")
    assert (code, out) == (1, "")
    assert err == (
        f"CheckpointError: the file cannot be read: {reason}.\n  where: copy/table.json\n"
        "  fix:   train again, copy it again, or use the epochal that wrote it\n"
    )


def test_weights_of_another_network(command, trained):
    write(cancer()[:3], "new.csv")
    other = (trained / "table.json").read_text().replace("64", "32").encode()
    code, _, err = command("predict", copy_of(trained, table=other), "new.csv")
    assert code == 1
    assert err.startswith("CheckpointError: these weights belong to another model.\n  where: copy/model.safetensors; ")


def test_a_run_without_weights(command, trained):
    write(cancer()[:3], "new.csv")
    code, _, err = command("predict", copy_of(trained, model=None), "new.csv")
    assert code == 1
    assert err.startswith("CheckpointError: the weights cannot be read: ")
    assert "\n  where: copy/model.safetensors\n" in err


# -- what fit refuses --


@pytest.mark.parametrize(
    ("content", "words", "code", "text"),
    [
        (
            "a,b\n1,2\n3\n",
            [],
            1,
            """\
TableError: the row at line 3 has 1 fields, and the header has 2.
  where: train, data.csv
  fix:   give it 2 fields; a separator inside one needs quotes
""",
        ),
        (
            "",
            [],
            1,
            """\
TableError: the file is empty.
  where: train, data.csv
  fix:   give a file with a header and at least one row
""",
        ),
        (
            "size,prize\n1,2.5\n2,3.5\n",
            [],
            1,
            """\
TableError: there is no column 'price' in the table.
  where: data.csv
  fix:   did you mean 'prize'? the table has 'size', 'prize'
""",
        ),
        (
            "size,price\n1,\n2,3.5\n",
            [],
            1,
            """\
TableError: the target 'price' is missing in 1 of 2 rows.
  where: data.csv, row 1
  fix:   remove these rows, or fill in the target
""",
        ),
        (
            "size,price\n1,2.5\n2,3.5\n",
            ["--val", "1.5"],
            2,
            """\
PlanError: a fraction for val lies between 0 and 1.
  where: --val 1.5
  fix:   try --val 0.2, or name a file
""",
        ),
        (
            "size,price\n1.5,2.5\n2.5,3.5\n",
            ["--val", "val.csv"],
            1,
            """\
TableError: there is no file 'val.csv'.
  where: val, val.csv
  fix:   did you mean 'data.csv'?
""",
        ),
        (
            "size,price\n1,2.5\n2,3.5\n",
            ["--hidden", "8,wide"],
            2,
            """\
PlanError: the hidden layers are whole numbers of at least 1, with commas between them.
  where: --hidden 8,wide
  fix:   try --hidden 64,64
""",
        ),
        (
            "size,price\n1.5,2.5\n2.5,3.5\n4.5,4.5\n",
            ["--epochs", "0", "--lr", "-1"],
            2,
            """\
PlanError: 2 options of the plan cannot be right.
- PlanError: lr must be a number above 0.
    where: lr=-1.0
    fix:   try lr=0.001
- PlanError: epochs must be an integer of at least 1.
    where: epochs=0
    fix:   try epochs=10
""",
        ),
        (
            "size,price\n1.5,2.5\n2.5,3.5\n4.5,4.5\n",
            ["--task", "clasification"],
            2,
            """\
PlanError: Invalid value "clasification" for --task. Choose from: "auto", "regression", "classification". Did you mean \
"classification"?
  where: epochal fit
  fix:   epochal fit --help shows what can be given
""",
        ),
    ],
)
def test_what_fit_refuses(command, tmp_path, content, words, code, text):
    Path("data.csv").write_text(content)
    assert command("fit", "data.csv", "--target", "price" if "a,b" not in content else "a", *words) == (code, "", text)
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]


def test_a_run_folder_in_use(command):
    write(diabetes(), "diabetes.csv")
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("all of it")
    code, out, err = command("fit", "diabetes.csv", "--target", "progression", "--run", "mine")
    assert (code, out) == (1, "")
    assert err.endswith(
        """\
RunFolderError: the run folder is not empty, and a run is never overwritten.
  where: mine: thesis.txt
  fix:   choose another name for the run
"""
    )
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


@pytest.mark.cuda
def test_fit_on_the_accelerator_is_read_on_the_host(command):
    write(wine(), "wine.csv")
    assert command("fit", "wine.csv", "--target", "cultivar", "--epochs", "3", "--device", "cuda")[0] == 0
    assert torch.cuda.is_available() and command("predict", "runs/wine-1", "wine.csv")[0] == 0
