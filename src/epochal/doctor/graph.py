"""What stands in the graph of autograd: what made a tensor, what lies between two, and where it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_SHAPES = {
    "View", "UnsafeView", "Reshape", "ReshapeAlias", "Squeeze", "Unsqueeze", "T", "Transpose", "Permute", "Clone",
    "Expand", "ToCopy", "Alias", "Slice", "Select", "Split", "Unbind",
}  # fmt: skip


def softmax_of(tensor: Tensor) -> tuple[str, int, tuple[int, ...]] | None:
    """Of what a softmax made: its name, its dimension, and the shape of its result. (What the graph has saved is not
    touched: to get it back may run a checkpoint again.)
    """
    node = maker(tensor)
    if node is None or _operation(node) not in ("Softmax", "LogSoftmax"):
        return None
    shape = tuple(node._input_metadata[0].shape)
    dim = int(node._saved_dim)
    return _operation(node), (dim - 2**64 if dim >= 2**63 else dim) % max(1, len(shape)), shape


def maker(tensor: Tensor, past: Sequence[str] = ()) -> Any:
    """The node of the graph that made its numbers, past what only changes its shape; None of a leaf.

    past: names of more operations that do not count.
    """
    node = tensor.grad_fn
    while node is not None and (_operation(node) in _SHAPES or _operation(node) in past):
        before = [one for one, _ in node.next_functions if one is not None]
        if len(before) != 1:
            return node
        node = before[0]
    return node


def is_transposed(tensor: Tensor) -> bool:
    """Whether its dimensions were exchanged since its numbers were made."""
    node, last = tensor.grad_fn, maker(tensor)
    while node is not None and node is not last:
        if _operation(node) in ("T", "Transpose", "Permute"):
            return True
        node = node.next_functions[0][0]
    return False


def made_by(tensor: Tensor, past: Sequence[str] = ()) -> str:
    """The name of the operation that made it, ``Softmax`` say; empty of a leaf."""
    node = maker(tensor, past)
    return "" if node is None else _operation(node)


def _operation(node: Any) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")


def leaves(tensor: Tensor) -> tuple[set[int], bool]:
    """The ids of all tensors that a backward pass from here gives a gradient, and whether more may be hidden: a
    function of somebody's own, as a reentrant checkpoint is, can go back to tensors that the graph does not show.
    """
    nodes = list(_graph(tensor))
    is_opaque = any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in nodes)
    return set(map(id, ends(tensor))), is_opaque


def ends(tensor: Tensor) -> list[Tensor]:
    """The tensors that a backward pass from here gives a gradient."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    return [node.variable for node in _graph(tensor) if getattr(node, "variable", None) is not None]


def operations_between(tensor: Tensor, earlier: Tensor) -> set[str] | None:
    """What autograd calls the operations on the way from one tensor to another; None where there is no way."""
    after: dict[Any, list[Any]] = {}
    for node in _graph(tensor):
        for one, _ in node.next_functions:
            after.setdefault(one, []).append(node)
    seen, ahead = set[Any](), [earlier.grad_fn]
    while ahead:
        new = [one for one in after.get(ahead.pop(), ()) if one not in seen]
        seen.update(new)
        ahead += new
    return {node.name() for node in seen} if seen else None


def _graph(tensor: Tensor) -> Iterator[Any]:
    """The nodes that a backward pass from here goes through."""
    seen, ahead = set(), [tensor.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        ahead += [one for one, _ in node.next_functions]
