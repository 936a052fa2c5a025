"""The state of a training: all that must survive a restart, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from torch import nn

from epochal.checkpoint.weights import refuse_another_model
from epochal.errors import DataError
from epochal.events import Stop, StopReason
from epochal.optim import optimizers
from epochal.protocols import Stateful
from epochal.runtime import seeding
from epochal.runtime.shards import all_like

if TYPE_CHECKING:
    import torch

    from epochal.data.window import Window
    from epochal.optim.schedules import Scheduled

Count = Annotated[int, Meta(ge=0)]


@dataclass
class Progress:
    """Where the run stands. It counts what was consumed, never what was fetched ahead.

    step: optimizer updates. epoch: finished epochs. windows: windows consumed in the epoch in hand.
    samples: samples seen in all. evaluated: the step of the last evaluation. seconds: time spent.
    """

    step: Count = 0
    epoch: Count = 0
    windows: Count = 0
    samples: Count = 0
    evaluated: Count = 0
    seconds: float = 0.0

    def tick(self, window: Window) -> None:
        """One window was consumed."""
        self.step += 1
        self.windows += 1
        self.samples += window.samples

    def close_epoch(self) -> None:
        """All windows of the epoch were consumed; an epoch without one is an error, not an endless loop."""
        if self.windows == 0:
            fix = "an iterable data set has to start anew at every __iter__; drop_last drops a lone small batch"
            raise DataError("the training data gave no batch.", where=f"train, epoch {self.epoch + 1}", fix=fix)
        self.epoch += 1
        self._closed, self.windows = self.windows, 0

    def reopen_epoch(self, was_closed: bool) -> None:
        """Takes the end of the epoch back: what belongs to it (an evaluation, a schedule) is still to be done."""
        if was_closed:
            self.epoch, self.windows = self.epoch - 1, self._closed

    @property
    def epoch_in_hand(self) -> int:
        """The number of the epoch in hand, from 1; right after its end, still its number."""
        return self.epoch + (1 if self.windows else 0)


@dataclass
class TrainState:
    """model: the user's module, never wrapped, never compiled. loss: the loss module, where it is one.

    optimizer: None where the step brings its own. seed: of the order of the samples. rows: the history. stop: what
    an observer decided, if it did. extras: what else has a state, by name (the best weights so far, early stopping,
    running means, stateful observers and steps). is_torn: while weights are moved, so that half an update is known
    as one when an error comes out of it.
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
    is_torn: bool = False
    extras: dict[str, Stateful] = field(default_factory=dict)

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose weights belong to the run: the model, and a loss that is a module."""
        return [self.model] if self.loss is None else [self.model, self.loss]

    @property
    def required(self) -> list[str]:
        """The parts that a saved state has to have; what only watches may begin without one."""
        watching = ("extras.observers.", "extras.early_stopping")
        return [name for name in self._parts() if not name.startswith(watching)]

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own; the modules last, so that nothing reaches a weight if another part refuses."""
        named = {name: getattr(self, name) for name in ("optimizer", "schedule", "scaler")}
        extras = {f"extras.{name}": part for name, part in self.extras.items()}
        parts = {**named, **extras, "loss": self.loss, "model": self.model}
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Everything, the states of the random generators too."""
        with optimizers.without_the_compiler():
            parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {
            "progress": asdict(self.progress),
            "seed": self.seed,
            "rows": packed(self.rows),
            "stop": {"message": self.stop.message, "reason": self.stop.reason.name} if self.stop else None,
            "generators": seeding.generator_states(),
            **parts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts everything back, the random generators last; what is not in ``state`` stays as it is.

        Raises CheckpointError, before anything has changed, if the weights are of another model; TypeError, ValueError
        or KeyError, before a weight has changed, if the state is of something else altogether.
        """
        plain = msgspec.convert({name: state[name] for name in ("progress", "seed", "stop")}, _Plain)
        rows = unpacked(state["rows"])
        msgspec.convert(rows, list[_Dated])
        stop = Stop(plain.stop["message"], StopReason[plain.stop["reason"]]) if plain.stop else None
        seeding.try_generator_states(state["generators"])
        for name, module in {"model": self.model, "loss": self.loss}.items():
            if module is not None and name in state:
                refuse_another_model(module.state_dict(), state[name], where=f"the {name} of the saved state")
        for name, part in self._parts().items():
            if name == "optimizer":
                optimizers.load_exactly(part, state[name])
            elif name in state and isinstance(part, nn.Module):
                part.load_state_dict(all_like(state[name], part.state_dict()))
            elif name in state:
                part.load_state_dict(state[name])
        for name, value in asdict(plain.progress).items():
            setattr(self.progress, name, value)
        self.seed, self.rows[:], self.stop = plain.seed, rows, stop
        seeding.set_generator_states(state["generators"])


class _Plain(msgspec.Struct):
    """What a saved state holds beside its parts."""

    progress: Progress
    seed: int
    stop: dict[str, str] | None


class _Dated(msgspec.Struct):
    """What every row of the history has."""

    epoch: Count
    step: Count


def packed(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The history by columns, a block for each stretch of rows with the same names: a long one is saved in no time.

    >>> packed([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}])
    [{'names': ['epoch', 'loss'], 'columns': [array([1, 2]), array([0.5 , 0.25])]}]
    """
    blocks = [(names, list(group)) for names, group in groupby(rows, key=list)]
    return [{"names": names, "columns": [_column([row[name] for row in group]) for name in names]}
            for names, group in blocks]  # fmt: skip


def _column(values: list[Any]) -> Any:
    kinds = set(map(type, values))
    return np.array(values) if kinds == {float} or kinds == {int} else values


def unpacked(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows that :func:`packed` was given."""
    rows: list[dict[str, Any]] = []
    for block in blocks:
        columns = [column.tolist() if isinstance(column, np.ndarray) else column for column in block["columns"]]
        rows += [dict(zip(block["names"], values)) for values in zip(*columns)]
    return rows
