"""Early stopping, with the rule of PyTorch's training page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epochal.errors import PlanError, UnknownNameError
from epochal.events import Evaluated, Stop, StopReason
from epochal.observe.best import improves


class EarlyStopping:
    """Stops after ``patience`` evaluations in a row without a new best.

    In a run it is an observer. Alone, it is called with a value, as on that page:

    >>> stopping = EarlyStopping(patience=2)
    >>> for loss in (1.0, 0.9, 0.95, 0.91):
    ...     stopping(loss)
    >>> stopping.early_stop, stopping.best_loss
    (True, 0.9)

    monitor: the column to watch; None takes the run's. min_delta: how much better a value must be. mode:
    ``"min"`` or ``"max"``; None takes what the monitored column wants. restore_best: whether the run ends
    with its best weights; None takes the run's.
    """

    def __init__(
        self,
        monitor: str | None = None,
        patience: int = 10,
        min_delta: float = 0.0,
        mode: str | None = None,
        restore_best: bool | None = None,
    ):
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise PlanError("patience must be an integer of at least 1.", where=f"patience={patience!r}", fix="try 10")
        if not min_delta >= 0:
            raise PlanError("min_delta must not be negative.", where=f"min_delta={min_delta!r}", fix="try 0")
        if mode not in (None, "min", "max"):
            raise UnknownNameError.of_name("mode", mode, ("min", "max"), where=f"mode={mode!r}")
        self.monitor, self.patience, self.min_delta, self.mode = monitor, patience, min_delta, mode
        self.restore_best = restore_best
        self.counter = 0
        self.best_loss: float | None = None
        self.early_stop = False  # stays True once patience has run out

    def __call__(self, seen: Any) -> Stop | None:
        """Takes an event, or a value to judge by itself; answers ``Stop`` to an event when patience runs out."""
        if isinstance(seen, Evaluated):
            self._count(seen.is_best)
            return self._stop(seen) if self.early_stop else None
        if isinstance(seen, int | float) or hasattr(seen, "item"):
            value = float(seen.item() if hasattr(seen, "item") else seen)
            better = improves(value, self.best_loss, mode=self.mode or "min", min_delta=self.min_delta)
            self.best_loss = value if better else self.best_loss
            self._count(better)
        return None

    def _count(self, better: bool) -> None:
        self.counter = 0 if better else self.counter + 1
        self.early_stop = self.early_stop or self.counter >= self.patience

    def _stop(self, seen: Evaluated) -> Stop:
        name = seen.best.metric if seen.best else "the monitored value"
        times = f"{self.counter} evaluation{'s' if self.counter > 1 else ''}"
        return Stop(f"early stopping: {name} has not improved for {times}", StopReason.EARLY_STOPPING)

    def fresh(self) -> EarlyStopping:
        """The same settings, nothing seen: what a run uses, so that a plan can be run twice."""
        return EarlyStopping(self.monitor, self.patience, self.min_delta, self.mode, self.restore_best)

    def begin_anew(self) -> None:
        """Patience is full again: for a run that is asked to go on after it was stopped."""
        self.counter, self.early_stop = 0, False

    def state_dict(self) -> dict[str, Any]:
        return {"counter": self.counter, "best_loss": self.best_loss, "early_stop": self.early_stop}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counter, self.best_loss, self.early_stop = state["counter"], state["best_loss"], state["early_stop"]
