"""The state of a training: all that must survive a restart, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from epochal.errors import DataError
from epochal.events import Stop, StopReason
from epochal.protocols import Stateful
from epochal.runtime import seeding

if TYPE_CHECKING:
    import torch

    from epochal.data.window import Window
    from epochal.optim.schedules import Scheduled


@dataclass
class Progress:
    """Where the run stands. It counts what was consumed, never what was fetched ahead.

    step: optimizer updates. epoch: finished epochs. windows: windows consumed in the epoch in hand.
    samples: samples seen in all. evaluated: the step of the last evaluation. seconds: time spent.
    """

    step: int = 0
    epoch: int = 0
    windows: int = 0
    samples: int = 0
    evaluated: int = 0
    seconds: float = 0.0

    def tick(self, window: Window) -> None:
        """One window was consumed."""
        self.step += 1
        self.windows += 1
        self.samples += window.samples

    def close_epoch(self) -> None:
        """All windows of the epoch were consumed; an epoch without one is an error, not an endless loop."""
        if self.windows == 0:
            raise DataError(
                "the training data gave no batch.",
                where=f"train, epoch {self.epoch + 1}",
                fix="an iterable data set has to start anew at every __iter__; drop_last drops a lone small batch",
            )
        self.epoch += 1
        self.windows = 0

    @property
    def epoch_in_hand(self) -> int:
        """The number of the epoch in hand, from 1; right after its end, still its number."""
        return self.epoch + (1 if self.windows else 0)


@dataclass
class TrainState:
    """model: the user's module, never wrapped, never compiled. loss: the loss module, where it is one.

    optimizer: None where the step brings its own. seed: of the order of the samples. rows: the history. stop: what
    an observer decided, if it did. extras: what else has a state, by name (the best weights so far, early stopping,
    running means, stateful observers and steps).
    """

    model: nn.Module
    optimizer: Any
    progress: Progress = field(default_factory=Progress)
    loss: nn.Module | None = None
    schedule: Scheduled | None = None
    scaler: torch.amp.GradScaler | None = None
    seed: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    stop: Stop | None = None
    extras: dict[str, Stateful] = field(default_factory=dict)

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose weights belong to the run: the model, and a loss that is a module."""
        return [self.model] if self.loss is None else [self.model, self.loss]

    def _parts(self) -> dict[str, Stateful]:
        named = ("model", "optimizer", "loss", "schedule", "scaler")
        parts = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        return {**parts, **{f"extras.{name}": part for name, part in self.extras.items()}}

    def state_dict(self) -> dict[str, Any]:
        """Everything, the states of the random generators too."""
        return {
            "progress": asdict(self.progress),
            "seed": self.seed,
            "rows": [dict(row) for row in self.rows],
            "stop": {"message": self.stop.message, "reason": self.stop.reason.name} if self.stop else None,
            "generators": seeding.generator_states(),
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts everything back, the random generators last."""
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)
        self.seed = state["seed"]
        self.rows[:] = state["rows"]
        stop = state["stop"]
        self.stop = Stop(stop["message"], StopReason[stop["reason"]]) if stop else None
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        seeding.set_generator_states(state["generators"])
