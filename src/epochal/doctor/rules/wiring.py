"""Rules over what is connected with what: model, loss, gradients, optimizer, and data for training and validation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from epochal.data.loader import Loader
from epochal.data.sources import Arrays
from epochal.doctor.case import NORMS, Case
from epochal.doctor.finding import Seen, rule
from epochal.doctor.graph import ends
from epochal.doctor.trace import tensors

TOLD = 4  # names of parameters


def named(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:TOLD]) + (f" and {len(names) - TOLD} more" if len(names) > TOLD else "")


def _hidden(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters that attributes of the model lead to, and that it does not know as its own; with their place."""
    known = {id(one) for one in (*model.parameters(), *model.buffers())}
    modules = set(map(id, model.modules()))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                for tail, one in _leaves(value, 0, modules):
                    if id(one) not in known:
                        yield f"{path}.{name}{tail}".removeprefix("."), one


def _leaves(value: Any, depth: int, modules: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, nn.Module):
        if id(value) not in modules:
            yield from ((f".{name}", p) for name, p in value.named_parameters())
    elif isinstance(value, Tensor):
        if value.requires_grad and value.is_leaf:
            yield "", value
    elif isinstance(value, Mapping) and depth < 3:
        for key, part in value.items():
            yield from ((f"[{key!r}]{tail}", one) for tail, one in _leaves(part, depth + 1, modules))
    elif isinstance(value, list | tuple | set) and depth < 3 and len(value) < 10_000:
        for at, part in enumerate(value):
            yield from ((f"[{at}]{tail}", one) for tail, one in _leaves(part, depth + 1, modules))


@rule("hidden-modules", "error", "wiring")
def hidden_modules(case: Case) -> Iterator[Seen]:
    """A layer in a plain list, dict or tensor attribute is not part of the model: it is neither trained, nor saved,
    nor moved.

    Looks at the attributes of every module for layers and tensors that get a gradient from the loss, that
    ``model.parameters()`` does not know, and that the optimizer does not hold. What gets no gradient (a frozen teacher)
    may be hidden on purpose. A tensor that is no nn.Parameter is told as a warning, and not in a step of the user's,
    which may move it.
    """
    found = [
        (name, one) for name, one in _hidden(case.model)
        if id(one) in case.now.reached and one.requires_grad and id(one) not in case.held
        and all(id(one) in seen.reached for seen in case.passes[-2:])
    ]  # fmt: skip
    certain = [name for name, one in found if isinstance(one, nn.Parameter)]
    is_meant = all(re.search(r"\[0\]", name) and "[1]" not in " ".join(certain) for name in certain)
    if certain or (found and case.plan.step is None):
        names = certain or [name for name, _ in found]
        yield Seen(
            "layers that the loss depends on are not part of the model, and are not trained.",
            f"{len(names)} tensors get a gradient, and are not in model.parameters()",
            f"{named(names)} of {type(case.model).__name__}",
            "keep layers in nn.ModuleList or nn.ModuleDict, and tensors in nn.Parameter",
            level=None if certain and not is_meant else "warning",
        )


@rule("foreign-parameters", "error", "wiring")
def foreign_parameters(case: Case) -> Iterator[Seen]:
    """The optimizer moves tensors that the model does not compute with: the model was copied or rebuilt after it was
    made.

    Looks at what the optimizer holds and the model does not, and at whether the loss gives it a gradient. What does get
    one (a learned weight of the loss, say) may be meant so; and in a step of the user's, what lies unused for a while.
    """
    if not case.held:
        return
    modules = case.run.state.modules
    known = {id(p) for module in modules for p in module.parameters()}
    hidden = {id(one) for _, one in _hidden(case.model)}
    held = list({id(p): p for group in case.held.values() for p in group["params"]}.values())
    foreign = [p for p in held if id(p) not in known | hidden and id(p) not in case.now.reached and p.requires_grad]
    missed = [name for name, p in case.trained.items() if id(p) not in case.held and id(p) in case.now.reached]
    if foreign and missed:
        yield Seen(
            "the optimizer holds parameters that are not the model's, and lacks some that are.",
            f"{len(foreign)} of its {len(held)} parameters are of another model; {len(missed)} of this one's are "
            "not in it",
            f"not in it: {named(missed)}; {case.place}",
            "make the optimizer after the last change of the model, over model.parameters()",
        )
    elif foreign and case.plan.step is None:
        yield Seen(
            "the optimizer holds parameters that the loss does not depend on, and the model does not have.",
            f"{len(foreign)} of its {len(held)} parameters",
            f"tensors of shape {tuple(foreign[0].shape)} and so on; {case.place}",
            "make the optimizer over model.parameters()",
            level="warning",
        )


@rule("not-in-optimizer", "warning", "wiring")
def not_in_optimizer(case: Case) -> Iterator[Seen]:
    """A weight that the optimizer does not hold stays as it was initialised, though a gradient is computed for it.

    Looks at the parameters that want a gradient, get one from the loss, and are in no group. If none is in it, that is
    an error. What shall stay as it is, is frozen by requires_grad_(False), which saves its gradient, too.
    """
    if not case.held:
        return
    missed = [name for name, p in case.trained.items() if id(p) not in case.held and id(p) in case.now.reached]
    if missed and not any(foreign_parameters(case)):
        count = sum(case.trained[name].numel() for name in missed)
        yield Seen(
            "the optimizer does not hold all of the parameters that are to be trained.",
            f"{count:,} of {sum(p.numel() for p in case.trained.values()):,} weights get a gradient and are in no "
            "group",
            f"{named(missed)}; {case.place}",
            "make it over model.parameters(), or freeze these: requires_grad_(False)",
            level="error" if len(missed) == len(case.trained) else None,
        )


@rule("no-gradient", "warning", "wiring")
def no_gradient(case: Case) -> Iterator[Seen]:
    """A parameter that no backward pass reaches is never trained: it is unused, or cut off by .detach() or no_grad().

    Looks at the graph of the loss in the first batches: a parameter that wants a gradient, is in the optimizer, and
    is in none of them. Where its layer ran, its output was cut off; where it did not, it is not used.
    """
    if any(one.is_opaque for one in case.passes):
        return
    without = set(case.passes[0].without).intersection(*(one.without for one in case.passes[1:]))
    missed = [
        name for name in case.trained if name in without and (not case.held or id(case.trained[name]) in case.held)
    ]
    if not missed or len(without) == len(case.trained):
        return
    ran = {layer.path for one in case.passes for layer in one.layers}
    cut = [name for name in missed if name.rpartition(".")[0] in ran]
    told = "ran, but its output is cut off from the loss" if cut else "is not used"
    yield Seen(
        "some parameters never get a gradient, and are not trained.",
        f"{len(missed)} of {len(case.trained)} trained parameters in none of {len(case.passes)} passes; the layer "
        f"{told}",
        named(cut or missed),
        "look for .detach(), .data, torch.no_grad() or NumPy after this layer"
        if cut
        else "use it in the forward, or leave it out of the model (or freeze it: requires_grad_(False))",
        level=None if cut else "info",
    )


@rule("all-frozen", "error", "static")
def all_frozen(case: Case) -> Iterator[Seen]:
    """No parameter of the model wants a gradient, so there is nothing to train.

    Looks at requires_grad of all of them. A backbone was frozen by requires_grad_(False) over the whole model, head
    and all, or after the head was put in.
    """
    every = list(case.model.parameters())
    if every and not case.trained and case.plan.step is None:
        yield Seen(
            "the model has no parameter to train.",
            f"all of its {sum(p.numel() for p in every):,} weights are frozen",
            f"{type(case.model).__name__}; {case.place}",
            "set requires_grad_(True) on the parameters that shall be trained",
        )


@rule("all-frozen", "info", "static")
def only_norms_trained(case: Case) -> Iterator[Seen]:
    """What is trained are scales and shifts of norms alone; the head was frozen with the rest, or put in before.

    Looks at the trained parameters: all of them are those of norms, in a model that has weights besides.
    """
    norms = {id(p) for part in case.model.modules() if isinstance(part, NORMS) for p in part.parameters(recurse=False)}
    every = list(case.model.parameters())
    if case.trained and len(every) > len(norms) and all(id(p) in norms for p in case.trained.values()):
        yield Seen(
            "nothing but the scales and shifts of norms is trained.",
            f"{sum(p.numel() for p in case.trained.values()):,} of {sum(p.numel() for p in every):,} weights",
            f"{type(case.model).__name__}; {case.place}",
            "set requires_grad_(True) on the layers that shall be trained, the head at least",
        )


@rule("hidden-modules", "warning", "wiring")
def foreign_layers(case: Case) -> Iterator[Seen]:
    """A layer in a closure, in an object that is no module, or made by the forward itself, is not part of the model.

    Looks at where the graph of the model's output ends: in an nn.Parameter that neither the model nor the optimizer
    has. Where it is another one in each pass, the forward makes it anew, which is an error.
    """
    known = {id(p) for module in case.run.state.modules for p in module.parameters()} | set(case.held)
    known |= {id(one) for _, one in _hidden(case.model)}
    one, *before = ({id(p): p for out in tensors(seen.outputs) for p in ends(out)
                     if type(p) is nn.Parameter and p.shape[:1] != (seen.samples,)}  # else it may be the inputs
                    for seen in case.passes[-1:-3:-1])  # fmt: skip
    foreign = [p for key, p in one.items() if key not in known]
    if foreign:
        is_anew = bool(before) and len(before[0]) == len(one) and not set(map(id, foreign)) & set(before[0])
        yield Seen(
            "the forward makes layers anew in each pass: their weights stay random."
            if is_anew
            else "the output depends on parameters that are not the model's, and are not trained.",
            f"{len(foreign)} of the {len(one)} that get a gradient are not in model.parameters()",
            f"tensors of shape {', '.join(str(tuple(p.shape)) for p in foreign[:TOLD])}; the forward of "
            f"{type(case.model).__name__}, {case.place}",
            "make layers in __init__, as attributes of the module; freeze what shall stay: requires_grad_(False)",
            level="error" if is_anew else None,
        )


@rule("frozen-in-optimizer", "warning", "static")
def frozen_in_optimizer(case: Case) -> Iterator[Seen]:
    """A group of the optimizer whose parameters are all frozen trains nothing: its learning rate does not matter.

    Looks at the groups of an optimizer that has trained ones as well. Frozen parameters among trained ones in a group
    do no harm, and are not told.
    """
    groups = case.optimizer.param_groups if case.optimizer is not None else []
    names = {id(p): name for name, p in case.model.named_parameters()}
    for number, group in enumerate(groups):
        if len(groups) > 1 and group["params"] and not any(p.requires_grad for p in group["params"]):
            yield Seen(
                "a group of the optimizer holds nothing but frozen parameters.",
                f"group {number} of {len(groups)}: none of its {len(group['params'])} parameters wants a gradient",
                named(names.get(id(p), "?") for p in group["params"]),
                "unfreeze them, model.part.requires_grad_(True), or leave the group out",
            )


def _source(data: Any) -> Any:
    return data.dataset if isinstance(data, DataLoader) else data


def _indices(data: Any) -> tuple[Any, np.ndarray | None]:
    """The data set in the end, and which of it; None for all."""
    data = _source(data)
    if not isinstance(data, Subset):
        return data, None
    base, rows = _indices(data.dataset)
    mine = np.asarray(data.indices)
    return base, mine if rows is None else rows[mine]


def _is_whole(data: Any) -> bool:
    """Whether all of a data set is read: no sampler chooses, and it is no stream, which may divide itself."""
    plain = (SequentialSampler, RandomSampler)
    if isinstance(data, DataLoader) and (
        type(data.sampler) not in plain or type(data.batch_sampler) is not BatchSampler
    ):
        return False
    return not isinstance(_source(data), IterableDataset)


def _memory(data: Any) -> list[Tensor]:
    """The arrays of data in memory."""
    data = _source(data)
    parts = data.tensors if isinstance(data, TensorDataset) else data
    parts = tuple(parts.values()) if isinstance(parts, Mapping) else parts
    try:
        return [one if isinstance(one, Tensor) else torch.from_numpy(one)
                for one in (parts if isinstance(parts, list | tuple) else [parts])]  # fmt: skip
    except TypeError:
        return []


def _is_inside(part: Tensor, whole: Tensor) -> bool:
    begins = whole.data_ptr()
    ends = begins + whole.numel() * whole.element_size()
    return whole.is_contiguous() and whole.device == part.device and begins <= part.data_ptr() < ends


@rule("val-in-train", "error", "static")
def val_in_train(case: Case) -> Iterator[Seen]:
    """What is validated on was trained on: the validation says how well it is remembered, not how well it is learned.

    Looks at whether val is train itself, has indices in common with it, or lies in the same memory with all of its
    arrays. (A data set of the user's own that is both may make each sample anew: a warning.)
    """
    train, val = case.plan.train, case.plan.val
    if val is None or isinstance(val, float) or not (_is_whole(train) and _is_whole(val)):
        return
    (base, rows), (other, others) = _indices(train), _indices(val)
    told, is_own = None, False
    if _source(train) is _source(val):
        told, is_own = "val is the very data that train is", not _memory(train)
    elif base is other:
        shared = len(np.intersect1d(rows, others)) if rows is not None and others is not None else None
        told = f"{'all' if shared is None else shared} indices are in both" if shared != 0 else None
    else:
        one, two = _memory(train), _memory(val)
        if one and len(one) == len(two) and all(part.numel() for part in (*one, *two)):
            is_shared = all(_is_inside(part, whole) for part, whole in zip(two, one))
            told = "the arrays of val lie inside those of train" if is_shared else None
    if told is not None:
        yield Seen(
            "the validation is made on data that are trained on.",
            told,
            f"train, val; {case.place}",
            "give val=0.2, which divides train, or data that train does not have",
            level="warning" if is_own else None,
        )


def arrays(case: Case) -> Arrays | None:
    """The training data, where they are in memory."""
    source = case.run.train.source if isinstance(case.run.train, Loader) else None
    return source if isinstance(source, Arrays) else None
