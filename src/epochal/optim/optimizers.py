"""Optimizers by name, from a factory, or as the user built them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from epochal.errors import ModelError, PlanError, UnknownNameError
from epochal.runtime.shards import is_sharded, like

NAMES: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adafactor": torch.optim.Adafactor,
    "muon": torch.optim.Muon,
}
FUSED = frozenset({"sgd", "adam", "adamw", "adagrad"})
_KEPT_AWAY = "__dynamo_disable"  # where torch notes what a method is called through
FUSED_SHARDED = frozenset({"adam", "adamw"})


def check(optimizer: Any) -> None:
    """Refuses what is no optimizer, and an unknown name."""
    if isinstance(optimizer, str) and optimizer not in NAMES:
        raise UnknownNameError.of_name("optimizer", optimizer, NAMES, where=f"optimizer={optimizer!r}")
    if not (isinstance(optimizer, str | Optimizer) or callable(optimizer)):
        what, where = f"{type(optimizer).__name__} is not an optimizer.", f"optimizer={optimizer!r:.60}"
        raise PlanError(what, where=where, fix="give a name, a function f(params) -> Optimizer, or an Optimizer")


def build(
    optimizer: str | Callable[[Iterable[nn.Parameter]], Optimizer] | Optimizer,
    modules: Sequence[nn.Module],
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
) -> Optimizer:
    """The optimizer over the trainable parameters of ``modules`` (the model, and a loss that has parameters).

    A name is built fused where torch has it, with ``lr`` and ``weight_decay`` or torch's defaults. A
    factory is called with the parameters. An ``Optimizer`` is taken as it is.

    Raises ModelError if no parameter requires a gradient, UnknownNameError, or PlanError if the optimizer
    belongs to another model.
    """
    parameters = list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))
    if not parameters:
        where = f"{type(modules[0]).__name__}: {_count(modules[0])}"
        fix = "set requires_grad_(True) on the parameters that shall be trained"
        raise ModelError("the model has no parameter to train.", where=where, fix=fix, code="all-frozen")
    check(optimizer)
    if isinstance(optimizer, str):
        options = {"lr": lr, "weight_decay": weight_decay}
        return _named(optimizer, modules, parameters, {key: v for key, v in options.items() if v is not None})
    if not isinstance(optimizer, Optimizer):
        optimizer = _from_factory(optimizer, parameters)
    _check_owner(optimizer, modules)
    return optimizer


def _count(module: nn.Module) -> str:
    count = sum(p.numel() for p in module.parameters())
    return "it has no parameters" if count == 0 else f"all of its {count:,} parameters are frozen"


def _named(name: str, modules: Sequence[nn.Module], parameters: list[nn.Parameter], options: dict) -> Optimizer:
    with without_the_compiler():
        return _built(name, modules, parameters, options)


@contextmanager
def without_the_compiler() -> Iterator[None]:
    """torch imports its compiler, which takes a second, to keep it away from some methods of optimizers, when the first
    of them is called. Inside, they do not ask for it.
    """
    asking = Optimizer.add_param_group, Optimizer.state_dict
    methods: list[Any] = [one.__wrapped__ for one in asking if hasattr(one, "__wrapped__")]
    if "torch._dynamo" in sys.modules:
        methods = []
    methods = [one for one in methods if not hasattr(one, _KEPT_AWAY)]
    for method in methods:
        setattr(method, _KEPT_AWAY, method)
    try:
        yield
    finally:
        for method in methods:
            delattr(method, _KEPT_AWAY)


def _built(name: str, modules: Sequence[nn.Module], parameters: list[nn.Parameter], options: dict) -> Optimizer:
    if name == "muon":
        return _muon(parameters, options)
    # The fused kernels take neither sparse gradients nor complex weights; torch knows few of them for sharded ones.
    sparse = any(getattr(part, "sparse", False) is True for module in modules for part in module.modules())
    fused = FUSED if not any(map(is_sharded, parameters)) else FUSED_SHARDED
    if name in fused and not sparse and not any(p.is_complex() for p in parameters):
        try:
            return NAMES[name](parameters, **options, fused=True)
        except (RuntimeError, TypeError):
            pass  # no fused kernel for this device or type: torch says so when asked
    return NAMES[name](parameters, **options)


def _muon(parameters: list[nn.Parameter], options: dict) -> Optimizer:
    """Muon moves matrices; vectors and tensors of more dimensions go to AdamW, as its author does.

    Source: K. Jordan et al., Muon (2024); the rate is matched to AdamW's as in Moonlight (2025), so
    one ``lr`` serves both.
    """
    muon = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    matrices, others = ([p for p in parameters if (p.dim() == 2) is flat] for flat in (True, False))
    built = [make(part, **options) for make, part in ((muon, matrices), (torch.optim.AdamW, others)) if part]
    return built[0] if len(built) == 1 else Several(built)


class Several(Optimizer):
    """Several optimizers that act as one: their groups side by side, one step steps all."""

    def __init__(self, optimizers: Sequence[Optimizer]):
        self.optimizers = list(optimizers)
        super().__init__([group for one in self.optimizers for group in one.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # A schedule writes lr into these groups; they have to be the very dicts that the parts read.
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for one in self.optimizers:
            one.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for one, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            load_exactly(one, state)
        self._share_groups()


def load_exactly(optimizer: Any, state: Any) -> None:
    """As ``optimizer.load_state_dict(state)``, to the bit.

    torch makes every floating point entry the type of its parameter: averages in fp32 of weights in bf16 would lose
    their last bits.
    """
    if not (isinstance(state, dict) and state.keys() >= {"state", "param_groups"}):
        optimizer.load_state_dict(state)
        return
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {**state, "state": dict(state["state"])}
    for number, parameter in zip(numbers, parameters):
        if is_sharded(parameter) and number in state["state"]:
            kept = state["state"][number]
            state["state"][number] = {name: like(value, parameter) for name, value in kept.items()}
    optimizer.load_state_dict(state)
    for number, parameter in zip(numbers, parameters):
        live = optimizer.state.get(parameter, {})
        for name, saved in state["state"].get(number, {}).items():
            if isinstance(saved, Tensor) and isinstance(live.get(name), Tensor) and live[name].dtype != saved.dtype:
                live[name] = saved.to(live[name].device)


def _from_factory(factory: Any, parameters: list[nn.Parameter]) -> Optimizer:
    built = factory(parameters)
    if not isinstance(built, Optimizer):
        what = f"the optimizer factory returned {type(built).__name__}, not a torch.optim.Optimizer."
        fix = "return the optimizer, for example lambda params: torch.optim.SGD(params, lr=0.01)"
        raise PlanError(what, where="optimizer", fix=fix)
    return built


def _check_owner(optimizer: Optimizer, modules: Sequence[nn.Module]) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        what = "LBFGS evaluates the loss several times in one step, which this loop does not do."
        raise PlanError(what, where="optimizer", fix="make it in a step of your own, step=, and leave optimizer= out")
    known = {id(p) for module in modules for p in module.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in known for p in held):
        where = f"none of its {len(held)} parameters is one of {type(modules[0]).__name__}'s"
        fix = "build it over this model's parameters() (a copy of a model has new ones)"
        what = "the optimizer holds the parameters of another model."
        raise PlanError(what, where=where, fix=fix, code="foreign-parameters")
