"""The command line as a whole: help, start-up, configuration, exit codes, streams; and the demo."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

import epochal
from epochal.cli import COMMANDS

ROOT = Path(epochal.__file__).parent


def test_help_version_and_listings_do_not_import_what_is_heavy(tmp_path):
    folder = tmp_path / "runs" / "x-1"
    (folder / "checkpoints").mkdir(parents=True)
    code = """
import sys
from epochal.__main__ import main
from epochal.cli import COMMANDS
commands = (["--help"], ["--version"], [], ["fit", "--help"], ["demo", "--help"], ["predict", "--help"],
            ["train", "--help"], ["resume", "--help"], ["export", "--help"],
            ["runs", "ls"], ["runs", "show", "runs/x-1"], ["config", "show"])
print([main(command) for command in commands], file=sys.stderr)
print([name for name in ("torch", "polars", "matplotlib") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == "[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n[]\n"


def test_help_has_one_line_for_each_command(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = command("--help")
    assert code == 0
    assert (
        "".join(f"{line.rstrip()}\n" for line in out.splitlines())
        == """\
Usage: epochal COMMAND

The complete training loop for PyTorch.

╭─ Commands ───────────────────────────────────────────────────────────────────╮
│ demo               Train a small network on handwritten digits, in seconds.  │
│ fit                Train a network on a table, from a file to a run folder.  │
│ predict            Predict the target of a run of fit for new rows.          │
│ eval               Measure a run of fit on a table with the target.          │
│ train              Train what a recipe plans: plan(...) in a Python file.    │
│ resume             Go on with an interrupted run, or train one further.      │
│ check              Look for the mistake in a recipe before it costs a night. │
│ explain            Say what a finding of check means.                        │
│ verify-resume      Prove that a recipe can be killed and resumed to the bit. │
│ tune-speed         Measure what would make a recipe train faster.            │
│ profile            Measure where the time of a recipe's updates goes.        │
│ export             Write the weights of a run as one file.                   │
│ import-checkpoint  Begin a run folder with the weights of a .pt file.        │
│ slurm              Print a script for sbatch that trains a recipe.           │
│ runs               List run folders, or show one.                            │
│ config             Show what a command would run with.                       │
│ --help (-h)        Display this message and exit.                            │
│ --version          Display application version.                              │
╰──────────────────────────────────────────────────────────────────────────────╯

A flag --some-flag can also be given as EPOCHAL_SOME_FLAG in the environment, or
as a line in the file of --config: some-flag = "value". The command line counts
first, then the environment, then the file. With --traceback, an error shows how
it came about.
"""
    )


def test_the_line_of_a_command_is_the_first_of_its_help():
    for module, _, function, line in ((*home.partition(":"), line) for home, line in COMMANDS.values()):
        documented = getattr(import_module(f"epochal.cli.{module}"), function).__doc__
        assert documented.splitlines()[0] == line


@pytest.mark.parametrize("words", COMMANDS)
def test_every_flag_has_help(command, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = command(*words.split(), "--help")
    assert code == 0
    for line in (line.strip("│ *") for line in out.splitlines() if line.startswith("│")):
        assert re.fullmatch(r"[A-Z]+  .*[.\]]|(-\S+ )+([A-Z|.]+ )? *[A-Z].*[.\]]", line), line


def test_version(command):
    assert command("--version") == (0, f"{epochal.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["fti"],
            """\
PlanError: Unknown command "fti". Did you mean "fit"? Available commands: demo, fit, predict, eval, train, resume, \
check, explain, ...
  where: epochal
  fix:   epochal --help shows what can be given
""",
        ),
        (
            ["demo", "--epocs", "3"],
            """\
PlanError: Unknown option: --epocs. Did you mean --epochs?
  where: epochal demo
  fix:   epochal demo --help shows what can be given
""",
        ),
        (
            ["demo", "--epochs", "many"],
            """\
PlanError: Invalid value for --epochs: unable to convert "many" into int.
  where: epochal demo
  fix:   epochal demo --help shows what can be given
""",
        ),
        (
            ["demo", "--epochs", "0"],
            """\
PlanError: epochs must be an integer of at least 1.
  where: epochs=0
  fix:   try epochs=10
""",
        ),
        (
            ["demo", "--seed", "-1"],
            """\
PlanError: Invalid value "-1" for --seed. Must be >= 0.
  where: epochal demo
  fix:   epochal demo --help shows what can be given
""",
        ),
        (
            ["demo", "--config", "none.toml"],
            """\
PlanError: the configuration cannot be read: No such file or directory.
  where: none.toml
  fix:   name a TOML file with lines like: epochs = 20
""",
        ),
        (
            ["predict", "runs/x"],
            """\
PlanError: Command "predict" parameter DATA requires an argument.
  where: epochal predict
  fix:   epochal predict --help shows what can be given
""",
        ),
    ],
)
def test_a_wrong_command_ends_with_2_and_leaves_nothing(command, tmp_path, words, text):
    assert command(*words) == (2, "", text)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_epochal_itself_shows_its_traceback(command, monkeypatch):
    import epochal.cli.runs as runs

    monkeypatch.setattr(runs, "RunFolderError", None)  # what the code then raises is nobody's mistake but its own
    code, out, err = command("runs", "ls", "nowhere")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith(
        """\
TypeError: 'NoneType' object is not callable
epochal met an error that it did not expect. Unless its last line tells you what to mend, this is a bug in epochal:
please report it together with the command and the text above.
"""
    )


def test_an_error_shows_how_it_came_about_when_asked(command, monkeypatch):
    short = """\
RunFolderError: there is no such folder.
  where: nowhere
  fix:   name a folder of runs, or make a first one with epochal demo
"""
    assert command("runs", "ls", "nowhere") == (1, "", short)
    _, _, err = command("runs", "ls", "nowhere", "--traceback")
    assert err.startswith("Traceback (most recent call last):") and err.endswith(short)
    monkeypatch.setenv("EPOCHAL_TRACEBACK", "1")
    assert command("runs", "ls", "nowhere")[2].startswith("Traceback")


# -- configuration --


def test_the_command_line_comes_before_the_environment_before_the_file(command, monkeypatch):
    Path("my.toml").write_text('epochs = 1\npatience = 2\nlr = 0.1\n"batch-size" = 8\n')
    monkeypatch.setenv("EPOCHAL_PATIENCE", "3")
    monkeypatch.setenv("EPOCHAL_LR", "0.2")
    code, out, _ = command("config", "show", "fit", "--lr", "0.3", "--config", "my.toml")
    assert code == 0
    assert (
        out
        == """\
epochal fit
  --target      None                  missing
  --task        auto                  default
  --val         0.2                   default
  --epochs      1                     my.toml
  --patience    3                     EPOCHAL_PATIENCE
  --lr          0.3                   command line
  --batch-size  8                     my.toml
  --hidden      64,64                 default
  --drop        []                    default
  --run         None                  default
  --device      auto                  default
  --precision   fp32                  default
  --seed        0                     default
  --processes   None                  default
  --restarts    None                  default
  --config      my.toml               command line
  --resume      False                 default
"""
    )


def test_config_show_without_a_command_shows_all_that_train(command, monkeypatch):
    monkeypatch.setenv("EPOCHAL_DEVICE", "cpu")
    code, out, _ = command("config", "show", "--json")
    shown = json.loads(out)
    assert code == 0 and list(shown) == ["demo", "fit", "train"]
    assert all(flags["device"] == {"value": "cpu", "from": "EPOCHAL_DEVICE"} for flags in shown.values())
    assert shown["demo"]["epochs"] == {"value": 15, "from": "default"}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "epohcs = 3",
            """\
PlanError: Unknown option: "[epohcs]" from my.toml. Did you mean --epochs?
  where: epochal demo
  fix:   epochal demo --help shows what can be given
""",
        ),
        (
            'epochs = "many"',
            """\
PlanError: Invalid value for [epochs] from my.toml: unable to convert "many" into int.
  where: epochal demo
  fix:   epochal demo --help shows what can be given
""",
        ),
        (
            "epochs 3",
            """\
PlanError: the configuration cannot be read: Expected '=' after a key in a key/value pair (at line 1, column 8).
  where: my.toml
  fix:   name a TOML file with lines like: epochs = 20
""",
        ),
    ],
)
def test_a_mistake_in_the_file_is_an_error(command, line, text):
    Path("my.toml").write_text(line)
    assert command("demo", "--config", "my.toml") == (2, "", text)


# -- the demo --


def test_the_digits_are_those_of_scikit_learn():
    digits = load_digits()
    with np.load(ROOT / "cli/digits.npz") as packed:
        assert packed["images"].dtype == packed["labels"].dtype == np.uint8
        np.testing.assert_array_equal(packed["images"], digits.images)
        np.testing.assert_array_equal(packed["labels"], digits.target)
    assert (ROOT / "cli/digits.npz").stat().st_size < 60_000
    licence = (ROOT / "cli/digits-LICENSE.txt").read_text()
    assert "E. Alpaydin and C. Kaynak" in licence and "CC BY 4.0" in licence and "scikit-learn" in licence


def accuracies(run):
    return [float(row["val_accuracy"]) for row in csv.DictReader(Path(run, "results.csv").read_text().splitlines())]


def test_demo_reads_digits_in_well_under_a_minute(tmp_path):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "epochal", "demo"], capture_output=True, text=True, cwd=tmp_path)
    assert time.monotonic() - began < 60
    assert done.returncode == 0, done.stderr

    files = "checkpoints/, config.toml, demo.toml, journal.jsonl, metrics.jsonl, model.safetensors, results.csv"
    results, *others = done.stdout.splitlines()
    assert others == [f"files    runs/demo-1: {files}, results.png, run.json", "next     epochal runs show runs/demo-1"]
    best = json.loads(Path("runs/demo-1/run.json").read_text())["best"]
    accuracy = accuracies("runs/demo-1")[best["epoch"] - 1]
    assert accuracy > 0.975
    assert results == f"results  epoch {best['epoch']}: val_loss {best['value']:.4f}, val_accuracy {accuracy:.4f}"
    assert Path("runs/demo-1/results.png").read_bytes().startswith(b"\x89PNG")

    assert done.stderr.startswith("model      Sequential, 38,378 parameters\n")  # the header, then the table
    assert "\nepoch  1/15  train_loss" in done.stderr
    assert "\nweights  those of epoch" in done.stderr  # the summary
    assert "\x1b" not in done.stderr + done.stdout


def test_a_run_folder_is_never_overwritten(command):
    for _ in range(2):
        assert command("demo", "--epochs", "1")[0] == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["demo-1", "demo-2"]
    before = {path: path.read_bytes() for path in Path("runs/demo-1").iterdir() if path.is_file()}
    assert command("demo", "--epochs", "1", "--run", "runs/demo-1") == (
        1,
        "",
        "RunFolderError: the run folder is not empty, and a run is never overwritten.\n"
        "  where: runs/demo-1: checkpoints, config.toml, demo.toml, journal.jsonl ...\n"
        "  fix:   choose another name for the run, or continue this one with resume=True "
        "(epochal resume runs/demo-1, if a command began it)\n",
    )
    assert {path: path.read_bytes() for path in before} == before
    assert accuracies("runs/demo-1") == accuracies("runs/demo-2")  # the same seed


def test_a_folder_that_cannot_be_made(command):
    Path("file").write_text("")
    assert command("demo", "--run", "file/run") == (
        1,
        "",
        """\
RunFolderError: the run folder cannot be used: Not a directory.
  where: file/run
  fix:   choose a folder that can be written
""",
    )
    Path("runs").write_text("")
    code, _, err = command("demo", "--epochs", "1")
    assert code == 1 and err.startswith("RunFolderError: the run folder cannot be used: Not a directory.")


def test_a_mistake_leaves_no_run_folder(command, tmp_path):
    code, _, err = command("demo", "--device", "cuda:99")
    assert code == 2 and err.startswith("PlanError: the device 'cuda:99' cannot be used.")
    assert list(tmp_path.iterdir()) == []


# -- signals and pipes --

INTERRUPTIBLE = (  # a parent may have told its children to ignore the signal
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from epochal.__main__ import main; sys.exit(main(['demo', '--epochs', '100000']))"
)


def test_an_interrupted_run_ends_properly(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    results = Path("runs/demo-1/results.csv")
    for _ in range(600):
        if (results.exists() and results.stat().st_size) or run.poll() is not None:
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=100)
    assert (run.returncode, out) == (130, "")
    facts = json.loads(Path("runs/demo-1/run.json").read_text())
    assert err.endswith(
        f"Interrupted: SIGINT ended the run after step {facts['steps']}; a checkpoint is saved.\n"
        "  where: runs/demo-1\n  fix:   epochal resume runs/demo-1\n"
    )
    assert "Traceback" not in err
    assert (facts["status"], facts["reason"]) == ("ended", "interrupted")
    assert Path("runs/demo-1/model.safetensors").exists() and Path("runs/demo-1/results.png").exists()


def test_nobody_reads_on(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "epochal", "config", "show"], stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
