"""The training side of a row: means over the samples since the last row, kept on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from epochal.metrics.metric import Mean, Stream
from epochal.protocols import StepResult
from epochal.runtime.processes import world


class TrainAverages:
    """Adds up what the steps report: the loss, the metrics on the training outputs, and a step's own values."""

    def __init__(self, stream: Stream):
        self.loss, self.stream, self.skipped = Mean(), stream, 0
        self.values: dict[str, Mean] = {}

    def update(self, result: StepResult) -> None:
        self.skipped += not result.applied
        self.loss.update(result.loss, result.weight)
        for outputs, targets in result.seen:
            self.stream.update(outputs, targets)
        for name, value in result.values.items():
            self.values.setdefault(name, Mean()).update(value, result.weight)

    def take(self) -> dict[str, Any]:
        """The means so far, by column name; a new row begins. What the steps report is of all processes already."""
        found = {**{name: mean.compute() for name, mean in self.values.items()}, "loss": self.loss.compute()}
        columns = {f"train_{name}": value for name, value in {**found, **self.stream.together().compute()}.items()}
        if self.skipped:
            columns["skipped"] = self.skipped
        self.loss.reset()
        self.stream.reset()
        self.values.clear()
        self.skipped = 0
        return columns

    def state_dict(self) -> dict[str, Any]:
        return {
            "loss": self.loss.state_dict(),
            "stream": self.stream.together().state_dict(),
            "values": {name: mean.state_dict() for name, mean in self.values.items()},
            "skipped": self.skipped,
        }

    def own_state_dict(self, whole: Mapping[str, Any]) -> dict[str, Any]:
        """The state, with what this process alone has counted: so a resume adds numbers up in the same order."""
        own = tree_map(lambda one: one.cpu() if isinstance(one, Tensor) else one, self.stream.state_dict())
        return {**whole, "stream": own, "is_own": True}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"])
        if world().is_first or state.get("is_own"):  # what all processes had counted, counts once
            self.stream.load_state_dict(state["stream"])
        self.skipped = state["skipped"]
        self.values = {}
        for name, saved in state["values"].items():
            self.values[name] = Mean()
            self.values[name].load_state_dict(saved)
