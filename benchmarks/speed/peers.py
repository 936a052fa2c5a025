"""Other trainers, each as its own documentation has it for data in memory on the CPU, set up to be quick.

What is optional and takes time is off: progress bars, loggers, checkpoints, summaries, sanity checks, and the losses
of single batches where a trainer need not look at them. Two things are on that are in no trainer's documentation: a
fused optimizer, wherever an optimizer of torch can be given, and a validation in batches of 1,024 samples, as by hand.
So what is compared is the trainer, not how well its user knows torch; with ``--usual`` both are as documented.
The loss over all of the validation data is found after every epoch, by what the trainer has for it.

Nothing of these packages is needed to train with the others: each is imported by its own arm.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from .works import Work

Clock = Callable[[], None]
usual = (
    False  # as in the documentation: an optimizer that is not fused, and a validation in the batches of the training
)


def _validated(work: Work) -> int:
    """Samples in a batch of the validation."""
    return work.batch_size if usual else 1024


def _loaders(work: Work) -> tuple[DataLoader, DataLoader]:
    train = DataLoader(TensorDataset(*work.train), batch_size=work.batch_size, shuffle=work.shuffle)
    return train, DataLoader(TensorDataset(*work.val), batch_size=_validated(work))


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, fused=not usual)


def lightning(work: Work, clock: Clock) -> None:
    from pytorch_lightning import Callback, LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.criterion = work.model(), work.criterion()

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            return self.criterion(self.model(inputs), targets)

        def validation_step(self, batch, batch_idx):
            inputs, targets = batch
            self.log("val_loss", self.criterion(self.model(inputs), targets), batch_size=len(inputs))

        def configure_optimizers(self):
            return _adam(self)

    class Epochs(Callback):
        def on_train_epoch_end(self, trainer, pl_module):  # comes after the validation
            clock()

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # What it advises, workers, makes data that lie in memory slower.
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # its own use of torch
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=work.epochs, callbacks=[Epochs()], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(Module(), *_loaders(work))


class _Samples(Dataset):
    """Named as the trainer of transformers hands them to the model."""

    def __init__(self, pair):
        self.inputs, self.labels = pair

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


class _WithLoss(nn.Module):
    def __init__(self, work: Work):
        super().__init__()
        self.model, self.criterion = work.model(), work.criterion()

    def forward(self, inputs, labels):
        outputs = self.model(inputs)
        return {"loss": self.criterion(outputs, labels), "logits": outputs}


def transformers(work: Work, clock: Clock) -> None:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Epochs(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):  # on_epoch_end comes before the validation
            clock()

    with tempfile.TemporaryDirectory() as folder:
        model = _WithLoss(work)
        arguments = TrainingArguments(
            folder, num_train_epochs=work.epochs, per_device_train_batch_size=work.batch_size,
            per_device_eval_batch_size=_validated(work), eval_strategy="epoch", lr_scheduler_type="constant",
            max_grad_norm=0, prediction_loss_only=True, remove_unused_columns=False, dataloader_pin_memory=False,
            use_cpu=True, train_sampling_strategy="random" if work.shuffle else "sequential", disable_tqdm=True,
            report_to="none", save_strategy="no", logging_strategy="no", logging_nan_inf_filter=False,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=_Samples(work.train), eval_dataset=_Samples(work.val),
            callbacks=[Epochs()], optimizers=(_adam(model), None),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def accelerate(work: Work, clock: Clock) -> None:
    from accelerate import Accelerator

    accelerator, model, criterion = Accelerator(cpu=True), work.model(), work.criterion()
    model, optimizer, train_loader, val_loader = accelerator.prepare(model, _adam(model), *_loaders(work))
    for _ in range(work.epochs):
        model.train()
        total = torch.zeros(())
        for inputs, targets in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            total += loss.detach()
        total.item()
        model.eval()
        total = torch.zeros(())
        with torch.no_grad():
            for inputs, targets in val_loader:
                outputs, targets = accelerator.gather_for_metrics((model(inputs), targets))
                total += criterion(outputs, targets) * len(targets)
        total.item()
        clock()


def skorch(work: Work, clock: Clock) -> None:
    from skorch import NeuralNet
    from skorch.callbacks import Callback
    from skorch.dataset import Dataset as Samples
    from skorch.helper import predefined_split

    class Epochs(Callback):
        def on_epoch_end(self, net, **kwargs):
            clock()

    net = NeuralNet(
        work.model(), work.criterion(), optimizer=torch.optim.Adam, optimizer__fused=not usual, lr=1e-3,
        max_epochs=work.epochs, batch_size=work.batch_size, iterator_train__shuffle=work.shuffle,
        iterator_valid__batch_size=_validated(work), train_split=predefined_split(Samples(*work.val)),
        callbacks=[("epochs", Epochs())], callbacks__print_log=None, verbose=0, device="cpu",
    )  # fmt: skip
    net.fit(*work.train)


def ignite(work: Work, clock: Clock) -> None:
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.metrics import Loss

    model, criterion = work.model(), work.criterion()
    train_loader, val_loader = _loaders(work)
    trainer = create_supervised_trainer(model, _adam(model), criterion)
    evaluator = create_supervised_evaluator(model, metrics={"loss": Loss(criterion)})

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate():
        evaluator.run(val_loader)
        clock()

    trainer.run(train_loader, max_epochs=work.epochs)


def keras(work: Work, clock: Clock) -> None:
    os.environ["KERAS_BACKEND"] = "torch"  # is read when keras is imported
    import keras

    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss = {"mse": "mse", "cross_entropy": cross_entropy}[work.loss]
    keras.utils.set_random_seed(0)
    with keras.device("cpu"):
        model = keras.Sequential([keras.Input(work.train[0].shape[1:]), *_keras_layers(work.name)])
        model.compile(optimizer=keras.optimizers.Adam(1e-3, epsilon=1e-8), loss=loss)
        model.fit(
            *work.train, batch_size=work.batch_size, epochs=work.epochs, shuffle=work.shuffle, verbose=0,
            validation_data=work.val, validation_batch_size=_validated(work),
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: clock())],
        )  # fmt: skip


def _keras_layers(name: str) -> list:
    """The network of that work in layers of keras, which has no use for a module of torch's."""
    from keras.layers import BatchNormalization, Conv2D, Dense, Dropout, Flatten, MaxPooling2D, ReLU

    def convolution(channels, kernel=3, strides=1):  # images and settings as torch has them
        return [
            Conv2D(channels, kernel, strides, "same", data_format="channels_first"),
            BatchNormalization(axis=1, momentum=0.9, epsilon=1e-5),
            ReLU(),
        ]

    pool = partial(MaxPooling2D, 2, data_format="channels_first")
    if name == "seed":
        return [Dense(64, "relu"), Dense(32, "relu"), Dense(1)]
    if name == "diamonds":
        return [Dense(128, "relu"), Dense(128, "relu"), Dense(1)]
    if name == "digits":
        return [*convolution(32), pool(), *convolution(64), pool(), Flatten(), Dropout(0.5), Dense(10)]
    if name == "mnist":
        return [*convolution(16, 5, 2), *convolution(32), pool(), Flatten(), Dropout(0.3), Dense(10)]
    raise NotImplementedError(f"there is no network for {name} in layers of keras: only seed, diamonds, digits, mnist")


def poutyne(work: Work, clock: Clock) -> None:
    from poutyne import Callback, Model

    class Epochs(Callback):
        def on_epoch_end(self, epoch_number, logs):
            clock()

    network = work.model()
    model = Model(network, _adam(network), work.criterion(), device="cpu")
    model.fit_generator(*_loaders(work), epochs=work.epochs, verbose=False, callbacks=[Epochs()])


def _installed(arm):
    """Where a package is missing, the arm ends with a line that says how to get it."""

    def run(work: Work, clock: Clock) -> None:
        try:
            arm(work, clock)
        except ModuleNotFoundError as missing:
            sys.exit(f"{arm.__name__}: {missing.name} is not installed: pip install -r benchmarks/requirements.txt")

    return run


ARMS: dict[str, Callable[[Work, Clock], None]] = {
    arm.__name__: _installed(arm) for arm in (lightning, transformers, accelerate, skorch, ignite, keras, poutyne)
}
