"""What the rules look at: a prepared run, and its first batches as they were seen."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from epochal import losses
from epochal.data.batch import size, split
from epochal.data.loader import Loader
from epochal.data.sources import Arrays
from epochal.doctor.graph import leaves
from epochal.doctor.trace import Call, Layer, Trace, tensors
from epochal.loop import evaluation_mode
from epochal.objective import Custom, Supervised

if TYPE_CHECKING:
    from epochal.plan import Plan
    from epochal.run import Run

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.MultiheadAttention)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
ROWS, BYTES, SECONDS = 4096, 2**26, 0.7  # of the data that are looked at


@dataclass
class Pass:
    """A batch on its way forward, watched. value: of the loss; outputs: the model's, as it returned them.

    without: names of trained parameters that no backward pass from the loss gives a gradient.
    """

    batch: Any
    inputs: list[Tensor]
    targets: Any
    samples: int
    outputs: Any
    value: Tensor
    trace: Trace
    without: list[str] = field(default_factory=list)
    reached: set[int] = field(default_factory=set)
    is_opaque: bool = False  # whether the graph may hide weights that it goes back to

    @property
    def calls(self) -> list[Call]:
        return self.trace.calls

    @property
    def layers(self) -> list[Layer]:
        return self.trace.layers

    @cached_property
    def entries(self) -> list[Layer]:
        """The first layers with weights on the way from the inputs, and norms that come before all of them."""
        found, made = [], set[int]()
        for layer in self.layers:
            if isinstance(layer.module, (*WEIGHTED, *NORMS, nn.Embedding)):
                if layer.input is None or id(layer.input) not in made:
                    found.append(layer)
                break
        return found


@dataclass
class Case:
    """plan: as it was given. passes: the first batches. may_read: whether the data may be read for it, which draws from
    generators; a run that goes on is not disturbed so.
    """

    plan: Plan
    run: Run
    passes: list[Pass] = field(default_factory=list)
    may_read: bool = False
    own_optimizer: Optimizer | None = None  # one that a step of the user's has made

    @property
    def model(self) -> nn.Module:
        return self.run.state.model

    @property
    def optimizer(self) -> Optimizer | None:
        return self.own_optimizer if self.own_optimizer is not None else self.run.state.optimizer

    @property
    def now(self) -> Pass:
        return self.passes[-1]

    @cached_property
    def objective(self) -> Any:
        """A Supervised or a Custom; None where there is only a step."""
        return getattr(self.run.step, "objective", None) or self.run.setting.objective

    @cached_property
    def kind(self) -> str | None:
        """The short name of the loss, where it is one of torch's."""
        return losses.kind(self.objective.loss) if isinstance(self.objective, Supervised) else None

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that want a gradient, by name; those of a loss module too."""
        modules = self.run.state.modules
        found: dict[str, nn.Parameter] = {}
        for module in modules:
            for name, p in module.named_parameters():
                if p.requires_grad:
                    found[name if name not in found else f"loss.{name}"] = p
        return found

    @cached_property
    def held(self) -> dict[int, dict[str, Any]]:
        """The optimizer's group of each parameter, by its id."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return {id(p): group for group in groups for p in group["params"]}

    @property
    def place(self) -> str:
        return f"the plan at {self.plan.called}" if self.plan.called else type(self.model).__name__

    def at(self, place: str) -> str:
        """Where a loss is computed: the user's line, or the call that names the loss."""
        return place or self.place

    def name_of(self, tensor: Tensor) -> str | None:
        return next((name for name, p in self.trained.items() if p is tensor), None)

    def output_layer(self) -> str:
        """The layer that made the model's output, in words."""
        found = made_last(self.now)
        return f"{found.path or 'the model'} ({type(found.module).__name__})" if found else type(self.model).__name__

    def is_harmed_by(self, row: int, *, of_val: bool = False) -> bool:
        """Whether the loss over this row of the sample, alone with the row after it, is not finite."""
        loader, objective = self.run.validation.loader if of_val else self.run.train, self.objective
        source = loader.source if isinstance(loader, Loader) else None
        if not isinstance(source, Arrays) or objective is None:
            return any(not bool(torch.isfinite(one.value)) for one in self.passes)
        every = rows_looked_at(source)
        rows = every[[row, (row + 1) % len(every)]]
        with evaluation_mode(self.run.state.modules), suppress(Exception):
            return not bool(torch.isfinite(objective(self.model, source.take(rows)).value))
        return True

    def is_given(self, one: Tensor) -> bool:
        """Whether numbers are those of a part of the batch, in its order, whatever their shape and type."""
        for part in tensors(self.now.batch):
            if part.numel() == one.numel() and torch.equal(part.detach().flatten().to(one), one.detach().flatten()):
                return True
        return False

    def row_of(self, at: int, *, of_val: bool = False) -> int:
        """Which row of the data a row of the sample is; of a loader, which it is of what was read."""
        loader = self.run.validation.loader if of_val else self.run.train
        source = loader.source if isinstance(loader, Loader) else None
        return int(rows_looked_at(source)[at]) if isinstance(source, Arrays) else at

    @cached_property
    def sample(self) -> tuple[list[Tensor], Tensor | None] | None:
        """Inputs and targets of evenly spaced rows of the training data; of a loader, of its first batches."""
        return sampled(self.run.train, self.plan, self.passes, may_read=self.may_read)

    @cached_property
    def val_sample(self) -> tuple[list[Tensor], Tensor | None] | None:
        loader = self.run.validation.loader
        return None if loader is None else sampled(loader, self.plan, (), may_read=self.may_read)


def made_last(seen: Pass) -> Layer | None:
    """The innermost layer whose output is the model's output."""
    final = {id(one) for one in tensors(seen.outputs)}
    return next((layer for layer in seen.layers if layer.output_ids & final), None)


def sampled(
    loader: Any, plan: Plan, passes: Sequence[Pass], *, may_read: bool
) -> tuple[list[Tensor], Tensor | None] | None:
    source = loader.source if isinstance(loader, Loader) else None
    target = [plan.target] if isinstance(plan.target, str) else list(plan.target or ())
    if isinstance(source, Arrays):
        rows = rows_looked_at(source)
        batches = [source.take(rows.to(source.tensors[0].device))]
    else:
        batches = [one.batch for one in passes]
        with suppress(Exception):
            batches = some_of(loader) if may_read else batches
    inputs: list[list[Tensor]] = []
    targets: list[Any] = []
    for batch in batches:
        args, kwargs, wanted = split(batch, target)
        inputs.append(list(tensors((args, kwargs))))
        targets.append(wanted)
    if not inputs or len({tuple(tuple(part.shape[1:]) for part in one) for one in inputs}) != 1:
        return None
    if any(part.dim() == 0 for one in inputs for part in one):
        return None
    joined = [torch.cat(parts) for parts in zip(*inputs)]
    fit = all(isinstance(one, Tensor) and one.dim() for one in targets)
    fit = fit and len({tuple(one.shape[1:]) for one in targets}) == 1
    return joined, torch.cat(targets) if fit else None


def rows_looked_at(source: Arrays) -> Tensor:
    """Evenly spaced rows, as many as are looked at."""
    count = len(source)
    most = min(ROWS, max(1, BYTES * count // max(1, source.nbytes)))
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def some_of(loader: Any, most: int = 64) -> list[Any]:
    """The first batches, as many as are looked at."""
    found, rows = [], 0
    began = time.perf_counter()
    for batch in islice(loader.batches(epoch=0), most):
        found.append(batch)
        rows += size(batch)
        if rows >= most * ROWS // 128 or time.perf_counter() - began > SECONDS:
            break
    return found


def noted(case: Case, batch: Any, value: Tensor, outputs: Any, trace: Trace) -> Pass:
    target = getattr(case.objective, "target", ())
    args, kwargs, targets = split(batch, target)
    whole = next(
        (layer.output for layer in reversed(trace.layers) if layer.path == "" and layer.output is not None), None
    )
    reached, is_opaque = leaves(value)
    without = [name for name, p in case.trained.items() if id(p) not in reached]
    inputs = [one for one in tensors((args, kwargs)) if one.dim()]
    one = Pass(
        batch,
        inputs,
        targets,
        size(batch, target),
        outputs if whole is None else whole,
        value,
        trace,
        without,
        reached,
        is_opaque,
    )
    case.passes.append(one)
    return one


def copy_of(batch: Any) -> Any:
    """A deep copy, for a pass may work in place; the batch itself where it cannot be copied."""
    try:
        return copy.deepcopy(batch)
    except Exception:
        return batch


def is_custom(case: Case) -> bool:
    return isinstance(case.objective, Custom)
