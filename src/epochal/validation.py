"""What is evaluated while a model is trained, and how often."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from epochal import loop
from epochal.buffers import Buffers
from epochal.cadence import Every
from epochal.data.loader import Loader
from epochal.data.shared import SharedLoader
from epochal.feeding import AnyLoader
from epochal.metrics.metric import Stream
from epochal.result import Setting
from epochal.runtime.attributes import Attributes
from epochal.widening import HALF_TOLERANCE, TOLERANCE, Noting, could_be_wider, widen


@dataclass(frozen=True)
class Validation:
    """What is evaluated, with which metrics, and how often; ``loader`` is None where there is no ``val``.

    is_ours: loss, metrics and data are epochal's own; only the model is somebody else's.
    """

    loader: AnyLoader | None
    stream: Stream
    every: Every
    is_ours: bool = False

    @property
    def is_one_batch(self) -> bool:
        """Whether it is known to be a single batch of data in memory, within which nothing can end it."""
        loader = self.loader
        return isinstance(loader, Loader) and loader.wide is not None and len(loader) == 1

    def measured(self, setting: Setting, *, shared: bool, is_cut_short: Callable[[], bool]) -> dict[str, Any]:
        """The columns of a row, by name; what is measured does not count if ``is_cut_short`` has become true.

        shared: whether several processes each have a share of the batches.
        """
        loader = self.loader
        if loader is None:
            return {}
        evaluate = partial(
            loop.evaluate, stream=self.stream, modules=setting.modules, device=setting.device,
            autocast=setting.autocast, shared=shared, in_step=setting.in_step,
        )  # fmt: skip
        batches: Iterable[Any] = loader.batches(epoch=0)
        if not (setting.in_step or isinstance(loader, SharedLoader)):  # else all processes take every batch
            batches = _until(is_cut_short, batches)
        if not (isinstance(loader, Loader) and self.is_ours and could_be_wider(loader, setting.modules)):
            found = evaluate(setting.objective, setting.forward, batches)
        else:  # the first one, for which nothing is compiled
            noted, plain, before = Noting(setting.objective), setting.modules[0], kept(setting.modules)
            found = evaluate(noted, plain, batches)
            if kept(setting.modules) != before:
                loader.wide = loader.batch_size  # the model counts its calls, say: it is called as often as by hand
            elif not is_cut_short():
                again, buffers = partial(evaluate, setting.objective, plain), Buffers(setting.modules, setting.device)
                tolerance = self._tolerance(setting)
                widen(loader, found, noted, again, setting.modules, buffers, tolerance=tolerance)
        return {f"val_{name}": value for name, value in found.items()}

    @staticmethod
    def _tolerance(setting: Setting) -> float:
        is_plain = isinstance(setting.autocast, nullcontext) and setting.dtype not in (torch.bfloat16, torch.float16)
        return TOLERANCE if is_plain else HALF_TOLERANCE


kept = partial(Attributes, versions=True)


def _until(is_cut_short: Callable[[], bool], batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        yield batch
        if is_cut_short():
            return
