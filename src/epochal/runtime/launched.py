"""A process that was started together with others: what it decides with them, and how it tells of its end.

Imports no torch, for every command begins here; a process that is alone does nothing of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from epochal.errors import PlanError
from epochal.runtime.world import announced

T = TypeVar("T")

LAUNCHER = "EPOCHAL_LAUNCHER"  # in the environment of the processes that runtime/launch.py starts: its process id
ERRORS = "TORCHELASTIC_ERROR_FILE"
PATIENCE = timedelta(minutes=5)  # with the others, until a plan is known that says another
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def follow() -> None:
    """Has the kernel end this process with its launcher, even if that is killed: nobody trains on unseen.

    Until :func:`listen` a Ctrl-C ends it at once: the launcher says so, and torch would print where it was.
    """
    if notes() is not None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    elif announced().size > 1 and LAUNCHER in os.environ and not _is_alive(int(os.environ[LAUNCHER])):
        print("epochal: what started this process is gone, and so are the others.", file=sys.stderr)
        sys.exit(128 + signal.SIGKILL)


def _is_alive(process: int) -> bool:
    import psutil  # which no other command needs at its start

    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


def listen() -> None:
    """From here on a Ctrl-C is Python's again, and the run's."""
    if notes() is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def launches(processes: int | None, restarts: int | None) -> bool:
    """Whether the command is to be run by several processes, and this one has started them and seen them end.

    >>> launches(None, None), launches(1, 0)
    (False, False)

    Raises PlanError for what would do nothing.
    """
    if (size := announced().size) > 1:  # the processes themselves get here with the same flags
        if notes() is None and (restarts or processes not in (None, size)):
            flag = f"--restarts {restarts}" if restarts else f"--processes {processes}"
            what = f"{flag} is for processes that epochal starts, and this is one of {size} of torchrun or srun."
            error = PlanError(what, where=flag, fix="leave it out, or start it without torchrun")
            error.is_shared = True
            raise error
        return False
    if (processes or 1) == 1:
        if restarts:
            what = "--restarts is for several processes, and this is one."
            raise PlanError(what, where=f"--restarts {restarts}", fix="give --processes N too, or leave it out")
        return False
    from epochal.runtime.launch import launch

    launch(sys.argv[1:], processes or 1, restarts or 0)
    return True


def notes() -> Path | None:
    """Where the launcher keeps what was decided, for its processes, and for those that it starts anew."""
    if os.environ.get(LAUNCHER) != str(os.getppid()):  # none, or its environment was only inherited
        return None
    return Path(os.environ[ERRORS]).parents[3]


def is_restarted() -> bool:
    """Whether these processes were started before, and have to go on where those were.

    >>> is_restarted()
    False
    """
    return announced().size > 1 and announced().restarts > 0


def meet() -> None:
    """Joins the group, if there are others. Its devices are those of the machine, as no plan is known yet."""
    if announced().size > 1:
        from epochal.runtime.device import choose
        from epochal.runtime.processes import join

        join(choose("auto"), PATIENCE)


def decided(name: str, make: Callable[[], T]) -> T:
    """What the first process makes, a value of JSON's: the same for all, and for those that are started anew.

    >>> decided("seed", lambda: 7)
    7
    """
    if announced().size == 1:
        return make()
    from epochal.runtime.processes import first

    note = folder / name if (folder := notes()) else None

    def once() -> T:
        if note is not None and note.exists():
            return json.loads(note.read_text())
        value = make()
        if note is not None:
            note.write_text(json.dumps(value))
        return value

    meet()
    return first(once)


def together(make: Callable[[], T]) -> T:
    """What ``make`` gives in this process; if it fails in any, it fails in all, and is told once."""
    if announced().size == 1:
        return make()
    from epochal.runtime.processes import together

    meet()
    return together(make)


def check_restarts() -> None:
    """Raises PlanError where processes are started anew by somebody who cannot tell them their run folder."""
    is_possible = is_restarted() or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if announced().size > 1 and notes() is None and is_possible:
        what = "a run whose processes are started anew needs a folder that they find again."
        fix = "give --run FOLDER (torchrun takes it for its own, but after --: torchrun ... -- -m epochal train ...)"
        raise PlanError(what, where="no --run, and restarts by torchrun or SLURM", fix=fix)


def tell(error: BaseException, text: str, code: int) -> None:
    """Says on stderr how this process ends. One of a launcher's leaves it to that: ``launch.py`` reads the file."""
    world, is_shared = announced(), getattr(error, "is_shared", False)
    if notes() is not None:
        brief = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        facts = {"message": text, "timestamp": time.time(), "brief": brief, "code": code, "shared": is_shared}
        file = Path(os.environ[ERRORS])
        file.with_suffix(".new").write_text(json.dumps(facts))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said
        os.replace(file.with_suffix(".new"), file)  # whoever is killed in the midst of it leaves no half a file
    elif text and (world.is_first or not is_shared):
        with suppress(OSError):  # a terminal that was closed
            print(text if world.size == 1 or is_shared else f"rank {world.rank}: {text}", file=sys.stderr)
