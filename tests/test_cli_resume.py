"""Runs of the command line that are interrupted, killed and resumed; and ``epochal verify-resume``."""

import hashlib
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path

import pytest
import torch

from epochal.checkpoint.weights import load_weights

RECIPE = """
import time
import epochal, torch

class Net(torch.nn.Module):
    def __init__(self, hidden, pause):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, hidden), torch.nn.BatchNorm1d(hidden), torch.nn.Dropout(0.3), torch.nn.Linear(hidden, 1)
        )
        self.pause = pause

    def forward(self, x):
        time.sleep(self.pause)
        return self.layers(x)

def plan(hidden: int = 8, pause: float = 0.0, epochs: int = 4):
    X = torch.randn(100, 4, generator=torch.Generator().manual_seed(1))
    data = X, X.sum(1, keepdim=True)
    return epochal.Plan(Net(hidden, pause), data, val=0.2, loss="mse", lr=0.01, epochs=epochs, batch_size=8)
"""
# A parent may have told its children to ignore the signal.
EPOCHAL = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from epochal.__main__ import main; sys.exit(main())"
)


@pytest.fixture
def recipe():
    path = Path("noise.py")
    path.write_text(RECIPE)
    return path


def begin(*words):
    command = [sys.executable, "-c", EPOCHAL, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, condition):
    for _ in range(6000):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


def lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def facts(run):
    return json.loads(Path(run, "run.json").read_text())


def left(run):
    """What must not depend on kills: the weights, and every row, to the byte."""
    run = Path(run)
    digest = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    return digest, (run / "metrics.jsonl").read_bytes(), (run / "results.csv").read_bytes()


# -- signals --


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_ends_a_run_after_a_step_with_a_checkpoint(command, recipe, name, code):
    run = begin("train", recipe, "--seed", 0, "--pause", 0.01, "--epochs", 1000, "--run", "a run")
    wait_for(run, lambda: lines(Path("a run/metrics.jsonl")) >= 2)
    told = command("runs", "show", "a run")[1]
    assert "\nstatus      running\n" in told and "\nnext" not in told
    run.send_signal(getattr(signal, name))
    out, err = run.communicate(timeout=100)
    step = facts("a run")["steps"]
    assert (run.returncode, out) == (code, "")
    assert err.endswith(
        f"Interrupted: {name} ended the run after step {step}; a checkpoint is saved.\n"
        "  where: a run\n  fix:   epochal resume 'a run'\n"
    )
    assert "Traceback" not in err and Path("a run/results.png").exists()
    assert any(path.name.startswith(f"step-{step:08d}") for path in Path("a run/checkpoints").iterdir())
    assert (facts("a run")["status"], facts("a run")["reason"]) == ("ended", "interrupted")
    assert command("runs", "show", "a run")[1].endswith("\nnext        epochal resume 'a run'\n")

    epochs = facts("a run")["epochs"] + 2  # it is resumed in the middle of the first of them
    assert command("resume", "a run", "--epochs", epochs)[0] == 0
    assert command("train", recipe, "--seed", 0, "--epochs", epochs, "--run", "straight")[0] == 0
    assert left("a run") == left("straight")


def test_a_second_ctrl_c_stops_at_once(recipe):
    run = begin("train", recipe, "--pause", 60, "--run", "run")
    wait_for(run, lambda: Path("run/checkpoints/step-00000000").exists())
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert run.poll() is None  # the step is finished first
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=100)
    assert (run.returncode, out) == (130, "")
    assert err.endswith("\ninterrupted; epochal resume run goes on from the newest checkpoint\n")
    assert "Traceback" not in err


def test_a_run_killed_at_random_instants_ends_as_if_it_had_not_been(command, recipe):
    words = ["--seed", "0", "--pause", "0.015", "--epochs", "8"]
    assert command("train", recipe, *words, "--run", "straight")[0] == 0
    kills, chance = 0, random.Random(0)
    run, journal = begin("train", recipe, *words, "--run", "killed"), Path("killed/journal.jsonl")
    while True:
        before = lines(journal)
        wait_for(run, lambda: lines(journal) > before and Path("killed/run.json").exists())  # noqa: B023
        time.sleep(chance.uniform(0, 0.4))
        if kills < 2:
            run.kill()
        run.communicate(timeout=100)
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL
        kills += 1
        assert "\nstatus" in command("runs", "show", "killed")[1]
        run = begin("resume", "killed")
    assert kills == 2
    assert left("killed") == left("straight")


def test_a_run_whose_process_is_gone_has_stopped(command, recipe):
    assert command("train", recipe, "--epochs", 1, "--run", "runs/run")[0] == 0
    Path("runs/run/run.json").write_text(json.dumps({**facts("runs/run"), "status": "running", "reason": None}))
    assert "\nruns/run  stopped" in command("runs", "ls")[1]
    assert command("runs", "show", "runs/run")[1].endswith("\nnext       epochal resume runs/run\n")


# -- what a run was begun with --


def test_every_command_that_trains_can_be_trained_further(command, recipe):
    rows = [f"{i * 37 % 11 / 10},{i * 13 % 17},{i * i % 7 + i / 10}" for i in range(60)]
    Path("rows.csv").write_text("\n".join(["a,b,c", *rows]))
    for words, further in (
        (["train", recipe, "--seed", "1", "--hidden", "4", "--set", "batch_size=16"], "recipe.toml"),
        (["fit", "rows.csv", "--target", "c", "--hidden", "4", "--drop", "b", "--batch-size", "8"], "fit.toml"),
        (["demo", "--seed", "2"], "demo.toml"),
    ):
        name = str(words[0])
        code, _, err = command(*words, "--epochs", 1, "--run", name)
        assert code == 0, err
        begun = facts(name)["command"]
        assert begun == [name, *([str(Path(words[1]).absolute())] if name != "demo" else [])]
        assert tomllib.loads(Path(name, further).read_text())["epochs"] == 1
        code, out, err = command("resume", name)
        assert (code, out) == (0, "") and err == (
            f"{name} has ended, after epoch 1: all epochs are done\n"
            f"epochal resume {name} --epochs N trains until N epochs are done\n"
        )
        before = left(name)
        code, out, err = command("resume", name, "--epochs", 2)
        assert code == 0 and out.startswith("results  epoch 2: "), err
        assert "note: resumed from step-" in err
        assert tomllib.loads(Path(name, further).read_text())["epochs"] == 2  # what the next resume goes on to
        if name != "demo":  # whose schedule spans the epochs
            assert command(*words, "--epochs", 2, "--run", f"{name}-straight")[0] == 0
            assert left(name) == left(f"{name}-straight") != before


def test_flags_are_those_of_the_start_wherever_they_came_from(command, recipe, monkeypatch):
    Path("my.toml").write_text("pause = 0.001\n")
    monkeypatch.setenv("EPOCHAL_HIDDEN", "5")
    words = ["--seed", "3", "--set", "weight_decay=0.1", "--config", "my.toml", "--epochs", "1", "--run", "run"]
    assert command("train", recipe, *words, "--set", "resume=true")[0] == 0
    assert tomllib.loads(Path("run/recipe.toml").read_text()) == {
        "hidden": 5, "pause": 0.001, "seed": 3, "epochs": 1, "set": ["weight_decay=0.1"],
    }  # fmt: skip
    monkeypatch.setenv("EPOCHAL_HIDDEN", "6")
    Path("my.toml").unlink()
    code, _, err = command("resume", "run", "--epochs", "2")
    assert code == 0 and "no longer exact" not in err and "changed since: epochs 1 → 2.\n" in err
    assert load_weights("run/model.safetensors")["layers.0.weight"].shape == (5, 4)


def test_the_plan_can_be_changed_on_a_resume(command, recipe):
    given = ["--epochs", 6, "--set", "max_steps=12", "--run", "run"]
    assert command("train", recipe, *given, "--set", "weight_decay=0.1")[0] == 0
    assert (facts("run")["reason"], facts("run")["epochs"]) == ("max_steps", 1)
    assert command("resume", "run", "--set", "max_steps=none")[0] == 0
    assert (facts("run")["reason"], facts("run")["epochs"]) == ("epochs", 6)
    changed = ["max_steps=12", "weight_decay=0.1", "max_steps=none"]
    assert tomllib.loads(Path("run/recipe.toml").read_text())["set"] == changed
    assert command("demo", "--epochs", 1, "--run", "demo")[0] == 0
    code, _, err = command("resume", "demo", "--set", "lr=1")
    assert code == 2 and "--set changes the plan of a recipe, and this run has none." in err


def test_more_epochs_may_be_asked_for_after_a_change_of_them(command, recipe):
    assert command("train", recipe, "--epochs", 2, "--run", "run")[0] == 0
    assert command("resume", "run", "--set", "epochs=3")[0] == 0
    assert command("resume", "run", "--epochs", 5)[0] == 0
    assert facts("run")["epochs"] == 5


def test_train_with_resume_keeps_the_seed_that_was_drawn(command, recipe):
    assert command("train", recipe, "--epochs", 2, "--run", "run")[0] == 0
    drawn = tomllib.loads(Path("run/recipe.toml").read_text())["drawn"]
    code, _, err = command("train", recipe, "--epochs", 3, "--run", "run", "--resume")
    assert code == 0 and f"seed       {drawn}\n" in err and "no longer exact" not in err
    assert tomllib.loads(Path("run/recipe.toml").read_text())["drawn"] == drawn
    code, _, err = command("train", recipe, "--epochs", 1, "--run", "other", "--resume")
    assert code == 0 and "there is no checkpoint in other yet: the run begins anew." in err


@pytest.mark.parametrize("given", [["--seed", 5], ["--set", "seed=5"]])
def test_train_with_resume_keeps_the_seed_that_was_given(command, recipe, given):
    assert command("train", recipe, "--epochs", 2, "--run", "run", *given)[0] == 0
    code, _, err = command("train", recipe, "--epochs", 3, "--run", "run", "--resume")
    assert code == 0 and "seed       5\n" in err and "no longer exact" not in err


def test_train_with_resume_gives_a_recipe_its_own_seed_again(command):
    own = RECIPE.replace("epochs: int = 4", "epochs: int = 4, seed: int = 1").replace("seed(1)", "seed(seed)")
    Path("own.py").write_text(own)
    assert command("train", "own.py", "--epochs", 2, "--run", "run", "--seed", 7)[0] == 0
    code, _, err = command("train", "own.py", "--epochs", 3, "--run", "run", "--resume")
    assert code == 0 and "no longer exact" not in err and "trained on" not in err


def test_flags_that_cannot_be_read_are_told(command, recipe):
    assert command("train", recipe, "--epochs", 2, "--run", "run")[0] == 0
    Path("run/recipe.toml").write_text("seed = \n[[[")
    for words in (["resume", "run", "--epochs", 3], ["train", recipe, "--run", "run", "--resume"]):
        code, _, err = command(*words)
        assert code == 2 and "PlanError: the configuration cannot be read" in err and "Traceback" not in err


def test_a_terminal_that_is_closed_ends_a_run_by_its_signal(recipe):
    child, terminal = pty.fork()
    if child == 0:
        words = ["train", "noise.py", "--run", "run", "--pause", "0.02", "--epochs", "100"]
        os.execv(sys.executable, [sys.executable, "-c", EPOCHAL, *words])
    seen = b""
    while b"elapsed" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    assert facts("run")["reason"] == "interrupted"


def test_a_recipe_that_is_gone_or_changed(command, recipe):
    assert command("train", recipe, "--epochs", 1, "--run", "run")[0] == 0
    original = recipe.absolute()
    recipe.write_text(RECIPE + "# more\n")
    code, _, err = command("resume", "run", "--epochs", 2)
    assert code == 0 and err.startswith(f"{original} has changed since the run was begun (as run/recipe.py)")
    recipe.unlink()
    code, _, err = command("resume", "run", "--epochs", 3)
    assert code == 0 and err.startswith(f"{original} is gone: the run goes on with its copy, run/recipe.py\n")
    Path("run").rename("moved")
    assert command("resume", "moved", "--epochs", 4)[0] == 0


def test_a_parameter_that_is_called_otherwise_now(command, recipe):
    assert command("train", recipe, "--hidden", 5, "--epochs", 1, "--run", "run")[0] == 0
    recipe.write_text(RECIPE.replace("hidden", "width"))
    code, _, err = command("resume", "run", "--epochs", 2)
    assert code == 2 and err.endswith(
        'PlanError: Unknown option: "[hidden]" from run/recipe.toml.\n'
        "  where: run\n"
        "  fix:   what the run was begun with stands in run/recipe.toml: "
        "change there what the recipe calls otherwise now\n"
    )
    flags = Path("run/recipe.toml")
    flags.write_text(flags.read_text().replace("hidden", "width"))
    assert command("resume", "run", "--epochs", 2)[0] == 0


def test_a_run_killed_before_it_began_counts_as_new(command, recipe):
    folder = Path("run")
    folder.mkdir()
    for name in (".lock", "config.toml", "journal.jsonl", "recipe.py", "recipe.toml"):
        (folder / name).write_text("hidden = 3\n")
    assert command("train", recipe, "--epochs", 1, "--run", folder)[0] == 0
    assert (folder / "recipe.py").read_text() == RECIPE
    assert "hidden" not in tomllib.loads((folder / "recipe.toml").read_text())
    code, _, err = command("train", recipe, "--run", folder)
    assert code == 1 and "(epochal resume run, if a command began it)\n" in err


# -- what cannot be resumed --


def test_a_run_of_a_script(command):
    import epochal

    X = torch.ones(8, 2)
    epochal.fit(torch.nn.Linear(2, 1), (X, X[:, :1]), loss="mse", epochs=1, run="script", observers=())
    assert command("resume", "script") == (
        1,
        "",
        """\
RunFolderError: the run was begun by a script, not by a command.
  where: script
  fix:   call fit as it was called then, with run='script', resume=True
""",
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "there is no run in the folder: it holds no run.json."),
        ("{", "its run.json cannot be read: Input data was truncated."),
        ("[1]", "its run.json cannot be read: Expected `object`, got `array`."),
        ("{}", "its run.json cannot be read: Object missing required field `status`."),
        ('{"status": "running", "command": ["rm", "x"]}', "it was begun by a command that is not known: rm x."),
        ('{"status": "running", "command": "fit"}', "its run.json cannot be read: Expected `array | null`, got `str`"),
        ('{"status": "running", "command": ["fit"]}', "it was begun by a command that is not known: fit."),
        (
            '{"status": "running", "command": ["fit", "/gone/rows.csv"]}',
            "the table that the run was begun with is not there.\n  where: /gone/rows.csv\n"
            "  fix:   put it back, or say where it is: epochal fit TABLE --config run/fit.toml --run run --resume\n",
        ),
        (
            '{"status": "imported"}',
            "it holds imported weights, and no run yet.\n  where: run\n"
            "  fix:   begin one with them: epochal train RECIPE.py --run run --resume\n",
        ),
    ],
)
def test_a_folder_that_is_no_run(command, content, text):
    Path("run").mkdir()
    if content is not None:
        Path("run/run.json").write_text(content)
    code, out, err = command("resume", "run")
    assert (code, out) == (1, "") and err.startswith(f"RunFolderError: {text}"), err


def test_a_file_or_nothing(command):
    Path("model.pt").write_text("")
    code, _, err = command("resume", "model.pt")
    assert code == 1 and err.startswith("RunFolderError: it is a file, and not a run folder.\n  where: model.pt\n")
    assert command("resume", "nothing")[2].startswith("RunFolderError: there is no such run folder.\n")


# -- verify-resume --

DATA = """
import epochal, numpy as np, torch
from torch.utils.data import Dataset
GENERATOR = np.random.default_rng(0)

class Noisy(Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, i):
        x = torch.full((4,), i / 40) + torch.from_numpy(DRAW(size=4)).float()
        return x, x.sum()[None]

def plan(lr: float = 0.01):
    return epochal.Plan(torch.nn.Linear(4, 1), Noisy(), loss="mse", lr=lr, epochs=3, batch_size=8)
"""
COUNTER = """
import epochal, torch

class Net(torch.nn.Linear):
    calls = 0
    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls / 100)

def plan():
    X = torch.randn(40, 4)
    return epochal.Plan(Net(4, 1), (X, X.sum(1, keepdim=True)), loss="mse", lr=0.01, epochs=3, batch_size=8)
"""
STEP = """
import epochal, torch

def plan():
    X, speed = torch.randn(40, 4), torch.zeros(1, 4)
    def step(state, window):
        x, y = window.batches[0]
        loss = torch.nn.functional.mse_loss(state.model(x), y)
        (gradient,) = torch.autograd.grad(loss, [state.model.weight])
        state.model.weight.data -= 0.01 * speed.mul_(0.9).add_(gradient)
        return epochal.StepResult(loss.detach(), weight=window.samples)
    model = torch.nn.Linear(4, 1, bias=False)
    return epochal.Plan(model, (X, X.sum(1, keepdim=True)), step=step, epochs=3, batch_size=8)
"""
CHOICES = """
import enum
from pathlib import Path
import epochal, torch
X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
class Kind(enum.Enum):
    narrow = 1
    too_wide = 2
def plan(kind: Kind = Kind.narrow, sizes: tuple[int, int] = (1, 2), files: list[Path] = [], kinds: set[Kind] = set()):
    print(kind, sizes, files, kinds)
    return epochal.Plan(torch.nn.Linear(4, 1), (X, X.sum(1, keepdim=True)), loss="mse", epochs=1, batch_size=8)
"""


def test_flags_of_every_kind_come_back(command):
    Path("recipe.py").write_text(CHOICES)
    words = [
        "--kind",
        "too-wide",
        "--sizes",
        3,
        4,
        "--files",
        "a",
        "--files",
        Path("b").absolute(),
        "--kinds",
        "narrow",
    ]
    code, out, err = command("train", "recipe.py", "--run", "r", *words)
    told, a, b = "Kind.too_wide (3, 4) [{!r}, {!r}] {{<Kind.narrow: 1>}}\n", Path("a"), Path("b").absolute()
    assert code == 0 and out.startswith(told.format(a, b)), err
    code, out, err = command("resume", "r", "--epochs", 2)
    assert code == 0 and out.startswith(told.format(a.absolute(), b)), err


EQUAL = dict.fromkeys(("batches", "weights", "optimizer", "generators", "history", "the rest"), "equal")


def verify(command, text, *words):
    """(exit code, what is told of each part, stderr after the progress)"""
    Path("recipe.py").write_text(textwrap.dedent(text))
    before = set(os.listdir())
    code, out, err = command("verify-resume", "recipe.py", "--kills", 1, *words)
    assert set(os.listdir()) - before <= {"__pycache__"}
    told = {line[:10].strip(): line[10:].strip() for line in out.splitlines()}
    return code, told, err


def test_a_recipe_is_shown_to_be_exact(command, monkeypatch):
    monkeypatch.setenv("EPOCHAL_LR", "0.1")
    code, told, err = verify(command, DATA.replace("DRAW", "np.random.normal"), "--lr", 0.02, "--steps", 12)
    assert (code, told) == (0, {"recipe": "recipe.py", "run": "12 steps; killed after step 7, and resumed", **EQUAL}), (
        err
    )
    assert err == "running straight\nrunning until it is killed after step 7\nrunning to its end\n"


@pytest.mark.parametrize(
    ("text", "equal", "different", "what", "where"),
    [
        (
            DATA.replace("DRAW", "GENERATOR.normal"),
            {"generators"},
            {"batches": "differ from step ", "weights": "differ: parameter weight"},
            "the resumed run differs.",
            "first in the batch; at the end, parameter weight",
        ),
        (
            COUNTER,
            {"batches", "generators"},
            {"weights": "differ: parameter weight", "optimizer": "differ: exp_avg of weight"},
            "the resumed run differs: from the same batch, weights, optimizer and generators, step ",
            "first in the weights; at the end, parameter weight",
        ),
        (
            STEP,
            {"batches", "generators", "optimizer"},
            {"weights": "differ: parameter weight", "history": "differ: row "},
            "the resumed run differs: from the same batch, weights, optimizer and generators, step ",
            "first in the weights; at the end, parameter weight",
        ),
    ],
    ids=["global generator", "counter", "step"],
)
def test_a_recipe_that_hides_something_is_found_out(command, text, equal, different, what, where):
    code, told, err = verify(command, text)
    assert code == 1 and f"RecipeError: {what}" in err and f"{where}\n" in err, err
    # Of 15 steps every third is saved, beside the training; it was killed after the seventh.
    assert re.search(r"where: after kill 1, resumed from step [36], before step ", err), err
    assert {name for name in EQUAL if told[name] == "equal"} - {"the rest"} == equal
    assert all(told[name].startswith(line) for name, line in different.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_verification_and_leaves_nothing(tmp_path, monkeypatch, number):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    Path("recipe.py").write_text(RECIPE)
    process = begin("verify-resume", "recipe.py", "--pause", "30")
    wait_for(process, lambda: list(scratch.glob("*/straight-0.jsonl")))
    process.send_signal(number)
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 128 + number and "Traceback" not in err
    assert err.endswith(f"Interrupted: ended by {number.name}.\n  fix:   run it again; nothing was left behind\n")
    assert list(scratch.iterdir()) == []


def test_a_verification_under_nohup_hears_no_hang_up(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        Path("recipe.py").write_text(RECIPE)
        process = begin("verify-resume", "recipe.py", "--epochs", "1", "--kills", "1")
        time.sleep(2)
        process.send_signal(signal.SIGHUP)
        assert process.communicate(timeout=100)[0].startswith("recipe ") and process.returncode == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_recipe_that_fails_cannot_be_verified(command):
    code, told, err = verify(command, COUNTER.replace("super().forward(x)", "nothing"))
    assert (code, told) == (1, {})
    assert err.endswith(
        "RecipeError: a run of the recipe ended with exit code 1.\n"
        "  fix:   mend what stands above; epochal train runs the recipe alone\n"
    )
