"""Rules over softmaxes: over which dimension they are taken, at the end of a model and inside of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from epochal import losses
from epochal.doctor.case import Case
from epochal.doctor.finding import Seen, rule
from epochal.doctor.graph import is_transposed, softmax_of
from epochal.doctor.trace import tensors


class Softmax(NamedTuple):
    """name: softmax or logsoftmax. shape: of its result. is_last: whether that is an output of the model, or what a
    loss gets.
    """

    name: str
    dim: int
    shape: tuple[int, ...]
    where: str
    is_last: bool

    @property
    def size(self) -> int:
        return self.shape[self.dim] if self.shape else 0


def softmaxes(case: Case) -> Iterator[Softmax]:
    """Those of the last pass: the last ones first, then all that were called."""
    outputs = case.now.outputs
    last = [call.outputs for call in case.now.calls] or ([outputs] if isinstance(outputs, Tensor) else [])
    for one in {id(one): one for one in [*last, *tensors(outputs)] if one.grad_fn is not None}.values():
        if (made := softmax_of(one)) is not None and not is_transposed(one):
            name, dim, shape = made
            is_last = any(one is other for other in last)
            yield Softmax(name.lower(), dim, shape, f"{case.output_layer()}, {case.place}", is_last)
    for called in case.now.trace.softmaxes:
        if called.result.numel() > 1 and (made := softmax_of(called.result)) is not None:
            _, dim, shape = made
            yield Softmax(called.name, dim, shape, case.at(called.place), False)


@rule("softmax-over-one", "error", "batch")
def softmax_over_one(case: Case) -> Iterator[Seen]:
    """The softmax of a single number is always 1: the output does not depend on the inputs, and nothing is learned.

    Looks at every softmax of a pass: it is taken over a dimension of size 1. A warning where it is inside of the model.
    For one output a sigmoid is meant, or two outputs for two classes.
    """
    for one in softmaxes(case):
        if one.size == 1 and (one.is_last or len(one.shape) > 1):
            fix = "take it over the dimension that is to be divided, or take a sigmoid"
            if one.is_last:
                fix = 'end the model with nn.Linear(..., 1) alone, and give loss="bce_with_logits"'
            yield Seen(
                "a softmax is taken over a single number, and is always 1.",
                f"{one.name} over dimension {one.dim} of {one.shape}, whose size is 1",
                one.where,
                fix,
                level=None if one.is_last else "warning",
            )
            return


@rule("softmax-dim", "error", "batch")
def softmax_dim(case: Case) -> Iterator[Seen]:
    """A softmax over the wrong dimension mixes the samples of a batch, and the scores of one sample do not sum to 1.

    Looks at every softmax of a pass whose input has the samples in its first dimension: it must not be taken over that
    dimension where the result becomes the output of the model or a loss's scores. For (n, classes) it is dim=1. A
    warning where there are no classes, or where it is inside of the model and no other dimension has that size.
    """
    classes = {call.outputs.shape[1] for call in case.now.calls
               if call.name in losses.CLASS_INDEX and call.outputs.dim() > 1}  # fmt: skip
    for one in softmaxes(case):
        if len(one.shape) < 2:
            continue
        is_over_samples = one.dim == 0 and one.size == case.now.samples > 1
        if is_over_samples and (one.is_last or one.size not in one.shape[1:]):
            yield Seen(
                "a softmax is taken over the samples of the batch, not over the classes of each sample.",
                f"{one.name} over dimension 0 of {one.shape}, which counts the samples",
                one.where,
                f"take it over the classes: torch.softmax(x, dim={1 if one.is_last else -1})",
                level=None if one.is_last and classes else "warning",
            )
            return
        if one.is_last and len(one.shape) > 2 and classes and one.dim != 1 and one.size not in classes:
            yield Seen(
                "a softmax is not taken over the classes.",
                f"{one.name} over dimension {one.dim} of {one.shape}, but the loss has its classes in dimension 1",
                one.where,
                "take it over the classes: torch.log_softmax(x, dim=1)",
            )
            return
