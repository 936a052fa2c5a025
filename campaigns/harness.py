"""What the campaigns share: children that are forked in milliseconds, a disk that can break, and states as digests.

torch and epochal are imported once, by the process that forks; it computes nothing itself, so that its children may.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import random
import select
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from epochal.checkpoint import files

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where nothing depends on a real disk
LISTED = 20  # failures that are told in full


@dataclass
class Outcome:
    """What a program found. tried: how many attempts. failures: what went wrong in which, one line each."""

    id: str
    what: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Part:
    """The share of one process in an outcome. Figures are added up, those named ``most ...`` are compared."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def fail(self, what: str) -> None:
        self.failures.append(what)

    def count(self, figure: str, by: float = 1) -> None:
        self.figures[figure] = self.figures.get(figure, 0) + by

    def most(self, figure: str, value: float) -> None:
        self.figures[figure] = max(self.figures.get(figure, 0), value)

    def add(self, other: Part) -> None:
        self.tried += other.tried
        self.failures += other.failures
        for name, value in other.figures.items():
            (self.most if name.startswith("most ") else self.count)(name, value)


def outcome(id: str, what: str, work: Callable[[Part, random.Random, int, int], None], *, shares: int = 1) -> Outcome:
    """Runs ``work(part, random, share, shares)`` in as many children as there are shares, and adds up their parts."""
    began = time.perf_counter()
    settle()

    def one(share: int) -> dict[str, Any]:
        part = Part()
        work(part, random.Random(f"{id} {share}"), share, shares)
        return asdict(part)

    children = [Child(lambda share=share: one(share)) for share in range(shares)]
    total = Part()
    for share, child in enumerate(children):
        ended = child.wait(timeout=None)
        if ended.error is not None:
            total.fail(f"share {share}: {ended.error}")
        else:
            total.add(Part(**ended.value))
    return Outcome(id, what, total.tried, total.failures, time.perf_counter() - began, total.figures)


def settle() -> None:
    """What is there is left out of the garbage collector's sight, so that forked pages stay shared."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


@dataclass
class Ended:
    """How a child ended: with a value, or with what went wrong. killed: by its signal, if by one."""

    value: Any = None
    error: str | None = None
    killed: int | None = None


class Child:
    """A forked process that runs a function and sends back what it returns, as JSON; its output goes nowhere."""

    def __init__(self, function: Callable[[], Any]):
        self._result, result = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads that would not be there after a fork: there are none
            self.pid = os.fork()
        if self.pid == 0:
            _serve(function, result)
        os.close(result)
        self._ended = os.pidfd_open(self.pid)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = 60.0) -> Ended:
        """Waits for the result or for the end; a child that takes longer is killed."""
        parts: list[bytes] = []
        deadline = None if timeout is None else time.monotonic() + timeout
        late = False
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = select.select([self._result, self._ended], [], [], left)[0]
            if self._result in ready and (data := os.read(self._result, 2**20)):
                parts.append(data)
                continue
            if not ready:
                late = True
                self.kill()
            break
        _, status = os.waitpid(self.pid, 0)
        os.close(self._result)
        os.close(self._ended)
        if late:
            return Ended(error=f"no answer after {timeout} seconds", killed=signal.SIGKILL)
        if os.WIFSIGNALED(status):
            return Ended(error=f"ended by signal {os.WTERMSIG(status)}", killed=os.WTERMSIG(status))
        try:
            return Ended(**json.loads(b"".join(parts)))
        except ValueError:
            return Ended(error=f"ended with status {status} and no answer")


def _serve(function: Callable[[], Any], result: int) -> None:
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        warnings.simplefilter("ignore")
        try:
            answer: dict[str, Any] = {"value": function()}
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            answer = {"error": f"{type(error).__name__} at {place}: {str(error)[:500]}"}
        data = json.dumps(answer).encode()
        while data:
            data = data[os.write(result, data) :]
    finally:
        os._exit(0)


def ask(function: Callable[[], Any], timeout: float = 60.0) -> Ended:
    """What a function returns in a child of its own."""
    return Child(function).wait(timeout)


def warm(function: Callable[[], Any]) -> None:
    """Runs a function in a child, and imports here what it imported there, so that later children need not."""
    before = set(sys.modules)

    def work() -> list[str]:
        function()
        return [name for name in sys.modules if name not in before]

    if (ended := ask(work)).error is not None:
        raise RuntimeError(ended.error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ended.value:
            with suppress(Exception):
                importlib.import_module(name)


@contextmanager
def scratch(*, on_disk: bool = False) -> Iterator[Path]:
    """A folder for a while: on a real disk, or in memory where that makes no difference."""
    with tempfile.TemporaryDirectory(prefix="campaign-", dir=None if on_disk else MEMORY) as folder:
        yield Path(folder)


CALLS = {"open", "write", "read", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir", "listdir", "fstat"}


class Disk:
    """``os`` as :mod:`epochal.checkpoint.files` sees it; ``around(name, call, arguments)`` stands in for each call."""

    def __init__(self, around: Callable[..., Any]):
        self._around = around

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        if name not in CALLS:
            return call
        return lambda *arguments, **named: self._around(name, lambda: call(*arguments, **named), arguments)


@contextmanager
def disk(around: Callable[..., Any]) -> Iterator[None]:
    """While inside, every call to the disk goes through ``around``."""
    files.os = Disk(around)
    try:
        yield
    finally:
        files.os = os


@contextmanager
def changed(owner: Any, **attributes: Any) -> Iterator[None]:
    """While inside, attributes of a module or a class are others: how something is broken on purpose."""
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def counted(at: int, what: Callable[[], None], *, only: str | None = None) -> Callable[..., Any]:
    """For :func:`disk`: does something right after the call of this number, from 1. only: those of a thread's name."""
    calls = SimpleNamespace(count=0)

    def around(name: str, call: Callable[[], Any], arguments: tuple) -> Any:
        done = call()
        if only is None or threading.current_thread().name == only:
            calls.count += 1
            if calls.count == at:
                what()
        return done

    around.calls = calls  # type: ignore[attr-defined]
    return around


def kill_me() -> None:
    """SIGKILL to this very process."""
    os.kill(os.getpid(), signal.SIGKILL)


TIMES = {"time", "seconds"}  # the only entries of a state that no two runs have in common


def digest(state: Any) -> str:
    """A sha256 of a state: types, order and bits, without times, and however its tensors lie in memory."""
    told = hashlib.sha256()
    _tell(state, told.update)
    return told.hexdigest()


def _tell(value: Any, tell: Callable[[bytes], None]) -> None:
    tell(type(value).__name__.encode() + b":")
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key not in TIMES:
                _tell(key, tell)
                _tell(part, tell)
        tell(b"}")
    elif isinstance(value, list | tuple):
        for part in value:
            _tell(part, tell)
        tell(b"]")
    elif isinstance(value, torch.Tensor) and value.layout is not torch.strided:
        tell(f"{tuple(value.shape)} {value.layout} ".encode())
        _tell(_parts(value), tell)
    elif isinstance(value, torch.Tensor):
        tell(f"{value.dtype} {tuple(value.shape)} {value.layout} ".encode())
        flat = value.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1)
        tell(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, np.ndarray | np.generic):
        tell(f"{value.dtype.str} {value.shape} ".encode() + value.tobytes())
    elif isinstance(value, float):
        tell(struct.pack(">d", value))
    else:
        tell(repr(value).encode())


def _parts(sparse: torch.Tensor) -> list[Any]:
    """What a sparse tensor consists of; made dense, one of a wild shape would not fit into memory."""
    if sparse.layout is torch.sparse_coo:
        return [sparse.is_coalesced(), sparse._indices(), sparse._values()]
    by_row = sparse.layout in (torch.sparse_csr, torch.sparse_bsr)
    indices = ("crow_indices", "col_indices") if by_row else ("ccol_indices", "row_indices")
    return [*(getattr(sparse, name)() for name in indices), sparse.values()]


def sha256(path: Path) -> str:
    """Of a file; what the system says of one that is not there."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return str(error.strerror)


def listing(folder: Path) -> dict[str, str]:
    """Everything under a folder, with the sha256 of each file."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*"))}


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders under a folder."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*.tmp")]
