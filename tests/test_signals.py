"""Signals: the step in hand is finished, a checkpoint saved, the end truthful; and nothing is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import epochal
from epochal.checkpoint.store import Checkpoints

SCRIPT = """
import os, signal, sys, time
import torch
from torch import nn
import epochal
from torch.utils.data import Dataset

torch.set_num_threads(1)


class Slow(Dataset):
    def __init__(self, count, pause):
        self.count, self.pause = count, pause

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        time.sleep(self.pause)
        return torch.full((4,), index / 100), torch.zeros(1)


def train(model, **options):
    usual = {"loss": "mse", "epochs": 3, "seed": 0, "batch_size": 5, "observers": [tell], "run": "r"}
    saving = epochal.Saving("1 step", share=None)
    return epochal.fit(model, Slow(40, 0.002), Slow(200, 0.1 if "slow-val" in sys.argv else 0.0),
                       save=saving, **{**usual, **options})


def tell(event):
    if isinstance(event, (epochal.StepDone, epochal.Evaluated)):
        print(type(event).__name__, getattr(event, "step", ""), flush=True)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.2), nn.Linear(3, 1))
result = train(model, workers=2 if "workers" in sys.argv else 0, resume="resume" in sys.argv)
print("returned", result.reason.name, flush=True)
usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
print("handlers", usual, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)
"""


def start(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def until(process, line):
    for told in process.stdout:
        if told.strip() == line:
            return
    raise AssertionError(f"{line} was never told: {process.stderr.read()}")


def finished(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, out.strip().splitlines(), err


def newest():
    return Checkpoints("r/checkpoints").newest_whole().state["progress"]


def test_a_ctrl_c_gives_the_result_and_puts_the_handlers_back(tmp_path):
    process = start()
    until(process, "StepDone 3")
    process.send_signal(signal.SIGINT)
    code, lines, err = finished(process)
    assert (code, lines[-2:]) == (0, ["returned INTERRUPTED", "handlers True True"]), err
    done = 3 + sum(line.startswith("StepDone") for line in lines)
    assert newest()["step"] == done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("times", [1, 2])
def test_a_program_that_is_told_to_end_saves_and_ends_by_that_signal(tmp_path, number, times):
    process = start()
    until(process, "StepDone 2")
    for _ in range(times):
        process.send_signal(number)
    code, lines, err = finished(process)
    assert code == -number, err
    assert newest()["step"] == 2 + sum(line.startswith("StepDone") for line in lines)
    assert not any(line.startswith("returned") for line in lines)


def test_a_validation_is_left_at_once_and_made_again_after_the_resume(tmp_path):
    assert finished(start())[0] == 0
    undisturbed = {name: Path("r", name).read_bytes() for name in ("model.safetensors", "metrics.jsonl", "results.csv")}
    Path("r").rename("straight")
    process = start("slow-val")
    until(process, "StepDone 8")
    time.sleep(0.3)  # the validation takes twenty seconds
    process.send_signal(signal.SIGINT)
    code, lines, err = finished(process)
    assert (code, lines[-2:]) == (0, ["returned INTERRUPTED", "handlers True True"]), err
    assert not any(line.startswith("Evaluated") for line in lines)
    assert (newest()["step"], newest()["epoch"], newest()["evaluated"]) == (8, 0, 0)
    assert finished(start("resume"))[0] == 0
    assert undisturbed == {name: Path("r", name).read_bytes() for name in undisturbed}


def test_a_signal_to_the_whole_group_reaches_workers_too(tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start("workers", *(["resume"] if Path("r").exists() else []), start_new_session=True)
        until(process, f"StepDone {4 if number == signal.SIGINT else 12}")
        os.killpg(process.pid, number)
        code, _, err = finished(process)
        assert code == (0 if number == signal.SIGINT else -number), err
        assert "Traceback" not in err
    assert finished(start("workers", "resume"))[0] == 0
    assert newest()["step"] == 24


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    code = SCRIPT.replace("self.pause = count, pause", "self.pause = count, 5.0")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1000):
        if Path("r/checkpoints/step-00000000").exists():
            break
        time.sleep(0.1)
    time.sleep(1.5)  # until it is in the midst of its first step, which takes five seconds
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it waits for the step in hand
    process.send_signal(signal.SIGINT)
    code, _, err = finished(process)
    assert "KeyboardInterrupt" in err
    assert code in (1, -signal.SIGINT)


def quick(**options):
    X = torch.randn(20, 4)
    return epochal.fit(nn.Linear(4, 1), (X, X[:, :1]), loss="mse", epochs=2, observers=(), **options)


def test_a_handler_that_somebody_chose_is_left_alone():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("mine"))
    try:
        mine = signal.getsignal(signal.SIGINT)
        X = torch.randn(20, 4)
        with epochal.Plan(nn.Linear(4, 1), (X, X[:, :1]), loss="mse", epochs=2, observers=()).prepare() as run:
            assert signal.getsignal(signal.SIGINT) is mine
            for event in run:
                if isinstance(event, epochal.Started):
                    os.kill(os.getpid(), signal.SIGINT)
        assert (seen, run.ended.reason) == (["mine"], epochal.StopReason.EPOCHS)
    finally:
        signal.signal(signal.SIGINT, before)


def test_nothing_is_installed_outside_the_main_thread():
    seen = []

    def watch(event):
        seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    X = torch.randn(20, 4)
    plan = epochal.Plan(nn.Linear(4, 1), (X, X[:, :1]), loss="mse", epochs=1, observers=[watch])
    thread = threading.Thread(target=plan.fit)
    thread.start()
    thread.join()
    assert seen and set(seen) == {before}
    plan.fit()
    assert len(set(seen)) == 2  # in the main thread there is one during the run
    assert signal.getsignal(signal.SIGINT) is before


def test_without_a_run_folder_sigterm_is_nobodys_business():
    seen = []
    X = torch.randn(20, 4)
    observer = lambda event: seen.append(signal.getsignal(signal.SIGTERM))
    epochal.fit(nn.Linear(4, 1), (X, X[:, :1]), loss="mse", epochs=1, observers=[observer])
    assert set(seen) == {signal.SIG_DFL}


def test_a_program_that_waits_for_its_own_children_hears_of_them():
    seen = []

    def child_ends(event):
        if isinstance(event, epochal.StepDone) and event.step == 1:
            subprocess.run(["true"])

    before = signal.signal(signal.SIGCHLD, lambda *_: seen.append("mine"))
    try:
        mine = signal.getsignal(signal.SIGCHLD)
        X = torch.randn(20, 4)
        epochal.fit(nn.Linear(4, 1), (X, X[:, :1]), loss="mse", epochs=1, observers=[child_ends])
        assert seen == ["mine"] and signal.getsignal(signal.SIGCHLD) is mine
    finally:
        signal.signal(signal.SIGCHLD, before)


SLOW_WRITER = """
import os, signal, threading, time
from pathlib import Path
import torch
import epochal
from epochal.checkpoint.store import Checkpoints
from epochal.runtime.lock import is_held

commit, X = Checkpoints._commit, torch.randn(64, 4)

def slowly(self, step, *contents):
    if step:
        time.sleep(2)
    path = commit(self, step, *contents)
    print("written", path.name, is_held(Path("r")), flush=True)
    return path

def interrupted(event):
    if isinstance(event, epochal.StepDone) and event.step == 3:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.4, os.kill, [os.getpid(), signal.SIGINT]).start()

Checkpoints._commit = slowly
plan = dict(loss="mse", epochs=1, batch_size=8, seed=0, run="r", observers=[interrupted])
try:
    epochal.fit(torch.nn.Linear(4, 1), (X, X[:, :1]), **plan)
except KeyboardInterrupt:
    print("interrupted", is_held(Path("r")), flush=True)
try:
    epochal.fit(torch.nn.Linear(4, 1), (X, X[:, :1]), **{**plan, "resume": True, "observers": ()})
except epochal.RunFolderError as error:
    print(error.what, flush=True)
time.sleep(3)
print("afterwards", is_held(Path("r")), flush=True)
"""


def test_the_folder_stays_locked_while_a_second_ctrl_c_leaves_the_writer_behind(tmp_path):
    told = subprocess.run([sys.executable, "-c", SLOW_WRITER], capture_output=True, text=True, timeout=100)
    assert told.stdout.splitlines()[1:] == [
        "interrupted True",
        "another run is at work in this folder.",
        "written step-00000003 True",
        "afterwards False",
    ], told.stderr


def test_a_terminal_that_takes_no_word_does_not_disturb_the_step(monkeypatch):
    def full(*_):
        raise BlockingIOError

    def interrupt(event):
        if isinstance(event, epochal.StepDone):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "isatty", lambda _: True)
    monkeypatch.setattr(os, "write", full)
    X = torch.randn(20, 4)
    result = epochal.fit(nn.Linear(4, 1), (X, X[:, :1]), loss="mse", epochs=2, observers=[interrupt])
    assert result.reason is epochal.StopReason.INTERRUPTED
