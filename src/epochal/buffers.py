"""What a forward pass moves, kept before an update so that it can be put back if the update is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from epochal.runtime import seeding


class Kept(NamedTuple):
    """A buffer as it was: the tensor itself (so that no other can take its place), its version, its values."""

    tensor: Tensor
    version: int
    values: Tensor


class Buffers:
    """Keeps and puts back running statistics, which a forward pass moves before anything is known of its batch.

    What never changes (masks, tables) is copied once: a change shows in the version of a tensor. Only the kernels
    of batch and instance norm move theirs without a new version, so theirs are copied every time, in one call.

    torch's generators on the host and on ``device``, from which dropout draws, are kept and put back too; python's
    and numpy's, which hardly a model uses, are not.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, *, copies_always: bool = False):
        parts = [part for module in modules for part in module.modules()]
        places = [(part, name) for part in parts for name in part._buffers if part._buffers[name] is not None]
        self._norms = [(part._buffers, name) for part, name in places if isinstance(part, _NormBase)]
        self._others = [(part._buffers, name) for part, name in places if not isinstance(part, _NormBase)]
        self._statistics: list[Tensor] = []
        self._kept: dict[int, Kept] = {}
        self._device, self._home = device, seeding.accelerators().get(device.type)
        self._copies_always = copies_always  # a graph's kernels leave no new version, either
        self._host_state = self._device_state = torch.empty(0)

    def keep(self) -> None:
        self._host_state = torch.default_generator.get_state()
        if self._home is not None:
            self._device_state = self._home.get_rng_state(self._device)
        if self._norms or self._others:
            self._keep_buffers()

    @torch.no_grad()
    def _keep_buffers(self) -> None:
        statistics: list[Any] = [home.get(name) for home, name in self._norms]
        try:
            if statistics:
                torch._foreach_copy_(self._statistics, statistics)
        except (RuntimeError, TypeError):  # the first time, or they have got another shape
            self._statistics = [tensor.clone() for tensor in statistics]
        for number, (home, name) in enumerate(self._others):
            now = home.get(name)
            if now is None:
                self._kept.pop(number, None)
            elif not self._is_kept(number, now):
                self._kept[number] = Kept(now, _version(now), now.clone())

    @torch.no_grad()
    def put_back(self) -> None:
        torch.default_generator.set_state(self._host_state)
        if self._home is not None:
            self._home.set_rng_state(self._device_state, self._device)
        for (home, name), values in zip(self._norms, self._statistics):
            if (now := home.get(name)) is not None:
                now.copy_(values)
        for number, kept in self._kept.items():
            home, name = self._others[number]
            now = home.get(name)
            if now is kept.tensor and now.shape == kept.values.shape and not now.is_inference():
                if not self._is_kept(number, now):
                    now.copy_(kept.values)
            elif name in home:
                home[name] = kept.values.clone()

    def _is_kept(self, number: int, now: Tensor) -> bool:
        kept = self._kept.get(number)
        return (
            not self._copies_always and kept is not None and kept.tensor is now and kept.version == _version(now) >= 0
        )


def _version(tensor: Tensor) -> int:
    """What every change in place adds one to; -1 where that is not counted."""
    return -1 if tensor.is_inference() else tensor._version
