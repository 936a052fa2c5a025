"""One optimizer update: autocast, scaling, accumulation, clipping and the non-finite guard, and nowhere else."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from epochal import losses, nonfinite
from epochal.accumulation import Sum, dense_gradients, gradients, leave_zeros
from epochal.agreement import Agreement
from epochal.buffers import Buffers
from epochal.clipping import Clip, total_norm
from epochal.data.batch import pieces, size
from epochal.data.window import Window
from epochal.errors import ModelError, NonFiniteError
from epochal.graph import Graph
from epochal.objective import Custom, Objective, describe_batch, relocate
from epochal.optim.fused import Fused
from epochal.protocols import StepResult
from epochal.runtime import device as devices
from epochal.runtime import precision as precisions
from epochal.runtime import seeding
from epochal.runtime.compiler import Forward

if TYPE_CHECKING:
    from epochal.state import TrainState

# The kernel of torch's own GradScaler; with a scale of 1 it changes no bit of what is finite.
_flag_nonfinite = torch._amp_foreach_non_finite_check_and_unscale_


class Doubtful(NamedTuple):
    """An update that is not known to be finite, with what it takes to undo it and to find out why it is not.

    flag: above 0 where it is not finite, on the host as soon as ``event`` has happened.
    """

    place: nonfinite.Place
    before: Buffers
    window: Window
    loss: Tensor
    weight: float | Tensor
    flag: Tensor
    event: Any = None


class Update:
    """The default step: the gradient of the weighted mean over the window, then one move of the weights.

    forward: the model, or a compiled form of it. clip: the largest gradient norm (L2 over all parameters),
    None for no clipping. skip_nonfinite: leave out an update that is not finite, instead of raising.
    keeps_outputs: hand the outputs and targets on, for metrics.

    An update is not finite when its loss or a gradient is not. What is not finite in the data and reaches neither
    (a marker of missing values that the model masks) does no harm, and stops nothing. The flag is read at once,
    except on CUDA where the optimizer is fused, ``skip_nonfinite`` is False and no objective of the user's gives a
    tensor as its weight (it may be 0): there the device itself leaves out the update, and the host reads the flag
    during the next one, or in ``settle``, so that the device is never waited for. An fp16 gradient that is not finite
    is the scaler's business.

    micro_batch: the most samples that the model gets at once; None as long as memory has sufficed for whole batches.
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
        agreement: Agreement | None = None,
        graph: Graph | None = None,
    ):
        self.objective, self.forward, self.device = objective, forward, device
        self.graph = graph
        parts = ("graph", graph), ("forward", forward)
        self._compiled = [(name, part) for name, part in parts if isinstance(part, Graph | Forward)]
        self.agreement, self._engine = agreement, None if agreement is None else agreement.engine
        self._clip = None if clip is None else Clip(clip, self._engine)
        self._call = objective if self._engine is None else partial(self._engine.call, objective)
        self.autocast = precisions.autocast(precision, device)
        self.skip_nonfinite, self.keeps_outputs = skip_nonfinite, keeps_outputs
        self.micro_batch: int | None = None
        self._batch_norm = False  # whether the model has it, known at the first update
        self._target, self._loss = getattr(objective, "target", ()), getattr(objective, "loss", None)
        self._moves = devices.moves(device)
        # torch's own losses give a gradient of 0 where all targets are ignored; but not where all that counts has a
        # class weight of 0, and what a user divides by is not known.
        self._divides_by_itself = isinstance(objective, Custom) or losses.may_weigh_nothing(self._loss)
        self._reads_late = device.type == "cuda" and not skip_nonfinite and agreement is None
        self._fused: Fused | None = None
        self._has_moved = False  # an update that a device leaves out must find a momentum that was written to
        self._unread: Doubtful | None = None
        self._kept: deque[Buffers] = deque()  # that of the update in hand first, then of the one not read yet
        self._one, self._found = torch.ones((), device=device), torch.zeros((), device=device)

    def __call__(self, state: TrainState, window: Window) -> StepResult:
        before, notes, room, batch = self._keep(state), [], [], None
        if self.graph is not None:
            if (done := self._at_once(self.graph, state, window, before)) is not None:
                return done
            notes = self.graph.take_notes()
        # Where a graph is still to come, nothing is compiled for the few updates until then.
        forward = self.forward if self.graph is None or self.graph.is_off else state.model
        if self._engine is not None:
            self._engine.warm_up(lambda: self._rehearse(state, window, before))
        while True:
            _clear_gradients(state.optimizer)
            summed = self._sum(state, self._cut(window), self.agreement)
            try:
                for batch in summed.batches():
                    if self._moves:
                        batch = devices.move(batch, self.device)
                    with self.autocast:
                        loss = self._call(forward, batch)
                    if (backward := summed.add(loss)) is not None:
                        backward()
                break
            except Exception as error:
                if isinstance(forward, Forward) and forward.gives_up(error):
                    before.put_back()
                    continue
                failed = self._out_of_memory(error, state, batch)  # raises any other error again
            batch = loss = backward = None  # they hold what fills the memory
            self._make_room(state, summed.window, before, failed)
            room = self._notes(window)  # the last time says it all
        notes += room if not isinstance(forward, Forward) else [*forward.take_notes(), *room]
        if self.agreement is None:
            summed.close(state, self.device)
        else:
            self._close_together(state, summed, self.agreement)
        if self._unread is not None:
            self.settle(state)  # the update before this one: the device has long done it
        found = self._look_for_nonfinite(state, summed.loss)
        late = self._reads_late and self._has_moved and self._counts(summed) and _device_can_leave_out(state)
        if not late and self._found.item():
            return self._leave_out(state, self._doubtful(state, before, summed.window, summed, self._found), notes)
        norm = None if self._clip is None else self._clip(state)
        if late:
            self._unread = self._doubtful(state, before, summed.window, summed, self._found)
        applied = self._move_weights(state, found, late)
        self._has_moved = True
        return StepResult(summed.loss, summed.weight, summed.seen, grad_norm=norm, applied=applied, notes=notes)

    def _at_once(self, graph: Graph, state: TrainState, window: Window, before: Buffers) -> StepResult | None:
        """The update by a graph; None where it has to be done in the usual way, and nothing has moved."""
        if len(window.batches) > 1 or self._cut(window) is not window:
            return None
        batch, state.is_torn = window.batches[0], True
        try:
            if self._moves:
                batch = devices.move(batch, self.device)
            moved = graph(self.fused(state), batch, window.sizes[0], before)
        except Exception as error:
            before.put_back()
            graph.give_up(error)
            moved = None  # in the usual way it is told as it always is
        state.is_torn = False
        if moved is None:
            return None
        if self._unread is not None:
            self.settle(state)
        if self._reads_late:
            self._unread = self._doubtful(state, before, window, moved, torch.logical_not(moved.ok))
        elif not moved.ok.item():
            return self._leave_out(state, self._doubtful(state, before, window, moved, moved.ok), graph.take_notes())
        graph.advance()
        seen = [(moved.outputs, moved.targets)] if self.keeps_outputs else ()
        return StepResult(moved.loss, moved.weight, seen, grad_norm=moved.norm, notes=graph.take_notes())

    def settle(self, state: TrainState) -> None:
        """Reads what has not been read yet: NonFiniteError if the last update was not finite.

        To be called before weights are evaluated or saved, and at the end.
        """
        doubtful, self._unread = self._unread, None
        if doubtful is None:
            return
        if doubtful.event is not None:
            doubtful.event.synchronize()
        if doubtful.flag.item():
            self._found.zero_()
            if doubtful.weight:
                raise self._diagnosis(state, doubtful)

    def state_dict(self) -> dict[str, Any]:
        return {"micro_batch": self.micro_batch} | {name: part.state_dict() for name, part in self._compiled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.micro_batch = state["micro_batch"]
        for name, part in self._compiled:
            if name in state:
                part.load_state_dict(state[name])

    def _keep(self, state: TrainState) -> Buffers:
        if not self._kept:
            parts = (part for module in state.modules for part in module.modules())
            self._batch_norm = any(isinstance(part, _BatchNorm) for part in parts)
            always = self.graph is not None
            count = 2 if self._reads_late else 1
            self._kept.extend(Buffers(state.modules, self.device, copies_always=always) for _ in range(count))
        if self._reads_late:
            self._kept.rotate()
        before = self._kept[0]
        before.keep()
        return before

    def _sum(self, state: TrainState, window: Window, agreement: Agreement | None = None) -> Sum:
        divides, keeps = self._divides_by_itself, self.keeps_outputs
        return Sum(window, state.scaler, self._one, divides_by_itself=divides, keeps_outputs=keeps, agreement=agreement)

    def _rehearse(self, state: TrainState, window: Window, before: Buffers) -> None:
        """The passes of an update of which nothing remains but the gradients, until the next one."""
        generators, batch = seeding.generator_states(), None
        _clear_gradients(state.optimizer)
        summed = self._sum(state, window, self.agreement)
        try:
            for batch in summed.batches():
                with self.autocast:
                    # A copy, for a model may work in place.
                    loss = self._call(self.forward, devices.move(copy.deepcopy(batch), self.device))
                if (backward := summed.add(loss)) is not None:
                    backward()
        except Exception as error:
            relocate(error, state.model, batch, f"step {state.progress.step}, batch {state.progress.windows} of train")
        self._engine.told(self._found)  # type: ignore[union-attr]
        before.put_back()
        seeding.set_generator_states(generators)

    def _close_together(self, state: TrainState, summed: Sum, agreement: Agreement) -> None:
        """The sums over all processes; and what is not finite in one of them is so in all."""
        agreement.engine.check()  # type: ignore[union-attr]
        if agreement.is_sharded:  # each has only looked at its part
            self._look_for_nonfinite(state, self._one)
        agreement.hear(summed.close_together(state, self.device, self._found))

    def _out_of_memory(self, error: Exception, state: TrainState, batch: Any) -> Exception:
        words = ("out of memory", "not enough memory", "can't allocate memory")
        out_of_memory = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
        if not out_of_memory and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            relocate(error, state.model, batch, f"step {state.progress.step}, batch {state.progress.windows} of train")
        return error.with_traceback(None)  # its frames hold what fills the memory

    def _make_room(self, state: TrainState, cut: Window, before: Buffers, failed: Exception) -> None:
        """All is as before the update, and from now on the pieces are half as large as those of this window."""
        _clear_gradients(state.optimizer)
        before.put_back()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        largest = max(cut.sizes)
        batch, half = cut.batches[cut.sizes.index(largest)], -(-largest // 2)
        if largest < 2 or self.agreement is not None or pieces(batch, half, self._target) is None:
            told = next((line for line in str(failed).splitlines() if line.strip()), type(failed).__name__)
            raise ModelError(
                "memory ran out, and the batch cannot be made smaller"
                + (" by one of several processes alone." if self.agreement is not None else "."),
                where=f"step {state.progress.step}, batch {state.progress.windows} of train; "
                f"the batch is {describe_batch(batch)}; {told}",
                fix='take a smaller model or smaller samples, precision="bf16", or a device with more memory'
                if largest < 2
                else "give a smaller batch_size, with accumulate= for updates over as many samples",
            ) from failed
        self.micro_batch = half

    def _cut(self, window: Window) -> Window:
        if (limit := self.micro_batch) is None or max(window.sizes) <= limit or self.agreement is not None:
            return window
        cut: list[Any] = []
        for batch in window.batches:
            cut += pieces(batch, limit, self._target, no_lone=self._batch_norm) or [batch]
        return Window(cut, [size(piece, self._target) for piece in cut])

    def _notes(self, window: Window) -> list[str]:
        told = f"out of memory: batches of {max(window.sizes)} are now done in pieces of {self.micro_batch}"
        return [told + ("; batch norm sees the smaller pieces" if self._batch_norm else "")]

    def _look_for_nonfinite(self, state: TrainState, loss: Tensor) -> list[Tensor]:
        """Sets the flag where the loss or a gradient is not finite: one pass over them, and nothing waits. Gives the
        gradients.
        """
        if self._moves:
            loss = loss.to(self.device)
        if state.scaler is not None:
            # An fp16 gradient may overflow: its scaler sees that, skips the update and scales down.
            state.scaler.unscale_(state.optimizer)
            _flag_nonfinite([loss], self._found, self._one)
            return []
        held = looked_at = gradients(state)
        if self.agreement is not None and self.agreement.is_sharded:
            looked_at = [self._engine.local(gradient) for gradient in held]  # type: ignore[union-attr]
        try:
            _flag_nonfinite([*looked_at, loss], self._found, self._one)
        except RuntimeError:  # a gradient is sparse or complex, which is not asked of each at every step
            _flag_nonfinite([*dense_gradients(state), loss], self._found, self._one)
        return held

    def _leave_out(self, state: TrainState, doubtful: Doubtful, notes: list[str]) -> StepResult:
        """All is put back, as if the window had never been given to the model; unless that is an error."""
        self._found.zero_()
        nothing_counted = not doubtful.weight  # all targets ignored, say: the mean over nothing is no number
        if not self.skip_nonfinite and not nothing_counted:
            raise self._diagnosis(state, doubtful)
        _clear_gradients(state.optimizer)
        doubtful.before.put_back()
        if state.scaler is not None:
            state.scaler.update(state.scaler.get_scale())  # as it was: the scale is not to blame for the loss
        return StepResult(doubtful.loss, weight=0.0, applied=False, notes=notes)

    def _diagnosis(self, state: TrainState, doubtful: Doubtful) -> NonFiniteError:
        """Runs the window once more, watched and not compiled; then all is as it was before the update."""
        place, before, window, loss, *_ = doubtful
        watch, norm = nonfinite.Watch(self.objective, state.modules), None
        try:
            _clear_gradients(state.optimizer)
            before.put_back()
            again = self._sum(state, window)  # of what this process has of it
            call = watch if self._engine is None else self._engine.alone(watch)
            with watch:
                for batch in window.batches:
                    with self.autocast:
                        found = call(state.model, devices.move(batch, self.device))
                    backward = again.add(found)
                    if backward is None and self.agreement is not None and self.agreement.is_sharded:
                        backward = partial(leave_zeros, found.value, state.modules, found.value.backward)
                    if backward is not None:
                        backward()
            again.close(state, self.device)
            norm = total_norm(dense_gradients(state), self._engine).item()
            norm /= 1.0 if state.scaler is None else state.scaler.get_scale()
            finding = watch.finding(loss)
        except Exception as error:  # what is known already must not be lost over the search for more
            finding = nonfinite.unexplained(loss, error)
        finally:
            _clear_gradients(state.optimizer)
            before.put_back()
        rank, finding, norm = nonfinite.agreed(finding, norm)
        return finding.error(place, loss.item(), norm, micro_batches=len(window.batches), rank=rank)

    def _doubtful(self, state: TrainState, before: Buffers, window: Window, summed: Any, flag: Tensor) -> Doubtful:
        """summed: what has the loss and the weight of the update."""
        progress, event = state.progress, None
        if self._reads_late and flag.is_cuda:
            flag = flag.to("cpu", non_blocking=True)  # into pinned memory: nothing waits
            event = torch.cuda.current_stream(self.device).record_event()
        rate = float(state.optimizer.param_groups[0].get("lr", math.nan))
        place = nonfinite.Place(progress.step, progress.epoch + 1, progress.windows, rate)
        return Doubtful(place, before, window, summed.loss, summed.weight, flag, event)

    def _counts(self, summed: Sum) -> bool:
        """Whether something counts in the window, as far as that is known without waiting: else it is read at once."""
        return not self._divides_by_itself if isinstance(summed.weight, Tensor) else bool(summed.weight)

    def fused(self, state: TrainState) -> Fused:
        """What moves the weights."""
        if self._fused is None or self._fused.optimizer is not state.optimizer:
            self._fused = Fused(state.optimizer)
            self._fused.learn()
        return self._fused

    def _move_weights(self, state: TrainState, held: list[Tensor], unless_found: bool) -> bool:
        state.is_torn, applied = True, True
        if state.scaler is not None:
            scale = state.scaler.get_scale()
            state.scaler.step(state.optimizer)
            state.scaler.update()
            applied = state.scaler.get_scale() >= scale
        else:
            self.fused(state)(held, self._found if unless_found else None)
        state.is_torn = False
        return applied


def _device_can_leave_out(state: TrainState) -> bool:
    """Whether the optimizer's kernels can leave out an update by themselves, as torch's GradScaler has them do."""
    fused = all(group.get("fused") for group in state.optimizer.param_groups)
    able = fused and getattr(state.optimizer, "_step_supports_amp_scaling", False)
    return able and state.scaler is None


def _clear_gradients(optimizer: Optimizer) -> None:
    """As ``optimizer.zero_grad()``, without its bookkeeping; an optimizer with a way of its own is asked."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        return optimizer.zero_grad()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    return None
