"""epochal: the complete training loop for PyTorch.

Everything public is named here and loaded when it is first used, so that ``import epochal`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Console": "observe.console",
    "EarlyStopping": "observe.early_stopping",
    "EpochalError": "errors",
    "History": "report.history",
    "Loader": "data.loader",
    "Loss": "protocols",
    "Metric": "metrics.metric",
    "MetricsTracker": "tutorial",
    "Plan": "plan",
    "Result": "result",
    "Run": "run",
    "Saving": "checkpoint.store",
    "Schedule": "optim.schedules",
    "StepResult": "protocols",
    "Stop": "events",
    "StopReason": "events",
    "TrainState": "state",
    "Window": "data.window",
    "evaluate": "result",
    "fit": "plan",
    "predict": "result",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'epochal' has no attribute {name!r}")
    return getattr(import_module(f"epochal.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
