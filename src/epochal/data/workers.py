"""The processes of a DataLoader: how they are waited for, and what becomes of those that die or hang."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import psutil
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from epochal.errors import WorkerError

SECONDS_TO_END = 1.0
CHILD = getattr(signal, "SIGCHLD", None)
_NOTHING = object()
_AWAITING: set[_Watchdog] = set()  # those of the loaders whose next batch is awaited just now


_runs = 0  # in the main thread, one within the other
_raise = signal_handling._error_if_any_worker_fails  # what torch's handler of SIGCHLD calls


@contextmanager
def heard_while_awaited() -> Iterator[None]:
    """Inside, the death of a worker is heard while a batch is awaited, and nowhere else.

    torch's handler of SIGCHLD raises wherever the main thread is: in the middle of a step, or in another handler, where
    nobody hears it.
    """
    global _runs
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _runs += 1
    signal_handling._error_if_any_worker_fails = _tell
    try:
        yield
    finally:
        _runs -= 1
        if not _runs:
            signal_handling._error_if_any_worker_fails = _raise


def _tell() -> None:
    """Raises where a queue is polled, for in the midst of taking a batch over from a worker that lives, that one would
    complain. A watchdog calls it again, and insists where it was the dead one's batch.
    """
    polls = sys._getframe(2).f_code.co_name in ("select", "wait")
    if _AWAITING and (polls or any(one.insists for one in _AWAITING)):
        _raise()


class _Watchdog(threading.Thread):
    """Kills workers that have kept the training waiting too long, so that whatever waits for them wakes up.

    torch's own timeout does not see a worker that stops while it hands a batch over. since: the time at which the
    wait in hand began, None while there is none. lost: who ended the wait, once it has done so. insists: whether a
    worker has been dead for so long that its end is to be heard wherever the training waits.
    """

    def __init__(self, patience: float, batches: Callable[[], Any]):
        super().__init__(daemon=True, name="watchdog")
        self.patience, self._batches = patience or math.inf, batches
        self._tells = CHILD is not None and threading.current_thread() is threading.main_thread()
        self.since: float | None = None
        self.lost: Lost | None = None
        self.insists = False
        self.over = threading.Event()

    def run(self) -> None:
        pause, waited, since = min(1.0, self.patience / 4), 0.0, None
        while not self.over.wait(pause):
            # What it has seen pass counts, and not the clock: a program that was suspended has not waited.
            waited, since = (waited + pause if self.since == since else 0.0), self.since
            batches = self._batches()
            if since is None or not _workers(batches):
                continue
            if self._tells and any(map(_is_zombie, _workers(batches))):  # else torch looks in five seconds
                self.insists = waited >= 2 * pause
                signal.pthread_kill(threading.main_thread().ident, CHILD)  # type: ignore[arg-type]
            late = waited - (4 * pause if self._tells else 0.0)  # unless torch's handler comes first, if it is there
            dead = _dead(batches) if late >= 2 * pause else ""
            if self.lost is None and self.since == since and (dead or waited > self.patience):
                self.lost = Lost(dead) if dead else Lost(_awaited(batches), self.patience)
                for worker in _workers(batches):
                    worker.kill()
            if self.lost is not None and late > (self.lost.seconds or 0.0):
                _hang_up(batches)

    def wait_for(self, get: Callable[..., Any], *arguments: Any) -> Any:
        try:
            self.since, self.insists = time.monotonic(), False
            if self._tells and (arguments or self._batches() is not None):  # none hears of it while workers are started
                _AWAITING.add(self)
            for worker in _workers(self._batches()):
                if worker.exitcode:  # other processes were started since: then torch itself hears nothing of it
                    raise RuntimeError(f"DataLoader worker (pid {worker.pid}) is gone")
            return get(*arguments)
        finally:
            _AWAITING.discard(self)
            self.since = None


def watched(
    make: Callable[[], Iterator[Any]],
    loader: DataLoader,
    first: int,
    *,
    timeout: float,
    skip: Callable[[Any], int] = lambda batches: 0,
    in_place: Callable[[], Any] | None = None,
    lose: Callable[[int], Any] = lambda number: None,
    anew: Callable[[], Iterator[Any]] | None = None,
) -> Generator[Any, None, int]:
    """The batches of one pass over a DataLoader, numbered from ``first``; a lost worker becomes a WorkerError.

    make: gives torch's iterator. timeout: seconds without a batch after which the workers count as hung, 0 for ever.
    skip: torch's iterator -> how many batches are read and thrown away before. in_place: called after that. lose:
    called with the number of the batch that is missing if a worker is lost. anew: gives what is read if there is
    nothing, as from a data set that was put back to its very end. Returns the number of the last batch, plus one.
    """
    number, batches = first, getattr(loader, "_iterator", None)

    dog = _Watchdog(timeout, lambda: batches)
    if loader.num_workers:
        dog.start()
    try:
        batches = dog.wait_for(make)
        for _ in range(skip(batches)):
            dog.wait_for(next, batches, None)
        if in_place is not None:
            in_place()
        while True:
            while (batch := dog.wait_for(next, batches, _NOTHING)) is not _NOTHING:
                number += 1
                yield batch
                del batch
            if anew is None or number > first:
                return number
            batches, anew = anew(), None
    except Exception as error:
        try:
            told = worker_error(error, f"batch {number} was awaited", batches, dog.lost)
        except RuntimeError:  # torch tells of a dead worker in the midst of anything, once, where no run has its signal
            told = worker_error(error, f"batch {number} was awaited", batches, dog.lost)
        if told is None:
            raise
        end_workers(batches, at_once=True)
        loader._iterator = None
        lose(number)
        raise told from error
    finally:
        dog.over.set()
        _AWAITING.discard(dog)
        if not loader.persistent_workers:
            end_workers(batches)


def worker_error(error: BaseException, where: str, batches: Any = None, lost: Lost | None = None) -> WorkerError | None:
    """A lost worker as an error that names it; None if ``error`` is about something else.

    torch tells of a dead worker wherever the main thread is, in the model's forward too; or what the worker had sent
    cannot be fetched from it any more. batches: torch's iterator, which knows its workers. lost: where that is known.
    """
    text = str(error)
    if isinstance(error, RuntimeError):
        if timed_out := re.match(r"DataLoader timed out after (\S+) seconds", text):
            lost = Lost(_awaited(batches), float(timed_out[1]))
        elif lost is None and (died := re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", text)):
            lost = Lost(_dead(batches) or f"pid {died[1]}")
    if lost is None:
        workers = _workers(batches)
        if text.startswith("Caught") or not workers or not isinstance(error, RuntimeError | OSError | EOFError):
            return None
        for worker in workers:  # what it had sent is gone: it may be about to die
            worker.join(1.0 / len(workers))
        if not (dead := _dead(batches)):
            return None
        lost = Lost(dead)
    saved = "a saved run can be resumed, and its samples come in the same order"
    return WorkerError(lost.what, where=f"{where}; {lost.who}", fix=f"{lost.fix}; {saved}")


class Lost(NamedTuple):
    """Workers in words; and how many seconds they were waited for, None if they have died."""

    who: str
    seconds: float | None = None

    @property
    def what(self) -> str:
        if self.seconds is None:
            return "a process that loads data died."
        return f"a process that loads data hangs: it gave no batch in {self.seconds:g} seconds."

    @property
    def fix(self) -> str:
        if self.seconds is None:
            return "if memory ran out, use fewer workers or smaller samples; without workers the data set's errors show"
        return "look for what the data set waits for (a lock, a disk, a network), or give a longer timeout"


def _workers(batches: Any) -> list[Any]:
    """The processes of torch's iterator; none where it has none, or is not there yet."""
    return list(getattr(batches, "_workers", ()))


def _dead(batches: Any) -> str:
    """The workers that have died, with what they died of; takes note of their end."""
    ends = [(i, worker.pid, worker.exitcode) for i, worker in enumerate(_workers(batches))]
    return ", ".join(f"worker {i} (pid {pid}, {_end(code)})" for i, pid, code in ends if code)


def _end(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {-code}: {signal.strsignal(-code)}"


def _is_zombie(worker: Any) -> bool:
    """Whether it has ended, and nobody has taken note of it."""
    with suppress(psutil.Error):
        return psutil.Process(worker.pid).status() == psutil.STATUS_ZOMBIE
    return False


def _awaited(batches: Any) -> str:
    """A worker that is stopped, for it may keep the others waiting too; else the one that has the next batch in hand,
    which torch keeps to itself.
    """
    try:
        workers = batches._workers
        stopped = (i for i, one in enumerate(workers) if psutil.Process(one.pid).status() == psutil.STATUS_STOPPED)
        number = next(stopped, None)
        if number is None:
            number = batches._task_info[batches._rcvd_idx][0]
        return f"worker {number} (pid {workers[number].pid})"
    except (AttributeError, LookupError, psutil.Error):
        return "one of the workers"


def end_workers(batches: Any, at_once: bool = False) -> None:
    """Ends the workers of torch's iterator, if it has any; those that hang, or that a dead one may block, at once."""
    if not (workers := _workers(batches)):
        return
    if at_once or any(worker.exitcode for worker in workers):
        _kill(workers)
        _hang_up(batches)
    # torch waits five seconds for each; one that dies just now can make the others wait for what it held.
    late = threading.Timer(SECONDS_TO_END, _kill, [workers])
    late.start()
    try:
        batches._shutdown_workers()
    finally:
        late.cancel()


def _kill(workers: Iterable[Any]) -> None:
    for worker in workers:
        with suppress(RuntimeError, AssertionError, ValueError):  # torch tells of this end too; or it is over
            worker.kill()
            worker.join()


def _hang_up(batches: Any) -> None:
    """Lets go of the pipe that killed workers wrote to: who is still reading half a batch from it finds its end, unless
    processes that were started later hold it too. torch would wait for ever for its thread that pins memory.
    """
    pinning = vars(batches).pop("_pin_memory_thread", None)
    if pinning is not None:
        batches._pin_memory_thread_done_event.set()
        pinning._invoke_excepthook = lambda *_: None  # it may end with an EOFError, which is no news
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError):  # it is closed already
        os.dup2(nowhere, batches._worker_result_queue._writer.fileno(), inheritable=False)
    os.close(nowhere)
    if pinning is not None:
        pinning.join(SECONDS_TO_END)
