"""``epochal import-checkpoint`` and ``export``: weights from and to the files of others."""

import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from epochal.checkpoint.weights import load_weights, save_weights

RECIPE = """
import epochal, torch

def plan(epochs: int = 2):
    X = torch.linspace(-1, 1, 64)[:, None]
    return epochal.Plan(torch.nn.Linear(1, 1), (X, 3 * X), val=0.2, loss="mse", lr=0.1, epochs=epochs)
"""


@pytest.fixture
def run(command):
    Path("recipe.py").write_text(RECIPE)
    assert command("train", "recipe.py", "--run", "run", "--seed", 0)[0] == 0
    return Path("run")


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# -- import --

LINEAR = {"weight": torch.tensor([[2.0]]), "bias": torch.tensor([0.5])}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (LINEAR, ""),
        (torch.nn.Linear(1, 1).state_dict() | LINEAR, ""),
        ({"state_dict": LINEAR}, ""),
        (
            {"epoch": 3, "model_state_dict": LINEAR, "optimizer_state_dict": {"state": {}}, "loss": 0.5},
            "taken: model_state_dict; left out: epoch, optimizer_state_dict, loss\n",
        ),
        (
            {"model": {f"module._orig_mod.{name}": value for name, value in LINEAR.items()}},
            "all names began with 'module.', which DataParallel adds; it is taken off\n"
            "all names began with '_orig_mod.', which torch.compile adds; it is taken off\n",
        ),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_weights_are_taken_and_nothing_else(command, content, told, is_zip):
    torch.save(content, "file.pt", _use_new_zipfile_serialization=is_zip)
    assert command("import-checkpoint", "file.pt", "runs/new run") == (
        0,
        "weights  2 tensors, 2 numbers\n"
        "files    runs/new run: imported.safetensors, run.json\n"
        "next     epochal train RECIPE.py --run 'runs/new run' --resume\n",
        told,
    )
    assert json.loads(Path("runs/new run/run.json").read_text()) == {
        "status": "imported",
        "from": "file.pt",
        "sha256": hashlib.sha256(Path("file.pt").read_bytes()).hexdigest(),
    }
    assert same(dict(sorted(load_weights("runs/new run/imported.safetensors").items())), dict(sorted(LINEAR.items())))


def test_a_run_begins_with_the_weights(command):
    torch.save(LINEAR, "file.pt")
    Path("recipe.py").write_text(RECIPE)
    assert command("import-checkpoint", "file.pt", "run")[0] == 0
    assert "\nrun  imported\n" in command("runs", "ls", ".")[1]
    code, _, err = command("train", "recipe.py", "--run", "run", "--set", "resume=true", "--set", "lr=1e-30")
    assert code == 0 and "note: begun with the weights that were imported.\n" in err
    weights = load_weights("run/model.safetensors")
    assert all(torch.equal(weights[name], LINEAR[name]) for name in LINEAR)
    assert command("resume", "run", "--epochs", 3)[0] == 0  # now it is a run like any other


def test_tied_weights_stay_tied(command):
    weight = torch.randn(3, 3)
    torch.save({"a": weight, "b": weight}, "file.pt")
    assert command("import-checkpoint", "file.pt", "run")[0] == 0
    weights = load_weights("run/imported.safetensors")
    assert weights["a"] is weights["b"] and torch.equal(weights["a"], weight)


class Canary:
    def __reduce__(self):
        return os.mkdir, ("dead",)


def hostile(name):
    """Writes file.pt."""
    path = Path("file.pt")
    if name == "code":
        torch.save({"weight": torch.ones(1), "more": Canary()}, path)
    elif name == "module":
        torch.save(torch.nn.Linear(1, 1), path)
    elif name == "pickle":
        path.write_bytes(pickle.dumps({"weight": Canary()}))
    elif name == "text":
        path.write_text("no weights")
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "half":
        torch.save(LINEAR, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif name == "expanded":
        torch.save({"weight": torch.zeros(1).expand(2**40)}, path)
    elif name == "meta":
        torch.save({"weight": torch.zeros(2**40, device="meta")}, path)
    elif name == "sparse":
        torch.save({"weight": torch.eye(3).to_sparse()}, path)
    elif name == "quantity":
        torch.save({"weight": torch.zeros(2, dtype=torch.complex128)}, path)
    elif name == "list":
        torch.save([torch.ones(1)], path)
    elif name == "scalar":
        torch.save({"weight": torch.ones(1), "epoch": 3}, path)
    elif name == "deep":
        nested = {}
        for _ in range(300):
            nested = {"model": nested}
        torch.save(nested, path)
    elif name == "bomb":
        torch.save({"weight": torch.zeros(2**22)}, "large.pt")
        with zipfile.ZipFile("large.pt") as large, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
            for entry in large.infolist():
                small.writestr(entry.filename, large.read(entry.filename))
        Path("large.pt").unlink()


HOSTILE = {
    "code": "the file holds more than weights: posix.mkdir.",
    "module": "the file holds more than weights: torch.nn.modules.linear.Linear.",
    "pickle": "the file cannot be read.",
    "text": "the file cannot be read.",
    "empty": "the file cannot be read.",
    "half": "the file cannot be read.",
    "expanded": "its tensors are not plain ones, or larger than the file.",
    "meta": "its tensors are not plain ones, or larger than the file.",
    "sparse": "its tensors are not plain ones, or larger than the file.",
    "quantity": "its tensors are not plain ones, or larger than the file.",
    "list": "the file holds no state dict of tensors.\n  where: file.pt; a list\n",
    "scalar": "the file holds no state dict of tensors.\n  where: file.pt; a dict with 'weight' (Tensor), 'epoch' (",
    "deep": "the file holds no state dict of tensors.\n  where: file.pt; a dict with 'model' (dict)\n",
    "bomb": "the file cannot be read.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_weights_alone_is_refused_and_nothing_is_written(command, tmp_path, name):
    hostile(name)
    code, out, err = command("import-checkpoint", "file.pt", "run")
    assert (code, out) == (1, "") and err.startswith(f"CheckpointError: {HOSTILE[name]}"), err
    assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]
    assert "weights_only" not in err and "Traceback" not in err


def test_what_else_cannot_be_imported(command):
    text = "CheckpointError: the file cannot be read: No such file or directory.\n  where: none.pt\n"
    assert command("import-checkpoint", "none.pt", "run")[2].startswith(text)
    torch.save(LINEAR, "file.pt")
    Path("run").mkdir()
    Path("run/mine.txt").write_text("")
    code, _, err = command("import-checkpoint", "file.pt", "run")
    assert code == 1 and err.startswith("RunFolderError: the run folder is not empty")
    assert sorted(path.name for path in Path("run").iterdir() if path.name != ".lock") == ["mine.txt"]


# -- export --


def test_the_weights_of_a_run_as_a_file_of_torchs(command, run):
    assert command("export", run, "--to", "pt") == (0, "run/model.pt\n", "")
    read = torch.load("run/model.pt", weights_only=True)
    assert same(dict(sorted(read.items())), load_weights("run/model.safetensors"))
    code, _, err = command("export", run, "--to", "pt")
    assert (code, err) == (
        2,
        "PlanError: the file exists.\n  where: run/model.pt\n  fix:   choose another name with -o, or give --force\n",
    )
    assert command("export", run, "--to", "pt", "--force")[0] == 0
    assert command("import-checkpoint", "run/model.pt", "again")[0] == 0
    assert command("export", "again", "--to", "safetensors", "-o", "mine.safetensors")[1] == "mine.safetensors\n"
    assert same(load_weights("mine.safetensors"), load_weights("run/model.safetensors"))


def test_a_run_that_has_not_ended_gives_the_weights_of_its_newest_checkpoint(command, run):
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "status": "running"}))
    save_weights({"weight": torch.zeros(1)}, run / "model.safetensors")  # of an earlier end, say
    newest = sorted((run / "checkpoints").iterdir())[-1]
    (newest / "state.json").write_text("{}")
    code, out, err = command("export", run, "--to", "safetensors")
    assert (code, out) == (0, "run/exported.safetensors\n")
    left, taken = err.splitlines()
    assert left.startswith(f"left out: {newest}: the checkpoint is damaged: ")
    assert taken.startswith("the run has not ended: these are the weights of step-")
    assert load_weights("run/exported.safetensors")["weight"].shape == (1, 1)


def test_what_cannot_be_exported(command, run):
    assert command("export", "nothing", "--to", "pt")[2].startswith("RunFolderError: there is no such run folder.\n")
    Path("empty").mkdir()
    text = "RunFolderError: there are no weights in the folder yet.\n  where: empty\n"
    assert command("export", "empty", "--to", "pt")[2].startswith(text)
    code, _, err = command("export", run, "--to", "pt", "-o", "x.safetensors")
    assert code == 2 and err.startswith("PlanError: the name of the file says another format.\n")
    assert not Path("x.safetensors").exists()
    code, _, err = command("export", run, "--to", "onnx")
    assert code == 2 and '"onnx"' in err
    (run / "model.safetensors").write_bytes(b"none")
    assert command("export", run, "--to", "pt")[2].startswith("CheckpointError: it is not a safetensors file")
    assert not (run / "model.pt").exists()
