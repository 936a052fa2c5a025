"""Passes of their own, on a copy that nobody needs any more: what the rules of a probe ask for."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from epochal.data.batch import split
from epochal.doctor.case import Case, Pass, copy_of
from epochal.doctor.relation import Relation, knowing_nothing, relation
from epochal.doctor.rules.symptoms import is_stalled
from epochal.doctor.trace import Operation, Trace, tensors
from epochal.doctor.trial import VAL, Trial
from epochal.loop import evaluation_mode
from epochal.metrics.metric import Metric
from epochal.objective import Supervised

if TYPE_CHECKING:
    from epochal.plan import Plan


class Probe:
    """case: with its first passes, over a copy. trial: of the plan, where it was trained for a while."""

    def __init__(self, plan: Plan, case: Case, trial: Trial | None = None):
        self.plan, self.case, self.trial = plan, case, trial
        self.model = case.model

    @cached_property
    def evaluated(self) -> Pass:
        return self._evaluation()

    @cached_property
    def again(self) -> Pass:
        return self._evaluation()

    def _evaluation(self) -> Pass:
        objective, batch = self.case.objective, self.case.now.batch
        with evaluation_mode([self.model]), torch.enable_grad(), Trace(self.model) as trace:
            loss = objective(self.model, copy_of(batch))
        whole = next((layer.output for layer in reversed(trace.layers) if layer.path == ""), loss.outputs)
        now = self.case.now
        return Pass(batch, now.inputs, now.targets, now.samples, whole, loss.value, trace)

    @property
    def trained(self) -> nn.Module | None:
        return self.trial.model if self.trial is not None and self.trial.error is None else None

    @property
    def updates(self) -> int:
        return len(self.trial.losses) if self.trial is not None else 0

    def outputs(self, batch: Any, model: nn.Module | None = None) -> Any:
        """The model's in eval mode; None where it does not take the batch."""
        model = self.model if model is None else model
        args, kwargs, _ = split(copy_of(batch), getattr(self.case.objective, "target", ()))
        try:
            with evaluation_mode([model]):
                return model(*args, **kwargs)
        except Exception:
            return None

    def given(self, inputs: Tensor) -> Any:
        """What the model makes of one tensor in eval mode; None where it wants something else."""
        try:
            with evaluation_mode([self.model]):
                return self.model(inputs.clone())
        except Exception:
            return None

    def loss(self, batch: Any, model: nn.Module, *, training: bool = False) -> float | None:
        try:
            with evaluation_mode([model]), torch.enable_grad():
                if training:
                    model = copy.deepcopy(model).train()
                return float(self.case.objective(model, copy_of(batch)).value.detach())
        except Exception:
            return None

    def known_loss(self, model: nn.Module) -> float | None:
        """The loss of torch's inside of what is minimised, of a batch."""
        with evaluation_mode([model]), torch.enable_grad(), Trace(model) as trace:
            self.case.objective(model, copy_of(self.case.now.batch))
        return sum(call.result.mean().item() for call in trace.calls) if trace.calls else None

    def saturated(self, one: Pass) -> dict[str, float]:
        """Of each sigmoid and tanh inside of the model the share of its results at its ends."""
        return one.trace.ends

    def dead(self, model: nn.Module) -> list[tuple[str, float]]:
        """Of each activation of the model that can give 0, the share of units that give it for all samples."""
        found = []
        with evaluation_mode([model]), torch.enable_grad(), Trace(model) as trace:
            self.case.objective(model, copy_of(self.case.now.batch))
        for path, output in trace.cut_off:
            if output.dim() > 1 and output.shape[0] == self.case.now.samples:
                units = output.detach().movedim(1, 0).flatten(1)
                found.append((path, (~units.any(1)).float().mean().item()))
        return found

    def is_stalled(self) -> bool:
        return self.trial is not None and is_stalled(self.trial.losses, 0.95)

    def over_time(self) -> list[tuple[float, int]]:
        """The gradient of the loss by the first place of a sequence, of that by the last; and how many places there
        are."""
        case, found = self.case, []
        places = {one.shape[1] for one in case.now.inputs if one.dim() in (2, 3)}
        with Trace(self.model) as trace:
            batch = copy_of(case.now.batch)
            given = [one.requires_grad_() for one in tensors(split(batch, getattr(case.objective, "target", ()))[:2])
                     if one.is_floating_point() and one.dim() == 3]  # fmt: skip
            value = case.objective(self.model, batch).value
        inner = [layer.output for layer in trace.layers if isinstance(layer.module, nn.Embedding)]
        for one in [*given, *(part for part in inner if isinstance(part, Tensor) and part.dim() == 3)]:
            if not one.requires_grad or one.shape[1] < 8 or one.shape[1] not in places or not value.requires_grad:
                continue
            (slope,) = torch.autograd.grad(value, one, retain_graph=True, allow_unused=True)
            if slope is not None:
                sizes = slope.float().pow(2).sum((0, 2)).sqrt()
                if sizes[-1] > 0:
                    found.append(((sizes[0] / sizes[-1]).item(), one.shape[1]))
        return found

    def parts(self) -> list[tuple[Any, Tensor]]:
        """The inputs of a batch, with their places in it."""
        batch, target = self.case.now.batch, getattr(self.case.objective, "target", ())
        if isinstance(batch, Mapping):
            keys = list(target) or [key for key in ("target", "targets", "label", "labels", "y") if key in batch][:1]
            return [(key, part) for key, part in batch.items() if isinstance(part, Tensor) and key not in keys]
        if isinstance(batch, list | tuple) and len(batch) > 2:
            return [(at, part) for at, part in enumerate(batch[:-1]) if isinstance(part, Tensor)]
        return []

    def with_part(self, name: Any, part: Tensor) -> Any:
        batch = self.case.now.batch
        if isinstance(batch, Mapping):
            return {**batch, name: part}
        return [part if at == name else one for at, one in enumerate(batch)]

    def with_row_changed(self, row: int) -> Any:
        """The batch with the inputs of another sample in the place of this one's."""

        def change(part: Any) -> Any:
            if not isinstance(part, Tensor) or not part.dim() or part.shape[0] != self.case.now.samples:
                return part
            changed = part.clone()
            other = part[1:].roll(1, 0)[0]
            changed[row] = other * 1.5 + 0.5 if part.is_floating_point() else other
            return changed

        return with_inputs_changed(self.case.now.batch, change)

    def twice(self) -> Any:
        """The batch with each sample twice; None where it is not made of tensors."""
        batch, count = self.case.now.batch, self.case.now.samples
        parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
        if not all(isinstance(one, Tensor) and one.dim() and len(one) == count for one in parts):
            return None
        made = [torch.cat([one, one]) for one in parts]
        if isinstance(batch, Tensor):
            return made[0]
        return dict(zip(batch, made)) if isinstance(batch, Mapping) else made

    def with_noise(self) -> Any:
        """The batch with noise of size 1 in the place of its numbers."""
        draw = torch.Generator().manual_seed(0)

        def change(part: Any) -> Any:
            is_float = isinstance(part, Tensor) and part.is_floating_point()
            return torch.randn(part.shape, generator=draw).to(part) if is_float else part

        return with_inputs_changed(self.case.now.batch, change)

    def sequence(self) -> tuple[Tensor | None, Tensor | None]:
        """What the model got, and targets of the same shape: the batch's, or those of the loss in an objective."""
        given = next((layer.input for layer in reversed(self.case.now.layers) if layer.path == ""), None)
        if given is None or not 2 <= given.dim() <= (3 if given.is_floating_point() else 4):
            return None, None
        wanted = [self.case.now.targets, *(call.targets for call in self.case.now.calls)]
        fit = [one for one in wanted if isinstance(one, Tensor) and one.numel() == given.numel()]
        return given.detach(), fit[0].reshape(given.shape) if fit else None

    def targets_vary(self) -> bool:
        targets = self.case.now.targets
        return isinstance(targets, Tensor) and targets.dim() > 0 and not bool((targets == targets[:1]).all())

    def metric_operations(self, *, of_loss: bool = True) -> Iterator[Operation]:
        """What the metric functions of the user compare; and an objective."""
        if of_loss:
            yield from self.evaluated.trace.thresholds
        yield from self._compared

    @cached_property
    def _compared(self) -> list[Operation]:
        outputs, targets, found = self.evaluated.outputs, self.case.now.targets, []
        for _, one in self.metric_functions():
            with Trace(self.model) as trace, torch.no_grad():
                one(outputs, targets)
            found += trace.thresholds
        return found

    def metric_functions(self) -> list[tuple[str, Callable]]:
        """Those of the user, with their names."""
        given = self.plan.metrics
        every = given if isinstance(given, list | tuple) else [given]
        named = given.items() if isinstance(given, Mapping) else [(getattr(one, "__name__", ""), one) for one in every]
        return [(n, one) for n, one in named if callable(one) and not isinstance(one, Metric | nn.Module | str | type)]

    @cached_property
    def averaged_metrics(self) -> list[tuple[str, float, float]]:
        """Of each metric function: its name, its value over the batches of val at once, and the mean over them; of as
        many as there is time for."""
        loader, functions = self.case.run.validation.loader, self.metric_functions()
        if loader is None or not functions:
            return []
        model = self.trained if self.trained is not None else self.model
        seen, each, began = [], dict[str, list[float]](), time.perf_counter()
        with evaluation_mode([model]):
            for number, batch in enumerate(loader.batches(epoch=0)):
                args, kwargs, targets = split(batch, getattr(self.case.objective, "target", ()))
                outputs = model(*args, **kwargs)
                if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
                    return []
                seen.append((outputs, targets))
                for name, one in functions:
                    each.setdefault(name, []).append(float(one(outputs, targets)))
                if number >= 40 or time.perf_counter() - began > VAL:
                    break
            outputs, targets = (torch.cat(parts) for parts in zip(*seen))
            sizes = [len(targets) for _, targets in seen]
            return [
                (name, float(one(outputs, targets)), sum(v * n for v, n in zip(each[name], sizes)) / sum(sizes))
                for name, one in functions
            ]

    @cached_property
    def relation(self) -> Relation | None:
        case, nothing = self.case, None
        if case.sample is not None and case.val_sample is not None and isinstance(case.objective, Supervised):
            with suppress(Exception):  # a loss with weights of classes that do not occur, say
                nothing = knowing_nothing(case.objective.loss, case.kind, case.sample[1], case.val_sample[1])
        return relation(case.sample, self.trial, nothing)


def with_inputs_changed(batch: Any, change: Callable[[Any], Any]) -> Any:
    """The batch with its parts changed, but for the targets: the last of several; of a mapping, all parts."""
    if isinstance(batch, Mapping):
        return {name: change(part) for name, part in batch.items()}
    if isinstance(batch, list | tuple):
        return [*map(change, batch[:-1]), batch[-1]] if len(batch) > 1 else [change(batch[0])]
    return change(batch)
