"""How one model is trained by several processes: replicated (DDP) or sharded (FSDP2), both torch's own.

The user's module stays what it is, with its plain names. What is called is a module around it, whose forward takes a
function and gives it the model: so an objective of the user's own runs inside torch's engine.
"""

from __future__ import annotations

import inspect
import warnings
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from epochal.errors import ModelError, PlanError
from epochal.runtime.processes import are_alike, copy_from_first, gather, unlike
from epochal.runtime.shards import local, put_together
from epochal.runtime.strategy import Strategy
from epochal.runtime.traces import Traces

_CODES = {torch.float32: "f", torch.float64: "d"}  # of the module array


class _Whole(nn.Module):
    """What torch's engines are given: the model, and the loss if it is a module.

    carrier: a parameter of zeros. Its gradient is whatever is given to the backward pass for it, and that travels with
    the other gradients: so the processes tell each other small numbers in each update, and nobody waits once more.
    """

    def __init__(self, modules: Sequence[nn.Module], facts: int, device: torch.device):
        super().__init__()
        self.modules_within = nn.ModuleList(modules)
        self.carrier = nn.Parameter(torch.zeros(facts, device=device)) if facts else None

    def forward(self, function: Callable, *given: Any, also: Tensor | None = None) -> Any:
        """also: what is to be seen among the outputs."""
        return function(*given), also


class Replicated:
    """Every process has the whole model; DistributedDataParallel exchanges the gradients while they are computed.

    facts: how many numbers are told in each update; they travel with the gradients, and are added up too. factor: what
    is multiplied with, so that the mean over the processes, which is what torch makes of gradients, is their sum. (A
    hook that leaves out torch's division costs 4 % of a small update: it is Python's, while the engine waits.)
    """

    sharded = False

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, facts: int):
        self.modules, self.device, self.factor = list(modules), device, dist.get_world_size()
        self._whole = _Whole(modules, facts, device)
        self._carrier: Any = self._whole.carrier
        self._ddp: DistributedDataParallel | None = None
        self._finds_unused = False
        self._used: list[tuple[str, nn.Parameter]] = []  # weights that every update has to give a gradient

    def warm_up(self, update: Callable[[], object]) -> None:
        """Finds out what the model uses, before the first update; ``update``: its passes, of which nothing may remain.

        torch has to know whether a weight may get no gradient. And it lays out the gradients anew after the first pass,
        which decides how they are added up, to the bit: a run that is resumed would begin with another layout.
        """
        if self._ddp is not None:
            return
        update()
        trained = [(n, p) for module in self.modules for n, p in module.named_parameters() if p.requires_grad]
        unused = {name for names in gather([name for name, p in trained if p.grad is None]) for name in names}
        self._wrap(finds_unused=bool(unused))
        if not unused:
            self._used = trained
            update()

    def _wrap(self, *, finds_unused: bool) -> None:
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        options: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False,
            "init_sync": False, "gradient_as_bucket_view": True, "find_unused_parameters": finds_unused,
        }  # fmt: skip
        self._ddp = DistributedDataParallel(self._whole, **options)
        self._finds_unused = finds_unused

    def begin(self, *, syncs: bool) -> None:
        """Before each micro-batch; syncs: with the last one of an update, the gradients are added up."""
        if self._ddp is not None and self._ddp.require_backward_grad_sync is not syncs:  # to set it takes long
            self._ddp.require_backward_grad_sync = syncs

    def call(self, function: Callable, *given: Any) -> Any:
        whole, self._root = self._ddp or self._whole, self._carrier
        if not self._finds_unused:
            return whole(function, *given)[0]
        self._root = self._carrier.view_as(self._carrier)  # what the outputs do not lead to counts as unused
        return whole(function, *given, also=self._root)[0]

    def backward(self, value: Tensor, share: float | Tensor, facts: Sequence[Any]) -> None:
        """Adds the gradient of value × share, with which the facts travel."""
        told = _vector(facts, torch.float32, self.device, self.factor)
        torch.autograd.backward([value, self._root], [_as(share * self.factor, value), told])

    def check(self) -> None:
        """After the last backward pass. Raises ModelError, before a weight has moved, if the others wait for more."""
        if unused := [name for name, p in self._used if p.grad is None]:
            what = "the model has not used a weight that it used before; the others wait for its gradient."
            fix = "use every weight in each update (add 0 * weight.sum() to the loss)"
            raise ModelError(what, where=f"rank {dist.get_rank()}; {', '.join(unused[:3])}", fix=fix)

    def told(self, found: Tensor) -> list[float]:
        """The sums of all facts, after the last backward pass; and of ``found``, where gradients differ: not here."""
        told, self._carrier.grad = self._carrier.grad.tolist(), None
        return [*told, 0.0]

    def alone(self, function: Callable) -> Callable:
        """The function, called so that no other process hears of it."""
        return function

    def local(self, gradient: Tensor) -> Tensor:
        """What of it lies in this process."""
        return gradient

    def whole(self, tensor: Tensor) -> Tensor:
        """What was computed of parts, put together."""
        return tensor

    def dissolve(self) -> None:
        """At the end of the run, by all: the modules are the user's alone, and hold the whole weights."""
        self._ddp, self._whole, self._used = None, None, []  # type: ignore[assignment]


class Sharded:
    """Every process has a part of every weight (FSDP2); the wrapped modules are put together when they are needed."""

    sharded = True

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, strategy: Strategy, precision: str):
        self.modules, self.device = list(modules), device
        self._traces = Traces(modules)
        self._whole: Any = _Whole(modules, 0, device)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy()
        if precision == "bf16":  # weights travel in it; what is computed in it, autocast says
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        blocks: list[Any] = list(_blocks(modules[0], strategy.wrap))
        for block in blocks:
            if strategy.activation_checkpointing:
                checkpoint(block)
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self._whole, mesh=mesh, mp_policy=policy)
        # It warns of outputs that are views, which nobody changes here.
        warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \(FSDP{_Whole.__name__}\) returned a view")
        parts: list[Any] = [*blocks, self._whole]
        for part in parts:  # a sum, as each value is divided by what all processes count
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        self._traces.note()
        self._weights = [(n, p) for module in modules for n, p in module.named_parameters() if p.requires_grad]
        self._facts: Any = 0.0

    def warm_up(self, update: Callable[[], object]) -> None:
        """There is nothing to find out: what is added up does not depend on the passes before."""

    def begin(self, *, syncs: bool) -> None:
        self._whole.set_requires_gradient_sync(syncs)

    def call(self, function: Callable, *given: Any) -> Any:
        if self._whole is None:  # the run is over
            return function(*given)
        return self._whole(function, *given)[0]

    def backward(self, value: Tensor, share: float | Tensor, facts: Sequence[Any]) -> None:
        self._facts = self._facts + _vector(facts, torch.float64, self.device)
        value.backward(_as(share, value))

    def told(self, found: Tensor) -> list[float]:
        """Raises ModelError, before a weight has moved, if gradients are not of the same weights in all processes.

        FSDP2 adds up what has a gradient, one after the other, and would add those of different weights.
        """
        unused = [name for name, weight in self._weights if weight.grad is None]
        mark = 1 + zlib.crc32(repr(unused).encode()) % 2**14 if unused else 0
        alike = torch.tensor([mark, mark**2], dtype=torch.float64, device=self.device)
        facts, self._facts = torch.cat([self._facts, found[None].double(), alike]), 0.0
        dist.all_reduce(facts)
        *told, total, squares = facts.tolist()
        if total**2 != squares * dist.get_world_size():  # exact, below 2^53: up to 4,096 processes
            what = "the processes have used different weights in this update, and fsdp would mix up their gradients."
            where = f"rank {dist.get_rank()}; without a gradient here: {', '.join(unused[:3]) or 'none'}"
            fix = 'use every part of the model in each update, or give strategy="ddp"'
            raise ModelError(what, where=where, fix=fix)
        return told

    def check(self) -> None:
        """What is to be checked, :meth:`told` finds: nobody knows it by itself."""

    def alone(self, function: Callable) -> Callable:
        return partial(self.call, function)

    def local(self, gradient: Tensor) -> Tensor:
        return local(gradient)

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def dissolve(self) -> None:
        self._traces.remove()
        put_together(self.modules)
        self._whole, self._weights = None, []


Engine = Replicated | Sharded


def _as(number: float | Tensor, value: Tensor) -> Tensor:
    """The number as a tensor like the value."""
    return number.to(value) if isinstance(number, Tensor) else torch.full_like(value, number)


def _vector(facts: Sequence[Any], dtype: torch.dtype, device: torch.device, factor: float = 1) -> Tensor:
    """Numbers, among them tensors of one number, as one tensor; what is a tensor is not waited for."""
    known = array(_CODES[dtype], [0.0 if isinstance(fact, Tensor) else fact * factor for fact in facts])
    vector = torch.frombuffer(known, dtype=dtype).to(device)  # torch.tensor takes three times as long
    for place, fact in enumerate(facts):
        if isinstance(fact, Tensor):
            vector[place] = fact * factor
    return vector


def begin_alike(modules: Sequence[nn.Module]) -> None:
    """Gives every process the weights of the first one. Raises ModelError if they have different models."""
    named = [
        (name, value) for module in modules for name, value in (*module.named_parameters(), *module.named_buffers())
    ]
    for rank, apart in enumerate(unlike([(name, tuple(value.shape), str(value.dtype)) for name, value in named])):
        if apart is not None:
            _, one, theirs = apart
            what = "the processes have different models."
            where = f"rank 0 has {one}, rank {rank} has {theirs}"
            raise ModelError(what, where=where, fix="build the same model in every process; only weights may differ")
    copy_from_first([value.detach() for _, value in named])


def engine(
    modules: Sequence[nn.Module], device: torch.device, strategy: Strategy, precision: str, facts: int
) -> Engine:
    """What trains these modules in several processes, which begin with the same weights.

    Raises PlanError for a model that is sharded already.
    """
    if any(isinstance(p, DTensor) for module in modules for p in module.parameters()):
        what = "the model is sharded already, by the program itself or by a run that failed."
        raise PlanError(what, where=f"strategy={strategy}", fix="give it as it is before fully_shard, or build it anew")
    begin_alike(modules)
    if strategy.kind == "fsdp":
        _refuse_unshardable(modules)
        return Sharded(modules, device, strategy, precision)
    return Replicated(modules, device, facts)


def _refuse_unshardable(modules: Sequence[nn.Module]) -> None:
    scalar = next((name for module in modules for name, p in module.named_parameters() if p.dim() == 0), None)
    if scalar is not None:
        what, fix = "fsdp cuts weights by rows, and one is a single number.", "make it of shape (1,), or give ddp"
        raise PlanError(what, where=f"strategy: fsdp; {scalar}", fix=fix)
    parts = [(name, part) for module in modules for name, part in module.named_modules()]
    if sparse := [name for name, part in parts if getattr(part, "sparse", False) is True]:
        what = "fsdp does not add up sparse gradients."
        raise PlanError(what, where=f"strategy: fsdp; {sparse[0]}", fix="give sparse=False there, or ddp")


def _blocks(model: nn.Module, classes: Sequence[type[nn.Module]] | None) -> Iterator[nn.Module]:
    """The modules to wrap, none within another: those of the classes; or the repeated ones, which stand in a list."""
    if classes is not None:
        found = [part for part in model.modules() if isinstance(part, tuple(classes)) and part is not model]
        if not found:
            named = ", ".join(one.__name__ for one in classes)
            known = ", ".join(sorted({type(part).__name__ for part in model.modules()}))
            what = f"the model has no module of the class {named} to wrap."
            raise PlanError(what, where=f"strategy: wrap; the model has {known}", fix="name classes of its blocks")
    else:
        lists = (part for part in model.modules() if isinstance(part, nn.ModuleList | nn.Sequential))
        found = [child for one in lists for child in one if _is_repeated(child, one)]
    taken: set[int] = set()
    for block in found:  # modules() gives the outer ones first
        if id(block) in taken:
            continue
        taken.update(map(id, block.modules()))
        if (name := _shared_outside(block, model)) is None:
            yield block
        elif classes is not None:
            what = f"a module to wrap shares the weight {name!r} with others."
            fix = "wrap a class of modules that have weights of their own"
            raise PlanError(what, where=f"strategy: wrap {type(block).__name__}", fix=fix)


def _shared_outside(block: nn.Module, model: nn.Module) -> str | None:
    """The name of a weight that a block shares with the rest of the model."""
    inside = {id(p) for p in block.parameters()}
    within = {id(part) for part in block.modules()}
    others = (part for part in model.named_modules() if id(part[1]) not in within)
    names = (f"{path}.{name}" for path, part in others for name, p in part._parameters.items() if id(p) in inside)
    return next(names, None)


def _is_repeated(child: nn.Module, siblings: nn.ModuleList | nn.Sequential) -> bool:
    counts = Counter(type(one) for one in siblings)
    return counts[type(child)] > 1 and any(True for _ in child.children()) and any(True for _ in child.parameters())


def refuse_drift(modules: Sequence[nn.Module]) -> None:
    """Compares the weights that every process has, bit for bit. Raises ModelError with the first that differ."""
    named = [(n, p.detach()) for module in modules for n, p in module.named_parameters() if not isinstance(p, DTensor)]
    if not named:
        return
    hashes = torch.stack([torch.hash_tensor(_bits(weight)) for _, weight in named]).cpu().view(torch.int64)
    if are_alike(hashes):
        return
    places = [apart and apart[0] for apart in unlike(hashes.tolist())]
    if (place := min((place for place in places if place is not None), default=None)) is not None:
        ranks = ", ".join(str(rank) for rank, one in enumerate(places) if one == place)
        what = f"the processes have drifted apart: the weight {named[place][0]!r} is not the same in all of them."
        fix = "change weights in all processes alike; in a step of your own, call average_gradients before it moves"
        raise ModelError(what, where=f"rank {ranks} against rank 0", fix=fix)


def _bits(weight: Tensor) -> Tensor:
    return torch.view_as_real(weight) if weight.is_complex() else weight
