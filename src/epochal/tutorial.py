"""The verbs of PyTorch's training page under their own names: code written along that page runs as it stands."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

from epochal import loop, losses
from epochal.checkpoint.files import replace
from epochal.checkpoint.imported import read_pt
from epochal.checkpoint.weights import load_into
from epochal.data.window import windows
from epochal.errors import CheckpointError, FileError
from epochal.events import Ended, Evaluated, Event, StopReason
from epochal.metrics.metric import Mean, Stream
from epochal.objective import Supervised
from epochal.observe import early_stopping
from epochal.optim import optimizers
from epochal.plan import fit
from epochal.report.history import History
from epochal.state import TrainState
from epochal.step import Update

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENTRIES = ("epoch", "model_state_dict", "optimizer_state_dict", "loss")  # of a checkpoint


def train_epoch(model: nn.Module, dataloader: Iterable[Any], criterion: Any, optimizer: Optimizer) -> float:
    """One epoch, on the model's device; gives the mean loss over the samples. The model is left in train mode.

    criterion: what ``fit`` takes as ``loss``. Raises NonFiniteError before a NaN reaches the weights, and PlanError
    for the optimizer of another model.
    """
    model.train()
    loss, mean = losses.resolve(criterion), Mean()
    state = TrainState(model, optimizers.build(optimizer, [model, loss] if isinstance(loss, nn.Module) else [model]))
    step = Update(Supervised(loss), model, _device(model))
    for result in loop.steps(state, step, lambda _: windows(dataloader), lambda: state.progress.epoch == 1):
        if result is not None:
            mean.update(result.loss, result.weight)
    return mean.compute()


def validate(model: nn.Module, dataloader: Iterable[Any], criterion: Any) -> float:
    """The mean loss over the samples, without gradients. The model is left in eval mode, as the page leaves it."""
    model.eval()
    objective, device = Supervised(losses.resolve(criterion)), _device(model)
    found = loop.evaluate(
        objective, model, dataloader, Stream([]), modules=[model], device=device, autocast=nullcontext()
    )
    return found["loss"]


def train_model(model: nn.Module, train_loader: Any, val_loader: Any, num_epochs: int = 100) -> nn.Module:
    """The page's template: cross entropy, Adam at 0.001, a tenth of it every 30 epochs, early stopping after 10.

    Prints a line an epoch. Gives the model with the weights of the last epoch (``fit`` would give the best), on the
    accelerator if there is one, in eval mode.
    """
    model.train()
    fit(
        model, train_loader, val_loader, loss=nn.CrossEntropyLoss(), optimizer=lambda weights: Adam(weights, lr=0.001),
        schedule=lambda optimizer: StepLR(optimizer, step_size=30, gamma=0.1), epochs=num_epochs, patience=10,
        restore_best=False, observers=[_print_progress],
    )  # fmt: skip
    return model.eval()


def _print_progress(event: Event) -> None:
    if isinstance(event, Evaluated):
        print("Epoch {epoch}: Train: {train_loss:.4f}, Val: {val_loss:.4f}".format(**event.row))
    elif isinstance(event, Ended) and event.reason is StopReason.EARLY_STOPPING:
        print("Early stopping!")


def EarlyStopping(patience: int = 10, min_delta: float = 0.0) -> early_stopping.EarlyStopping:
    """``epochal.EarlyStopping`` with the page's parameters: call it with a value, then look at ``early_stop``."""
    return early_stopping.EarlyStopping(patience=patience, min_delta=min_delta)


class MetricsTracker:
    """Losses and accuracies, one an epoch (``train_losses val_losses train_accs val_accs``), and their curves."""

    def __init__(self) -> None:
        self.train_losses, self.val_losses, self.train_accs, self.val_accs = [], [], [], []

    def update(self, train_loss: Any, val_loss: Any, train_acc: Any, val_acc: Any) -> None:
        """Adds an epoch: numbers, or scalar tensors, of which only the number is kept."""
        self.train_losses.append(_number(train_loss))
        self.val_losses.append(_number(val_loss))
        self.train_accs.append(_number(train_acc))
        self.val_accs.append(_number(val_acc))

    def plot(self, path: str | Path | None = None) -> Figure:
        """The curves as a figure, the best epoch marked; a file too if there is a ``path``. Needs no display."""
        names = ("train_loss", "val_loss", "train_accuracy", "val_accuracy")
        values = zip(self.train_losses, self.val_losses, self.train_accs, self.val_accs)
        rows = [{"epoch": epoch, **dict(zip(names, row))} for epoch, row in enumerate(values, 1)]
        return History(rows, monitor="val_loss").plot(path)


def save_checkpoint(path: str | Path, epoch: int, model: nn.Module, optimizer: Optimizer, loss: Any) -> None:
    """Writes the page's dictionary, whole or not at all; torch reads it with ``weights_only=True``.

    Raises CheckpointError where it cannot be written, or holds what could not be read so.
    """
    checkpoint = dict(zip(ENTRIES, (epoch, model.state_dict(), optimizer.state_dict(), _number(loss))))

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
        read_pt(temporary, "meta")  # all but the numbers

    try:
        replace(Path(path), write)
    except Exception as error:
        raise _unusable("written", path, error) from error


def load_checkpoint(path: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Puts the weights and the optimizer's state back; gives the dictionary, its tensors on the host.

    Runs no code of the file. Raises CheckpointError, and changes nothing, where the file is none of this kind or
    belongs to another model or optimizer.
    """
    try:
        saved = read_pt(path)
    except Exception as error:  # by what is wrong with the file, torch raises any of a dozen classes
        raise _unusable("read", path, error) from error
    entries = saved if isinstance(saved, dict) else {}
    if not entries.keys() >= set(ENTRIES) or not isinstance(entries["model_state_dict"], dict):
        what, expected = "the file is not a checkpoint of a model and its optimizer.", ", ".join(ENTRIES)
        fix = "let torch read a plain state dict, with weights_only=True, and give it to model.load_state_dict"
        raise CheckpointError(what, where=f"{path}; a dict with {expected} is expected", fix=fix)
    with ExitStack() as undo:
        if optimizer is not None:
            undo.callback(optimizer.load_state_dict, optimizer.state_dict())
            _load_optimizer(optimizer, saved["optimizer_state_dict"], path)
        load_into(model, saved["model_state_dict"], str(path))
        undo.pop_all()
    return saved


def _load_optimizer(optimizer: Optimizer, state: Any, path: str | Path) -> None:
    try:
        optimizer.load_state_dict(state)
        if lacking := [name for group in optimizer.param_groups for name in optimizer.defaults if name not in group]:
            raise ValueError(f"its groups lack {', '.join(lacking)}")  # torch takes them as they come
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fix = "build the optimizer as it was when the checkpoint was saved"
        raise CheckpointError("the checkpoint is of another optimizer.", where=f"{path}; {error}", fix=fix) from error


def _unusable(verb: str, path: str | Path, error: Exception) -> CheckpointError:
    cause = error.__cause__ if isinstance(error, FileError) else error
    why = "it is damaged, or holds more than tensors and plain values"
    if isinstance(cause, OSError) and cause.errno != errno.EINVAL:  # which torch meets in a file cut short
        why = cause.strerror
    fix = "give a path that can be used, and keep all but tensors and plain values out of the states"
    return CheckpointError(f"the checkpoint cannot be {verb}: {why}.", where=str(path), fix=fix)


def _number(value: Any) -> float:
    return float(value.item() if hasattr(value, "item") else value)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
