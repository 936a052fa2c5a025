"""What made the first value that is not finite, found by running one update again under watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from epochal import losses
from epochal.data.batch import size, split
from epochal.errors import NonFiniteError
from epochal.protocols import Loss
from epochal.runtime import processes
from epochal.runtime.shards import local

ROWS_TOLD = 8
_MILDER = 'lower lr, set clip=1.0, or use nonfinite="skip"'
_DATA = 'mend or leave out these rows, or use nonfinite="skip"'
_LAYER = f"keep its inputs where it is defined (add an epsilon, clamp), {_MILDER}"
_LOSS = f"keep what it takes a logarithm, a root or a quotient of away from 0, {_MILDER}"
_GRADIENT = f"a root, a norm or a quotient has no finite gradient at 0: add an epsilon; or {_MILDER}"
_WEIGHT = "an update has overflowed (lower lr), or look at the file the weights came from and at what else changes them"
_UNKNOWN = f"look for NaN in the data, {_MILDER}"


def weight(modules: Sequence[nn.Module]) -> str | None:
    """The name of a trained weight that is not finite, None if all of them are; of a sharded one, what lies here."""
    every = [(name, local(p)) for module in modules for name, p in module.named_parameters()]
    # Neither for sparse ones nor for those of a byte does torch know it.
    trained = [(n, p) for n, p in every if p.requires_grad and p.layout is torch.strided and p.dtype.itemsize > 1]
    finite = [torch.isfinite(p.detach()).all() for _, p in trained]
    if not finite or torch.stack([one.to(finite[0].device) for one in finite]).all():  # one look, nothing else waits
        return None
    return next(name for (name, _), one in zip(trained, finite) if not one)


def of_weight(name: str, step: int) -> NonFiniteError:
    """What to raise instead of saving it."""
    what = f"the weight {name!r} is not finite, though loss and gradients were; it is not saved."
    return NonFiniteError(what, where=f"after step {step}", fix=f"{_WEIGHT}; resume goes on from the newest checkpoint")


class Place(NamedTuple):
    """Of an update: the updates done before it, its epoch (from 1), its number in the epoch, and its rate."""

    step: int
    epoch: int
    batch: int
    lr: float


class Finding(NamedTuple):
    """what: the beginning of a sentence. rows: of the micro-batch, where known. is_cause: whether it says why."""

    what: str
    fix: str
    rows: Sequence[int] = ()
    micro_batch: int | None = None
    is_cause: bool = True
    code: str | None = None

    def error(
        self, place: Place, loss: float, norm: float | None, *, micro_batches: int = 1, rank: int | None = None
    ) -> NonFiniteError:
        told = [f"step {place.step}, epoch {place.epoch}, batch {place.batch}"]
        if rank is not None:
            told[0] += f", the share of rank {rank}"
        if micro_batches > 1 and self.micro_batch is not None:
            told[0] += f", micro-batch {self.micro_batch}"
        if self.rows:
            rows = ", ".join(map(str, self.rows[:ROWS_TOLD]))
            more = f" and {len(self.rows) - ROWS_TOLD} more" if len(self.rows) > ROWS_TOLD else ""
            told.append(f"row{'s' if len(self.rows) > 1 else ''} {rows}{more} of it")
        measured = f"loss {loss:g}, " + (f"gradient norm {norm:g}, " if norm is not None else "")
        told.append(f"{measured}lr {place.lr:g}")
        what = f"{self.what}; the weights were not touched."
        return NonFiniteError(what, where="; ".join(told), fix=self.fix, code=self.code)


def unexplained(loss: Tensor, error: BaseException | None = None) -> Finding:
    """What can be said without a second run, or when it failed or went well."""
    what = "a gradient is not finite" if torch.isfinite(loss).all() else "the loss is not finite"
    if error is not None:
        told = f"{what}, and running the step again to see why raised {type(error).__name__}"
        return Finding(told, _UNKNOWN, is_cause=False)
    return Finding(
        f"{what}, but it was when the step was run again",
        f"something draws from python's or numpy's generators, or changes its inputs in place; {_UNKNOWN}",
        is_cause=False,
    )


def agreed(finding: Finding, norm: float | None) -> tuple[int | None, Finding, float | None]:
    """Of the findings of several processes the one that says most, whose it is, and its gradient norm.

    Where weights are sharded, a gradient is not finite in all of them, and only one knows why.
    """
    told = processes.gather((finding, norm))
    if len(told) == 1:
        return None, finding, norm
    rank = min(range(len(told)), key=lambda one: (told[one][0].micro_batch is None, not told[one][0].is_cause))
    return rank, *told[rank]


class Watch:
    """An objective that calls another one, and inside ``with`` sees what the layers of the model make.

    The first layer whose output is not finite while its inputs are, in the order in which they end, has made it;
    if there is none, it came with the data, or from the loss. Where all of these are finite and only a gradient
    is not, the same is asked of the gradients that go out of and into the layers, in the order of the backward pass.
    """

    def __init__(self, objective: Callable[[Callable, Any], Loss], modules: Sequence[nn.Module]):
        self.objective, self.modules = objective, modules
        self._found: Finding | None = None
        self._suspect: Finding | None = None  # not finite, though the loss was
        self._layer: Finding | None = None  # in the micro-batch in hand
        self._number, self._size, self._counts = -1, 0, True
        self._entered: dict[str, bool] = {}  # whether the layer's inputs were finite
        self._spoilt: set[str] = set()  # layers that got a gradient which was not finite
        self._backward: tuple[str, Finding] | None = None
        self._after: str | None = None  # the layer with whose output's gradient it began
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for name, weight in self._parameters():
            if self._found is None and not _finite(weight):
                self._found = Finding(f"the weight {name!r} is not finite", _WEIGHT)
        for path, module in self.modules[0].named_modules():
            self._handles += [
                module.register_forward_pre_hook(partial(self._enters, path), with_kwargs=True),
                module.register_forward_hook(partial(self._ends, path), with_kwargs=True),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def __call__(self, forward: Callable, batch: Any) -> Loss:
        self._number, self._layer = self._number + 1, None
        self._size = size(batch, getattr(self.objective, "target", ()))
        loss = self.objective(forward, batch)
        self._counts = bool(loss.weight)
        if self._found is None and self._counts:
            found = self._layer or self._of_data(batch)
            if not _finite(loss.value):
                self._found = found or self._of_loss(loss)
            elif self._suspect is None:
                self._suspect = found
        return loss

    def finding(self, loss: Tensor) -> Finding:
        """What is to blame, after the whole update; ``loss``: that of the first time."""
        if self._found is not None:
            return self._found
        spoilt = next((name for name, p in self._parameters() if p.grad is not None and not _finite(p.grad)), None)
        if spoilt is None:
            return unexplained(loss)
        if self._suspect is not None:
            return self._suspect
        if self._backward is not None:
            return self._backward[1]
        if self._after is None:
            return Finding(f"the gradient of {spoilt!r} is not finite", _GRADIENT, is_cause=False)
        maker = self._named(self._after.rpartition(".")[0]) if self._after else "the loss"
        return Finding(f"the backward pass of {maker} made the first gradient that is not finite", _GRADIENT)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return (named for module in self.modules for named in module.named_parameters())

    def _named(self, path: str) -> str:
        module = self.modules[0].get_submodule(path)
        return f"layer {path!r} ({type(module).__name__})" if path else f"the forward of {type(module).__name__}"

    def _finding(self, what: str, fix: str, rows: Sequence[int]) -> Finding:
        code = {_DATA: "nonfinite-inputs", _LAYER: "divergence", _LOSS: "divergence"}.get(fix)
        code = "nonfinite-targets" if code and what.startswith("the targets") else code
        return Finding(what, fix, rows, self._number, code=code)

    def _of_data(self, batch: Any) -> Finding | None:
        for holder, part in self._parts(batch):
            if not _finite(part):
                return self._finding(f"{holder} a value that is not finite", _DATA, _rows(part, self._size))
        return None

    def _parts(self, batch: Any) -> list[tuple[str, Any]]:
        if not hasattr(self.objective, "loss"):  # what is what in the batch, only the user's objective knows
            named = batch.items() if isinstance(batch, Mapping) else enumerate(_listed(batch))
            return [(f"part {name!r} of the batch holds", part) for name, part in named]
        args, kwargs, targets = split(batch, getattr(self.objective, "target", ()))
        inputs = [(f"input {name!r} holds", part) for name, part in (*enumerate(args), *kwargs.items())]
        if len(inputs) == 1:
            inputs = [("the inputs hold", inputs[0][1])]
        return [*inputs, ("the targets hold", targets)]

    def _of_loss(self, loss: Loss) -> Finding:
        """With the rows whose own loss is not finite, where the loss compares outputs and targets row by row."""
        what = "the loss made the first value that is not finite"
        compare, outputs, targets = getattr(self.objective, "loss", None), loss.outputs, loss.targets
        if compare is None or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
            return self._finding(what, _LOSS, ())
        try:
            with torch.no_grad():
                rows = enumerate(zip(outputs.split(1), targets.split(1), strict=True))
                counted = ((number, row) for number, row in rows if losses.weight_of(compare, row[1], 1))
                return self._finding(what, _LOSS, [number for number, row in counted if not _finite(compare(*row))])
        except Exception:  # it needs more than one row
            return self._finding(what, _LOSS, ())

    def _enters(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._entered[path] = _finite((args, kwargs))
        self._listen((args, kwargs), self._flows_on, path)

    def _ends(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._layer is None and self._entered.get(path, True) and not _finite(output):
            what = f"{self._named(path)} made the first value that is not finite"
            self._layer = self._finding(what, _LAYER, _rows(output, self._size))
        self._listen(output, self._arrives, path)

    def _listen(self, value: Any, told: Callable, path: str) -> None:
        for tensor in _tensors(value):
            if tensor.requires_grad:
                self._handles.append(tensor.register_hook(partial(told, path)))

    def _arrives(self, path: str, gradient: Tensor) -> None:
        """A gradient of a layer's output; of layers with the same output, the innermost is told first."""
        if self._counts and not _finite(gradient):
            self._spoilt.add(path)
            if self._after is None or _within(self._after, path):
                self._after = path

    def _flows_on(self, path: str, gradient: Tensor) -> None:
        """A gradient of a layer's input; of layers with the same input, the outermost is told first."""
        if not self._counts or path in self._spoilt or _finite(gradient):
            return
        if self._backward is None or _within(path, self._backward[0]):
            what = f"the backward pass of {self._named(path)} made the first gradient that is not finite"
            self._backward = path, self._finding(what, _GRADIENT, _rows(gradient, self._size))


def _listed(batch: Any) -> Sequence[Any]:
    return batch if isinstance(batch, list | tuple) else [batch]


def _within(path: str, outer: str) -> bool:
    return path != outer and (not outer or path.startswith(f"{outer}."))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of floating point numbers in a structure; of a sparse one, its entries."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value.coalesce().values() if value.is_sparse else value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(tensor.detach()).all()) for tensor in _tensors(value))


def _rows(value: Any, count: int) -> list[int]:
    """The samples, of ``count``, that a value which is not finite belongs to."""
    rows: set[int] = set()
    for tensor in _tensors(value):
        if tensor.dim() and tensor.shape[0] == count:
            spoilt = ~torch.isfinite(tensor.detach()).reshape(count, -1).all(1)
            rows.update(spoilt.nonzero().flatten().tolist())
    return sorted(rows)
