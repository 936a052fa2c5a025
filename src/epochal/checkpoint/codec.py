"""Any state as tensors plus JSON, and back, exactly. No code, no class names.

What JSON cannot say itself stands in a dict with one key, a mark: ``{"$tuple": [1, 2]}``. All marks are read in
``_decode_mark``; a dict of the user's with a key that begins with ``$`` is written as ``$dict``, so none is mistaken.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from epochal.checkpoint.memory import DTYPES, HELD, NAMES, Found, View, name_of, place
from epochal.errors import CheckpointError
from epochal.runtime.shards import is_sharded

_DEPTH = 64  # far deeper than any state, far from the end of the interpreter's stack
_COMPRESSED = {
    "$csr": (torch.sparse_csr, "crow_indices", "col_indices"),
    "$csc": (torch.sparse_csc, "ccol_indices", "row_indices"),
    "$bsr": (torch.sparse_bsr, "crow_indices", "col_indices"),
    "$bsc": (torch.sparse_bsc, "ccol_indices", "row_indices"),
}
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|mtia|hpu|meta)(:\d{1,3})?")
_ARRAY = re.compile(r"[<>|](b1|[iu][1248]|[fc]\d{1,2}|[SU][1-9]\d{0,8}|[mM]8(\[([1-9]\d{0,8})?[a-zA-Z]{1,2}\])?)")
_FIXES: tuple[tuple[Any, str], ...] = (
    (Enum, "save its .name or .value"),
    (torch.Generator, "save generator.get_state()"),
    (Tensor, "save a plain tensor, for example value.to_dense() or value.full_tensor()"),
    (tuple, "save tuple(value)"),
    (set | frozenset, "save sorted(value)"),
    (Mapping, "save dict(value)"),
    (object, "keep numbers, strings, tensors, lists and dicts of them in state_dict()"),
)
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, struct.error)


def encode(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """The state as JSON, and its tensors by the names that the JSON gives them.

    Takes dicts, OrderedDicts and Counters (keys: strings, numbers, booleans, None, tuples of them), lists, tuples,
    tensors, numpy arrays and numbers, numbers, strings, bytes, booleans, None, torch.dtype, torch.device, and members
    of an IntEnum or StrEnum (as their values). Anything else is a CheckpointError that says where it stands. The
    tensors are contiguous and strided, of a type that safetensors holds, on the device where they were, and no two
    share memory. They are the state's own memory where that is possible: copy them before the state moves on. A
    sharded tensor (DTensor) stays one.

    >>> encode({"step": 3, "betas": (0.9, 0.99)})
    ({'step': 3, 'betas': {'$tuple': [0.9, 0.99]}}, {})
    """
    found: Found = defaultdict(dict)
    tree = _encode(state, ("state",), found)
    tensors: dict[str, Tensor] = {}
    for views in found.values():
        place(list(views.values()), tensors)
    return tree, tensors


def _encode(value: Any, path: tuple, found: Found) -> Any:
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else {"$int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if kind is str:
        return value if _is_text(value) else {"$str": value.encode("utf-8", "surrogatepass").hex()}
    if len(path) > _DEPTH:
        what = f"the state is nested deeper than {_DEPTH} levels."
        raise CheckpointError(
            what, where=name_of((*path[:8], "..")), fix="look for a list or dict that contains itself"
        )
    if kind is list or kind is tuple:
        # Python's generator is 625 numbers, and it is saved often: they are looked at all at once.
        small = set(map(type, value)) == {int} and min(value) >= -(2**63) and max(value) < 2**64
        parts = list(value) if small else [_encode(part, (*path, i), found) for i, part in enumerate(value)]
        return parts if kind is list else {"$tuple": parts}
    if isinstance(value, Tensor):
        return _encode_tensor(value, path, found)
    if kind in (dict, OrderedDict, Counter):
        return _encode_mapping(value, path, found)
    return _encode_rare(value, path, found)


def _encode_rare(value: Any, path: tuple, found: Found) -> Any:
    kind = type(value)
    if kind is np.ndarray and _ARRAY.fullmatch(value.dtype.str):
        content = torch.from_numpy(np.frombuffer(bytearray(value.tobytes()), np.uint8))
        return {"$array": [_encode_tensor(content, path, found), value.dtype.str, list(value.shape)]}
    if isinstance(value, np.generic) and value.dtype.kind in "biufcmM":
        return {"$scalar": [value.dtype.str, value.tobytes().hex()]}
    if _is_value(value):
        return _encode(value.value, path, found)
    if kind is complex:
        return {"$complex": [_encode(value.real, path, found), _encode(value.imag, path, found)]}
    if kind is bytes:
        return {"$bytes": value.hex()}
    if kind is torch.dtype and value in NAMES:
        return {"$dtype": NAMES[value]}
    if kind is torch.device and _DEVICE.fullmatch(str(value)):
        return {"$device": str(value)}
    raise _refusal(value, path)


def _encode_mapping(value: Mapping, path: tuple, found: Found) -> Any:
    pairs = [(key.value if _is_value(key) else key, part) for key, part in value.items()]
    for key, _ in pairs:
        if not _is_key(key):
            what = f"a dict with a key of the type {type(key).__name__} cannot be saved."
            fix = "use keys that are strings, numbers of up to 64 bits, None or tuples of them"
            raise CheckpointError(what, where=name_of(path), fix=fix)
    if all(type(key) is str and not key.startswith("$") and _is_text(key) for key, _ in pairs):
        entries: Any = {key: _encode(part, (*path, key), found) for key, part in pairs}
    else:
        entries = {"$dict": [[_encode(key, path, found), _encode(part, (*path, key), found)] for key, part in pairs]}
    kind = type(value)
    # A module's state dict carries the versions of its layers; some layers load differently, or not, without them.
    if kind is OrderedDict and hasattr(value, "_metadata"):
        return {"$state_dict": [entries, _encode(dict(value._metadata), (*path, "_metadata"), found)]}
    return entries if kind is dict else {"$ordered" if kind is OrderedDict else "$counter": entries}


def _is_value(value: Any) -> bool:
    """Whether it is an enum member that equals its value."""
    return isinstance(value, Enum) and value == value.value


def _is_key(key: Any) -> bool:
    if type(key) is int:
        return key.bit_length() <= 64  # larger ones can be made to collide, and then a dict takes forever
    return key is None or type(key) in (str, float, bool) or (type(key) is tuple and all(map(_is_key, key)))


def _is_text(value: str) -> bool:  # JSON cannot hold a lone surrogate
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _encode_tensor(value: Tensor, path: tuple, found: Found) -> dict[str, Any]:
    if is_sharded(value):
        return _encode_sharded(value, path, found)
    plain = type(value) in (Tensor, nn.Parameter) and not (value.is_meta or value.is_quantized or value.is_nested)
    if not plain or value.dtype not in NAMES:
        raise _refusal(value, path)
    tensor = value.detach()

    def parts(*names: str) -> list[Any]:
        return [_encode_tensor(getattr(tensor, name)(), (*path, name.lstrip("_")), found) for name in names]

    if tensor.layout is torch.sparse_coo:
        return {"$coo": [list(tensor.shape), tensor.is_coalesced(), *parts("_indices", "_values")]}
    for mark, (layout, *indices) in _COMPRESSED.items():
        if tensor.layout is layout:
            return {mark: [list(tensor.shape), *parts(*indices, "values")]}
    if tensor.layout is not torch.strided or View(tensor, path).extent > tensor.untyped_storage().nbytes():
        raise _refusal(value, path)  # where the extent is larger, its memory was given back
    tensor = tensor.resolve_conj().resolve_neg()
    view, storage = View(tensor, path), tensor.untyped_storage()
    # Tied tensors have one place: memory and layout. A tensor without elements may have no address.
    memory = storage.data_ptr() if tensor.numel() else -storage._cdata
    layout = (tensor.dtype, view.start, tensor.shape, tensor.stride())
    return found[tensor.device, memory].setdefault(layout, view).record


def _encode_sharded(value: Any, path: tuple, found: Found) -> dict[str, Any]:
    """One entry, as if it were whole; what of it lies where is the business of whoever writes it."""
    if value.dtype not in HELD:
        raise _refusal(value, path)
    storage = value.to_local().untyped_storage()
    place = ("sharded", storage.data_ptr() or -storage._cdata, value.to_local().storage_offset())
    return found[place].setdefault((value.dtype, value.shape), View(value.detach(), path)).record


def _refusal(value: Any, path: tuple) -> CheckpointError:
    what = f"a value of the type {type(value).__name__}"
    if isinstance(value, Tensor):
        what += f" ({value.dtype}, {value.layout}, on {value.device})"
    elif isinstance(value, np.ndarray):
        what += f" of {value.dtype}"
    fix = next(fix for kinds, fix in _FIXES if isinstance(value, kinds))
    return CheckpointError(f"{what} cannot be saved.", where=name_of(path), fix=fix)


@dataclass(frozen=True)
class _Stored:
    """The tensors of a file, and what was made of them: one entry, one tensor."""

    tensors: Mapping[str, Tensor]
    made: dict[Any, Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        if name not in self.made:
            self.made[name] = self.tensors[name]
        return self.made[name]

    def view(self, name: str, dtype: torch.dtype, shape: tuple, stride: tuple, offset: int) -> Tensor:
        """A part of a flat tensor, if it lies inside."""
        flat, key = self.tensor(name), (name, dtype, shape, stride, offset)
        if key in self.made:
            return self.made[key]
        if flat.layout is not torch.strided or flat.dim() != 1 or flat.dtype not in (dtype, torch.uint8):
            raise ValueError("a view is taken of a tensor that is not flat, or of another type")
        if flat.dtype is torch.uint8 and (flat.data_ptr() % 16 or flat.storage_offset() % 16):
            flat = self.made[name] = flat.clone()  # a file has bytes at any address, numbers need a multiple
        flat = flat[: flat.nbytes // dtype.itemsize * dtype.itemsize // flat.itemsize].view(dtype)
        count, last = math.prod(shape), offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if count > flat.numel() or (count and last >= flat.numel()):
            raise ValueError("a view reaches beyond its tensor")
        return self.made.setdefault(key, flat.as_strided(shape, stride, flat.storage_offset() + offset))


def decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`encode` was given. Tied tensors are one tensor again, and views of one memory share it.

    Raises CheckpointError for anything that ``encode`` does not write, before memory is touched or taken for it.

    >>> decode({"step": 3, "betas": {"$tuple": [0.9, 0.99]}}, {})
    {'step': 3, 'betas': (0.9, 0.99)}
    """
    return _decode(tree, ("state",), _Stored(tensors))


def _decode(tree: Any, path: tuple, stored: _Stored) -> Any:
    try:
        if type(tree) is list:
            return [x if type(x) is int else _decode(x, (*path, i), stored) for i, x in enumerate(tree)]
        if type(tree) is not dict:
            return tree
        if not any(key.startswith("$") for key in tree):
            return {key: _decode(part, (*path, key), stored) for key, part in tree.items()}
        ((mark, content),) = tree.items()
        return _decode_mark(mark, content, path, stored)
    except _MALFORMED as error:
        fix = "use an older checkpoint"
        raise CheckpointError(f"the state is malformed: {error}.", where=name_of(path), fix=fix) from error


def _decode_mark(mark: str, content: Any, path: tuple, stored: _Stored) -> Any:
    def inner(tree: Any, name: object = 0) -> Any:
        return _decode(tree, (*path, name), stored)

    match mark, content:
        case "$tensor", str(name):
            return stored.tensor(name)
        case "$view", [str(name), str(dtype), list(shape), list(stride), offset]:
            return stored.view(name, DTYPES[dtype], _sizes(shape), _sizes(stride), _sizes([offset])[0])
        case "$tuple", list():
            return tuple(_decode(content, path, stored))
        case "$dict", list():
            entries = {inner(key): inner(part, key) for key, part in content}
            if len(entries) != len(content) or not all(map(_is_key, entries)):
                raise ValueError("a key of a dict is there twice, or is not one")
            return entries
        case "$state_dict", [dict(entries), dict(metadata)]:
            state, versions = inner(entries), inner(metadata, "_metadata")
            if not all(type(part) is dict for part in (state, versions, *versions.values())):
                raise ValueError("a state dict or the version of a layer is no dict")
            state = OrderedDict(state)
            setattr(state, "_metadata", versions)  # noqa: B010 (a type checker knows no such attribute)
            return state
        case "$ordered" | "$counter", dict():
            if type(entries := inner(content)) is not dict:
                raise ValueError("a kind of dict holds none")
            return OrderedDict(entries) if mark == "$ordered" else Counter(entries)
        case "$int", str():
            return int(content, 16)
        case "$float", str():
            return struct.unpack(">d", bytes.fromhex(content))[0]
        case "$complex", [real, imag]:
            return complex(inner(real), inner(imag))
        case "$str", str():
            return bytes.fromhex(content).decode("utf-8", "surrogatepass")
        case "$bytes", str():
            return bytes.fromhex(content)
        case "$dtype", str():
            return DTYPES[content]
        case "$device", str() if _DEVICE.fullmatch(content):
            return torch.device(content)
        case "$array", [part, str(dtype), list(shape)] if _ARRAY.fullmatch(dtype):
            return inner(part).cpu().numpy().copy().view(np.dtype(dtype)).reshape(_sizes(shape))
        case "$scalar", [str(dtype), str(data)] if _ARRAY.fullmatch(dtype):
            (scalar,) = np.frombuffer(bytes.fromhex(data), np.dtype(dtype))
            return scalar
        case "$coo", [list(shape), bool(coalesced), indices, values]:
            parts = inner(indices), inner(values), _sizes(shape)
            return torch.sparse_coo_tensor(*parts, check_invariants=True, is_coalesced=coalesced)
        case "$csr" | "$csc" | "$bsr" | "$bsc", [list(shape), compressed, plain, values]:
            parts, layout = (inner(compressed), inner(plain), inner(values)), _COMPRESSED[mark][0]
            return torch.sparse_compressed_tensor(*parts, _sizes(shape), layout=layout, check_invariants=True)
    raise ValueError(f"{mark[:20]!r} is not written like this")


def _sizes(numbers: list) -> tuple[int, ...]:
    if len(numbers) > 64 or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("a shape is not one")
    return tuple(numbers)


def dumps(tree: Any) -> bytes:
    """The JSON of :func:`encode` as bytes; the same tree gives the same bytes.

    Spaces at the end see to it that there are eight bytes for each list and dict. So a small file cannot fill the
    memory with empty lists.
    """
    data = msgspec.json.encode(tree)
    return data.ljust(_least(data))


def _least(data: bytes) -> int:
    return 8 * (data.count(b"{") + data.count(b"["))


def loads(data: bytes) -> Any:
    """Reads what :func:`dumps` wrote, byte for byte; CheckpointError for any other JSON, and what is none.

    >>> loads(dumps({"step": [3, 0.5]}))
    {'step': [3, 0.5]}
    """
    try:
        if len(data) < _least(data):
            raise ValueError("it holds more lists than it has room for")
        tree = msgspec.json.decode(data)
        if dumps(tree) != data:  # a key twice, a number in other words, spaces
            raise ValueError("it is not written as epochal writes it")
        return tree
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        what = f"the state cannot be read: {error}."
        raise CheckpointError(what, where="the JSON of a checkpoint", fix="use an older checkpoint") from error
