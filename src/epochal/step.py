"""One optimizer update: autocast, scaling, accumulation, clipping and the non-finite guard, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from epochal.buffers import Buffers
from epochal.errors import LossError, NonFiniteError
from epochal.objective import Custom, Objective, relocate
from epochal.protocols import StepResult
from epochal.runtime import device as devices
from epochal.runtime import precision as precisions

if TYPE_CHECKING:
    from epochal.data.window import Window
    from epochal.state import TrainState


class Update:
    """The default step: the gradient of the weighted mean over the window, then one move of the weights.

    forward: the model, or a compiled form of it. clip: the largest gradient norm (L2 over all parameters),
    None for no clipping. skip_nonfinite: leave out an update that is not finite, instead of raising.
    keeps_outputs: hand the outputs and targets on, for metrics.
    """

    def __init__(
        self,
        objective: Objective,
        forward: Callable,
        device: torch.device,
        *,
        precision: str = "fp32",
        clip: float | None = None,
        skip_nonfinite: bool = False,
        keeps_outputs: bool = True,
    ):
        self.objective, self.forward, self.device = objective, forward, device
        self.autocast = precisions.autocast(precision, device)
        self.clip, self.skip_nonfinite, self.keeps_outputs = clip, skip_nonfinite, keeps_outputs
        self._moves = devices.moves(device)
        # torch's own losses give a gradient of 0 where nothing is counted; what a user divides by is not known.
        self._divides_by_itself = isinstance(objective, Custom)
        self._buffers: Buffers | None = None
        self._order: dict[int, int] = {}  # the place of each parameter in the model
        self._one, self._found = torch.ones((), device=device), torch.zeros((), device=device)

    def __call__(self, state: TrainState, window: Window) -> StepResult:
        _clear_gradients(state.optimizer)
        if self._buffers is None:
            self._buffers = Buffers(state.modules)
        self._buffers.keep()
        alone = len(window.batches) == 1
        total: Any = 0.0
        seen, weights = [], 0.0
        for batch in window.batches:
            try:
                if self._moves:
                    batch = devices.move(batch, self.device)
                with self.autocast:
                    loss = self.objective(self.forward, batch)
            except Exception as error:
                where = f"step {state.progress.step}, batch {state.progress.windows} of train"
                relocate(error, state.model, batch, where)
            if not loss.value.requires_grad:
                raise _without_graph(state)
            if not alone and self._divides_by_itself and not loss.weight:
                continue  # nothing is counted in this micro-batch: its own mean, and its gradient, are 0 / 0
            weights = loss.weight if alone else weights + loss.weight
            total = loss.value.detach() if alone else total + _weighted(loss.value.detach(), loss.weight)
            # One batch is its own mean, and gives the bits of the plain loop. Of several, each counts by its
            # weight; samples are known before, what the weights add up to only afterwards.
            value = loss.value if alone else _weighted(loss.value, loss.weight) / window.samples
            (value if state.scaler is None else state.scaler.scale(value)).backward()
            if self.keeps_outputs:
                seen.append((_detached(loss.outputs), _detached(loss.targets)))
        if not alone:
            total = total / weights if isinstance(total, Tensor) else torch.full((), math.nan)
            _rescale(state, window.samples, weights)
        if not self._is_finite(state, total):
            return self._not_finite(state, total, weights)
        norm = None if self.clip is None else self._clip(state, self.clip)
        return StepResult(total, weights, seen, grad_norm=norm, applied=self._move_weights(state))

    def _is_finite(self, state: TrainState, loss: Tensor) -> bool:
        """Whether the loss and all gradients are finite; one pass over the gradients, and two reads on the host."""
        if state.scaler is not None:
            # An fp16 gradient may overflow: its scaler sees that, skips the update and scales down.
            state.scaler.unscale_(state.optimizer)
        else:
            # The kernel of torch's own GradScaler, with a scale of 1: it changes no bit of a finite gradient.
            torch._amp_foreach_non_finite_check_and_unscale_(_dense_gradients(state), self._found, self._one)
        return math.isfinite(loss.item()) and self._found.item() == 0.0

    def _not_finite(self, state: TrainState, loss: Tensor, weights: float | Tensor) -> StepResult:
        self._found.zero_()
        if self._buffers is not None:
            self._buffers.put_back()
        nothing_counted = not weights  # all targets ignored, say: the mean over nothing is not a number
        if not self.skip_nonfinite and not nothing_counted:
            raise _non_finite(state, loss)
        if state.scaler is not None:
            state.scaler.update()
        return StepResult(loss, weight=0.0, applied=False)

    def _clip(self, state: TrainState, clip: float) -> Tensor:
        """Clips as ``torch.nn.utils.clip_grad_norm_`` does, sparse gradients too; gives the norm before.

        In the model's order, as ``clip_grad_norm_(model.parameters())`` adds up: it decides the last bits.
        """
        if not self._order:
            every = (p for module in state.modules for p in module.parameters())
            self._order = {id(p): place for place, p in enumerate(every)}
        held = [p for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
        parameters = sorted(held, key=lambda p: self._order.get(id(p), len(self._order)))
        norm = torch.nn.utils.get_total_norm([_dense(p.grad) for p in parameters])
        torch.nn.utils.clip_grads_with_norm_([p for p in parameters if not p.grad.is_sparse], clip, norm)
        coefficient = torch.clamp(clip / (norm + 1e-6), max=1.0)  # the same formula, for what torch leaves out
        for p in parameters:
            if p.grad.is_sparse:
                p.grad.mul_(coefficient)
        return norm

    def _move_weights(self, state: TrainState) -> bool:
        if state.scaler is None:
            state.optimizer.step()
            return True
        scale = state.scaler.get_scale()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        return state.scaler.get_scale() >= scale


def _weighted(value: Tensor, weight: float | Tensor) -> Tensor:
    """value × weight, and 0 where nothing is counted: the mean over nothing is not a number."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, value * weight)
    return value * weight if weight else value * 0.0


def _gradients(state: TrainState) -> list[Tensor]:
    return [g for group in state.optimizer.param_groups for p in group["params"] if (g := p.grad) is not None]


def _dense_gradients(state: TrainState) -> list[Tensor]:
    return [_dense(gradient) for gradient in _gradients(state)]


def _dense(gradient: Any) -> Tensor:
    """A gradient as a dense real tensor: of a sparse one its entries, of a complex one both parts."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def _clear_gradients(optimizer: Optimizer) -> None:
    """As ``optimizer.zero_grad()``, without its bookkeeping; an optimizer with a way of its own is asked."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        return optimizer.zero_grad()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    return None


def _rescale(state: TrainState, samples: int, weights: float | Tensor) -> None:
    """Turns gradients of values divided by the samples into those of values divided by the weights."""
    if not isinstance(weights, Tensor) and weights in (0, samples):
        return
    factor = samples / (weights.double() if isinstance(weights, Tensor) else weights)
    for gradient in _gradients(state):
        gradient.mul_(factor)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_detached(part) for part in value)
    return value


def _without_graph(state: TrainState) -> LossError:
    return LossError(
        "the loss does not depend on any parameter that can be trained.",
        where=f"step {state.progress.step}; loss.requires_grad is False",
        fix="do not detach() the outputs, and do not compute the loss under torch.no_grad()",
    )


def _non_finite(state: TrainState, loss: Tensor) -> NonFiniteError:
    norm = torch.nn.utils.get_total_norm(_dense_gradients(state))
    what = "the loss" if not math.isfinite(loss.item()) else "a gradient"
    rate = state.optimizer.param_groups[0]["lr"]
    return NonFiniteError(
        f"{what} is not finite; the weights were not touched.",
        where=f"step {state.progress.step}, epoch {state.progress.epoch + 1}, batch {state.progress.windows}; "
        f"loss {loss.item():g}, gradient norm {norm.item():g}, lr {float(rate):g}",
        fix='look for NaN in the data, lower lr, set clip=1.0, or use nonfinite="skip"',
    )
