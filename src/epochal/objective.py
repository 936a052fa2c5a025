"""From a batch to a loss: the one place where the model is called in training and in evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from epochal import losses
from epochal.data.batch import size, split
from epochal.errors import EpochalError, LossError, ModelError
from epochal.protocols import Loss
from epochal.runtime.processes import world

Objective = Callable[[Callable, Any], Loss]  # (forward, batch) -> Loss


class Supervised:
    """The model's outputs compared with the batch's targets.

    The first batch is looked at closely, before any weight has moved: shapes, types and, over all
    targets where they are in memory, class indices. Later batches only have their shapes compared.

    kernel: computes the same as ``loss``, for outputs and targets of one shape.
    """

    def __init__(
        self, loss: Callable, *, kernel: Callable | None = None, target: Sequence[str] = (), all_targets: Any = None
    ):
        self.loss, self.target, self._compute = loss, target, kernel or loss
        self._compares_shapes = losses.kind(loss) in losses.ELEMENTWISE
        self._counts_classes = losses.kind(loss) in losses.CLASS_INDEX
        self._all_targets = all_targets
        self._examined = False
        self.watch: Callable | None = None  # what is called in its place, and calls it

    def __call__(self, forward: Callable, batch: Any) -> Loss:
        if self.watch is not None:
            return self.watch(forward, batch)
        args, kwargs, targets = split(batch, self.target)
        if targets is None:
            what = "a loss compares outputs with targets, but a batch has no targets."
            fix = 'give (inputs, targets), name the dict entry with target="...", or use objective=f(model, batch)'
            raise LossError(what, where=f"a batch is {describe_batch(batch)}", fix=fix)
        outputs = forward(*args, **kwargs)
        if not self._examined:
            self._examine(outputs, targets)
        if self._compares_shapes and outputs.shape != targets.shape:
            losses.check_shapes(self.loss, outputs, targets)
        value = self._compute(outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
            losses.check_scalar(value, f"loss {losses.describe(self.loss)}")
        weight = size(batch, self.target)
        if self._counts_classes:
            weight = losses.weight_of(self.loss, targets, weight)
        return Loss(value.reshape(()) if value.dim() else value, weight, outputs, targets)

    def bare(self, forward: Callable, batch: Any) -> Loss:
        """What is compiled: the same without a look at it, and without the weight."""
        args, kwargs, targets = split(batch, self.target)
        outputs = forward(*args, **kwargs)
        return Loss(self._compute(outputs, targets), None, outputs)

    def weighed(self, loss: Loss, batch: Any, samples: int) -> Loss:
        """What :meth:`bare` gave, whole."""
        _, _, targets = split(batch, self.target)
        weight = losses.weight_of(self.loss, targets, samples) if self._counts_classes else samples
        return Loss(loss.value, weight, loss.outputs, targets)

    def _examine(self, outputs: Any, targets: Any) -> None:
        if self._compares_shapes and not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
            where = f"the model returned {type(outputs).__name__}, the targets are {type(targets).__name__}"
            fix = "give a loss function f(outputs, targets) that picks what it needs"
            raise LossError(f"{losses.describe(self.loss)} compares two tensors.", where=where, fix=fix)
        losses.check_dtype(self.loss, targets)
        if self._all_targets is not None and not self._all_targets.is_floating_point():
            losses.check_classes(self.loss, outputs, self._all_targets, of="data")
        losses.check_classes(self.loss, outputs, targets, of="batch")
        self._examined = True


class Custom:
    """A user's objective ``f(model, batch) -> Tensor | Loss``, with the weight filled in."""

    def __init__(self, objective: Callable, target: Sequence[str] = ()):
        self.objective, self.target = objective, target
        self.watch: Callable | None = None  # what is called in its place, and calls it

    def __call__(self, forward: Callable, batch: Any) -> Loss:
        if self.watch is not None:
            return self.watch(forward, batch)
        given = self.objective(forward, batch)
        loss = given if isinstance(given, Loss) else Loss(given)
        losses.check_scalar(loss.value, f"objective {losses.describe(self.objective)}")
        if loss.value.dim():
            loss = loss._replace(value=loss.value.reshape(()))
        if isinstance(loss.weight, Tensor):
            losses.check_scalar(loss.weight, f"the weight of objective {losses.describe(self.objective)}")
        return self.weighed(loss, batch, size(batch, self.target))

    def bare(self, forward: Callable, batch: Any) -> Loss:
        given = self.objective(forward, batch)
        return given if isinstance(given, Loss) else Loss(given)

    def weighed(self, loss: Loss, batch: Any, samples: int) -> Loss:
        if isinstance(loss.weight, Tensor):
            return loss._replace(weight=loss.weight.reshape(()))
        return loss if loss.weight is not None else loss._replace(weight=samples)


def describe_batch(batch: Any) -> str:
    """Shapes and types, for messages: ``(float32 (32, 10), int64 (32,))``."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, dict):
        return "{" + ", ".join(f"{key}: {describe_batch(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, list | tuple) and len(batch) <= 8:
        return "(" + ", ".join(map(describe_batch, batch)) + ")"
    return type(batch).__name__


def relocate(error: Exception, model: nn.Module, batch: Any, where: str) -> NoReturn:
    """Raises an error out of the user's model or loss again, with the place where it happened.

    Mistakes that torch reports in riddles become a ModelError; any other foreign error stays itself and
    gets a note.
    """
    if isinstance(error, EpochalError):
        error.where = f"{where}; {error.where.removeprefix('; ')}" if error.where else where
        raise error
    place = f"{where}; {_failing_module(error, model)}; the batch is {describe_batch(batch)}"
    if (known := _explain(error, model, batch, place)) is not None:
        raise known from error
    error.add_note(f"epochal: {place}")
    raise error


def _explain(error: Exception, model: nn.Module, batch: Any, place: str) -> EpochalError | None:
    text = str(error).strip()
    first = next((line for line in text.splitlines() if line), "").rstrip(".")
    from_torch = isinstance(error, RuntimeError)
    types = "same dtype", "expected scalar type", "Input type", "does not match weight dtype"
    if isinstance(error, RuntimeError | ValueError) and any(words in text for words in types):
        return _type_mismatch(batch, model, place, first)
    if from_torch and (seen := re.search(r"expected input\[(.+?)\] to have (\d+) channels", text)):
        shape, channels = [int(one) for one in seen[1].split(",")], int(seen[2])
        if len(shape) == 4 and shape[3] == channels != shape[1]:
            what = f"a convolution wants {channels} channels, and gets images with their channels last."
            where = f"{place}; it gets {tuple(shape)}"
            return ModelError(what, where=where, fix="give X.permute(0, 3, 1, 2)", code="image-layout")
    if from_torch and ("cannot be multiplied" in text or ("to have" in text and "channels" in text)):
        fix = "make the layer's input size match the data"
        return ModelError(f"a layer cannot take inputs of this shape: {first}.", where=place, fix=fix)
    if "more than 1 value per channel" in text:
        shared = " of each process's share" if world().size > 1 else ""
        fix = f"choose a batch_size that leaves no lone sample{shared} at the end, or a DataLoader with drop_last=True"
        return ModelError("batch norm cannot train on a single sample.", where=place, fix=fix, code="batch-norm-of-one")
    if from_torch and "mixed torch.Tensor and DTensor" in text:
        what = "the objective works on weights of a block outside of the block's call; fsdp only has a part of them."
        fix = 'for a penalty on weights give weight_decay=; or give strategy="ddp", where every process has them whole'
        return ModelError(what, where=place, fix=fix)
    if "elements of input should be between 0 and 1" in text:
        fix = 'give loss="bce_with_logits", or end the model with a sigmoid'
        what = "nn.BCELoss needs probabilities, but the model gives other numbers."
        return ModelError(what, where=place, fix=fix, code="bce-on-logits")
    if isinstance(error, IndexError) and "out of bounds" in text and "arget" in text:
        fix = "number the classes from 0, give the model more outputs, or give the loss ignore_index="
        what = f"a class index is not among those that the model gives scores for: {first}."
        return LossError(what, where=place, fix=fix, code="label-out-of-range")
    if "elements of target should be between 0 and 1" in text:
        what = "nn.BCELoss needs targets from 0 to 1."
        return LossError(what, where=place, fix="give 0.0 and 1.0, for example (y > 0).float()", code="target-format")
    if from_torch and "multi-target not supported" in text:
        what = "cross_entropy takes class indices of one dimension less than the scores, or probabilities."
        return LossError(what, where=place, fix="give y.argmax(1) of one-hot targets", code="target-format")
    if isinstance(error, TypeError) and "forward()" in text and "argument" in text:
        fix = "(a, b, y) calls model(a, b), a dict calls model(**inputs); any other way: objective=f(model, batch)"
        return ModelError(f"the batch does not fit the model's forward: {first}.", where=place, fix=fix)
    return None


def _type_mismatch(batch: Any, model: nn.Module, place: str, first: str) -> ModelError:
    inputs, named, _ = split(batch)
    types = {part.dtype for part in (*inputs, *named.values()) if isinstance(part, Tensor)}
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    name = str(weights).removeprefix("torch.")
    if types and not any(kind.is_floating_point or kind.is_complex for kind in types):
        fix = "give X.float() (and scale it), or let an nn.Embedding take the integers"
        what = f"integer inputs reach a layer whose weights are {name}."
        return ModelError(what, where=place, fix=fix, code="integer-inputs")
    fix = f"give X.to(torch.{name}), or make the model {'double()' if torch.float64 in types else 'float()'}"
    return ModelError(f"a layer got numbers of another type than its weights: {first}.", where=place, fix=fix)


def _failing_module(error: Exception, model: nn.Module) -> str:
    """The innermost module of the model that was running, found in the traceback."""
    paths = {id(module): path for path, module in model.named_modules()}
    found, trace = None, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if id(owner) in paths:
            found = owner
        trace = trace.tb_next
    if found is None:
        return f"model {type(model).__name__}"
    return f"layer {paths[id(found)] or 'model'!r} ({type(found).__name__})"
