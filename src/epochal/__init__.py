"""epochal: the complete training loop for PyTorch.

Everything public is named here and loaded when it is first used, so that ``import epochal`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epochal.accumulation import average_gradients as average_gradients
    from epochal.checkpoint.store import Checkpoints as Checkpoints
    from epochal.checkpoint.store import Saving as Saving
    from epochal.data.loader import Loader as Loader
    from epochal.data.window import Window as Window
    from epochal.doctor.finding import Finding as Finding
    from epochal.errors import CheckpointError as CheckpointError
    from epochal.errors import DataError as DataError
    from epochal.errors import DiskFullError as DiskFullError
    from epochal.errors import EpochalError as EpochalError
    from epochal.errors import FaultError as FaultError
    from epochal.errors import FileError as FileError
    from epochal.errors import Interrupted as Interrupted
    from epochal.errors import LossError as LossError
    from epochal.errors import LossShapeError as LossShapeError
    from epochal.errors import MissingPackageError as MissingPackageError
    from epochal.errors import ModelError as ModelError
    from epochal.errors import NonFiniteError as NonFiniteError
    from epochal.errors import PlanError as PlanError
    from epochal.errors import ProcessError as ProcessError
    from epochal.errors import RecipeError as RecipeError
    from epochal.errors import RunFolderError as RunFolderError
    from epochal.errors import TableError as TableError
    from epochal.errors import UnknownNameError as UnknownNameError
    from epochal.errors import WorkerError as WorkerError
    from epochal.events import Ended as Ended
    from epochal.events import Evaluated as Evaluated
    from epochal.events import Found as Found
    from epochal.events import Noted as Noted
    from epochal.events import Saved as Saved
    from epochal.events import Started as Started
    from epochal.events import StepDone as StepDone
    from epochal.events import Stop as Stop
    from epochal.events import StopReason as StopReason
    from epochal.metrics.metric import Metric as Metric
    from epochal.observe.console import Console as Console
    from epochal.observe.early_stopping import EarlyStopping as EarlyStopping
    from epochal.optim.schedules import Schedule as Schedule
    from epochal.plan import Plan as Plan
    from epochal.plan import fit as fit
    from epochal.protocols import Loss as Loss
    from epochal.protocols import StepResult as StepResult
    from epochal.report.history import History as History
    from epochal.result import Result as Result
    from epochal.result import evaluate as evaluate
    from epochal.result import predict as predict
    from epochal.run import Run as Run
    from epochal.runtime.strategy import Strategy as Strategy
    from epochal.speed.profiling import profile as profile
    from epochal.speed.tuning import tune_speed as tune_speed
    from epochal.state import TrainState as TrainState

__version__ = "0.1.0"

_ROOMS = {
    "accumulation": "average_gradients",
    "checkpoint.store": "Checkpoints Saving",
    "data.loader": "Loader",
    "data.window": "Window",
    "doctor.finding": "Finding",
    "errors": """CheckpointError DataError DiskFullError EpochalError FaultError FileError Interrupted LossError
        LossShapeError MissingPackageError ModelError NonFiniteError PlanError ProcessError RecipeError RunFolderError
        TableError UnknownNameError WorkerError""",
    "events": "Ended Evaluated Found Noted Saved Started StepDone Stop StopReason",
    "metrics.metric": "Metric",
    "observe.console": "Console",
    "observe.early_stopping": "EarlyStopping",
    "optim.schedules": "Schedule",
    "plan": "Plan fit",
    "protocols": "Loss StepResult",
    "report.history": "History",
    "result": "Result evaluate predict",
    "run": "Run",
    "runtime.strategy": "Strategy",
    "speed.profiling": "profile",
    "speed.tuning": "tune_speed",
    "state": "TrainState",
}
_HOMES = dict(sorted((name, room) for room, names in _ROOMS.items() for name in names.split()))

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'epochal' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"epochal.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
