"""R11: signals at random moments: in a step, in a save, in a validation; once and twice; to workers and to the group.

The last finished step is in a checkpoint, the exit code is the documented one, nothing more is done than the step in
hand and one save, and the resumed run leaves the bits of an undisturbed one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1, Signals
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import epochal
from campaigns import harness, training
from campaigns.harness import Child, Ended, Outcome, Part
from epochal.__main__ import main
from epochal.checkpoint.store import Checkpoints
from epochal.runtime import signals

WHAT = "SIGTERM, SIGINT and SIGUSR1 at random moments"
SIGNALS = {"small": 14, "full": 500}
PROCESSES = {"small": 1, "full": 30}  # of these: with an interpreter of their own
WAYS = {"small": ("once", "once", "twice", "group"), "full": ("once", "once", "twice", "worker", "group")}
STEPS, EVALUATIONS = 12, 4  # of a run; the second: batches that are evaluated
CALLS_OF_A_RUN = 250  # calls to the disk that all saves of a run make together
MOST_SECONDS = 3.0  # that an end may take on a machine with other work; what it took is told as a figure
ROOT = Path(__file__).parents[1]
RECIPE = "from campaigns.r11_signals import plan\n"


class Slow(Dataset):
    """Samples that take two milliseconds each, so that there is time for a signal."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(0.002)
        return torch.full((4,), index / self.count) + torch.rand(()), torch.ones(1)


reached: Callable[[str], None] = lambda moment: None  # noqa: E731  (told of each step and each evaluated batch)


def plan(workers: int = 0) -> epochal.Plan:
    """What the signals disturb: every step is saved, and told in a file beside the run folder."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
    model.register_forward_pre_hook(lambda module, inputs: None if module.training else reached("val"))
    return epochal.Plan(
        model, Slow(24), val=Slow(8), loss="mse", epochs=2, batch_size=4, seed=0, workers=workers, schedule="cosine",
        save=epochal.Saving("1 steps", share=None), run="run", observers=[Log()],  # --run says where it really is
    )  # fmt: skip


class Log:
    """An observer that writes down what it is told, and when."""

    def __call__(self, event: epochal.Event) -> None:
        if isinstance(event, epochal.Started):
            assert event.run is not None
            self.file = event.run.with_suffix(".log").open("a", buffering=1)
        if isinstance(event, epochal.StepDone | epochal.Evaluated | epochal.Ended):
            print(type(event).__name__, getattr(event, "step", 0), time.monotonic(), file=self.file)
        if isinstance(event, epochal.StepDone):
            reached("step")


@dataclass
class Case:
    """number: the signal. how: once, twice, to a worker or to the whole group. at: the moment, and which of them.

    face: the command line, or a script that calls ``fit``.
    """

    number: Signals
    how: str
    at: tuple[str, int]
    workers: int
    face: str

    @property
    def stops_at_once(self) -> bool:
        return self.how == "twice" and self.number == SIGINT

    @property
    def spares_the_run(self) -> bool:
        """A Ctrl-C is for the run, which ends its workers; one that gets it alone ignores it."""
        return self.how == "worker" and self.number == SIGINT


def _drawn(rng: random.Random, ways: Sequence[str]) -> Case:
    how = rng.choice(ways)
    moment = rng.choice(("step", "save", "val"))
    most = {"step": STEPS - 3, "save": CALLS_OF_A_RUN, "val": EVALUATIONS}[moment]
    workers = 2 if how == "worker" else rng.choice((0, 2)) if how == "group" else 0
    return Case(
        rng.choice((SIGINT, SIGTERM, SIGUSR1)), how, (moment, rng.randint(1, most)), workers,
        rng.choice(("command", "command", "script")),
    )  # fmt: skip


def run(scale: str) -> Outcome:
    """In forked processes, and some with an interpreter of their own."""
    shares = 2 if scale == "full" else 1

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        _disturb(part, rng, SIGNALS[scale] // shares, WAYS[scale])
        _processes(part, rng, PROCESSES[scale] // shares)

    _warm()
    return harness.outcome("R11", WHAT, work, shares=shares)


def bites() -> Outcome:
    """A run that does not listen to SIGTERM and SIGUSR1."""

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        with harness.changed(signals, TERMINATE={}):
            for number in (SIGTERM, SIGUSR1):
                _disturb(part, rng, part.tried + 1, (), Case(number, "once", ("step", 4), 0, "command"))

    _warm()
    return harness.outcome("R11", WHAT, work)


def _warm() -> None:
    with harness.scratch() as folder:
        harness.warm(lambda: _undisturbed(folder, 0) and None)


def _undisturbed(folder: Path, workers: int) -> dict[str, str]:
    (folder / "recipe.py").write_text(RECIPE)
    run = folder / f"straight-{workers}"
    code = main(["train", str(folder / "recipe.py"), "--run", str(run), "--workers", str(workers)])
    if code:
        raise RuntimeError(f"undisturbed: exit code {code}")
    return training.left(run)


def _disturb(part: Part, rng: random.Random, count: int, ways: Sequence[str], case: Case | None = None) -> None:
    with harness.scratch() as folder:
        os.chdir(folder)
        expected = {workers: harness.ask(lambda: _undisturbed(folder, workers)).value for workers in (0, 2)}  # noqa: B023
        while part.tried < count:
            one = case or _drawn(rng, ways)
            part.tried += 1
            for problem in _one(part, rng, folder, one, expected[one.workers]):
                part.fail(f"{one}: {problem}")


def _one(part: Part, rng: random.Random, folder: Path, case: Case, expected: dict[str, str]) -> list[str]:
    run = folder / f"run-{part.tried}"
    waiting, mark = os.pipe()
    child = Child(lambda: _trained(run, case, mark))
    os.close(mark)
    came = os.read(waiting, 1)
    os.close(waiting)
    time.sleep(rng.random() * 0.004)
    sent = _send(child.pid, case, rng) if came else None
    ended = child.wait()
    if sent is None:
        part.count("ended before its moment")
        return [] if came or ended.value in (0, "EPOCHS") else [f"undisturbed: {ended}"]
    part.count(f"{case.number.name}, {case.how}")
    return [*_end(part, case, run, ended, sent), *_resumed(run, case, expected)]


def _trained(run: Path, case: Case, mark: int) -> int | str:
    """In the child: trains, and tells through a pipe when the moment has come."""
    global reached
    os.setpgid(0, 0)
    signal.signal(SIGINT, signal.default_int_handler)  # which a shell may have taken from us
    (moment, at), seen = case.at, [0]
    os.dup2(os.open(run.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)

    def now() -> None:
        os.write(mark, b".")
        time.sleep(0.005)

    def count(what: str) -> None:
        seen[0] += what == moment
        if what == moment and seen[0] == at:
            now()

    reached = count
    in_save = harness.disk(harness.counted(at, now, only="checkpoint")) if moment == "save" else nullcontext()
    with in_save:
        if case.face == "script":
            return plan(case.workers).replace(run=run).fit().reason.name
        given = ["--run", str(run), "--workers", str(case.workers)]
        return main(["train", str(run.parent / "recipe.py"), *given])


def _send(pid: int, case: Case, rng: random.Random) -> float | None:
    """Sends the signal, and gives when; None if whom it is for is not there (any more)."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        if case.how == "group":
            os.killpg(pid, case.number)
        elif case.how == "worker":
            workers = [child.pid for child in psutil.Process(pid).children()]
            if not workers:
                return None
            os.kill(rng.choice(workers), case.number)
        else:
            os.kill(pid, case.number)
        sent = time.monotonic()
        if case.how == "twice":
            time.sleep(rng.random() * 0.003)
            with suppress(ProcessLookupError):
                os.kill(pid, case.number)
        return sent
    return None


def _end(part: Part, case: Case, run: Path, ended: Ended, sent: float) -> list[str]:
    """What is wrong with how it ended: code, time, what it did meanwhile, and what is saved."""
    told = [line.split() for line in run.with_suffix(".log").read_text().splitlines()]
    steps = [(int(step), float(at)) for what, step, at in told if what == "StepDone"]
    ends = [float(at) for what, _, at in told if what == "Ended"]
    got = -ended.killed if ended.killed else ended.value if ended.error is None else ended.error.split(" at ")[0]
    expected: tuple[Any, ...] = _expected(case)
    if case.spares_the_run:
        return [] if got in expected else [f"ends with {got}, not {expected}"]
    problems = []
    is_late = got in (0, "EPOCHS") or (got == -case.number and bool(ends))  # after its end, it is nobody's any more
    if is_late and len(steps) == STEPS and case.at[0] != "step":
        part.count("came after the last step")
    elif got not in expected and not (case.stops_at_once and "KeyboardInterrupt" in str(got)):
        problems.append(f"ends with {got}, not {expected}: {run.with_suffix('.err').read_text()[-300:]}")
    if ends and not case.stops_at_once:
        part.count("seconds until the end", ends[0] - sent)
        part.most("most seconds until the end", ends[0] - sent)
        # torch looks only every five seconds for one that dies while the workers are being started.
        if ends[0] - sent > MOST_SECONDS + (5 if case.workers else 0):
            problems.append(f"took {ends[0] - sent:.1f} seconds")
    if case.how != "worker" and (more := sum(at > sent for _, at in steps)) > 1:
        problems.append(f"{more} steps were done after the signal")
    _, traceback, rest = run.with_suffix(".err").read_text().partition("Traceback")
    if traceback and not case.stops_at_once:
        problems.append(f"a traceback is shown: {rest[:2000]}")
    found = Checkpoints(run / "checkpoints").newest_whole()
    saved = found.state["progress"]["step"] if found else None
    last = steps[-1][0] if steps else 0
    # torch tells of a lost worker in the middle of a step, and half a step is not saved.
    is_broken_off = case.how == "worker" and got in (1, "WorkerError")
    if saved != last and not case.stops_at_once and not (is_broken_off and saved is not None):
        problems.append(f"step {last} is done, and step {saved} saved")
    return problems


def _expected(case: Case) -> tuple[Any, ...]:
    if case.spares_the_run:
        return (0, "EPOCHS")
    if case.how == "worker":
        return (1, 0, "EPOCHS") if case.face == "command" else ("WorkerError", "EPOCHS")
    if case.face == "command":
        return (128 + case.number,)
    return ("INTERRUPTED",) if case.number == SIGINT else (-case.number,)


def _resumed(run: Path, case: Case, expected: dict[str, str]) -> list[str]:
    def go_on() -> dict[str, str]:
        if case.face == "script":
            plan(case.workers).replace(run=run, resume=True).fit()
        elif code := main(["resume", str(run)]):
            raise RuntimeError(f"exit code {code}")
        return training.left(run)

    ended = harness.ask(go_on)
    if ended.error is not None:
        return [f"resumed: {ended.error}"]
    return [f"after the resume {name} differs" for name in training.differences(ended.value, expected)]


def _processes(part: Part, rng: random.Random, count: int) -> None:
    """``python -m epochal train`` and ``resume``, as a shell would start them."""
    with harness.scratch() as folder:
        os.chdir(folder)
        expected = harness.ask(lambda: _undisturbed(folder, 0)).value
        for number in range(count):
            case = Case(rng.choice((SIGINT, SIGTERM, SIGUSR1)), "once", ("step", rng.randint(1, 6)), 0, "command")
            run = folder / f"process-{number}"
            signal.signal(SIGINT, signal.default_int_handler)
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            words = [sys.executable, "-m", "epochal", "train", "recipe.py", "--run", str(run)]
            with run.with_suffix(".err").open("w") as errors:
                process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
            _until(lambda: run.with_suffix(".log").read_text().count("StepDone") >= case.at[1], process)  # noqa: B023
            process.send_signal(case.number)
            sent = time.monotonic()
            code = process.wait(60)
            part.tried += 1
            part.count(f"{case.number.name}, to python -m epochal")
            ended = Ended(value=code) if code >= 0 else Ended(error="killed", killed=-code)
            for problem in [*_end(part, case, run, ended, sent), *_resumed(run, case, expected)]:
                part.fail(f"process, {case}: {problem}")


def _until(there: Callable[[], bool], process: subprocess.Popen) -> None:
    for _ in range(6000):
        with suppress(FileNotFoundError):
            if there() or process.poll() is not None:
                return
        time.sleep(0.002)
