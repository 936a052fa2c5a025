"""The best evaluation so far, and the weights that belong to it: the one notion of "best" in the house."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from epochal.errors import PlanError
from epochal.events import Best, Row
from epochal.runtime.shards import all_like


def improves(value: float, best: float | None, *, mode: str = "min", min_delta: float = 0.0) -> bool:
    """Whether ``value`` is a new best: not worse than ``best`` once ``min_delta`` is taken off it.

    The rule of the early stopping on PyTorch's training page: a value equal to the best one counts as an
    improvement when ``min_delta`` is 0. A NaN never does.

    >>> improves(0.5, None), improves(0.5, 0.5), improves(0.49, 0.5, min_delta=0.1), improves(float("nan"), None)
    (True, True, False, False)
    """
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value <= best - min_delta if mode == "min" else value >= best + min_delta


class BestSoFar:
    """Follows the monitored value through the rows, and keeps the weights of the best one.

    modules: whose weights are kept; none, and only the record is kept.
    """

    def __init__(self, monitor: str, mode: str, min_delta: float = 0.0, modules: Sequence[nn.Module] = ()):
        self.monitor, self.mode, self.min_delta = monitor, mode, min_delta
        self.modules = list(modules)
        self.best: Best | None = None
        self.weights: list[dict[str, Any]] | None = None

    def update(self, row: Row) -> bool:
        """Looks at a row; True if it is the best one so far."""
        if not isinstance(row.get(self.monitor), int | float):
            known = sorted(name for name, value in row.items() if isinstance(value, float))
            where = f"epoch {row['epoch']}; the row has {', '.join(known)}"
            raise PlanError(f"there is no number {self.monitor!r} to monitor.", where=where, fix="monitor one of these")
        value, best = row[self.monitor], self.best.value if self.best else None
        # Nor is an infinity the best of a run, though the first value of all counts for PyTorch's page.
        if not math.isfinite(value) or not improves(value, best, mode=self.mode, min_delta=self.min_delta):
            return False
        self.best = Best(row["epoch"], row["step"], self.monitor, value)
        if self.modules:
            self.weights = [_snapshot(module.state_dict()) for module in self.modules]
        return True

    def restore(self) -> bool:
        """Puts the best weights back into the modules, if there are any; True if they hold them now."""
        if self.weights is None:
            return False
        for module, weights in zip(self.modules, self.weights, strict=True):
            module.load_state_dict(weights)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"best": asdict(self.best) if self.best else None, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = Best(**state["best"]) if state["best"] else None
        self.weights = state["weights"] if self.modules else None
        if self.weights is not None:  # of a sharded module each process keeps its part
            pairs = zip(self.weights, self.modules, strict=True)
            self.weights = [dict(all_like(weights, module.state_dict())) for weights, module in pairs]


@torch.no_grad()
def _snapshot(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that training cannot change; tensors stay on their device."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }
