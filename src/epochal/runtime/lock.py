"""One run folder, one run: an advisory lock that no crash can leave behind."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from epochal.errors import RunFolderError

try:
    import fcntl
except ImportError:  # no such locks on this system: nothing keeps two runs apart there
    fcntl = None

LOCK_FILE = ".lock"
OURS = b"process "  # what a lock file begins with
_HELD: set[tuple[int, int]] = set()  # by this process, to which its own locks are no obstacle


class Lock:
    """Holds a folder for this process, until it is released or the process is gone.

    A record lock (``lockf``): the kernel lets go of it when the process ends, however that happens, and workers that
    were forked do not hold it. What the file says (process and host) is for people.

    Raises RunFolderError if another run holds it.
    """

    def __init__(self, folder: Path):
        self._descriptor: int | None = None
        path = folder / LOCK_FILE
        if os.path.exists(path) and _place(os.stat(path)) in _HELD:  # closing it again would let go of that lock
            raise _taken(folder, "this process")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                os.close(descriptor)
                raise _taken(folder, holder or "it has just begun") from error
            # else a file system without locks
        self._descriptor, self._held = descriptor, _place(os.fstat(descriptor))
        _HELD.add(self._held)
        with suppress(OSError):  # a full disk: what the file says is only for people
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, OURS + f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _HELD.discard(self._held)

    def __del__(self) -> None:
        self.release()


def is_held(folder: Path) -> bool:
    """Whether a run is at work in the folder; False where that cannot be found out."""
    return _tells(folder, _is_locked)


def was_held(folder: Path) -> bool:
    """Whether a run holds the folder, or has ever held it."""
    return _tells(folder, lambda descriptor: os.read(descriptor, len(OURS)) == OURS)


def _tells(folder: Path, ask: Callable[[int], bool]) -> bool:
    """What the lock file of a folder says; True if this process holds it, False if there is none."""
    try:
        if _place(os.stat(folder / LOCK_FILE)) in _HELD:  # opening it and closing it again would let go of that lock
            return True
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe, perhaps
    except OSError:
        return False
    try:
        return ask(descriptor)
    except OSError:  # it is no file
        return False
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    try:
        os.lockf(descriptor, os.F_TEST, 0)
        return False
    except (AttributeError, OSError) as error:
        return getattr(error, "errno", None) in (errno.EAGAIN, errno.EACCES)


def _place(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _taken(folder: Path, holder: str) -> RunFolderError:
    fix = "wait for it to end, or choose another name for this run"
    return RunFolderError("another run is at work in this folder.", where=f"{folder}; {holder}", fix=fix)
