"""Tensors of which every process has a part (torch's DTensors), as FSDP2 cuts them: along their first dimension."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from epochal.errors import CheckpointError


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor; without loading the module of that class where nobody has."""
    home = sys.modules.get("torch.distributed.tensor")
    return home is not None and isinstance(value, home.DTensor)


def local(tensor: Any) -> Any:
    """What of a sharded tensor lies in this process; any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def put_together(modules: Sequence[nn.Module]) -> None:
    """Makes every sharded weight a whole one again, where it was; one after the other, by all processes."""
    whole: dict[int, nn.Parameter] = {}
    for part in (part for module in modules for part in module.modules()):
        for name, weight in part._parameters.items():
            if weight is not None and is_sharded(weight):
                if id(weight) not in whole:  # one that several modules share stays shared
                    full: Any = weight.detach()
                    whole[id(weight)] = nn.Parameter(full.full_tensor(), weight.requires_grad)
                part._parameters[name] = whole[id(weight)]


def part_of(tensor: Any) -> tuple[Tensor, int]:
    """What of a sharded tensor lies in this process, and the row of the whole at which it begins.

    Raises CheckpointError for one that is not cut along its first dimension alone.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if any(offsets[1:]) or shape[1:] != tensor.shape[1:]:
        what = f"a tensor that is cut otherwise than by rows cannot be saved: {tensor.placements}."
        raise CheckpointError(what, where=f"shape {tuple(tensor.shape)}", fix="shard along the first dimension")
    return tensor.to_local(), offsets[0] if tensor.dim() else 0


def like(whole: Any, live: Any) -> Any:
    """A tensor that was read whole, cut as ``live`` is; anything else as it is. Nobody is asked for anything."""
    if not (is_sharded(live) and isinstance(whole, Tensor)) or is_sharded(whole) or whole.shape != live.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(live.device), live.device_mesh, live.placements, src_data_rank=None)


def all_like(saved: Mapping[str, Any], live: Mapping[str, Any]) -> Mapping[str, Any]:
    """As :func:`like`, of each entry of a state dict, which stays what it is."""
    if not any(map(is_sharded, live.values())):
        return saved
    cut = copy.copy(saved)  # with what it says of its layers
    for name, value in saved.items():
        cut[name] = like(value, live.get(name))  # type: ignore[index]
    return cut
