"""A pulse of every process, so that those who wait for one in vain can say which it is, and what it was doing."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from epochal.errors import ProcessError
from epochal.runtime.processes import world

SECONDS = 0.5  # from one beat to the next
OVER = "over"  # in the place of a beat
PATIENCE = 2.0  # with whoever holds the store
# What torch says, in many words, when another process does not answer. Its classes for it are not used everywhere.
_SILENCE = re.compile(
    r"gloo/|Connection (closed|reset|refused)|[Tt]imed? ?out|NCCL|ProcessGroup|Broken pipe|recvValue|TCPStore|store->"
)
_TORCH = Path(torch.__file__).parent.as_posix()
_WAITING = tuple(f"{_TORCH}/{part}" for part in ("distributed", "autograd", "nn/parallel", "_tensor.py"))


class Pulse(threading.Thread):
    """Tells, twice a second, where this process is; to the store in which all of them have met.

    step: the updates done so far. What the main thread is in is looked up in its stack, so that it costs it nothing.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True, name="pulse")
        self.step, self.rank, self.size = 0, world().rank, world().size
        self._beats, self._is_over, self._last, self.waits = 0, threading.Event(), "", False
        store: Any = _get_default_store()
        self._store = store.clone()  # a connection of its own: waiting on one blocks it
        self._main = threading.main_thread().ident

    def run(self) -> None:
        with suppress(Exception):  # whoever held the store is gone
            while not self._is_over.wait(SECONDS):
                self._beats += 1
                self._tell(f"{self._beats}|step {self.step}, {self._place()}")
            self._tell(f"{OVER}|{self._last}")

    def _tell(self, word: str) -> None:
        self._store.set(f"epochal/pulse/{self.rank}", word)

    def stop(self, last: str) -> None:
        """Ends it; last: why. A thread that is inside of the store while Python ends would abort the process."""
        self._last = last
        self._is_over.set()
        if self.is_alive():
            self.join(PATIENCE)

    def _place(self) -> str:
        if self.waits:
            return "a wait for others"
        frame = sys._current_frames().get(self._main or 0)
        return place_of(frame) if frame is not None else "at its end"

    def diagnosis(self) -> list[str]:
        """What is to be said of each other process: the silent ones, or else where all of them are. Takes seconds."""
        before = self._heard()
        time.sleep(4 * SECONDS)
        after = self._heard()
        if before is None or after is None:  # whoever holds the store does not answer
            by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            return [f"{'what started the processes' if by_agent else 'rank 0'} is dead or stopped"]
        told = {rank: after.get(rank, ("", "its start")) for rank in range(self.size) if rank != self.rank}
        over = {rank: place.rstrip(".") for rank, (beat, place) in told.items() if beat == OVER}
        own = {rank: word for rank, word in over.items() if not word.startswith(ProcessError.__name__)}  # no echo
        silent = [rank for rank in told if rank not in over and before.get(rank, ("", ""))[0] == told[rank][0]]
        if silent and not own:
            return [f"rank {rank} is dead or stopped (last heard of at {told[rank][1]})" for rank in silent]
        if over:
            return [f"rank {rank} has ended: {word}" for rank, word in (own or over).items()]
        return [f"rank {rank} is at {place}" for rank, (_, place) in told.items()]

    def _heard(self) -> dict[int, tuple[str, str]] | None:
        """Of each process that has been heard of, its last beat and its place. None if the store does not answer."""
        heard: dict[int, tuple[str, str]] = {}
        is_answered = threading.Event()

        def ask() -> None:
            for rank in range(self.size):
                if self._store.check([key := f"epochal/pulse/{rank}"]):
                    beat, _, place = self._store.get(key).decode().partition("|")
                    heard[rank] = beat, place
            is_answered.set()

        asking = threading.Thread(target=_quietly, args=[ask], daemon=True)  # a stopped process answers nothing at all
        asking.start()
        asking.join(PATIENCE)
        return heard if is_answered.is_set() else None


def _quietly(function: Callable[[], None]) -> None:
    with suppress(Exception):
        function()


def place_of(frame: FrameType | None) -> str:
    """The innermost place in a stack that is not torch's: the user's own line, or the part of epochal it is in."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if not path.as_posix().startswith((_TORCH, "<", sys.base_prefix)) and path.name != "processes.py":
            return f"{path.name}:{frame.f_lineno}, in {frame.f_code.co_name}"
        frame = frame.f_back
    return "its start"


def lost(error: BaseException | None, pulse: Pulse, step: int) -> ProcessError | None:
    """An error of a process that waited in vain for another one, as one that names it; None for any other error."""
    if not isinstance(error, RuntimeError) or not (isinstance(error, dist.DistError) or _SILENCE.search(str(error))):
        return None
    places = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not places or not places[-1].startswith(_WAITING):  # words like these, but of the user's own program
        return None
    pulse.waits = True
    told = next((line for line in str(error).splitlines() if line.strip()), "")
    told = re.sub(r".*\.cc:\d+\] |\. .*", "", told).strip()
    what = f"{'; '.join(pulse.diagnosis())}."
    where = f"rank {pulse.rank}, which waited for it after step {step}; {told[:200]}"
    fix = "look at what that process says itself; a saved run goes on from its newest checkpoint"
    return ProcessError(what, where=where, fix=fix)
