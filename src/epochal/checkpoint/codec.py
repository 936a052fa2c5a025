"""Any state as tensors plus JSON, and back, exactly. No pickle, no class names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epochal.errors import CheckpointError

_MARKS = ("$tensor", "$array", "$tuple", "$dict", "$float")


def encode(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """The state as JSON, and its tensors by the names that the JSON gives them.

    Takes dicts (with keys that are strings, numbers, booleans or None), lists, tuples, tensors, numpy
    arrays, numbers, strings, booleans and None; anything else is a CheckpointError that says where it stands.

    >>> encode({"step": 3, "betas": (0.9, 0.99)})
    ({'step': 3, 'betas': {'$tuple': [0.9, 0.99]}}, {})
    """
    tensors: dict[str, Tensor] = {}
    return _encode(state, "state", tensors), tensors


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | str) or (isinstance(value, int) and not isinstance(value, np.generic)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        return {"$tensor": _add(value.detach(), path, tensors)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        tensor = torch.from_numpy(value.view(np.int64) if value.dtype == np.uint64 else value)
        return {"$array": _add(tensor, path, tensors), "dtype": value.dtype.str}
    if isinstance(value, list):
        return [_encode(part, f"{path}.{i}", tensors) for i, part in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [_encode(part, f"{path}.{i}", tensors) for i, part in enumerate(value)]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(part, f"{path}.{key}", tensors) for key, part in value.items()}
        pairs = [[_encode(k, path, tensors), _encode(v, f"{path}.{k}", tensors)] for k, v in value.items()]
        return {"$dict": pairs}
    raise CheckpointError(
        f"a {type(value).__name__} cannot be saved.",
        where=path,
        fix="keep numbers, strings, tensors, lists and dicts of them in state_dict()",
    )


def _add(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    """Files the tensor under its path, or, where two entries have one (``1`` and ``"1"``), a name like it."""
    name = path if path not in tensors else f"{path}#{len(tensors)}"
    tensors[name] = tensor
    return name


def decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`encode` was given."""
    if isinstance(tree, list):
        return [decode(part, tensors) for part in tree]
    if not isinstance(tree, dict):
        return tree
    mark = next(iter(tree), None)
    if mark not in _MARKS:
        return {key: decode(part, tensors) for key, part in tree.items()}
    content = tree[mark]
    if mark == "$tensor":
        return tensors[content]
    if mark == "$array":
        return tensors[content].numpy().view(np.dtype(tree["dtype"]))
    if mark == "$tuple":
        return tuple(decode(part, tensors) for part in content)
    if mark == "$dict":
        return {decode(key, tensors): decode(part, tensors) for key, part in content}
    return float(content)
