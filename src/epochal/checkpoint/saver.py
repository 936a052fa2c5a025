"""Saving beside the training: a snapshot is taken, and a thread writes it while the next steps are done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from epochal.cadence import Every
from epochal.checkpoint import codec
from epochal.checkpoint.sharded import shared_out, writers
from epochal.checkpoint.store import Checkpoints, Piece, Saving
from epochal.checkpoint.tensors import DTYPES
from epochal.runtime.shards import is_sharded, part_of


class Saver:
    """Saves states one at a time. every, share, on_full: as in ``Saving``."""

    def __init__(self, checkpoints: Checkpoints, saving: Saving):
        self.checkpoints, self.on_full, self._share = checkpoints, saving.on_full, saving.share
        self.every = Every.parse(saving.every)
        # Seconds that the training has waited, or has shared a core with the writing thread: in all, and the last time.
        self._spent = self._last = 0.0
        self._thread: threading.Thread | None = None
        self._written = threading.Event()  # for a join that Ctrl-C breaks into takes the thread for ended
        self._outcome: tuple[int, Path | BaseException, float] | None = None

    @property
    def is_busy(self) -> bool:
        return self._thread is not None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written, though what has been may not have been told yet."""
        return self._thread is None or self._written.is_set()

    def may_start(self, seconds: float) -> bool:
        """Whether one more save keeps within its share of the run's seconds until now, with what is to come in any
        case: the one at the end, and the weights, which cost about as much.
        """
        return self._share is None or (not self.is_busy and self._spent + 3 * self._last <= self._share * seconds)

    def start(self, step: int, state: Mapping[str, Any]) -> None:
        """Takes a snapshot of the state and begins to write it. Nothing else may be in flight."""
        began = time.perf_counter()
        tree, tensors = codec.encode(state)
        if (group := self.checkpoints.group).size > 1:
            # As the first one says: what only it has (of an observer) may be weights, under another name.
            by = group.first(lambda: writers(tensors, group.size))
            tensors = shared_out(tensors, group.rank, by)
        snapshot = {name: _copied(tensor) for name, tensor in tensors.items()}
        # A daemon, so that a second Ctrl-C does not wait for it: what it leaves half-written is swept up later.
        self._written, begins = threading.Event(), threading.Lock()
        task = begins, step, tree, snapshot, self._written
        self._thread = threading.Thread(target=self._write, args=task, daemon=True, name="checkpoint")
        try:
            self._thread.start()
        except BaseException:
            if begins.acquire(blocking=False):  # it has not begun, and now it will not: nobody shall wait for it
                self._thread = None
            raise
        self._last = time.perf_counter() - began

    def _write(
        self, begins: threading.Lock, step: int, tree: Any, tensors: Mapping[str, Any], written: threading.Event
    ) -> None:
        if not begins.acquire(blocking=False):
            return
        outcome: Path | BaseException
        try:
            pieces = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Piece)}
            whole = {name: tensor for name, tensor in tensors.items() if name not in pieces}
            outcome = self.checkpoints.commit(step, tree, whole, pieces)
        except BaseException as error:  # it is raised where the training can hear it
            outcome = error
        self._outcome = step, outcome, time.thread_time()
        written.set()

    def then(self, function: Callable[[], object]) -> None:
        """Calls the function when nothing is being written: at once, or after a writing that nobody waits for."""
        if self._thread is None:
            function()
        else:
            threading.Thread(target=lambda: (self._written.wait(), function()), daemon=True).start()

    def finished(self, *, wait: bool = False) -> tuple[int, Path] | None:
        """The step and the folder of what has been written since the last call; raises what went wrong with it."""
        if self._thread is None or (not wait and not self._written.is_set()):
            return None
        began = time.perf_counter()
        self._written.wait()
        self._thread.join()  # a thread that is still about to end can abort a program that ends
        self._thread = None
        assert self._outcome is not None
        step, outcome, computed = self._outcome
        self._last += time.perf_counter() - began + computed
        self._spent += self._last
        if isinstance(outcome, BaseException):
            raise outcome
        return step, outcome


def _copied(tensor: Tensor) -> Tensor | Piece:
    """A copy on the host; of a sharded tensor, of the part that lies here."""
    if not is_sharded(tensor):
        return tensor.detach().to("cpu", copy=True)
    part, row = part_of(tensor)
    return Piece(part.detach().to("cpu", copy=True), row, (DTYPES[tensor.dtype], list(tensor.shape)))
