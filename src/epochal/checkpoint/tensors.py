"""Tensors as the bytes of a safetensors file, and back.

The library reads; epochal writes the format itself, because the library copies every tensor to do it and puts its
metadata in a random order: here equal tensors give equal bytes, and nothing is copied.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import safetensors
import torch
from safetensors.torch import load
from torch import Tensor

from epochal.checkpoint.files import Data
from epochal.errors import CheckpointError

DTYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64", torch.complex64: "C64",
    torch.float32: "F32", torch.int32: "I32", torch.uint32: "U32",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int16: "I16", torch.uint16: "U16",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip


def chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[Data]:
    """What a file that holds the tensors consists of: its header, and the memory of each tensor.

    tensors: contiguous, on the host. Sorted by the size of their entries, then by name, so that each is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda named: (-named[1].element_size(), named[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    begin = 0
    for name, tensor in ordered:
        offsets = [begin, begin := begin + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *(_memory(tensor) for _, tensor in ordered if tensor.numel())]


def _memory(tensor: Tensor) -> Data:
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # a lone element may have any stride
    array = flat.view(torch.uint8).numpy()
    return (array if sys.byteorder == "little" else array.view(f"u{tensor.element_size()}").byteswap()).data


def parse(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError if it is none."""
    try:
        return dict(sorted(load(data).items()))  # the library gives them in a random order
    except (safetensors.SafetensorError, AssertionError, KeyError, MemoryError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"it is not a safetensors file: {error}.", where=where, fix="give a .safetensors file, copied whole"
        ) from error


def metadata(data: bytes) -> dict[str, str]:
    """The texts that stand in the header of a safetensors file which has been parsed."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]).get("__metadata__") or {}
