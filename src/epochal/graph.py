"""One update as one graph: forward, loss, backward, the look for what is not finite, clipping, and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from epochal.buffers import Buffers
from epochal.data.batch import detached
from epochal.objective import Custom, Supervised, describe_batch
from epochal.optim.fused import Fused
from epochal.protocols import Loss
from epochal.runtime import compiler
from epochal.runtime import precision as precisions


class Moved(NamedTuple):
    """What an update leaves. ok: above 0 where loss and gradients are finite; else no weight has moved."""

    loss: Tensor
    weight: float | Tensor
    outputs: Any
    targets: Any
    ok: Tensor
    norm: Tensor | None


class Graph:
    """The update over one batch; None where it has to be done in the usual way.

    That is so as long as the optimizer has no state, after it was changed from outside, for more than SHAPES shapes of
    batches, and from where on the model turned out not to be compilable: a note says why. Weights and what the
    optimizer keeps of them change where they are, and no gradient is left in ``.grad``.
    """

    def __init__(
        self, objective: Supervised | Custom, model: nn.Module, device: torch.device, *, precision: str,
        clip: float | None, keeps_outputs: bool, trust: compiler.Trust, captures: bool = False,
    ):  # fmt: skip
        self.objective, self.model, self.device = objective, model, device
        self._settings = precision, clip, keeps_outputs
        self._notes: list[str] = []
        self._told = 0  # of the notes
        self._seen: list[str] = []  # shapes of batches
        self._tally = compiler.Tally()
        self.is_off = not compiler.can_trace_backward()
        self._waited = 0  # updates in a row that were done in the usual way
        self._graph: compiler.Graph | None = None
        self._fused: Any = None
        self.trust, self._captures = trust, captures
        self._numbers, self._array = torch.zeros(0), np.zeros(0)  # of one memory, on the host

    def __call__(self, fused: Fused, batch: Any, samples: int, before: Buffers) -> Moved | None:
        """samples: of the batch. before: what is put back where a graph cannot be made."""
        repeat = self._graph.repeat(samples) if self._graph is not None and self.trust.is_given else None
        if repeat is not None:  # the data are in memory: batches differ in their samples only
            self._next(fused)  # into the tensor that is used again
            made = repeat(_tensors(batch))
        elif (made := self._guarded(fused, batch, samples, before)) is None:
            self.trust.end()  # the model is called by the interpreter
            return None
        value, weight, ok, norm, outputs, targets = made
        self._fused = fused
        return Moved(*self.objective.weighed(Loss(value, weight, outputs, targets), batch, samples), ok, norm)

    def _guarded(self, fused: Fused, batch: Any, samples: int, before: Buffers) -> Any:
        if self.is_off:
            return None
        if not self._is_ready(fused):
            self._see(batch)
            return None
        groups = [
            (kind, kernel.group["params"], kernel.averages, kernel.counts)
            for kind, kernel in zip(fused.kinds, fused.kernels)
        ]
        given = batch, groups, self._next(fused)
        for weight in fused.weights:
            weight.grad = None  # that of an update before, which was not this one's kind
        made = compiler.MISSED if self._graph is None else self._graph(*given)
        if made is compiler.MISSED:
            return self._compiled(fused, given, before)
        if self._graph is not None:
            self._tally.has_fitted = True
            kept = [tensor for _, _, averages, _ in groups for average in averages for tensor in average]
            counts = [count for _, _, _, count in groups if count is not None]
            self._graph.keep(samples, _tensors(batch), made, lasting=[*fused.weights, *kept, *counts, self._numbers])
        return made

    def advance(self) -> None:
        """The update counts: the next one is a later one."""
        for kernel in self._fused.kernels:
            kernel.time += 1

    def give_up(self, error: Exception) -> None:
        """What was done by a graph failed, and is done in the usual way from here on."""
        self.is_off = True
        self._leave(f"the graph of the update failed: {compiler.reason(error)}; the model alone is compiled")

    def take_notes(self) -> list[str]:
        """What there is to say since the last time."""
        new, self._told = self._notes[self._told :], len(self._notes)
        return new

    def _is_ready(self, fused: Fused) -> bool:
        """Whether the optimizer's part is known; after an update in the usual way that has moved weights it is."""
        is_ready = (
            fused.is_ready
            and all(kernel.is_traceable for kernel in fused.kernels)
            and all(weight.requires_grad for weight in fused.weights)
            and not any(weight._backward_hooks or weight._post_accumulate_grad_hooks for weight in fused.weights)
        )
        has_moved = bool(fused.optimizer.state) or any(
            group.get("momentum") == 0 for group in fused.optimizer.param_groups
        )
        self._waited = 0 if is_ready else self._waited + has_moved
        if self._waited > 1:
            self.is_off = True
            what = f"this {type(fused.optimizer).__name__}, or a weight without gradient or with a hook,"
            self._leave(f"{what} cannot be in a graph; the model alone is compiled")
        return is_ready

    def state_dict(self) -> dict[str, Any]:
        made = self._tally.state_dict()
        return {"seen": list(self._seen), "is_off": self.is_off, "waited": self._waited, "made": made}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen, self._waited = list(state["seen"]), state["waited"]
        self._tally.load_state_dict(state["made"])
        self.is_off = self.is_off or state["is_off"]

    def _next(self, fused: Fused) -> Tensor:
        """The numbers of the optimizer for the update in hand, of all groups one after the other."""
        numbers = [number for kernel in fused.kernels for number in kernel.numbers()]
        if len(self._numbers) != len(numbers):
            wide = any(weight.dtype is torch.float64 for weight in fused.weights)
            self._numbers = torch.tensor(numbers, dtype=torch.float64 if wide else torch.float32, device=self.device)
            self._array = self._numbers.numpy() if self.device.type == "cpu" else self._array
        elif self.device.type != "cpu":
            self._numbers.copy_(torch.tensor(numbers))  # from memory that is not pinned: copied before this returns
        else:
            self._array[:] = numbers
        return self._numbers

    def _compiled(self, fused: Fused, given: tuple, before: Buffers) -> Any:
        """The update by a graph that is made for it; None if it is to be done in the usual way.

        So is the first one of each shape of batches: what is wrong with model or data is told then as it always is.
        """
        if self._see(given[0]):
            return None
        if not self._tally.allows(describe_batch(given[0])):
            self.is_off = True
            return self._leave("something of the model changes with every update, which would be compiled each time")
        if self._graph is None:
            function = _update(self.objective, self.model, self.device, fused, *self._settings)
            loss = getattr(self.objective, "loss", None)
            modules = [self.model, *([loss] if isinstance(loss, nn.Module) else [])]
            self._graph = compiler.Graph(function, self.trust, modules, captures=self._captures)
        try:
            return self._graph.compile(*given)
        except Exception as error:
            before.put_back()
            self.is_off = True
            return self._leave(f"the update is not one graph: {compiler.reason(error)}; the model alone is compiled")

    def _see(self, batch: Any) -> bool:
        """Whether these shapes are new, or come after too many others."""
        if (shapes := describe_batch(batch)) in self._seen:
            return False
        if len(self._seen) >= compiler.SHAPES:
            self._leave(f"batches have more than {compiler.SHAPES} shapes; those that came later are not compiled")
        else:
            self._seen.append(shapes)
        return True

    def _leave(self, why: str) -> None:
        if (note := f"compile: {why}") not in self._notes:
            self._notes.append(note)


def _tensors(batch: Any) -> Sequence[Tensor]:
    """Of a batch of arrays."""
    if isinstance(batch, Tensor):
        return (batch,)
    return tuple(batch.values()) if isinstance(batch, dict) else batch


def _update(
    objective: Any, model: nn.Module, device: torch.device, fused: Fused, precision: str, clip: float | None,
    keeps_outputs: bool,
) -> Callable[..., Any]:  # fmt: skip
    """What is compiled."""
    formula = fused.kernels[0].formula

    def update(batch: Any, groups: Any, numbers: Tensor) -> Any:
        with precisions.autocast(precision, device):
            loss = objective.bare(model, batch)
        gradients = torch.autograd.grad(loss.value, [weight for _, weights, _, _ in groups for weight in weights])
        with torch.no_grad():
            looked_at = [one for one in (loss.value, *gradients) if one.numel()]
            kind = torch.float64 if any(one.dtype is torch.float64 for one in looked_at) else torch.float32
            largest = torch.stack([one.abs().amax().to(kind) for one in looked_at])
            ok = (largest < torch.inf).all()  # nor is a NaN
            if isinstance(loss.weight, Tensor):
                ok = ok & (loss.weight != 0)
            norm = None
            if clip is not None:
                norm = get_total_norm(gradients, foreach=False)
                factor = torch.clamp(clip / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
                gradients = [gradient * factor for gradient in gradients]
            _move(formula, groups, list(gradients), numbers, ok)
        outputs = detached(loss.outputs) if keeps_outputs else None
        targets = detached(loss.targets) if keeps_outputs else None
        return loss.value.detach().reshape(()), loss.weight, ok, norm, outputs, targets

    return update


def _move(formula: Callable, groups: Any, gradients: list[Tensor], numbers: Tensor, ok: Tensor) -> None:
    """Writes new weights and averages over the old ones, where ``ok``."""
    count = len(numbers) // len(groups)
    for number, (kind, weights, averages, counts) in enumerate(groups):
        mine = numbers[number * count : (number + 1) * count].unbind()
        for place, weight in enumerate(weights):
            gradient, kept = gradients.pop(0), [average[place] for average in averages]
            gradient = -gradient if kind.is_maximized else gradient
            moved, new = formula(kind, _wide(weight), _wide(gradient), [_wide(one) for one in kept], mine)
            for old, now in zip((weight, *kept), (moved, *new)):
                old.copy_(torch.where(ok, now, old))
        if counts is not None:
            counts.add_(ok)


def _wide(tensor: Tensor) -> Tensor:
    """What is kept in half precision is computed in single, as torch's fused kernels do."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
