"""The loop, an evaluation, and a prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from epochal.data.batch import split
from epochal.data.share import Share
from epochal.errors import DataError, ModelError
from epochal.metrics.metric import Mean, Stream
from epochal.objective import Objective, relocate
from epochal.protocols import Step, StepResult
from epochal.runtime import device as devices

if TYPE_CHECKING:
    from epochal.data.window import Window
    from epochal.doctor.watch import Watch
    from epochal.state import Progress, TrainState


def steps(
    state: TrainState,
    step: Step,
    windows: Callable[[Progress], Iterable[Window]],
    until: Callable[[], bool],
    watch: Watch | None = None,
) -> Iterator[StepResult | None]:
    """The loop: a result for each update, and None at the end of each epoch.

    It begins where ``state.progress`` stands, in the middle of an epoch too, and the state is complete
    whenever it yields. watch: makes the updates that it wants to look at, and is told the results of all.
    """
    progress = state.progress
    while not until():
        for window in windows(progress):
            is_watched = watch is not None and progress.step >= watch.due
            result = watch.look(step, state, window) if is_watched else step(state, window)  # type: ignore[union-attr]
            if watch is not None:
                watch.note(result, progress.step)
            progress.tick(window)
            yield result
            if until():
                return
        progress.close_epoch()
        yield None


@contextmanager
def evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the modules are in eval mode and nothing is recorded; afterwards each is in the mode it was in.

    ``no_grad`` and not ``inference_mode``, so that a model which takes gradients itself still can.
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        set_modes(modes)


def set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Puts modules into the mode they were in, each by itself; one that does more than note it is asked."""
    modes = list(modes)
    for part, training in modes:
        if part.training is not training and switches_itself(part):
            part.train(training)
    for part, training in modes:  # it has told its own parts, too
        part.training = training


def switches_itself(module: nn.Module) -> bool:
    """Whether it has a ``train`` or ``eval`` of its own, which may change more than a flag (and merge weights, say)."""
    kind, own = type(module), vars(module)
    is_plain = kind.train is nn.Module.train and kind.eval is nn.Module.eval
    return not is_plain or "train" in own or "eval" in own


def evaluate(
    objective: Objective,
    forward: Callable,
    batches: Iterable[Any],
    stream: Stream,
    *,
    modules: Sequence[nn.Module],
    device: torch.device,
    autocast: AbstractContextManager,
    where: str = "val",
    shared: bool = False,
    in_step: bool = False,
) -> dict[str, Any]:
    """The loss, as the weighted mean over all samples, and the metrics, by name.

    shared: whether several processes each have a share of the batches, and add up what they have counted. in_step:
    whether they all have to call the model for every batch, even where nothing of it is theirs.
    """
    mean, number = Mean(), -1
    stream.reset()
    with evaluation_mode(modules):
        for number, batch in enumerate(batches):
            counts = True
            if isinstance(batch, Share):
                counts, batch = batch.samples > 0, batch.batch
                if not (counts or in_step):
                    continue
            try:
                batch = devices.move(batch, device) if devices.moves(device) else batch
                with autocast:
                    loss = objective(forward, batch)
                if counts:
                    stream.update(loss.outputs, loss.targets)
            except Exception as error:
                relocate(error, modules[0], batch, f"batch {number} of {where}")
            if counts:
                mean.update(loss.value, loss.weight)
    if number < 0:
        raise DataError("there is no batch to evaluate.", where=where, fix="give at least one sample")
    if shared:
        mean, stream = mean.together(), stream.together()
    return {"loss": mean.compute(), **stream.compute()}


def predict(
    forward: Callable,
    batches: Iterable[Any],
    *,
    modules: Sequence[nn.Module],
    device: torch.device,
    autocast: AbstractContextManager,
    inputs: Callable[[Any], tuple[tuple, dict]],
) -> Any:
    """The outputs for all samples, in order, on the host: one tensor, or a tuple or dict of tensors."""
    outputs = []
    with evaluation_mode(modules):
        for number, batch in enumerate(batches):
            batch = devices.move(batch, device) if devices.moves(device) else batch
            args, kwargs = inputs(batch)
            try:
                with autocast:
                    outputs.append(devices.move(forward(*args, **kwargs), torch.device("cpu")))
            except Exception as error:
                relocate(error, modules[0], batch, f"batch {number} of the data to predict")
    if not outputs:
        raise DataError("there is nothing to predict.", where="the data gave no batch", fix="give at least one sample")
    return _joined(outputs)


def inputs_only(batch: Any, target: Sequence[str] = (), count: int | None = None) -> tuple[tuple, dict]:
    """The inputs of a batch that may or may not bring its targets; ``count``: how many inputs the model takes."""
    if isinstance(batch, list | tuple) and count is not None and not hasattr(batch, "_fields"):
        return tuple(batch[:count]), {}
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return tuple(batch[: max(1, len(batch) - 1)]), {}
    args, kwargs, _ = split(batch, target)
    return args, kwargs


def _joined(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat([output if output.dim() else output[None] for output in outputs])
    if isinstance(first, dict):
        return {key: _joined([output[key] for output in outputs]) for key in first}
    if isinstance(first, list | tuple):
        return tuple(_joined(list(parts)) for parts in zip(*outputs))
    fix = "let the model return a tensor, a tuple or a dict of tensors"
    raise ModelError(f"outputs of type {type(first).__name__} cannot be put together.", where="predict", fix=fix)
