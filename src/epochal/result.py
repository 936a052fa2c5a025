"""What a run leaves: the model, its history, and ways to use them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from epochal import loop, losses
from epochal.checkpoint.weights import save_state_dict, save_weights
from epochal.data import tables
from epochal.data.given import GivenLoader
from epochal.data.loader import Loader
from epochal.data.sources import Arrays, as_tensor, encoded
from epochal.errors import PlanError
from epochal.events import Best, StopReason
from epochal.metrics import named
from epochal.metrics.metric import Stream
from epochal.objective import Supervised
from epochal.observe.console import counted
from epochal.report.history import History
from epochal.runtime import device as devices

if TYPE_CHECKING:
    from epochal.doctor.finding import Finding


@dataclass(frozen=True)
class Result:
    """model: the user's own module. history: a row an evaluation. best: epoch, step, metric and value of the
    best one, None if there was none. reason: why the run ended; message: the same in words. restored: whether
    the model holds the weights of ``best``. run: the run folder, if there is one. findings: what the doctor found.
    """

    model: nn.Module
    history: History
    best: Best | None
    reason: StopReason
    message: str
    restored: bool
    run: Path | None
    setting: Setting
    findings: tuple[Finding, ...] = ()

    def predict(self, data: Any, *, batch_size: int | None = None) -> Any:
        """The model's outputs for ``data``, in its order, on the host; train or eval mode is left as it was.

        data: inputs alone or with targets, in any form that ``fit`` takes.
        """
        return self.setting.predict(data, batch_size)

    def evaluate(self, data: Any, *, batch_size: int | None = None) -> dict[str, Any]:
        """The loss (mean over samples) and the metrics over ``data``, by name."""
        return self.setting.evaluate(data, batch_size)

    def save(self, path: str | Path) -> Path:
        """The model's state dict, written atomically: ``.safetensors``, or torch's format for any other suffix."""
        save = save_weights if Path(path).suffix == ".safetensors" else save_state_dict
        save(self.model.state_dict(), path)
        return Path(path)

    def __repr__(self) -> str:
        best = f", best {self.best.metric} {self.best.value:.4g} in epoch {self.best.epoch}" if self.best else ""
        return f"Result({self.message}; {counted(len(self.history), 'row')}{best})"


@dataclass(frozen=True)
class Setting:
    """How a model is called outside of training: what predict and evaluate need to know.

    objective: None where nothing can be evaluated. inputs: how many inputs a batch has, None where that is not
    known. encoding: of a table. in_step: whether all processes have to call the model together.
    """

    forward: Callable
    objective: Any
    modules: Sequence[nn.Module]
    device: torch.device
    metrics: Sequence[Any] = ()
    autocast: AbstractContextManager = field(default_factory=nullcontext)
    batch_size: int = 32
    target: Sequence[str] = ()
    inputs: int | None = None
    encoding: Any = None
    dtype: torch.dtype | None = None
    in_step: bool = False

    def predict(self, data: Any, batch_size: int | None = None) -> Any:
        if isinstance(data, list) and data and isinstance(data[0], list):
            data = np.asarray(data)  # rows of numbers; a list of arrays would be columns
        batches = self._batches(data, batch_size, with_targets=False)
        pick = partial(loop.inputs_only, target=self.target, count=self.inputs)
        return loop.predict(self.forward, batches, inputs=pick, **self._circumstances)

    def evaluate(self, data: Any, batch_size: int | None = None) -> dict[str, Any]:
        if self.objective is None:
            fix = "give loss= or objective= beside step="
            raise PlanError("there is nothing to evaluate with.", where="loss=None, objective=None", fix=fix)
        batches, stream = self._batches(data, batch_size, with_targets=True), Stream(self.metrics)
        return loop.evaluate(self.objective, self.forward, batches, stream, where="data", **self._circumstances)

    @property
    def _circumstances(self) -> dict[str, Any]:
        return {"modules": self.modules, "device": self.device, "autocast": self.autocast}

    def _batches(self, data: Any, batch_size: int | None, *, with_targets: bool) -> Iterable[Any]:
        if isinstance(data, DataLoader):
            return GivenLoader(data).batches(epoch=0)
        if self.encoding is not None and tables.is_table(data):
            if with_targets:
                data = encoded(self.encoding, data, where="data", dtype=self.dtype)
            else:
                features = self.encoding.features(tables.read_table(data, where="data"), where="data")
                data = Arrays(as_tensor(features, where="data", dtype=self.dtype))
        source = Loader(data, batch_size or self.batch_size, where="data", dtype=self.dtype, target=self.target)
        return source.batches(epoch=0)


def predict(model: nn.Module, data: Any, *, batch_size: int = 256, device: str | torch.device | None = None) -> Any:
    """The model's outputs for ``data``, in its order, on the host.

    data: inputs in any form that ``fit`` takes; of a data set or DataLoader that yields (inputs, targets),
    the targets are left out. The model runs in eval mode, without recording gradients, on ``device`` (by
    default where it is), and every module is left in the mode it was in.

    >>> predict(nn.Identity(), torch.arange(3.0)).tolist()
    [0.0, 1.0, 2.0]
    """
    return _setting(model, device, batch_size).predict(data)


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    loss: str | Callable,
    metrics: Any = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """The loss (mean over samples) and the metrics of ``model`` over ``data``.

    >>> evaluate(nn.Identity(), (torch.ones(4), torch.zeros(4)), loss="mse", metrics=["mae"])
    {'loss': 1.0, 'mae': 1.0}
    """
    resolved = losses.resolve(loss)
    chosen = named.resolve(metrics, loss=losses.kind(resolved))
    setting = _setting(model, device, batch_size, objective=Supervised(resolved), metrics=chosen)
    return setting.evaluate(data)


def _setting(model: nn.Module, device: Any, batch_size: int, **options: Any) -> Setting:
    own = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    chosen = devices.choose(device) if device is not None else own
    model.to(chosen)
    options = {"objective": None, **options}
    return Setting(model, modules=[model], device=chosen, batch_size=batch_size, dtype=float_type(model), **options)


def float_type(model: nn.Module) -> torch.dtype:
    """The floating point type that the model computes in: that of its first weight of such a type."""
    found = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return found or torch.get_default_dtype()
