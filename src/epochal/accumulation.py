"""What the micro-batches of an update add up to: the mean over all samples, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from epochal.agreement import FACTS, Agreement
from epochal.data.batch import detached
from epochal.data.window import Window
from epochal.errors import LossError
from epochal.protocols import Loss
from epochal.runtime import processes

if TYPE_CHECKING:
    from epochal.state import TrainState


_run_backward = torch.autograd.Variable._execution_engine.run_backward


class Sum:
    """What the micro-batches of a window (as it was cut, if it was) add up to: the weighted mean, and its weight.

    one: the gradient of a loss, 1, on the run's device. divides_by_itself: of a loss whose gradient is not known to be
    0 where nothing is counted. agreement: of several processes, whose sums are those over all of them.
    """

    def __init__(
        self, window: Window, scaler: Any, one: Tensor, *, divides_by_itself: bool, keeps_outputs: bool,
        agreement: Agreement | None = None,
    ):  # fmt: skip
        self.window, self._scaler, self._one = window, scaler, one
        self._agreement: Any = agreement
        self._alone = len(window.batches) == 1 and agreement is None
        self._divides_by_itself, self._keeps_outputs = divides_by_itself, keeps_outputs
        self.loss: Any = 0.0
        self.weight: float | Tensor = 0.0
        self.seen: list[tuple[Any, Any]] = []

    def batches(self) -> Iterator[Any]:
        """The micro-batches, one after the other; with the last one the processes exchange their gradients."""
        for number, batch in enumerate(self.window.batches):
            self._number, self._is_last = number, number == len(self.window.batches) - 1
            if self._agreement is not None:
                self._agreement.engine.begin(syncs=self._is_last)
            yield batch

    def add(self, loss: Loss) -> Callable[[], object] | None:
        """Counts a micro-batch, and gives its backward pass; None where nothing of it counts, and that gave 0 / 0."""
        value, weight = loss.value, loss.weight
        if not value.requires_grad:
            what = "the loss does not depend on any parameter that can be trained."
            fix = "do not detach() the outputs, and do not compute the loss under torch.no_grad()"
            if not weight:
                fix += "; where nothing counts compute the same as elsewhere, 0 / 0 does no harm there"
            raise LossError(what, where="loss.requires_grad is False", fix=fix)
        if self._agreement is not None:
            return self._add_share(loss, self._agreement)
        # One batch is its own mean, and gives the bits of the plain loop. Of several, each counts by its
        # weight; samples are known before, what the weights add up to only afterwards.
        self._see(loss)
        if self._alone:
            self.loss, self.weight = _mean(value.detach(), weight), weight
            if self._divides_by_itself and not isinstance(number := _number(weight), Tensor) and not number:
                return None
        elif self._divides_by_itself and not weight:
            return None
        else:
            value = _weighted(value, weight)
            self.loss, self.weight = self.loss + value.detach(), self.weight + weight
            value = value / self.window.samples
        return _backward(self._scaled(value), self._one)

    def _add_share(self, loss: Loss, agreement: Any) -> Callable[[], object]:
        """This process's part of it. With its gradient travel the sums, and with the last one the word."""
        counts = self.window.sizes[self._number] > 0  # else it stands in for a share that is empty
        weight = _number(loss.weight) if counts else 0.0
        told, engine = agreement.facts() if self._is_last else [0.0] * FACTS, agreement.engine
        if counts:
            self._see(loss)
        if self._divides_by_itself and not weight:
            backward = partial(engine.backward, loss.value, 0.0, [0.0, 0.0, *told])
            return partial(leave_zeros, loss.value, engine.modules, backward)
        is_counted = isinstance(weight, Tensor) or weight
        summed = _weighted(_number(loss.value.detach()), weight) if is_counted else 0.0
        share = weight / self.window.samples
        return partial(engine.backward, self._scaled(loss.value), share, [summed, weight, *told])

    def _scaled(self, value: Tensor) -> Tensor:
        return value if self._scaler is None else self._scaler.scale(value)

    def _see(self, loss: Loss) -> None:
        if self._keeps_outputs and (loss.outputs is not None or loss.weight):
            self.seen.append((detached(loss.outputs), detached(loss.targets)))

    def close(self, state: TrainState, device: torch.device) -> None:
        """All micro-batches are there: the sums, and the gradients, become those of the mean."""
        if not self._alone:
            counted = isinstance(self.loss, Tensor)
            self.loss = self.loss / self.weight if counted else torch.full((), math.nan, device=device)
            _rescale(state, self.window.samples, self.weight)

    def close_together(self, state: TrainState, device: torch.device, found: Tensor) -> list[float]:
        """As :meth:`close`, over all processes; gives the sums of their words. found: above 0 where a gradient is not
        finite, and afterwards also where one of another process is not.
        """
        loss, weight, *told, not_finite = self._agreement.engine.told(found)
        if not_finite:
            found.fill_(not_finite)
        # A mean over processes that is multiplied again may be off by the last bit.
        self.weight = self.window.samples if math.isclose(weight, self.window.samples, rel_tol=1e-6) else weight
        self.loss = torch.full((), loss / self.weight if self.weight else math.nan, device=device)
        _rescale(state, self.window.samples, self.weight)
        return told


def _backward(value: Tensor, one: Tensor) -> Callable[[], object]:
    """``value.backward``, to be called at once; of a plain tensor without what torch asks and makes for any other."""
    if type(value) is Tensor and value.dtype is one.dtype and value.get_device() == one.get_device():
        one = one.clone()  # what is computed of it may be computed in place
        return partial(_run_backward, (value,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    return value.backward


def leave_zeros(value: Tensor, modules: Iterable[nn.Module], backward: Callable[[], object]) -> None:
    """The backward pass of a value in which nothing counts, perhaps 0 / 0: all that it reaches gets zeros.

    The other processes wait for the gradients of the same weights as theirs, so it is done all the same. A graph within
    the graph (a reentrant checkpoint) reaches weights of the modules, too; a weight that FSDP2 has put together is none
    of theirs.
    """
    trained = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    handles = [weight.register_hook(torch.zeros_like) for weight in (*trained, *_reached(value))]
    try:
        with torch.autograd.set_detect_anomaly(False):
            backward()
    finally:
        for handle in handles:
            handle.remove()


def _reached(value: Tensor) -> list[Tensor]:
    """The weights that a value was computed from, found in its graph."""
    ahead: list[Any] = [get_gradient_edge(value).node]
    seen: set[Any] = {None}
    while ahead:
        if (node := ahead.pop()) not in seen:
            seen.add(node)
            ahead += [before for before, _ in node.next_functions]
    return [node.variable for node in seen if type(node).__name__ == "AccumulateGrad"]


def _number(value: float | Tensor) -> float | Tensor:
    """What lies on the host as a plain number, which is quicker; what lies on a device is not waited for."""
    return value.item() if isinstance(value, Tensor) and value.device.type == "cpu" else value


def _mean(value: Tensor, weight: float | Tensor) -> Tensor:
    """A mean; that over nothing is no number, whatever it was computed as."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, math.nan, value)
    return value if weight else torch.full_like(value, math.nan)


def _weighted(value: Any, weight: float | Tensor) -> Any:
    """value × weight, and 0 where nothing is counted: the mean over nothing is not a number."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, value * weight)
    return value * weight if weight else value.nan_to_num(0.0, 0.0, 0.0) * 0.0


def _rescale(state: TrainState, samples: int, weights: float | Tensor) -> None:
    """Turns gradients of values divided by the samples into those of values divided by the weights."""
    if not isinstance(weights, Tensor) and weights in (0, samples):
        return
    factor = samples / (weights.double() if isinstance(weights, Tensor) else weights)
    for gradient in gradients(state):
        gradient.mul_(factor)


def average_gradients(parameters: Iterable[Tensor], window: Window) -> None:
    """In a step of your own, after a backward pass: makes the gradients those of all processes, weighted by samples.

    In a world of one nothing changes. To be called before each ``optimizer.step()``, with the parameters that it moves,
    and in all processes alike.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.sum().backward()
    >>> average_gradients([weight], Window([], [4]))
    >>> weight.grad
    tensor([1., 1.])
    """
    if processes.world().size == 1:
        return
    share = sum(window.sizes) / window.samples
    held = [p for p in parameters if p.requires_grad]
    for p in held:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad * share
    for dtype in dict.fromkeys(p.dtype for p in held):  # together, for each exchange costs; in one order everywhere
        gradients = [p.grad for p in held if p.dtype == dtype and p.grad is not None]
        flat = processes.add_up(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(summed.view_as(gradient))


def gradients(state: TrainState) -> list[Tensor]:
    return [g for group in state.optimizer.param_groups for p in group["params"] if (g := p.grad) is not None]


def dense_gradients(state: TrainState) -> list[Tensor]:
    return [dense(gradient) for gradient in gradients(state)]


def dense(gradient: Any) -> Tensor:
    """A gradient as a dense real tensor: of a sparse one its entries, of a complex one both parts."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
