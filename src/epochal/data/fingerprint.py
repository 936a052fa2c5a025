"""Whether the data of a resumed run are those that it was begun with."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from epochal.data.given import GivenLoader
from epochal.data.loader import Loader
from epochal.data.shared import SharedLoader
from epochal.data.sources import Arrays, Samples, Source, Stream

WHOLE = 256 * 2**20  # bytes that are hashed in full: a quarter of a second at most
PART = 64 * 2**20  # bytes of evenly spaced rows, of what is larger
MANY = 16  # of a longer list the parts are not looked at
_CHUNK = 2**22  # bytes brought to the host at once


def fingerprint(data: Source | DataLoader | Loader | GivenLoader | SharedLoader) -> dict[str, str | int]:
    """Plain values that differ where the data do. No sample is fetched, and no generator is touched.

    Arrays are hashed (sha256 over the bytes of all parts, or of evenly spaced rows if there are more than
    256 MiB; ``hashed`` says which). Of a data set it is the type and the length, of a stream the type, of a
    DataLoader also how it makes batches.

    >>> fingerprint(Loader((torch.zeros(6, 2), torch.arange(6))))["part 0"]
    '(6, 2) float32'
    """
    if isinstance(data, Loader | GivenLoader | SharedLoader):
        data = data.source if isinstance(data, Loader) else data.loader
    if isinstance(data, DataLoader):
        return {
            **fingerprint(_source(data.dataset)),
            "batch_size": str(data.batch_size),
            "sampler": type(data.batch_sampler if data.batch_size is None else data.sampler).__name__,
            "drop_last": str(data.drop_last),
            "num_workers": data.num_workers,
            **({"persistent_workers": "True"} if data.persistent_workers else {}),
        }
    if isinstance(data, Arrays):
        return _of_arrays(data)
    facts: dict[str, str | int] = {"data": type(data.dataset).__name__}
    if isinstance(data, Samples) and hasattr(data.dataset, "__len__"):
        facts["samples"] = len(data.dataset)
        if isinstance(data.dataset, Subset):  # another division of the same data is another data set
            facts["indices"] = hashlib.sha256(repr(list(data.dataset.indices)).encode()).hexdigest()
    return facts


def held(data: Loader | GivenLoader | SharedLoader) -> dict[str, str]:
    """The arrays in the attributes of a data set of the user's own, and in those of data sets within it: a hash of
    each. They may be its data; no sample is fetched.

    >>> class Squares(torch.utils.data.Dataset):
    ...     def __init__(self):
    ...         self.roots = torch.arange(3.0)
    ...     def __len__(self):
    ...         return 3
    ...     def __getitem__(self, i):
    ...         return self.roots[i] ** 2
    >>> list(held(Loader(Squares())))
    ['Squares.roots']
    """
    source = data.source if isinstance(data, Loader) else _source(getattr(data.loader, "dataset", None))
    found: dict[str, str] = {}
    if isinstance(source, Samples):
        _look_into(source.dataset, type(source.dataset).__name__, found, depth=3)
    return found


def _look_into(dataset: Any, path: str, found: dict[str, str], depth: int) -> None:
    for name, value in getattr(dataset, "__dict__", {}).items():
        for number, one in enumerate(value if isinstance(value, list | tuple) and len(value) <= MANY else [value]):
            where = f"{path}.{name}" + (f"[{number}]" if one is not value else "")
            if isinstance(one, Dataset) and depth:
                _look_into(one, where, found, depth - 1)
            elif (numbers := _numbers(one)) is not None:
                digest = hashlib.sha256()
                _add(digest, numbers, _rows_to_hash(Arrays((numbers,))))
                found[where] = f"{tuple(numbers.shape)} {numbers.dtype} {digest.hexdigest()}"


def _numbers(value: Any) -> Tensor | None:
    """An array as a tensor with rows; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" and value.dtype.isnative and value.flags.writeable:
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or not value.numel():
        return None
    return value.reshape(-1) if value.dim() == 0 else value


def _source(dataset: Any) -> Source:
    if type(dataset) is TensorDataset:
        return Arrays(dataset.tensors)
    return Stream(dataset) if isinstance(dataset, IterableDataset) else Samples(dataset)


def _of_arrays(arrays: Arrays) -> dict[str, str | int]:
    names = list(arrays.parts) if isinstance(arrays.parts, dict) else range(len(arrays.tensors))
    facts: dict[str, str | int] = {"data": "arrays", "samples": len(arrays)}
    for name, part in zip(names, arrays.tensors):
        facts[f"part {name}"] = f"{tuple(part.shape)} {str(part.dtype).removeprefix('torch.')}"
    rows, digest = _rows_to_hash(arrays), hashlib.sha256()
    for part in arrays.tensors:
        _add(digest, part, rows)
    hashed = "all rows" if len(rows) == len(arrays) else f"{len(rows)} evenly spaced rows"
    return {**facts, "hashed": hashed, "sha256": digest.hexdigest()}


def _rows_to_hash(arrays: Arrays) -> range | Tensor:
    """All rows, or as many as fit into :data:`PART`, the first and the last among them."""
    if arrays.nbytes <= WHOLE:
        return range(len(arrays))
    count = min(len(arrays), max(2, PART * len(arrays) // arrays.nbytes))
    return torch.arange(count) * (len(arrays) - 1) // max(1, count - 1)


def _add(digest: Any, part: Tensor, rows: range | Tensor) -> None:
    """Adds the bytes of these rows, a few MiB at a time."""
    part = part.detach()
    step = max(1, _CHUNK * max(1, len(part)) // max(1, part.nbytes))
    for i in range(0, len(rows), step):
        some = rows[i : i + step]
        chunk = part[some.start : some.stop] if isinstance(some, range) else part[some.to(part.device)]
        chunk = chunk.resolve_conj().resolve_neg().cpu().contiguous().flatten()
        digest.update(chunk.view(torch.uint8).numpy().data)
