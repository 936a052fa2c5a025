"""The shapes that parts, watchers and users agree on. No code lives here, only forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


class Loss(NamedTuple):
    """What an objective returns.

    value: scalar tensor, the mean over what is counted. weight: how much of it there was (samples by
    default; the number of tokens, say, where the mean is over tokens), a number or a scalar tensor;
    means over batches and micro-batches are weighted by it. outputs and targets: what the metrics see.
    """

    value: Tensor
    weight: Any = None
    outputs: Any = None
    targets: Any = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer update hands to the watchers: device tensors, so nothing waits.

    loss: scalar, the weighted mean over the window. weight: its weight. seen: the (outputs, targets)
    of each micro-batch, for the metrics. values: further scalars by name, averaged into the row.
    applied: False where the update was skipped (not finite, or an fp16 overflow). notes: what a person should know,
    in words.
    """

    loss: Tensor
    weight: float | Tensor = 1.0
    seen: Sequence[tuple[Any, Any]] = ()
    values: Mapping[str, Tensor] = field(default_factory=dict)
    grad_norm: Tensor | None = None
    applied: bool = True
    notes: Sequence[str] = ()


Step = Callable[[Any, Any], StepResult]  # (state, window) -> StepResult: one optimizer update
Observer = Callable[[Any], Any]  # an event -> None, or Stop("why")


@runtime_checkable
class Stateful(Protocol):
    """What survives a restart: anything with these two methods."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
