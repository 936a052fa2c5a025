"""Several processes: how they are started, how their ends are told, and that nothing is left of them.

Where they train, each does so by itself here: what is looked at is the launcher.
"""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import psutil
import pytest

from epochal.errors import EpochalError, PlanError
from epochal.runtime import launch
from epochal.runtime.launched import LAUNCHER, check_restarts, launches, tell

pytestmark = pytest.mark.distributed
RECIPE = """
import os, signal, time
from pathlib import Path
import torch
import epochal

RANK = os.environ.get("RANK", "0")
LATE = "step-00000003"


class Slow(torch.utils.data.Dataset):
    def __init__(self, what):
        self.what, self.taken = what, 0

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        self.taken += 1
        if self.what == "die late" and self.taken == 8 and RANK == "1" and not Path("died").exists():
            while max([path.name for path in Path("runs/recipe-1/checkpoints").glob("step-*")], default="") < LATE:
                time.sleep(0.05)
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return torch.full((4,), index / 100), torch.zeros(1)


def say(*words):
    os.write(1, f"rank {RANK} {' '.join(map(str, words))}\\n".encode())  # in one go: the other one writes, too


def tell(event):
    if isinstance(event, epochal.StepDone):
        say("step", event.step)


def plan(what: str = "train", steps: int = 3) -> epochal.Plan:
    say("threads", os.environ["OMP_NUM_THREADS"])
    say("seed", torch.initial_seed())
    saving = epochal.Saving("1 step", share=None)
    return epochal.Plan(
        torch.nn.Linear(4, 1), Slow(what), loss="mse", max_steps=steps, batch_size=2, save=saving,
        observers=[tell],
    )
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "epochal"]
EPOCHAL = [sys.executable, "-m", "epochal"]


@pytest.fixture(autouse=True)
def _recipe(tmp_path, monkeypatch):
    Path("recipe.py").write_text(RECIPE)
    monkeypatch.delenv("OMP_NUM_THREADS")


def start(*words, by=EPOCHAL):
    return subprocess.Popen([*by, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train(*words):
    return start("train", "recipe.py", "--processes", "2", *words)


def finished(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def until(process, line):
    for told in process.stdout:
        if told.strip() == line:
            return
    raise AssertionError(f"{line} was never told: {process.stderr.read()}")


def seeds(out):
    return set(re.findall(r"seed (\d+)", out))


def test_after_a_death_all_go_on_in_the_same_folder_and_later_as_many_again(command, monkeypatch):
    code, out, err = finished(train("--what", "die late", "--steps", "12", "--restarts", "1"))
    assert code == 0, err
    assert "ProcessError: rank 1 is dead or stopped (last heard of at " in err
    assert ").\nall start again from the newest checkpoint (1 of 1)\n" in err
    assert out.count(f"threads {max(1, len(os.sched_getaffinity(0)) // 2)}\n") == 4
    assert len(seeds(out)) == 1
    assert out.count("results ") == out.count("next ") == 1 and os.listdir("runs") == ["recipe-1"]
    events = [json.loads(line)["event"] for line in Path("runs/recipe-1/journal.jsonl").read_text().splitlines()]
    assert [event for event in events if event != "saved"][-3:] == ["resumed", "noted", "ended"]

    monkeypatch.setattr(launch, "launch", lambda _, processes, restarts: begun.append((processes, restarts)))
    begun = []
    for words in ([], ["--processes", "3", "--restarts", "0"]):
        assert command("resume", "runs/recipe-1", "--set", "max_steps=20", *words) == (0, "", "")
    assert begun == [(2, 1), (3, 0)]


def test_a_ctrl_c_saves_and_gives_the_command_to_go_on():
    process = train("--steps", "500")
    until(process, "rank 0 step 3")
    process.send_signal(signal.SIGINT)
    code, _, err = finished(process)
    assert code == 130, err
    assert err.startswith("Interrupted: SIGINT ended the run after step ") and "a checkpoint is saved" in err
    assert err.count("epochal resume runs/recipe-1") == 1 and err.count("\n") == 3


def test_a_usage_error_starts_nothing():
    code, out, err = finished(train("--nothing"))
    assert (code, out) == (2, "") and err.count("--nothing") == 1


def test_no_process_outlives_its_launcher():
    Path("recipe.py").write_text(EARLY.format("if RANK: time.sleep(250)"))
    process = train()
    launcher, until = psutil.Process(process.pid), time.monotonic() + 200
    while len(children := launcher.children()) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.5)
    process.kill()
    assert len(children) == 2 and psutil.wait_procs(children, timeout=100)[1] == []
    process.communicate()


EARLY = """
import os, signal, sys, time

import epochal

RANK = os.environ.get("RANK")  # None in the launcher
{}


def plan():
    return None
"""


@pytest.fixture
def launched(monkeypatch):
    """Launches, from this process, two that do something as soon as they read the recipe; gives the error."""

    def run(does, restarts=0, signals=()):
        Path("recipe.py").write_text(EARLY.format(does))

        def send():
            until = time.monotonic() + 200
            while not {"ready-0", "ready-1"} <= set(os.listdir()) and time.monotonic() < until:
                time.sleep(0.05)
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.5)

        if signals:
            threading.Thread(target=send).start()
        with pytest.raises(EpochalError) as caught:
            launch.launch(["train", "recipe.py"], 2, restarts)
        return caught.value

    before = dict(os.environ)
    yield run
    os.environ.clear()
    os.environ.update(before)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("does", "code", "told"),
    [
        ("if RANK == '1': raise ValueError('bad')", 1, "rank 1: RecipeError: the recipe raised ValueError: bad.\n"),
        ("if RANK == '1': sys.exit(5)", 5, "ProcessError: rank 1 ended with exit code 5.\n"),
        ("if RANK == '1': os.kill(os.getpid(), 9)", 137, "ProcessError: rank 1 was killed by SIGKILL.\n"),
        ("if RANK == '1': os.abort()", 134, "ProcessError: rank 1 was killed by SIGABRT.\n"),
        ("if RANK == '1': os.kill(os.getpid(), 11)", 139, "ProcessError: rank 1 was killed by SIGSEGV.\n"),
    ],
)
def test_the_first_failure_is_told_once_and_is_the_exit_code(launched, capfd, does, code, told):
    error = launched(f"{does}\ntime.sleep(250)")  # the other one is ended
    assert error.exit_code == code and error.describe().startswith(told) and error.describe().count("\n") == 2
    assert capfd.readouterr() == ("", "")


def test_what_all_raise_is_told_once(launched, capfd):
    error = launched("pass")  # plan() gives None
    assert error.exit_code == 1 and error.describe().startswith("RecipeError: plan() gave a NoneType, not an ")
    assert error.describe().count("\n") == 2 and capfd.readouterr() == ("", "")


def test_a_mistake_is_not_made_again(launched, capfd):
    error = launched("open('begun', 'a').write(RANK)\nraise epochal.PlanError('no', fix='yes')", restarts=3)
    assert error.exit_code == 2 and "PlanError: no\n  fix:   yes" in error.describe()
    assert len(Path("begun").read_text()) <= 2
    assert capfd.readouterr() == ("", "")


COUNTING = """
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: got.append(number))
open(f"ready-{RANK}", "w")
while not got:
    time.sleep(0.05)
time.sleep(1)  # while the other one, too, and a second signal
open(f"got-{RANK}", "w").write(str(*got))
os._exit(128 + got[0])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_each_process_once(launched, number):
    error = launched(COUNTING, signals=[number, signal.SIGTERM])
    assert error.exit_code == 128 + number
    assert Path("got-0").read_text() == Path("got-1").read_text() == str(int(number))


def test_a_second_ctrl_c_stops_even_what_hangs(launched, monkeypatch):
    monkeypatch.setattr(launch, "TIME_TO_STOP", 0.5)
    hang = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nopen(f'ready-{RANK}', 'w')\ntime.sleep(250)"
    error = launched(hang, signals=[signal.SIGINT, signal.SIGINT])
    assert error.exit_code == 130 and error.describe().startswith("Interrupted: SIGINT ended the processes before")


@pytest.mark.parametrize(
    ("rank", "is_shared", "told"), [(0, False, "rank 0: "), (1, False, "rank 1: "), (0, True, ""), (1, True, None)]
)
def test_without_a_launcher_of_ours_what_is_shared_is_told_by_the_first(monkeypatch, capsys, rank, is_shared, told):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = PlanError("no")
    error.is_shared = is_shared
    tell(error, error.describe(), 2)
    assert capsys.readouterr().err == ("" if told is None else f"{told}PlanError: no\n")


def test_restarts_by_others_need_a_folder(monkeypatch):
    check_restarts()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PlanError, match="give --run FOLDER"):
        check_restarts()


def test_under_torchrun_the_first_process_decides():
    process = start("train", "recipe.py", by=TORCHRUN)
    code, out, err = finished(process)
    assert code == 0, err
    assert len(seeds(out)) == 1
    assert out.count("results ") == 1 and os.listdir("runs") == ["recipe-1"]


def test_what_an_inherited_environment_says_is_not_believed(monkeypatch, command):
    monkeypatch.setenv(LAUNCHER, "1")
    assert command("runs", "show", "nothing")[2].startswith("RunFolderError")


@pytest.mark.parametrize(("ended", "requeued"), [(0, False), (1, False), (138, True)])
def test_a_slurm_script_goes_on_when_its_time_was_up(command, monkeypatch, ended, requeued):
    words = ["--nodes", "2", "--processes", "4", "--gpus-per-task", "1", "--time", "4:00:00", "--requeue"]
    code, script, err = command("slurm", "recipe.py", *words, "--what", "two words", "--set", "batch_size=4")
    assert code == 0, err
    Path("job.sh").write_text(script)
    assert subprocess.run(["bash", "-n", "job.sh"]).returncode == 0
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-task=1", "time=4:00:00", "signal=USR1@120", "requeue"):
        assert f"#SBATCH --{line}\n" in script
    for name, does in (("srun", f'printf "%s\\n" "$@" > called; exit {ended}'), ("scontrol", 'echo "$@" > requeued')):
        Path(name).write_text(f"#!/bin/bash\n{does}\n")
        Path(name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path.cwd()}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert subprocess.run(["bash", "job.sh"]).returncode == ended
    called = Path("called").read_text().splitlines()
    assert called[0] == "--kill-on-bad-exit=0"  # else a task is killed before it has said 138
    recipe, flags = str(Path("recipe.py").absolute()), ["--what", "two words", "--set", "batch_size=4"]
    assert called[-9:] == ["train", recipe, *flags, "--run", "runs/recipe-77", "--resume"]
    assert Path("requeued").exists() == requeued
    assert not requeued or Path("requeued").read_text() == "requeue 77\n"


def test_a_slurm_script_takes_no_flag_that_the_recipe_does_not(command):
    code, out, err = command("slurm", "recipe.py", "--whta", "x")
    assert (code, out) == (2, "") and "--whta" in err
    code, out, err = command("slurm", "recipe.py", "--run", "x")
    assert (code, out) == (2, "") and "leave it out" in err


@pytest.mark.parametrize(("time", "is_one"), [("90", True), ("2-12", True), ("1-0:30:00", True), ("soon", False)])
def test_a_slurm_script_takes_the_times_that_sbatch_takes(command, time, is_one):
    code, out, err = command("slurm", "recipe.py", "--time", time)
    assert (code, f"--time={time}\n" in out) == ((0, True) if is_one else (2, False)), err


def test_other_numbers_of_processes_under_torchrun_are_refused(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert not launches(2, None) and not launches(None, None)
    with pytest.raises(
        PlanError, match="--processes 4 is for processes that epochal starts, and this is one of 2"
    ) as caught:
        launches(4, None)
    assert caught.value.is_shared
    with pytest.raises(PlanError, match="--restarts 3 is for processes that epochal starts"):
        launches(None, 3)


def test_more_processes_than_fit_into_memory_are_refused(command):
    code, _, err = command("demo", "--processes", "100000")
    assert code == 2 and "PlanError: 100,000 processes do not fit into memory: each takes 0.25 GiB" in err, err


@pytest.mark.parametrize("is_awaited", [True, False])
def test_a_process_whose_launcher_was_killed_while_it_started_ends(is_awaited):
    launcher = subprocess.Popen(["true"])
    if is_awaited:
        launcher.wait()
    world = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        LAUNCHER: str(launcher.pid),
    }
    words = [sys.executable, "-m", "epochal", "demo", "--epochs", "1"]
    done = subprocess.run(words, env=os.environ | world, timeout=100, capture_output=True, text=True)
    launcher.wait()
    assert (done.returncode, done.stderr) == (
        137, "epochal: what started this process is gone, and so are the others.\n"
    )  # fmt: skip


@pytest.mark.parametrize("processes", [[], ["--processes", "1"]])
def test_restarts_of_one_process_are_refused(command, processes):
    code, _, err = command("demo", *processes, "--restarts", "3")
    assert code == 2 and err.startswith("PlanError: --restarts is for several processes, and this is one."), err


def test_an_option_of_a_plan_that_is_no_flag_is_told_with_its_way(command):
    code, _, err = command("train", "recipe.py", "--batch-size", "3")
    assert code == 2 and "--set batch_size=... changes the plan" in err


def test_fsdp_is_a_flag():
    code, _, err = finished(start("train", "recipe.py", "--processes", "2", "--strategy", "fsdp"))
    assert code == 0, err
    assert tomllib.loads(Path("runs/recipe-1/recipe.toml").read_text())["strategy"] == "fsdp"


SLOW = """
import os, time
if "RANK" in os.environ:
    print("here", flush=True)
    time.sleep(250)
def plan():
    pass
"""


def test_a_ctrl_c_before_the_run_has_begun_says_only_that():
    Path("slow.py").write_text(SLOW)
    process = start("train", "slow.py", "--processes", "2")
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    code, _, err = finished(process)
    assert (code, err) == (130, "Interrupted: SIGINT ended the processes before they could save.\n")


def test_one_process_imports_no_launcher():
    code = "import sys; from epochal.runtime.launched import *; print(launches(1, 0), decided('', int), *sys.modules)"
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert words[:2] == ["False", "0"] and "torch" not in words
