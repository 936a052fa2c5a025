"""Where tensors lie in memory: those that share it are stored once, and share it again when they are read."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from epochal.runtime.shards import is_sharded

_INTEGERS = "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64"
_FLOATS = "float16 bfloat16 float32 float64 complex64 float8_e4m3fn float8_e5m2"
_OTHERS = "complex32 complex128 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2"
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in f"{_INTEGERS} {_FLOATS} {_OTHERS}".split()}
# Not every reader of safetensors knows the others, so they are stored as bytes.
HELD = {DTYPES[name] for name in f"{_INTEGERS} {_FLOATS}".split()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class View:
    """A tensor, where it stood first, and its entry in the tree, which is filled in at the end."""

    tensor: Tensor
    path: tuple
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> int:
        return self.tensor.data_ptr()

    @property
    def extent(self) -> int:
        """Bytes from the first to the last one, gaps between elements too."""
        steps = sum((size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.stride()))
        return (steps + 1) * self.tensor.itemsize if self.tensor.numel() else 0


Found = defaultdict[tuple, dict[tuple, View]]  # by memory, then by layout


def place(views: list[View], tensors: dict[str, Tensor]) -> None:
    """Stores the views of one memory: together if they make up most of what they span, otherwise each by itself."""
    if is_sharded(views[0].tensor):
        for view in views:
            view.record["$tensor"] = _add(view.tensor, view.path, tensors)
        return
    together = [view for view in views if view.tensor.nbytes <= view.extent]  # not the expanded ones
    if len(together) > 1:
        span = max(view.start + view.extent for view in together) - min(view.start for view in together)
        if span <= 2 * sum(view.tensor.nbytes for view in together):
            _place_flat(together, tensors)
            views = [view for view in views if view.tensor.nbytes > view.extent]
    for view in views:
        tensor = view.tensor
        if len(views) > 1 or view.extent != tensor.nbytes or not tensor.numel():
            tensor = tensor.clone()  # memory of its own, without gaps
        if tensor.is_contiguous() and tensor.dtype in HELD:
            view.record["$tensor"] = _add(tensor, view.path, tensors)
        else:
            _place_flat([replace(view, tensor=tensor)], tensors)


def _place_flat(views: list[View], tensors: dict[str, Tensor]) -> None:
    """Stores the memory that the views cover once, and of each view where it lies in there."""
    dtypes = {view.tensor.dtype for view in views}
    dtype = views[0].tensor.dtype if len(dtypes) == 1 and dtypes <= HELD else torch.uint8
    storage = max((view.tensor.untyped_storage() for view in views), key=lambda storage: storage.nbytes())
    start, end = min(view.start for view in views), max(view.start + view.extent for view in views)
    if len(dtypes) > 1:  # a place that is a whole number of elements away from each of them
        start -= (start - storage.data_ptr()) % 16
    offset, count = (start - storage.data_ptr()) // dtype.itemsize, (end - start) // dtype.itemsize
    flat = torch.empty(0, dtype=dtype, device=views[0].tensor.device).set_(storage, offset, (count,), (1,))
    name = _add(flat, views[0].path, tensors)
    for view in views:
        tensor, offset = view.tensor, (view.start - start) // view.tensor.itemsize
        view.record["$view"] = [name, NAMES[tensor.dtype], list(tensor.shape), list(tensor.stride()), offset]


def _add(tensor: Tensor, path: tuple, tensors: dict[str, Tensor]) -> str:
    """Files the tensor under its path; where two entries have one (``1`` and ``"1"``), under a name like it."""
    name = name_of(path)
    while name in tensors:
        name += f"#{len(tensors)}"
    tensors[name] = tensor
    return name


def name_of(path: tuple) -> str:
    return ".".join(map(str, path)).encode("utf-8", "backslashreplace").decode()
