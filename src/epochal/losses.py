"""Losses by name, what they demand of outputs and targets, and the weight of their mean."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from epochal.errors import LossError, LossShapeError, UnknownNameError

_KNOWN: dict[str, tuple[type[nn.Module], Callable]] = {  # each as torch's module and as torch's function
    "mse": (nn.MSELoss, functional.mse_loss),
    "l1": (nn.L1Loss, functional.l1_loss),
    "smooth_l1": (nn.SmoothL1Loss, functional.smooth_l1_loss),
    "huber": (nn.HuberLoss, functional.huber_loss),
    "cross_entropy": (nn.CrossEntropyLoss, functional.cross_entropy),
    "nll": (nn.NLLLoss, functional.nll_loss),
    "bce": (nn.BCELoss, functional.binary_cross_entropy),
    "bce_with_logits": (nn.BCEWithLogitsLoss, functional.binary_cross_entropy_with_logits),
}
NAMES = {name: module for name, (module, _) in _KNOWN.items()}
# What torch's functions call, after they have broadcast outputs and targets, which makes nodes in the graph.
_MEAN: Any = 1  # torch's number of that reduction
_KERNELS: dict[str, Callable] = {
    "mse": partial(torch._C._nn.mse_loss, reduction=_MEAN),
    "l1": partial(torch._C._nn.l1_loss, reduction=_MEAN),
    "smooth_l1": partial(torch._C._nn.smooth_l1_loss, reduction=_MEAN, beta=1.0),
    "huber": partial(torch._C._nn.huber_loss, reduction=_MEAN, delta=1.0),
}
ELEMENTWISE = frozenset({"mse", "l1", "smooth_l1", "huber", "bce", "bce_with_logits"})
BINARY = frozenset({"bce", "bce_with_logits"})
CLASS_INDEX = frozenset({"cross_entropy", "nll"})
FEW = 256  # targets that Python counts sooner than NumPy does, whose code a model's passes drive out of the caches
_OTHER_INTEGERS = frozenset({torch.bool, torch.int8, torch.int16, torch.int32})


def resolve(loss: str | Callable) -> Callable[[Any, Any], Tensor]:
    """A callable ``(outputs, targets) -> mean`` for a name, a module or a function.

    >>> resolve("mse")
    MSELoss()

    Raises UnknownNameError for an unknown name, LossError for a module that does not give a mean.
    """
    if isinstance(loss, str):
        if loss not in NAMES:
            raise UnknownNameError.of_name("loss", loss, NAMES, where=f"loss={loss!r}")
        return NAMES[loss]()
    if isinstance(loss, type):
        what = f"the loss is the class {loss.__name__}, not an instance of it."
        raise LossError(what, where=f"loss={loss.__name__}", fix=f"give loss={loss.__name__}()")
    if not callable(loss):
        fix = "give a name, an nn.Module or a function f(outputs, targets)"
        raise LossError(f"{type(loss).__name__} is not a loss.", where=f"loss={loss!r}", fix=fix)
    reduction = getattr(loss, "reduction", "mean")
    if reduction not in ("mean", "batchmean"):
        what = f"the loss gives {'a sum' if reduction == 'sum' else 'one value an element'} and not the mean."
        fix = 'leave reduction at "mean"; with objective= you can return any scalar'
        raise LossError(what, where=f"loss={describe(loss)} with reduction={reduction!r}", fix=fix, code="sum-loss")
    return loss


def kernel(name: str | Any) -> Callable[[Any, Any], Tensor] | None:
    """The kernel of a loss given by name, for outputs and targets of one shape; None where it is not any quicker.

    >>> kernel("mse")(torch.ones(4), torch.zeros(4))
    tensor(1.)
    """
    return _KERNELS.get(name) if isinstance(name, str) else None


def kind(loss: Any) -> str | None:
    """The short name of a known loss: torch's module, one derived from it, or the function. None for any other.

    >>> kind(nn.HuberLoss()), kind(print)
    ('huber', None)
    """
    if not isinstance(loss, nn.Module):
        return next((name for name, (_, function) in _KNOWN.items() if function is loss), None)
    named = (name for name, known in NAMES.items() if isinstance(loss, known) and type(loss).forward is known.forward)
    return next(named, None)


def describe(loss: Any) -> str:
    """The loss in words: ``nn.MSELoss``, or the name of the function."""
    if isinstance(loss, nn.Module):
        return f"nn.{type(loss).__name__}" if type(loss) in NAMES.values() else type(loss).__name__
    return getattr(loss, "__name__", type(loss).__name__)


def weight_of(loss: Any, targets: Any, samples: int) -> float | Tensor:
    """How much the mean over a batch counts: its samples; for class indices what torch divides by.

    ``nn.CrossEntropyLoss`` and ``nn.NLLLoss`` leave out the targets that equal ``ignore_index`` and
    weigh the others by class weight (torch's documentation of both), so their means are weighted so too.
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return samples
    is_plain = getattr(loss, "weight", None) is None
    if is_plain and targets.device.type == "cpu":
        if targets.dim() == 1 and len(targets) <= FEW:
            return len(targets) - targets.tolist().count(ignore_index(loss))
        return int(np.count_nonzero(targets.numpy() != ignore_index(loss)))
    counted = targets != ignore_index(loss)
    if is_plain:
        return counted.sum()
    return (loss.weight[torch.where(counted, targets, 0)] * counted).sum()


def may_weigh_nothing(loss: Any) -> bool:
    """Whether a class has the weight 0; torch divides by the sum of weights, and the gradient of 0 / 0 is NaN.

    >>> may_weigh_nothing(nn.CrossEntropyLoss()), may_weigh_nothing(nn.NLLLoss(torch.tensor([0.0, 1.0])))
    (False, True)
    """
    weights = getattr(loss, "weight", None) if kind(loss) in CLASS_INDEX else None
    return weights is not None and bool((weights == 0).any())


def ignore_index(loss: Any) -> int:
    """The class index that does not count; torch's default is -100."""
    return getattr(loss, "ignore_index", -100)


def check_shapes(loss: Any, outputs: Tensor, targets: Tensor) -> None:
    """Refuses outputs and targets that torch would broadcast into something else than was meant."""
    if outputs.shape == targets.shape:
        return
    fix = "let the model give one output for each target"
    if outputs.numel() == targets.numel():
        shape = ", ".join(["-1", *map(str, outputs.shape[1:])]) if outputs.dim() else "()"
        lacks_last = outputs.dim() == targets.dim() + 1 and outputs.shape[-1] == 1
        change = f"unsqueeze({outputs.dim() - 1})" if lacks_last else f"reshape({shape})"
        fix = f"give targets the shape {_shape(outputs)}, for example y.{change}"
    elif not targets.is_floating_point() and targets.shape == outputs.shape[:1]:
        fix += ', or give loss="cross_entropy" if these are classes'
    what = "the loss is computed over tensors of different shapes."
    raise LossShapeError(what, where=_given(loss, outputs, targets), fix=fix, code="broadcast-loss")


def check_scalar(value: Any, where: str) -> None:
    """Refuses what cannot be differentiated as a loss."""
    if not isinstance(value, Tensor):
        fix = "return the scalar tensor itself, not its .item()"
        raise LossError(
            f"the loss is a {type(value).__name__}, not a tensor.", where=where, fix=fix, code="detached-loss"
        )
    if value.numel() != 1:
        fix = "return the mean, for example loss.mean()"
        raise LossError("the loss is not a scalar.", where=f"{where}; its shape is {_shape(value)}", fix=fix)
    if value.is_complex():
        raise LossError("the loss is complex.", where=where, fix="return a real scalar, for example loss.abs()")


def check_classes(loss: Any, outputs: Any, targets: Any, *, of: str) -> None:
    """Refuses class indices that are not among the classes; ``of``: what the targets are all of, batch or data.

    Waits for the device: it is for the first batch.
    """
    if kind(loss) not in CLASS_INDEX or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    if targets.is_floating_point():
        if outputs.shape == targets.shape and kind(loss) == "cross_entropy":
            return  # probabilities
        where = f"targets {_type(targets)} {_shape(targets)}; loss {describe(loss)}"
        fix = "give the class of each sample as an integer, for example y.long()"
        raise LossError("class indices must be integers.", where=where, fix=fix, code="target-format")
    if outputs.dim() > 1 and targets.shape == (*outputs.shape[:1], 1, *outputs.shape[2:]):
        what = "the class indices have one dimension too many."
        fix = "drop the dimension of size 1, for example y.squeeze(1)"
        raise LossShapeError(what, where=_given(loss, outputs, targets), fix=fix, code="target-format")
    classes = outputs.shape[1] if outputs.dim() > 1 else outputs.shape[0]
    if (wrong := wrong_class(targets, classes, ignore_index(loss))) is not None:
        target, place, fix, code = wrong
        what = f"a target is outside the {classes} classes that the model gives scores for."
        where = f"target {target} at position {place} of the {of}, outputs {_shape(outputs)}"
        raise LossError(what, where=where, fix=fix, code=code)


def wrong_class(targets: Tensor, classes: int, ignored: int) -> tuple[int, int, str, str] | None:
    """The first class index that is not among so many classes, its position, how to mend it, and the code of the
    mistake.

    >>> wrong_class(torch.tensor([0, 1, 2, 3]), 3, -100)
    (3, 3, 'number the classes from 0 to 2, or give the model 4 outputs', 'too-few-outputs')
    """
    wrong = ((targets < 0) | (targets >= classes)) & (targets != ignored)
    if not wrong.any():
        return None
    known, highest = targets[targets != ignored], int(targets.max())
    from_one = known.min() == 1 and highest == classes
    # Classes that go on where the model's end are real ones; a lone number far beyond them is a marker.
    is_short = not from_one and known.min() >= 0 and highest < 2 * classes + 8
    is_short = is_short and bool((torch.bincount(known.flatten(), minlength=highest + 1)[classes:] > 0).all())
    fix = f"number the classes from 0 to {classes - 1}"
    fix += ": they seem to start at 1, give y - 1" if from_one else f", or give the model {highest + 1} outputs"
    if not from_one and not is_short:
        fix = f"{fix.partition(',')[0]}; a marker of what does not count is given to the loss as ignore_index="
    place = int(wrong.flatten().nonzero()[0])
    return int(targets.flatten()[place]), place, fix, "too-few-outputs" if is_short else "label-out-of-range"


def check_dtype(loss: Any, targets: Any) -> None:
    """Refuses targets of a type that torch cannot compare with."""
    if not isinstance(targets, Tensor):
        return
    if kind(loss) in CLASS_INDEX and targets.dtype in _OTHER_INTEGERS:
        where = f"targets {_type(targets)}; loss {describe(loss)}"
        raise LossError(
            "class indices must be 64-bit integers.", where=where, fix="give y.long()", code="target-format"
        )
    if kind(loss) in BINARY and not targets.is_floating_point():
        what = f"{describe(loss)} needs floating point targets."
        raise LossError(what, where=f"targets {_type(targets)}", fix="give y.float()", code="target-format")


def _given(loss: Any, outputs: Tensor, targets: Tensor) -> str:
    return f"outputs {_shape(outputs)}, targets {_shape(targets)}; loss {describe(loss)}"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
