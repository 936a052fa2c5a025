"""``epochal train RECIPE.py``: parameters as flags, changes of the plan, and what a wrong recipe gets."""

import json
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch

from epochal.checkpoint.weights import load_weights


@pytest.fixture
def recipe():
    """Writes a recipe and gives its path."""

    def write(text, name="digits.py"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


DIGITS = '''
    """Digits, with a network of one hidden layer."""
    from typing import Literal

    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    import epochal

    CALLS = []


    def plan(hidden: int = 16, act: Literal["relu", "tanh"] = "relu", scale: float = 16, bias: bool = True, note=None):
        """A network of one hidden layer reads digits.

        Args:
            hidden: Units of the hidden layer.
        """
        CALLS.append((hidden, act, scale, bias, note))
        X, y = load_digits(return_X_y=True)
        activation = nn.ReLU() if act == "relu" else nn.Tanh()
        model = nn.Sequential(nn.Linear(64, hidden, bias=bias), activation, nn.Linear(hidden, 10))
        data = torch.tensor(X / scale, dtype=torch.float32), torch.tensor(y)
        return epochal.Plan(model, data, val=0.2, loss="cross_entropy", lr=3e-3, epochs=2, metrics=["accuracy"])
'''


def config(run):
    return tomllib.loads(Path(run, "config.toml").read_text())


def calls():
    import digits  # a recipe can be imported by its name, as worker processes do

    return digits.CALLS


def test_a_recipe_is_trained_into_a_run_folder_of_its_name(command, recipe):
    path = recipe(DIGITS)
    code, out, err = command("train", path)
    assert code == 0, err
    files = "checkpoints/, config.toml, journal.jsonl, metrics.jsonl, model.safetensors, recipe.py, recipe.toml"
    results, *others = out.splitlines()
    assert results.startswith("results  epoch 2: val_loss ")
    assert others == [
        f"files    runs/digits-1: {files}, results.csv, results.png, run.json",
        "next     epochal runs show runs/digits-1",
    ]
    assert Path("runs/digits-1/recipe.py").read_text() == path.read_text()
    assert calls() == [(16, "relu", 16, True, None)]
    assert "train      1,438 samples" in err
    assert command("train", path)[1].endswith("next     epochal runs show runs/digits-2\n")


def test_parameters_become_typed_flags(command, recipe):
    words = ["--hidden", "8", "--act", "tanh", "--scale", "1e1", "--no-bias", "--note", "mine"]
    assert command("train", recipe(DIGITS), *words)[0] == 0
    assert calls() == [(8, "tanh", 10.0, False, "mine")]


def test_help_shows_the_parameters_of_the_recipe_and_the_flags_of_epochal(command, recipe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = command("train", recipe(DIGITS), "--help")
    lines = [line.strip("│╭╮╰╯─ ") for line in out.splitlines()]
    assert code == 0 and "A network of one hidden layer reads digits." in lines
    ours, theirs = lines.index("Parameters"), lines.index("Parameters of digits.py")
    assert [line.split()[0] for line in lines[ours + 1 : theirs] if line.startswith("--")] == [
        "--run",
        "--device",
        "--seed",
        "--epochs",
        "--precision",
        "--strategy",
        "--set",
        "--processes",
        "--restarts",
        "--threads",
        "--channels-last",
        "--config",
        "--resume",
    ]
    assert lines[theirs + 1 :][:3] == [
        "--hidden INT      Units of the hidden layer. [default: 16]",
        "--act CHOICE      [choices: relu, tanh] [default: relu]",
        "--scale FLOAT     [default: 16]",
    ]
    assert not Path("runs").exists()


def test_flags_of_epochal_and_changes_reach_the_plan(command, recipe):
    words = ["--run", "here", "--epochs", "3", "--precision", "bf16", "--device", "cpu", "--seed", "5"]
    words += ["--set", "batch_size=64", "--set", "optimizer=sgd", "--set", "max_time=1 min", "--set", "clip=1.5"]
    words += ["--set", 'metrics=["accuracy", "f1"]', "--set", "restore_best=false", "--set", "lr=none"]
    assert command("train", recipe(DIGITS), *words)[0] == 0
    changed = {"epochs": 3, "precision": "bf16", "device": "cpu", "seed": 5, "batch_size": 64, "optimizer": "sgd"}
    changed |= {"max_time": "1 min", "clip": 1.5, "metrics": ["accuracy", "f1"], "restore_best": False}
    assert {name: config("here").get(name) for name in (*changed, "lr")} == {**changed, "lr": None}


def test_a_seed_makes_a_run_that_can_be_made_again_from_its_folder(command, recipe):
    path = recipe(DIGITS)
    assert command("train", path, "--hidden", "8", "--seed", "3", "--set", "batch_size=16")[0] == 0
    first = Path("runs/digits-1")
    assert tomllib.loads((first / "recipe.toml").read_text()) == {"hidden": 8, "seed": 3, "set": ["batch_size=16"]}
    path.unlink()
    again = f"epochal train {first}/recipe.py --config {first}/recipe.toml"
    assert command("runs", "show", first)[1].endswith(f"again       {again}\n")
    assert command(*again.split()[1:])[0] == 0
    one, other = (load_weights(run / "model.safetensors") for run in (first, Path("runs/recipe-1")))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_parameters_come_from_the_environment_and_a_file_too(command, recipe, monkeypatch):
    path = recipe(DIGITS)
    Path("my.toml").write_text('hidden = 4\nact = "tanh"\nepochs = 1\n')
    monkeypatch.setenv("EPOCHAL_HIDDEN", "5")
    assert command("train", path, "--config", "my.toml")[0] == 0
    assert calls() == [(5, "tanh", 16, True, None)]
    assert config("runs/digits-1")["epochs"] == 1
    code, out, _ = command("config", "show", "train", path, "--act", "relu", "--config", "my.toml")
    assert code == 0
    assert out.splitlines()[:3] == [
        "epochal train",
        "  --hidden      5                     EPOCHAL_HIDDEN",
        "  --act         relu                  command line",
    ]


def test_a_parameter_with_the_name_of_a_flag_is_the_recipes(command, recipe):
    path = recipe(
        """
        import torch, epochal
        def plan(epochs: int = 3, seed: int = 1):
            model = torch.nn.Linear(2, 1)
            return epochal.Plan(model, (torch.ones(8, 2), torch.ones(8, 1)), loss="mse", epochs=10 * epochs)
        """
    )
    assert command("train", path, "--epochs", "2", "--seed", "4")[0] == 0
    assert config("runs/digits-1")["epochs"] == 20
    torch.manual_seed(4)
    expected = torch.nn.Linear(2, 1).weight
    assert command("train", path, "--epochs", "1", "--seed", "4", "--set", "epochs=1", "--set", "lr=1e-30")[0] == 0
    assert config("runs/digits-2")["epochs"] == 1
    torch.testing.assert_close(load_weights("runs/digits-2/model.safetensors")["weight"], expected)


def test_a_recipe_may_import_what_lies_beside_it(command, recipe):
    recipe("import torch\ndata = torch.ones(8, 2), torch.ones(8, 1)\n", "deep/beside.py")
    path = recipe(
        """
        import beside, epochal, torch
        def plan():
            return epochal.Plan(torch.nn.Linear(2, 1), beside.data, loss="mse", epochs=1, run="mine")
        """,
        "deep/recipe_with_company.py",
    )
    code, out, _ = command("train", path)
    assert code == 0 and out.endswith("next     epochal runs show mine\n")  # the run of the plan itself


# -- what is wrong with a recipe, or with what is asked of it --

LINEAR = """\
import torch, epochal

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x):
        return self.linear(x)

def plan():
    return epochal.Plan(Net(), (torch.ones(8, 2), torch.ones(8, 1)), loss="mse", epochs=1)
"""
MEND = "mend the recipe; --traceback shows the whole way there"


@pytest.mark.parametrize(
    ("text", "what", "where", "fix"),
    [
        ("def plan(:\n", "the recipe raised SyntaxError: invalid syntax (wrong.py, line 1).", "wrong.py:1", MEND),
        (
            "import torch\nimport nothing_of_this_name\n",
            "the recipe raised ModuleNotFoundError: No module named 'nothing_of_this_name'.",
            "wrong.py:2, in <module>",
            MEND,
        ),
        (
            "def plan(n: int = 3):\n    return pick(n)\n\ndef pick(n):\n    return [1, 2, 3][n]\n",
            "the recipe raised IndexError: list index out of range.",
            "wrong.py:5, in pick",
            MEND,
        ),
        (
            "def plan():\n    raise ValueError\n",
            "the recipe raised ValueError: no message.",
            "wrong.py:2, in plan",
            MEND,
        ),
        (
            LINEAR.replace("return self.linear(x)", "return self.linear(x).view(3, 5)"),
            "the recipe raised RuntimeError: shape '[3, 5]' is invalid for input of size 8.",
            "wrong.py:9, in forward; step 0, batch 0 of train; layer 'model' (Net);"
            " the batch is (float32 (8, 2), float32 (8, 1))",
            MEND,
        ),
        (
            LINEAR.replace("Net(), ", "torch.nn.Sequential(Net(), torch.nn.Unflatten(1, (3, 5))), "),
            "the recipe raised RuntimeError: unflatten: Provided sizes [3, 5] don't multiply up to the size of"
            " dim 1 (1) in the input tensor.",
            "step 0, batch 0 of train; layer '1' (Unflatten); the batch is (float32 (8, 2), float32 (8, 1))",
            MEND,
        ),
        (
            "x = 1\n",
            "the recipe has no function plan.",
            "wrong.py",
            "define plan(...) -> epochal.Plan in it; a script that calls fit is started with python, or by torchrun",
        ),
        (
            "def plan():\n    return {}\n",
            "plan() gave a dict, not an epochal.Plan.",
            "wrong.py",
            "end it with: return epochal.Plan(...)",
        ),
        (
            "def plan(config: int = 1): ...\n",
            "the parameter 'config' of plan() has a name that epochal needs.",
            "wrong.py",
            "give it another name",
        ),
        (
            "def plan(size: 'Size' = 1): ...\n",
            "the parameters of plan() cannot be read: name 'Size' is not defined.",
            "wrong.py",
            "give them types that exist: int, float, str, bool, Literal, ...",
        ),
    ],
)
def test_a_wrong_recipe(command, recipe, text, what, where, fix):
    recipe(text, "wrong.py")
    code, out, err = command("train", "wrong.py")
    assert (code, out) == (1, "")
    assert err.endswith(f"RecipeError: {what}\n  where: {where}\n  fix:   {fix}\n")
    assert "Traceback" not in err


def test_a_recipe_that_raises_shows_the_whole_way_when_asked(command, recipe):
    recipe("def plan():\n    return 1 / 0\n", "wrong.py")
    code, _, err = command("train", "wrong.py", "--traceback")
    assert code == 1 and err.startswith("Traceback (most recent call last):") and "    return 1 / 0\n" in err
    assert err.endswith(f"  where: wrong.py:2, in plan\n  fix:   {MEND}\n")


def test_no_recipe(command):
    fix = "  fix:   give a file with a function plan(...) -> epochal.Plan\n"
    assert command("train", "none.py") == (1, "", f"RecipeError: there is no such recipe.\n  where: none.py\n{fix}")
    text = f"RecipeError: a recipe is a Python file, and ends in .py.\n  where: recipe.txt\n{fix}"
    assert command("train", "recipe.txt") == (1, "", text)
    code, _, err = command("train")
    assert code == 2 and err.startswith('PlanError: Command "train" parameter RECIPE requires an argument.\n')


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--set", "batchsize=64"],
            "UnknownNameError: 'batchsize' is not a known option.\n  where: batchsize=\n"
            "  fix:   did you mean 'batch_size'? known: accumulate, ",
        ),
        (["--set", "batch_size"], "PlanError: --set takes option=value.\n  where: --set batch_size\n"),
        (["--set", "epochs=0"], "PlanError: epochs must be an integer of at least 1.\n  where: epochs=0\n"),
        (
            ["--set", "loss=mze"],
            "UnknownNameError: 'mze' is not a known loss.\n  where: loss='mze'\n  fix:   did you mean 'mse'?",
        ),
        (["--set", "observers=console"], "PlanError: observers must be functions that take an event.\n"),
        (
            ["--epocs", "3"],
            "PlanError: Unknown option: --epocs. Did you mean --epochs?\n  where: epochal train digits.py\n",
        ),
        (["--hidden", "3"], "PlanError: Unknown option: --hidden.\n"),
    ],
)
def test_what_cannot_be_asked_of_a_recipe(command, recipe, tmp_path, words, text):
    code, out, err = command("train", recipe(LINEAR), *words)
    assert (code, out) == (2, "") and err.startswith(text), err
    assert not Path("runs").exists()


def test_a_model_cannot_be_set(command, recipe):
    code, _, err = command("train", recipe(LINEAR), "--set", "model=resnet")
    assert code == 1 and err.startswith("ModelError: the model is a str, not a torch.nn.Module.\n")


def test_a_value_that_is_not_finite_ends_with_3_and_a_record(command, recipe):
    recipe(LINEAR.replace("torch.ones(8, 1)", "torch.full((8, 1), float('nan'))"))
    code, out, err = command("train", "digits.py")
    assert (code, out) == (3, "")
    assert "NonFiniteError: the targets hold a value that is not finite; the weights were not touched.\n" in err
    facts = json.loads(Path("runs/digits-1/run.json").read_text())
    assert (facts["status"], facts["reason"]) == ("ended", "nonfinite")
    told = err[err.index("  where: ") :].splitlines()
    code, out, _ = command("runs", "show", "runs/digits-1")
    shown = dict(line.split(None, 1) for line in out.splitlines())
    assert code == 0 and [shown["where"], shown["fix"]] == [line[9:] for line in told[:2]]
    assert shown["where"].startswith("step 0, epoch 1, batch 0; rows 0, 1, 2") and "nan" in shown["where"]


def test_a_run_without_an_epoch_is_done_too(command, recipe):
    code, out, _ = command("train", recipe(LINEAR), "--set", "max_time=1e-9")
    assert code == 0 and out.startswith("results  none: nothing was evaluated\nfiles    runs/digits-1: ")


def test_a_run_can_be_continued(command, recipe):
    path = recipe(DIGITS)
    assert command("train", path, "--seed", "0", "--run", "run")[0] == 0
    assert command("train", path, "--seed", "0", "--epochs", "4", "--run", "straight")[0] == 0
    code, out, _ = command("train", path, "--seed", "0", "--epochs", "4", "--run", "run", "--set", "resume=true")
    assert code == 0 and out.startswith("results  epoch 4: ")
    one, other = (load_weights(f"{run}/model.safetensors") for run in ("run", "straight"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_error_after_some_epochs_leaves_weights_and_curves(command, recipe):
    late = LINEAR.replace("epochs=1", "epochs=5, val=(torch.ones(8, 2), torch.ones(8, 1))")
    late = late.replace(
        "return self.linear(x)",
        "self.calls = getattr(self, 'calls', 0) + 1\n        1 / (6 - self.calls)\n        return self.linear(x)",
    )
    recipe(late)
    code, out, err = command("train", "digits.py")
    assert (code, out) == (1, "") and "RecipeError: the recipe raised ZeroDivisionError: division by zero.\n" in err
    left = {path.name for path in Path("runs/digits-1").iterdir()}
    assert {"model.safetensors", "results.csv", "results.png", "recipe.py", "recipe.toml"} <= left
    assert json.loads(Path("runs/digits-1/run.json").read_text())["reason"] == "failed"
