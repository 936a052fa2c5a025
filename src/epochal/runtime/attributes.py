"""What modules keep between two calls: all that their attributes lead to."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from operator import is_
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MOST = 100_000  # objects that are looked at: a module may keep a whole data set
_ENDS = (Tensor, str, bytes, int, float, type, np.ndarray, ModuleType, FunctionType, MethodType, BuiltinFunctionType)


class Attributes:
    """All that the attributes of ``modules`` lead to, as it is now; equal to that of later, if nothing was written.

    versions: of tensors, too, and not only which they are. What is kept where Python cannot see it (in C, in slots) is
    not seen, and of more than MOST objects nothing is equal.

    >>> layer = nn.Linear(2, 2)
    >>> before = Attributes([layer])
    >>> before == Attributes([layer])
    True
    >>> layer.calls = 1
    >>> before == Attributes([layer])
    False
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, modules: Iterable[nn.Module], *, versions: bool = False):
        self.objects: list[Any] = []
        self._values: list[Any] = []  # of what changes and stays the same object
        seen: set[int] = set()
        ahead: deque[Any] = deque(modules)
        while ahead and len(self.objects) <= MOST:
            one = ahead.popleft()
            self.objects.append(one)
            if id(one) in seen:
                continue
            seen.add(id(one))
            if versions and isinstance(one, Tensor) and not one.is_inference():
                self._values.append(one._version)
            elif isinstance(one, torch.Generator):
                self._values.append(one.get_state().tolist())
            elif isinstance(one, np.random.Generator | np.random.RandomState | random.Random):
                self._values.append(repr(_state(one)))
            else:
                ahead.extend(_parts(one))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Attributes) or len(self.objects) > MOST:
            return False
        same = len(self.objects) == len(other.objects) and all(map(is_, self.objects, other.objects))
        return same and self._values == other._values


def _parts(one: Any) -> Iterable[Any]:
    if isinstance(one, _ENDS):
        return ()
    if isinstance(one, dict):
        return (*one.keys(), *one.values())
    if isinstance(one, list | tuple | set | frozenset | deque):
        return tuple(one)
    return (vars(one),) if hasattr(one, "__dict__") else ()


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


def own(part: Any) -> dict[str, Any]:
    """The attributes that an object has itself; none of a lazy one that is not ready to say."""
    try:
        return object.__getattribute__(part, "__dict__")
    except Exception:
        return {}


def content(cell: CellType) -> list[Any]:
    """What a closure holds in a cell, if anything yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []
