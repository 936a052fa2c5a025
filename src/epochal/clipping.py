"""Clipping gradients by their norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from epochal.accumulation import dense

if TYPE_CHECKING:
    from epochal.state import TrainState


class Clip:
    """Clips as ``torch.nn.utils.clip_grad_norm_`` does, sparse gradients too; gives the norm before.

    limit: the largest norm (L2 over all parameters). engine: of several processes, each of which may have a part of
    the gradients. They are added up in the model's order, as by ``clip_grad_norm_(model.parameters())``: it decides the
    last bits.
    """

    def __init__(self, limit: float, engine: Any = None):
        self.limit, self._engine = limit, engine
        self._order: dict[int, int] = {}  # the place of each parameter in the model

    def __call__(self, state: TrainState) -> Tensor:
        if not self._order:
            every = (p for module in state.modules for p in module.parameters())
            self._order = {id(p): place for place, p in enumerate(every)}
        held = [p for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
        parameters = sorted(held, key=lambda p: self._order.get(id(p), len(self._order)))
        norm = total_norm([dense(p.grad) for p in parameters], self._engine)
        clip_grads_with_norm_([p for p in parameters if not p.grad.is_sparse], self.limit, norm)
        coefficient = torch.clamp(self.limit / (norm + 1e-6), max=1.0)  # the same formula, for what torch leaves out
        for p in parameters:
            if p.grad.is_sparse:
                p.grad.mul_(coefficient)
        return norm


def total_norm(gradients: list[Tensor], engine: Any = None) -> Tensor:
    """The L2 norm over all of them, and over the parts that other processes have."""
    norm = get_total_norm(gradients)
    return norm if engine is None else engine.whole(norm)
