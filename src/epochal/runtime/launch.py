"""Starts several processes that train together, watches over them, and tells what became of them.

torch's elastic agent does the starting and watching. What a process has to say of its end stands in a file, which
``launched.tell`` writes; torch's own words (log lines, a banner, tracebacks of itself) nobody needs to see.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from epochal.errors import EpochalError, Interrupted, PlanError, ProcessError
from epochal.runtime.launched import LAUNCHER
from epochal.runtime.signals import INTERRUPT, TERMINATE

# When processes are started anew, those of before must not be met in a store that is shared (pytorch issue 135712).
STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
TIME_TO_SAVE = 300  # seconds, after a signal
TIME_TO_STOP = 3  # after a second Ctrl-C
ENDED = 128 + signal.SIGTERM  # the exit code of a process that the agent has ended, since another one failed
CONSEQUENCES = (signal.SIGTERM, signal.SIGABRT)  # the first the agent sends; the second is how NCCL loses its peer
SOON = 5  # seconds: a process that is killed later than that after the first failure was killed for not ending
FOOTPRINT = 2**28  # bytes of a process in which torch and epochal are loaded, and no model yet
HOPELESS = (2, 3)  # exit codes of what would only happen again: a mistake, a value that is not finite


def launch(arguments: Sequence[str], processes: int, restarts: int) -> None:
    """Runs ``epochal`` with these arguments in so many processes, and once more, all of them, whenever one fails.

    Raises PlanError for more than fit into memory; ProcessError in the words of the one that failed first or, after a
    signal, of the one that saved.
    """
    free = psutil.virtual_memory().available
    if processes * FOOTPRINT > free:
        what = f"{processes:,} processes do not fit into memory: each takes {FOOTPRINT / 2**30:g} GiB for torch alone."
        raise PlanError(what, where=f"--processes {processes}; {free / 2**30:.1f} GiB are free", fix="start fewer")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ |= {LAUNCHER: str(os.getpid()), STORE: "1"}
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # stacks of C++, whenever another process is gone
    if sys.stderr.isatty():
        print(f"starting {processes} processes", file=sys.stderr)
    logging.disable()
    with TemporaryDirectory(prefix="epochal-") as folder, _signals_raise():
        ends = Ends(folder, restarts)
        threading.Thread(target=ends.wake, daemon=True).start()
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=restarts, run_id="epochal",
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost", logs_specs=ends,
            signals_to_handle="", shutdown_timeout=TIME_TO_SAVE,
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "epochal", *arguments)
        except ChildFailedError as error:
            raise _failure(error.failures, processes, ends) from None
        except SignalException as error:
            raise _interruption(error.sigval, ends) from None


class Ends(DefaultLogsSpecs):
    """Where the processes write how they end; it is asked for anew each time that they are started."""

    def __init__(self, folder: str, restarts: int):
        super().__init__(folder)
        self.folder, self.restarts, self.starts = folder, restarts, 0
        self.files: Mapping[int, str] = {}

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        if self.starts:
            told = [one for one in self.told().values() if one["code"] != ENDED]
            first = min(told, key=lambda one: one["timestamp"], default={"brief": "a process was killed"})
            if first.get("code") in HOPELESS:
                raise _told(first["message"], first["code"])
            again = f"all start again from the newest checkpoint ({self.starts} of {self.restarts})"
            print(f"{first['brief']}\n{again}", file=sys.stderr, flush=True)
        self.starts += 1
        where = super().reify(envs)
        self.files = where.error_files
        return where

    def wake(self) -> None:
        """Lets a stopped process go on as soon as another has failed: else it is waited for in vain once more."""
        while True:
            time.sleep(0.5)
            if self.told():
                _send(signal.SIGCONT)

    def told(self) -> dict[int, dict[str, Any]]:
        """What the processes that were started last have told, by rank."""
        return {rank: json.loads(Path(file).read_text()) for rank, file in self.files.items() if os.path.isfile(file)}

    def resume(self) -> str | None:
        """The command that goes on with the run, if one has begun."""
        note = Path(self.folder, "run")
        run = json.loads(note.read_text()) if note.exists() else None
        return f"epochal resume {shlex.quote(run)}" if run is not None and Path(run, "run.json").exists() else None


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Inside, the first signal is raised, so that the agent passes it on, once, and waits; a second Ctrl-C ends all.

    The agent's own handlers would break off that waiting at any second signal, and send SIGTERM in its place.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            raise SignalException("", signal.Signals(number))
        if received.count(signal.SIGINT) > 1:
            _send(signal.SIGINT)
            timer = threading.Timer(TIME_TO_STOP, _send, [signal.SIGKILL])
            timer.daemon = True  # nobody waits for it when all have ended
            timer.start()

    usual = {number: usual for number, usual in {**INTERRUPT, **TERMINATE}.items() if signal.getsignal(number) == usual}
    for number in usual:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, usual_one in usual.items():
            signal.signal(number, usual_one)


def _send(number: int) -> None:
    """To every process that was started, and those that it started."""
    for child in psutil.Process().children():
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)


def _failure(failures: Mapping[int, ProcessFailure], size: int, ends: Ends) -> EpochalError:
    """The error of the process that failed first, and a line for each other one that failed in its own way."""
    soonest, told = min(failure.timestamp for failure in failures.values()), ends.told()

    def precedence(rank: int) -> tuple[int, float]:
        """Who ended without a word comes first: who tells of a lost connection may have lost it to them."""
        number, when = -failures[rank].exitcode, failures[rank].timestamp
        if rank in told:
            return (1 if told[rank]["code"] != ENDED else 3), told[rank]["timestamp"]
        return (0 if number not in CONSEQUENCES and when < soonest + SOON else 2), when

    rank, *others = sorted(failures, key=precedence)
    if rank not in told:
        code, where = failures[rank].exitcode, f"process {failures[rank].pid}"
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        fix = "see what it printed, or the system's log (was there memory?)"
        error = ProcessError(f"rank {rank} {end}.", where=where, fix="; ".join(filter(None, [fix, ends.resume()])))
        error.exit_code = 128 - code if code < 0 else code
        return error
    first = told[rank]
    if first["shared"] or (len(told) == size and len({one["message"] for one in told.values()}) == 1):
        return _told(first["message"], first["code"])
    others = [one for one in others if one in told and told[one]["code"] != ENDED]
    return _told(_listed(f"rank {rank}: {first['message']}", others, told), first["code"])


def _interruption(received: signal.Signals, ends: Ends) -> EpochalError:
    """What the first process told after a signal, and those that failed in place of ending."""
    code, told = 128 + received, ends.told()
    words = [one["message"] for one in told.values() if one["brief"].startswith(Interrupted.__name__)]
    what = f"{received.name} ended the processes before they could save."
    text = words[0] if words else Interrupted(what, fix=ends.resume()).describe()
    return _told(_listed(text, [rank for rank in told if told[rank]["code"] != code], told), code)


def _listed(text: str, ranks: Sequence[int], told: Mapping[int, Mapping[str, Any]]) -> str:
    return "\n".join([text, *(f"rank {rank}, then: {told[rank]['brief']}" for rank in ranks)])


def _told(text: str, code: int) -> ProcessError:
    error = ProcessError(text)
    error.is_relayed, error.exit_code = True, code
    return error
