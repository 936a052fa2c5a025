"""Signals that ask a run to end: noted when they come, and acted on when the step in hand is done."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from epochal.runtime.world import announced

# Only a handler that nobody has chosen is replaced: a program with one of its own knows what it wants.
INTERRUPT = {signal.SIGINT: signal.default_int_handler}
TERMINATE = {
    number: signal.SIG_DFL
    for name in ("SIGTERM", "SIGUSR1", "SIGHUP")  # the last one: a terminal was closed, and there is no nohup
    if (number := getattr(signal, name, None)) is not None
}


class Signals:
    """Inside ``with``, SIGINT, and with ``terminate`` SIGTERM, SIGUSR1 and SIGHUP too, are noted in ``received``.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread nothing is done; afterwards every
    handler is what it was.
    """

    def __init__(self, *, terminate: bool):
        self.expected: dict[signal.Signals, Any] = INTERRUPT | (TERMINATE if terminate else {})
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self._process, self._is_over = os.getpid(), False
        if threading.current_thread() is threading.main_thread():
            chosen = {number for number, usual in self.expected.items() if signal.getsignal(number) == usual}
            self._before = {number: signal.signal(number, self._note) for number in chosen}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_over = True
        for number, handler in list(self._before.items()):
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # in a loader's worker, which inherited this
            if number != signal.SIGINT:  # a Ctrl-C reaches the whole group; the run will end its workers
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif number == signal.SIGINT == self.received and not self._is_over:
            raise KeyboardInterrupt
        else:
            self.received = signal.Signals(number)
            if number == signal.SIGINT and os.isatty(2) and announced().is_first:
                with suppress(OSError):
                    os.write(2, b"\r\nending after what is in hand; Ctrl-C again stops at once\r\n")

    def pass_on(self) -> None:
        """Lets the signal do what it would have done without us: all but SIGINT end the process."""
        if self.received in TERMINATE:
            os.kill(os.getpid(), self.received)
