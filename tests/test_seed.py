"""PyTorch's training page, section by section: what it does by hand, epochal does, to the bit where that makes sense.

The page's own code stands in the functions and classes whose names begin with ``page`` or ``Page``. Which test
proves which line of the page is written in ``docs/parity.md``.
"""

from __future__ import annotations

import ast
import io
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

import epochal
from epochal import tutorial
from epochal.errors import CheckpointError

ROOT = Path(__file__).parents[1]
QUIET = {"observers": (), "device": "cpu"}


# -- the page's code ----------------------------------------------------------------------------------------


class SimpleModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 64)
        self.fc2 = nn.Linear(64, 32)
        self.fc3 = nn.Linear(32, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(self.fc1(x))
        x = self.relu(self.fc2(x))
        x = self.fc3(x)
        return x  # noqa: RET504


def page_loop(model, dataloader, criterion, optimizer, num_epochs):
    """The complete training example, from its fourth step on; the mean losses are kept instead of printed."""
    losses = []
    for _ in range(num_epochs):
        epoch_loss = 0

        for batch_X, batch_y in dataloader:
            # Forward pass
            outputs = model(batch_X)
            loss = criterion(outputs, batch_y)

            # Backward pass
            optimizer.zero_grad()  # Clear previous gradients
            loss.backward()  # Compute gradients
            optimizer.step()  # Update weights

            epoch_loss += loss.item()

        losses.append(epoch_loss / len(dataloader))
    return losses


def page_train_epoch(model, dataloader, criterion, optimizer):
    """Train for one epoch"""
    model.train()  # Set to training mode
    total_loss = 0

    for batch_X, batch_y in dataloader:
        # Forward
        outputs = model(batch_X)
        loss = criterion(outputs, batch_y)

        # Backward
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        total_loss += loss.item()

    return total_loss / len(dataloader)


def page_validate(model, dataloader, criterion):
    """Validate model"""
    model.eval()  # Set to evaluation mode
    total_loss = 0

    with torch.no_grad():  # Disable gradient computation
        for batch_X, batch_y in dataloader:
            outputs = model(batch_X)
            loss = criterion(outputs, batch_y)
            total_loss += loss.item()

    return total_loss / len(dataloader)


class PageEarlyStopping:
    def __init__(self, patience=10, min_delta=0):
        self.patience = patience
        self.min_delta = min_delta
        self.counter = 0
        self.best_loss = None
        self.early_stop = False

    def __call__(self, val_loss):
        if self.best_loss is None:
            self.best_loss = val_loss
        elif val_loss > self.best_loss - self.min_delta:
            self.counter += 1
            if self.counter >= self.patience:
                self.early_stop = True
        else:
            self.best_loss = val_loss
            self.counter = 0


def page_train_model(model, train_loader, val_loader, num_epochs=100):
    """Complete training function"""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)

    criterion = nn.CrossEntropyLoss()
    optimizer = optim.Adam(model.parameters(), lr=0.001)
    scheduler = StepLR(optimizer, step_size=30, gamma=0.1)
    early_stopping = PageEarlyStopping(patience=10)

    for epoch in range(num_epochs):
        # Train
        model.train()
        train_loss = 0
        for batch_X, batch_y in train_loader:
            batch_X, batch_y = batch_X.to(device), batch_y.to(device)

            outputs = model(batch_X)
            loss = criterion(outputs, batch_y)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            train_loss += loss.item()

        # Validate
        model.eval()
        val_loss = 0
        with torch.no_grad():
            for batch_X, batch_y in val_loader:
                batch_X, batch_y = batch_X.to(device), batch_y.to(device)
                outputs = model(batch_X)
                loss = criterion(outputs, batch_y)
                val_loss += loss.item()

        # Print progress
        train_loss /= len(train_loader)
        val_loss /= len(val_loader)
        print(f"Epoch {epoch + 1}: Train: {train_loss:.4f}, Val: {val_loss:.4f}")

        # Step scheduler
        scheduler.step()

        # Early stopping
        early_stopping(val_loss)
        if early_stopping.early_stop:
            print("Early stopping!")
            break

    return model


# -- what the tests have in common --------------------------------------------------------------------------


def example(samples=1000, batch_size=32, kind=SimpleModel, shuffle=True):
    """The page's data, loader and model, after one seed; what is drawn afterwards is the same every time, too."""
    torch.manual_seed(0)
    X_train = torch.randn(samples, 10)
    y_train = torch.randn(samples, 1)
    dataloader = DataLoader(TensorDataset(X_train, y_train), batch_size=batch_size, shuffle=shuffle)
    return dataloader, kind()


def small(samples=64, **options):
    return example(samples, 16, **options)


def validation(samples=32, batch_size=16):
    generator = torch.Generator().manual_seed(1)
    X, y = torch.randn(samples, 10, generator=generator), torch.randn(samples, 1, generator=generator)
    return DataLoader(TensorDataset(X, y), batch_size=batch_size)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def close_weights(a, b):
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# -- Training Overview --------------------------------------------------------------------------------------


def test_training_overview():
    """Forward pass, loss, backward pass, weight update: in this order, for every batch."""
    dataloader, model = small()
    optimizer, happened = optim.Adam(model.parameters()), []
    model.register_forward_hook(lambda *_: happened.append("forward"))
    model.fc1.weight.register_hook(lambda _: happened.append("backward"))
    optimizer.register_step_pre_hook(lambda *_: happened.append("update"))

    def criterion(outputs, targets):
        happened.append("loss")
        return (outputs - targets).square().mean()

    epochal.fit(model, dataloader, loss=criterion, optimizer=optimizer, epochs=2, **QUIET)
    assert happened == ["forward", "loss", "backward", "update"] * 4 * 2


# -- Complete Training Example ------------------------------------------------------------------------------


def test_complete_example():
    dataloader, page = example()
    page_loop(page, dataloader, nn.MSELoss(), optim.Adam(page.parameters(), lr=0.001), num_epochs=3)
    dataloader, model = example()
    optimizer = optim.Adam(model.parameters(), lr=0.001)
    result = epochal.fit(model, dataloader, loss=nn.MSELoss(), optimizer=optimizer, epochs=3, **QUIET)
    assert result.model is model
    assert same_weights(page, model)


def test_complete_example_in_one_line():
    """Arrays and names instead of objects: epochal's own order of the samples, and the same quality."""
    torch.manual_seed(0)
    X, y = torch.randn(1000, 10), torch.randn(1000, 1)
    result = epochal.fit(SimpleModel(), (X, y), loss="mse", optimizer="adam", lr=1e-3, epochs=3, batch_size=32, **QUIET)
    dataloader, page = example()
    losses = page_loop(page, dataloader, nn.MSELoss(), optim.Adam(page.parameters(), lr=0.001), num_epochs=3)
    assert result.history.train_loss == pytest.approx(losses, rel=0.05)


def test_complete_example_averages_over_samples():
    """On purpose: the page's last batch of 8 counts as much as one of 32; here a sample counts as a sample."""
    dataloader, page = example(samples=40, shuffle=False)
    optimizer = optim.SGD(page.parameters(), lr=1e-30)  # nothing moves, so that the two losses are known
    (mean_over_batches,) = page_loop(page, dataloader, nn.MSELoss(), optimizer, num_epochs=1)
    result = epochal.fit(page, dataloader, loss="mse", optimizer=optimizer, epochs=1, **QUIET)
    first, last = (nn.functional.mse_loss(page(X), y).item() for X, y in dataloader)
    assert mean_over_batches == (first + last) / 2
    assert result.history.train_loss == [(32 * first + 8 * last) / 40]
    assert result.history.train_loss[0] == pytest.approx(
        nn.functional.mse_loss(page(X_of(dataloader)), y_of(dataloader)).item()
    )
    assert abs(mean_over_batches - result.history.train_loss[0]) > 0.009


def X_of(dataloader):
    return dataloader.dataset.tensors[0]


def y_of(dataloader):
    return dataloader.dataset.tensors[1]


def test_complete_example_prints_every_tenth_epoch():
    """The page prints every tenth epoch; the console can too, and never leaves out the best and the last one."""
    dataloader, model = small()
    out = io.StringIO()
    options = {"loss": "mse", "lr": 1e-30, "epochs": 20, "device": "cpu", "monitor": "train_loss"}
    epochal.fit(model, dataloader, observers=[epochal.Console(out, every=10)], **options)
    told = [int(number) for number in re.findall(r"^epoch +(\d+)/20  train_loss", out.getvalue(), re.MULTILINE)]
    assert {10, 20} <= set(told) and len(told) <= 3


# -- Key Components: 1. Loss Functions ----------------------------------------------------------------------

LOSSES = {
    "mse": nn.MSELoss(),
    "l1": nn.L1Loss(),
    "cross_entropy": nn.CrossEntropyLoss(),
    "bce": nn.BCELoss(),
    "bce_with_logits": nn.BCEWithLogitsLoss(),
}


def losses_example(name):
    torch.manual_seed(0)
    outputs = 3 if name == "cross_entropy" else 1
    layers = [nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, outputs), *([nn.Sigmoid()] if name == "bce" else [])]
    X, y = torch.randn(70, 10), torch.randn(70, 1)
    y = torch.randint(0, 3, (70,)) if name == "cross_entropy" else (y > 0).float() if "bce" in name else y
    return DataLoader(TensorDataset(X, y), batch_size=16, shuffle=True), nn.Sequential(*layers)


@pytest.mark.parametrize("given", ["object", "name"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, given):
    dataloader, page = losses_example(name)
    page_loop(page, dataloader, LOSSES[name], optim.Adam(page.parameters(), lr=0.01), num_epochs=3)
    dataloader, model = losses_example(name)
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    loss = name if given == "name" else LOSSES[name]
    result = epochal.fit(model, dataloader, loss=loss, optimizer=optimizer, epochs=3, **QUIET)
    assert same_weights(page, model)
    assert result.history.train_loss[-1] < result.history.train_loss[0]


# -- Key Components: 2. Optimizers --------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda weights: optim.SGD(weights, lr=0.01, momentum=0.9),
    "adam": lambda weights: optim.Adam(weights, lr=0.001),
    "adamw": lambda weights: optim.AdamW(weights, lr=0.001, weight_decay=0.01),
    "rmsprop": lambda weights: optim.RMSprop(weights, lr=0.001),
}


@pytest.mark.parametrize("given", ["object", "factory"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, given):
    dataloader, page = small(samples=70)
    page_loop(page, dataloader, nn.MSELoss(), OPTIMIZERS[name](page.parameters()), num_epochs=3)
    dataloader, model = small(samples=70)
    optimizer = OPTIMIZERS[name](model.parameters()) if given == "object" else OPTIMIZERS[name]
    epochal.fit(model, dataloader, loss="mse", optimizer=optimizer, epochs=3, **QUIET)
    assert same_weights(page, model)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", optim.SGD, {"lr": 0.01}),
        ("adam", optim.Adam, {"lr": 0.001}),
        ("adamw", optim.AdamW, {"lr": 0.001, "weight_decay": 0.01}),
        ("rmsprop", optim.RMSprop, {"lr": 0.001, "weight_decay": 0.1}),
        ("adam", optim.Adam, {}),  # torch's own defaults
    ],
)
def test_optimizers_by_name(name, kind, options):
    """A named one is built fused where torch has it: faster, and equal but for the last bits."""
    dataloader, page = small(samples=70)
    page_loop(page, dataloader, nn.MSELoss(), kind(page.parameters(), **options), num_epochs=3)
    dataloader, model = small(samples=70)
    plan = epochal.Plan(model, dataloader, loss="mse", optimizer=name, epochs=3, **options, **QUIET)
    with plan.prepare() as run:
        for _ in run:
            pass
    assert type(run.state.optimizer) is kind
    assert run.state.optimizer.defaults.items() >= options.items()
    assert close_weights(page, model)


# -- Key Components: 3. Learning Rate Scheduling ------------------------------------------------------------


def page_scheduled(model, dataloader, optimizer, scheduler, num_epochs, val_loader=None):
    """The page's loop with a scheduler; gives the learning rate of each epoch."""
    rates = []
    for _ in range(num_epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        page_train_epoch(model, dataloader, nn.MSELoss(), optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(page_validate(model, val_loader, nn.MSELoss()))  # For ReduceLROnPlateau
        else:
            scheduler.step()  # For StepLR
    return rates


@pytest.mark.parametrize("given", ["object", "factory", "name"])
def test_schedule_step(given):
    dataloader, page = small(samples=70)
    optimizer = optim.Adam(page.parameters(), lr=0.01)
    rates = page_scheduled(page, dataloader, optimizer, StepLR(optimizer, step_size=2, gamma=0.1), num_epochs=5)
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])

    dataloader, model = small(samples=70)
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    schedule = {
        "object": lambda: StepLR(optimizer, step_size=2, gamma=0.1),
        "factory": lambda: lambda opt: StepLR(opt, step_size=2, gamma=0.1),
        "name": lambda: epochal.Schedule("step", step_size=2, gamma=0.1),
    }[given]()
    result = epochal.fit(model, dataloader, loss="mse", optimizer=optimizer, schedule=schedule, epochs=5, **QUIET)
    assert result.history.lr == rates
    assert same_weights(page, model)


def test_schedule_step_by_its_name_alone():
    """``schedule="step"`` has the page's numbers: a tenth every 30 epochs."""
    dataloader, model = small(samples=16)
    result = epochal.fit(model, dataloader, loss="mse", lr=0.01, schedule="step", epochs=31, **QUIET)
    assert result.history.lr == pytest.approx([0.01] * 30 + [0.001])


@pytest.mark.parametrize("given", ["object", "factory", "name"])
def test_schedule_plateau(given):
    """It is fed with the validation's loss; the threshold makes sure that the rate falls in these few epochs."""
    settings = {"patience": 1, "factor": 0.5, "threshold": 0.1}
    dataloader, page = small()
    optimizer = optim.Adam(page.parameters(), lr=0.01)
    scheduler = ReduceLROnPlateau(optimizer, mode="min", **settings)
    rates = page_scheduled(page, dataloader, optimizer, scheduler, num_epochs=8, val_loader=validation())
    assert len(set(rates)) >= 3

    dataloader, model = small()
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    schedule = {
        "object": lambda: ReduceLROnPlateau(optimizer, mode="min", **settings),
        "factory": lambda: lambda opt: ReduceLROnPlateau(opt, mode="min", **settings),
        "name": lambda: epochal.Schedule("plateau", **settings),
    }[given]()
    result = epochal.fit(
        model, dataloader, validation(), loss="mse", optimizer=optimizer, schedule=schedule, epochs=8,
        restore_best=False, **QUIET,
    )  # fmt: skip
    assert result.history.lr == rates
    assert same_weights(page, model)


# -- Training with Validation -------------------------------------------------------------------------------


class Dropping(SimpleModel):
    """With a layer to which the mode matters."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return super().forward(self.drop(x))


def test_train_epoch_and_validate():
    """In the page's own loop, in place of the page's own functions."""

    def loop(train_epoch, validate):
        dataloader, model = small(kind=Dropping)
        optimizer, lines = optim.Adam(model.parameters(), lr=0.001), []
        for epoch in range(3):
            train_loss = train_epoch(model, dataloader, nn.MSELoss(), optimizer)
            assert model.training and model.drop.training
            val_loss = validate(model, validation(), nn.MSELoss())
            assert not model.training and not model.drop.training
            lines.append(f"Epoch {epoch + 1}: Train Loss: {train_loss!r}, Val Loss: {val_loss!r}")
        return model, lines

    page, page_lines = loop(page_train_epoch, page_validate)
    model, lines = loop(tutorial.train_epoch, tutorial.validate)
    assert same_weights(page, model)
    assert page_lines == lines  # all batches are of one size: the same means, to the last digit


def test_train_epoch_and_validate_average_over_samples():
    """On purpose. Four samples with the loss 1 and one with the loss 9: on the page 5, here 13/5."""
    X, y = torch.zeros(5, 1), torch.tensor([[1.0], [1.0], [1.0], [1.0], [3.0]])
    dataloader = DataLoader(TensorDataset(X, y), batch_size=4)
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.bias)
    optimizer = optim.SGD(model.parameters(), lr=1e-30)
    assert page_train_epoch(model, dataloader, nn.MSELoss(), optimizer) == 5.0
    assert tutorial.train_epoch(model, dataloader, nn.MSELoss(), optimizer) == 2.6
    assert page_validate(model, dataloader, nn.MSELoss()) == 5.0
    assert tutorial.validate(model, dataloader, nn.MSELoss()) == 2.6


def test_train_epoch_says_what_is_wrong():
    model = nn.Linear(1, 1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(epochal.EpochalError) as nan:
        tutorial.train_epoch(model, [(torch.ones(2, 1), torch.full((2, 1), math.nan))], nn.MSELoss(), optimizer)
    assert nan.value.what == "the targets hold a value that is not finite; the weights were not touched."
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    with pytest.raises(epochal.EpochalError) as shapes:
        tutorial.train_epoch(model, [(torch.ones(2, 1), torch.ones(2))], nn.MSELoss(), optimizer)
    assert str(shapes.value) == (
        "the loss is computed over tensors of different shapes.\n"
        "  where: step 0, batch 0 of train; outputs (2, 1), targets (2,); loss nn.MSELoss\n"
        "  fix:   give targets the shape (2, 1), for example y.unsqueeze(1)"
    )
    with pytest.raises(epochal.EpochalError) as other:
        tutorial.train_epoch(nn.Linear(1, 1), [(torch.ones(2, 1), torch.ones(2, 1))], nn.MSELoss(), optimizer)
    assert str(other.value) == (
        "the optimizer holds the parameters of another model.\n"
        "  where: none of its 2 parameters is one of Linear's\n"
        "  fix:   build it over this model's parameters() (a copy of a model has new ones)"
    )
    with pytest.raises(epochal.EpochalError, match=r"^the training data gave no batch\."):
        tutorial.train_epoch(model, [], nn.MSELoss(), optimizer)
    with pytest.raises(epochal.EpochalError, match=r"^there is no batch to evaluate\."):
        tutorial.validate(model, [], nn.MSELoss())


def test_training_with_validation():
    """The page's loop and ``fit`` with ``val``: the same weights, and the same losses epoch by epoch."""
    dataloader, page = small(kind=Dropping)
    optimizer, rows = optim.Adam(page.parameters(), lr=0.001), []
    for _ in range(3):
        train_loss = page_train_epoch(page, dataloader, nn.MSELoss(), optimizer)
        rows.append((train_loss, page_validate(page, validation(), nn.MSELoss())))
    dataloader, model = small(kind=Dropping)
    result = epochal.fit(
        model, dataloader, validation(), loss=nn.MSELoss(), optimizer=lambda weights: optim.Adam(weights, lr=0.001),
        epochs=3, restore_best=False, **QUIET,
    )  # fmt: skip
    assert same_weights(page, model)
    assert list(zip(result.history.train_loss, result.history.val_loss)) == rows


# -- Saving and Loading Models ------------------------------------------------------------------------------


def trained_a_little():
    dataloader, model = small(shuffle=False)
    optimizer = optim.Adam(model.parameters(), lr=0.001)
    loss = tutorial.train_epoch(model, dataloader, nn.MSELoss(), optimizer)
    return dataloader, model, optimizer, loss


def test_saving_and_loading_the_model():
    dataloader, model = small()
    result = epochal.fit(model, dataloader, loss="mse", epochs=1, **QUIET)
    result.save("model.pt")
    # Load model
    model = SimpleModel()
    model.load_state_dict(torch.load("model.pt"))  # torch's default is weights_only=True
    model.eval()
    assert same_weights(model, result.model)
    X = X_of(dataloader)
    with torch.no_grad():
        assert torch.allclose(model(X), result.predict(X), atol=1e-6)
    result.save("model.safetensors")  # the same without a pickle
    from safetensors.torch import load_file

    assert load_file("model.safetensors").keys() == model.state_dict().keys()


def test_checkpoint_written_here_is_read_by_the_page():
    _, trained, used, mean = trained_a_little()
    tutorial.save_checkpoint("checkpoint.pt", 3, trained, used, mean)
    model = SimpleModel()
    optimizer = optim.Adam(model.parameters(), lr=0.5)
    # Load checkpoint
    checkpoint = torch.load("checkpoint.pt", weights_only=True)
    model.load_state_dict(checkpoint["model_state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    epoch = checkpoint["epoch"]
    loss = checkpoint["loss"]
    assert (epoch, loss) == (3, mean)
    assert list(checkpoint) == ["epoch", "model_state_dict", "optimizer_state_dict", "loss"]
    assert same_weights(model, trained)
    assert optimizer.param_groups[0]["lr"] == 0.001


def test_checkpoint_written_by_the_page_is_read_here():
    """Read, and trained on from there: the same weights as without the interruption."""
    dataloader, page, optimizer, _ = trained_a_little()
    epoch, loss = 3, nn.MSELoss()(page(X_of(dataloader)), y_of(dataloader))  # on the page a tensor, with its graph
    # Save entire checkpoint
    checkpoint = {
        "epoch": epoch,
        "model_state_dict": page.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "loss": loss,
    }
    torch.save(checkpoint, "checkpoint.pt")
    page_train_epoch(page, dataloader, nn.MSELoss(), optimizer)

    model = SimpleModel()
    optimizer = optim.Adam(model.parameters(), lr=0.5)
    found = tutorial.load_checkpoint("checkpoint.pt", model, optimizer)
    assert (found["epoch"], found["loss"].item()) == (3, loss.item())
    tutorial.train_epoch(model, dataloader, nn.MSELoss(), optimizer)
    assert same_weights(page, model)

    for_inference = SimpleModel()  # without an optimizer
    tutorial.load_checkpoint("checkpoint.pt", for_inference)
    assert torch.equal(for_inference.fc3.bias, found["model_state_dict"]["fc3.bias"])


class Boom:
    """A pickle of this writes a file when it is read by something that runs code."""

    def __reduce__(self):
        return Path.touch, (Path("boom"),)


def refused(path, model=None, optimizer=None):
    """What ``load_checkpoint`` says; and nothing was changed."""
    model = model or SimpleModel()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lr = optimizer and optimizer.param_groups[0]["lr"]
    with pytest.raises(CheckpointError) as error:
        tutorial.load_checkpoint(path, model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert optimizer is None or optimizer.param_groups[0]["lr"] == lr
    return str(error.value)


UNREADABLE = (
    "the checkpoint cannot be read: {}.\n  where: checkpoint.pt\n"
    "  fix:   give a path that can be used, and keep all but tensors and plain values out of the states"
)
NOT_PLAIN = "it is damaged, or holds more than tensors and plain values"


def test_checkpoint_that_cannot_be_read():
    path = Path("checkpoint.pt")
    assert refused("checkpoint.pt") == UNREADABLE.format("No such file or directory")
    for content in (b"", b"no checkpoint at all\n", bytes(range(256)), pickle.dumps({"epoch": Boom()}, protocol=2)):
        path.write_bytes(content)
        assert refused("checkpoint.pt") == UNREADABLE.format(NOT_PLAIN)
    torch.save({"epoch": 1, "model_state_dict": {}, "optimizer_state_dict": {}, "loss": Boom()}, path)
    assert refused("checkpoint.pt") == UNREADABLE.format(NOT_PLAIN)
    assert not Path("boom").exists()
    _, model, optimizer, loss = trained_a_little()
    tutorial.save_checkpoint(path, 1, model, optimizer, loss)
    path.write_bytes(path.read_bytes()[:-1000])
    assert refused("checkpoint.pt") == UNREADABLE.format(NOT_PLAIN)


def test_checkpoint_of_something_else():
    _, model, adam, loss = trained_a_little()
    torch.save(model.state_dict(), "model.pt")
    assert refused("model.pt") == (
        "the file is not a checkpoint of a model and its optimizer.\n"
        "  where: model.pt; a dict with epoch, model_state_dict, optimizer_state_dict, loss is expected\n"
        "  fix:   let torch read a plain state dict, with weights_only=True, and give it to model.load_state_dict"
    )
    torch.save({"epoch": 1, "model_state_dict": 2, "optimizer_state_dict": 3, "loss": 4}, "numbers.pt")
    assert refused("numbers.pt").startswith("the file is not a checkpoint of a model and its optimizer.\n")
    tutorial.save_checkpoint("checkpoint.pt", 1, model, adam, loss)
    other = nn.Linear(10, 1)
    assert refused("checkpoint.pt", other, optim.Adam(other.parameters())) == (
        "the checkpoint is of another optimizer.\n"
        "  where: checkpoint.pt; loaded state dict contains a parameter group that doesn't match the size of "
        "optimizer's group\n"
        "  fix:   build the optimizer as it was when the checkpoint was saved"
    )
    assert refused("checkpoint.pt", model, optim.SGD(model.parameters(), lr=0.7)) == (
        "the checkpoint is of another optimizer.\n"
        "  where: checkpoint.pt; its groups lack momentum, dampening\n"
        "  fix:   build the optimizer as it was when the checkpoint was saved"
    )

    class Wider(SimpleModel):
        def __init__(self):
            super().__init__()
            self.fc3 = nn.Linear(32, 2)

    wider = Wider()
    assert refused("checkpoint.pt", wider, optim.Adam(wider.parameters(), lr=0.7)) == (
        "these weights belong to another model.\n"
        "  where: checkpoint.pt; of another shape: fc3.bias (1,) for (2,), fc3.weight (1, 32) for (2, 32)\n"
        "  fix:   build the model as it was when they were saved"
    )


def test_checkpoint_that_cannot_be_written():
    """What stood there before is kept, and nothing half-written stays behind."""
    _, model, optimizer, loss = trained_a_little()
    tutorial.save_checkpoint("checkpoint.pt", 1, model, optimizer, loss)
    good = Path("checkpoint.pt").read_bytes()

    class Odd(SimpleModel):
        def get_extra_state(self):
            return Boom()

        def set_extra_state(self, state):
            pass

    fix = "\n  fix:   give a path that can be used, and keep all but tensors and plain values out of the states"
    with pytest.raises(CheckpointError) as error:
        tutorial.save_checkpoint("checkpoint.pt", 2, Odd(), optimizer, loss)
    assert str(error.value) == f"the checkpoint cannot be written: {NOT_PLAIN}.\n  where: checkpoint.pt{fix}"
    with pytest.raises(CheckpointError) as error:
        tutorial.save_checkpoint("none/checkpoint.pt", 2, model, optimizer, loss)
    reason = "No such file or directory.\n  where: none/checkpoint.pt"
    assert str(error.value) == f"the checkpoint cannot be written: {reason}{fix}"
    assert Path("checkpoint.pt").read_bytes() == good
    assert [path.name for path in Path().iterdir()] == ["checkpoint.pt"]


# -- Tracking Metrics ---------------------------------------------------------------------------------------


def test_metrics_tracker(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    torch.manual_seed(0)
    X, y = torch.randn(64, 10), torch.randint(0, 3, (64,))
    model = nn.Linear(10, 3)
    loader, criterion = DataLoader(TensorDataset(X, y), batch_size=16), nn.CrossEntropyLoss()
    optimizer = optim.Adam(model.parameters(), lr=0.05)

    def calculate_accuracy(data):
        return epochal.evaluate(model, data, loss=criterion, metrics="accuracy")["accuracy"]

    # Usage
    tracker = tutorial.MetricsTracker()
    for _ in range(3):
        train_loss = tutorial.train_epoch(model, loader, criterion, optimizer)
        val_loss = tutorial.validate(model, loader, criterion)
        train_acc = calculate_accuracy(loader)
        val_acc = torch.tensor(calculate_accuracy(loader), requires_grad=True)  # a number is kept, no graph
        tracker.update(train_loss, val_loss, train_acc, val_acc)
    figure = tracker.plot("curves.png")

    assert len(tracker.train_losses) == len(tracker.val_losses) == len(tracker.train_accs) == 3
    assert all(type(value) is float for value in tracker.val_accs)
    loss, accuracy = (axes for axes in figure.axes if axes.get_title("left") or axes.get_title())
    curves = {
        (axes.get_title("left"), line.get_label()): list(line.get_ydata())
        for axes in (loss, accuracy)
        for line in axes.lines
    }
    assert curves["loss", "train"] == tracker.train_losses
    assert curves["loss", "val"] == tracker.val_losses
    assert curves["accuracy", "train"] == tracker.train_accs
    assert curves["accuracy", "val"] == tracker.val_accs
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_tracker_before_the_first_epoch():
    assert len(tutorial.MetricsTracker().plot().axes) == 1  # a figure that says so, and no error


def test_tracking_is_built_in():
    """``fit`` keeps all four without being asked for more than their names."""
    torch.manual_seed(0)
    X, y = torch.randn(64, 10), torch.randint(0, 3, (64,))
    result = epochal.fit(
        nn.Linear(10, 3),
        (X[:48], y[:48]),
        (X[48:], y[48:]),
        loss="cross_entropy",
        metrics="accuracy",
        epochs=2,
        **QUIET,
    )
    history = result.history
    for values in (history.train_loss, history.val_loss, history.train_accuracy, history.val_accuracy):
        assert len(values) == 2 and all(map(math.isfinite, values))
    predicted = result.predict(X[48:]).argmax(1)
    assert history.val_accuracy[result.best.epoch - 1] == (predicted == y[48:]).float().mean().item()
    assert [axes.get_title("left") for axes in history.plot().axes][:2] == ["loss", "accuracy"]


# -- Early Stopping -----------------------------------------------------------------------------------------

VALUES = st.lists(st.floats(allow_nan=False) | st.sampled_from([0.5, 0.25, 0.2, 1.0]), max_size=30)
SETTINGS = {"patience": st.integers(1, 4), "min_delta": st.sampled_from([0, 0.05, 0.5])}


@given(values=VALUES, **SETTINGS)
def test_early_stopping_value_by_value(values, patience, min_delta):
    """As the page uses it: until it says stop."""
    page, mine = PageEarlyStopping(patience, min_delta), tutorial.EarlyStopping(patience, min_delta)
    for value in values:
        page(value)
        mine(value)
        assert (mine.counter, mine.best_loss, mine.early_stop) == (page.counter, page.best_loss, page.early_stop)
        if page.early_stop:
            break


@given(values=VALUES, **SETTINGS)
def test_early_stopping_stays_stopped(values, patience, min_delta):
    """As on the page: whoever asks later than at once still learns that it was time to stop."""
    page, mine = PageEarlyStopping(patience, min_delta), tutorial.EarlyStopping(patience, min_delta)
    for value in values:
        page(value)
        mine(value)
        assert mine.early_stop == page.early_stop


def test_early_stopping_never_takes_a_nan_for_the_best():
    """On purpose: on the page a NaN becomes the best value, and starts the count anew."""
    page, mine = PageEarlyStopping(patience=2), tutorial.EarlyStopping(patience=2)
    for value in (0.5, 0.6, math.nan):
        page(value)
        mine(value)
    assert math.isnan(page.best_loss) and page.counter == 0 and not page.early_stop
    assert mine.best_loss == 0.5 and mine.counter == 2 and mine.early_stop
    first = tutorial.EarlyStopping(patience=2)
    first(math.nan)
    assert first.best_loss is None and first.counter == 1


def overfitting():
    """Noise, learned by heart: the loss on other noise soon rises."""
    dataloader, model = small(samples=32)
    return dataloader, model, optim.Adam(model.parameters(), lr=0.01)


def test_early_stopping_in_the_pages_loop_and_in_fit():
    def stopped_at(train_epoch, validate, early_stopping):
        dataloader, model, optimizer = overfitting()
        for epoch in range(100):
            train_epoch(model, dataloader, nn.MSELoss(), optimizer)
            early_stopping(validate(model, validation(), nn.MSELoss()))
            if early_stopping.early_stop:
                return model, epoch + 1
        return model, None

    page, epoch = stopped_at(page_train_epoch, page_validate, PageEarlyStopping(patience=3))
    mine, same_epoch = stopped_at(tutorial.train_epoch, tutorial.validate, tutorial.EarlyStopping(patience=3))
    assert epoch == same_epoch < 100
    assert same_weights(page, mine)

    dataloader, model, optimizer = overfitting()
    options = {"loss": "mse", "optimizer": optimizer, "epochs": 100, "patience": 3, "restore_best": False}
    result = epochal.fit(model, dataloader, validation(), **options, **QUIET)
    assert len(result.history) == epoch
    assert same_weights(page, model)
    assert result.reason is epochal.StopReason.EARLY_STOPPING
    assert result.message == "early stopping: val_loss has not improved for 3 evaluations"


def test_early_stopping_gives_the_best_weights():
    """On purpose: the page keeps those of the last epoch, ``fit`` (unless told otherwise) those of the best."""
    dataloader, model, optimizer = overfitting()
    result = epochal.fit(
        model, dataloader, validation(), loss="mse", optimizer=optimizer, epochs=100, patience=3, **QUIET
    )
    assert result.restored and result.best.epoch == len(result.history) - 3
    assert tutorial.validate(model, validation(), nn.MSELoss()) == result.best.value == min(result.history.val_loss)


# -- GPU Training -------------------------------------------------------------------------------------------


def test_device_auto():
    """The page's choice: CUDA where there is one, else the CPU; and it is said."""
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    dataloader, model = small()
    out = io.StringIO()
    result = epochal.fit(model, dataloader, loss="mse", epochs=1, observers=[epochal.Console(out)])
    assert {p.device.type for p in model.parameters()} == {expected}
    assert re.search(rf"^device +{expected}", out.getvalue(), re.MULTILINE)
    assert result.predict(X_of(dataloader)).device.type == "cpu"


@pytest.mark.cuda
def test_gpu_training():
    """The page's loop with its two ``.to(device)`` a batch; ``fit`` and the verbs move batches themselves."""
    device = torch.device("cuda")
    dataloader, page = small()
    page = page.to(device)
    optimizer = optim.Adam(page.parameters(), lr=0.001)
    for _ in range(2):
        page_loop(page, [(X.to(device), y.to(device)) for X, y in dataloader], nn.MSELoss(), optimizer, num_epochs=1)
    dataloader, model = small()
    epochal.fit(
        model, dataloader, loss="mse", optimizer=lambda weights: optim.Adam(weights, lr=0.001), epochs=2,
        device="cuda", observers=(),
    )  # fmt: skip
    dataloader, verbs = small()
    optimizer = optim.Adam(verbs.to(device).parameters(), lr=0.001)
    for _ in range(2):
        tutorial.train_epoch(verbs, dataloader, nn.MSELoss(), optimizer)
    assert next(model.parameters()).device.type == "cuda"
    assert close_weights(page, model) and close_weights(page, verbs)
    assert math.isfinite(tutorial.validate(verbs, validation(), nn.MSELoss()))


# -- Best Practices -----------------------------------------------------------------------------------------


class Watched(Dropping):
    """Writes down in which mode it is called, and whether gradients are recorded."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append((self.training, self.drop.training, torch.is_grad_enabled()))
        return super().forward(x)


TRAINING, EVALUATION = (True, True, True), (False, False, False)


@pytest.mark.parametrize("before", [True, False])
def test_train_mode_in_training_and_eval_mode_in_evaluation(before):
    dataloader, model = small(kind=Watched)
    model.train(before)
    result = epochal.fit(model, dataloader, validation(), loss="mse", epochs=2, **QUIET)
    assert model.calls == ([TRAINING] * 4 + [EVALUATION] * 2) * 2
    assert model.training is before and model.drop.training is before
    model.calls.clear()
    result.evaluate(validation())
    assert model.calls == [EVALUATION] * 2  # 32 samples, in the DataLoader's own batches
    assert model.training is before and model.drop.training is before


def test_predictions_without_gradients():
    dataloader, model = small(kind=Watched)
    result = epochal.fit(model, dataloader, loss="mse", epochs=1, **QUIET)
    model.calls.clear()
    X = X_of(dataloader)
    for predictions in (result.predict(X), epochal.predict(model, X)):
        assert not predictions.requires_grad and predictions.shape == (64, 1)
    assert set(model.calls) == {EVALUATION}
    assert torch.is_grad_enabled()


def test_predictions_of_a_model_that_takes_gradients_itself():
    """A force field: ``no_grad`` lets it, ``inference_mode`` would not."""

    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, places):
            with torch.enable_grad():
                places = places.requires_grad_()
                energy = self.energy(places).sum()
                (slope,) = torch.autograd.grad(energy, places, create_graph=torch.is_grad_enabled() and self.training)
            return -slope

    torch.manual_seed(0)
    places = torch.randn(64, 2)
    result = epochal.fit(Force(), (places, -places), (places.clone(), -places), loss="mse", lr=0.02, epochs=20, **QUIET)
    assert result.history.val_loss[-1] < 0.5 * result.history.val_loss[0]
    assert not result.predict(places).requires_grad


def test_gradients_are_cleared():
    """What earlier calls left in ``.grad`` does not matter, neither to ``fit`` nor to the page's verb."""

    def trained(train, stale):
        dataloader, model = small()
        for parameter in model.parameters() if stale else ():
            parameter.grad = torch.full_like(parameter, 1e6)
        train(model, dataloader, optim.SGD(model.parameters(), lr=0.01))
        return model

    def by_fit(model, dataloader, optimizer):
        epochal.fit(model, dataloader, loss="mse", optimizer=optimizer, epochs=1, **QUIET)

    def by_verb(model, dataloader, optimizer):
        tutorial.train_epoch(model, dataloader, nn.MSELoss(), optimizer)

    assert same_weights(trained(by_fit, stale=True), trained(by_fit, stale=False))
    assert same_weights(trained(by_verb, stale=True), trained(by_fit, stale=False))


def test_overfitting_is_told():
    """The page warns whenever val_loss > train_loss, which is nearly always. Here it is told, once, when the
    validation's loss has risen while the training's went on falling."""
    dataloader, model, optimizer = overfitting()
    out = io.StringIO()
    options = {"loss": "mse", "optimizer": optimizer, "epochs": 15, "device": "cpu"}
    result = epochal.fit(model, dataloader, validation(), observers=[epochal.Console(out)], **options)
    since = result.best.epoch + 1
    assert result.history.train_loss[-1] < 0.5 * result.history.train_loss[since - 2]
    assert f"\nfit      overfitting since epoch {since}: val_loss rose from " in out.getvalue()
    assert "the weights of epoch" in out.getvalue()
    assert [one.code for one in result.findings] == ["overfitting"]


def test_overfitting_is_not_told_of_a_healthy_run():
    """The page's rule would print a warning here, in every epoch."""
    torch.manual_seed(0)
    X = torch.randn(96, 10)
    y = X[:, :1] + 0.1 * torch.randn(96, 1)
    out = io.StringIO()
    options = {"loss": "mse", "lr": 0.01, "epochs": 6, "device": "cpu"}
    data = {"train": (X[:64], y[:64]), "val": (X[64:] * 1.5, y[64:] * 1.5)}
    result = epochal.fit(nn.Linear(10, 1), **data, observers=[epochal.Console(out)], **options)
    assert all(val > train for val, train in zip(result.history.val_loss, result.history.train_loss))
    assert "overfitting" not in out.getvalue()


# -- Quick Reference ----------------------------------------------------------------------------------------


def test_reference_model_train():
    dataloader, model = small(kind=Watched)
    model.eval()
    tutorial.train_epoch(model, dataloader, nn.MSELoss(), optim.SGD(model.parameters(), lr=0.01))
    assert model.calls == [TRAINING] * 4


def test_reference_model_eval():
    _, model = small(kind=Watched)
    tutorial.validate(model, validation(), nn.MSELoss())
    assert model.calls == [EVALUATION] * 2


def test_reference_zero_grad():
    """No gradient is there when an update begins, and each update's is that of its own batch alone."""
    dataloader, model = small()
    seen = []

    def criterion(outputs, targets):
        seen.append([parameter.grad for parameter in model.parameters()])
        return nn.functional.mse_loss(outputs, targets)

    epochal.fit(model, dataloader, loss=criterion, epochs=2, **QUIET)
    assert seen == [[None] * 6] * 8


def test_reference_backward():
    dataloader, page = small(samples=16)
    X, y = next(iter(dataloader))
    nn.MSELoss()(page(X), y).backward()
    _, model = small(samples=16)
    epochal.fit(model, DataLoader(TensorDataset(X, y), batch_size=16), loss="mse", epochs=1, **QUIET)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(page.parameters(), model.parameters()))


def test_reference_optimizer_step():
    dataloader, model = small(samples=70)
    optimizer, steps = optim.Adam(model.parameters()), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    result = epochal.fit(model, dataloader, loss="mse", optimizer=optimizer, epochs=2, **QUIET)
    assert len(steps) == 5 * 2 == result.history[-1]["step"]  # the last batch of 6 gets its update, too


def test_reference_no_grad():
    _, model = small(kind=Watched)
    values = epochal.evaluate(model, validation(), loss="mse")
    assert model.calls == [EVALUATION] * 2
    assert values == {"loss": pytest.approx(page_validate(model, validation(), nn.MSELoss()))}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reference_save():
    dataloader, model = small()
    path = epochal.fit(model, dataloader, loss="mse", epochs=1, **QUIET).save("model.pt")
    saved = torch.load(path, weights_only=True)
    assert list(saved) == list(model.state_dict())
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_reference_load():
    """What ``torch.save`` wrote goes into a model that epochal then uses, or trains further."""
    dataloader, model = small()
    torch.save(model.state_dict(), "model.pt")
    loaded = SimpleModel()
    loaded.load_state_dict(torch.load("model.pt"))
    X = X_of(dataloader)
    assert torch.equal(epochal.predict(loaded, X), epochal.predict(model, X))
    epochal.fit(loaded, dataloader, loss="mse", epochs=1, **QUIET)
    assert not same_weights(loaded, model)


# -- Complete Training Template -----------------------------------------------------------------------------


def template(labels_mean_something=True, samples=64):
    torch.manual_seed(0)
    X = torch.randn(samples + 32, 10)
    y = X[:, :3].argmax(1) if labels_mean_something else torch.randint(0, 3, (samples + 32,))
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
    train_loader = DataLoader(TensorDataset(X[:samples], y[:samples]), batch_size=16, shuffle=True)
    return model, train_loader, DataLoader(TensorDataset(X[samples:], y[samples:]), batch_size=16)


def test_complete_template(capsys):
    """The same weights to the bit and the same lines; 33 epochs, so that the rate falls once."""
    page = page_train_model(*template(), num_epochs=33)
    page_lines = capsys.readouterr().out
    model = tutorial.train_model(*template(), num_epochs=33)
    assert capsys.readouterr().out == page_lines
    assert len(page_lines.splitlines()) == 33
    assert same_weights(page, model)
    assert page.training is model.training is False
    assert {p.device for p in page.parameters()} == {p.device for p in model.parameters()}


def test_complete_template_stops_early(capsys):
    page = page_train_model(*template(labels_mean_something=False), num_epochs=200)
    page_lines = capsys.readouterr().out
    model = tutorial.train_model(*template(labels_mean_something=False), num_epochs=200)
    assert capsys.readouterr().out == page_lines
    assert page_lines.endswith("\nEarly stopping!\n") and len(page_lines.splitlines()) < 200
    assert same_weights(page, model)


def test_complete_template_over_ragged_batches(capsys):
    """On purpose: the page's lines are means over batches, these are means over samples. The weights are the same.

    The model is sure of class 0, at a loss of 0, and 20 away from class 1. Of five samples one is of class 1, alone
    in the last batch: on the page the mean is 10, here it is 4.
    """

    def sure():
        model = nn.Linear(1, 2)
        with torch.no_grad():
            model.weight.zero_()
            model.bias.copy_(torch.tensor([20.0, 0.0]))
        train, val = (
            DataLoader(TensorDataset(torch.zeros(5, 1), torch.tensor([0, 0, 0, 0, 1])), batch_size=4) for _ in range(2)
        )
        return model, train, val

    def numbers():
        return [float(number) for number in re.findall(r"\d+\.\d{4}", capsys.readouterr().out)]

    page = page_train_model(*sure(), num_epochs=1)
    assert numbers() == pytest.approx([10, 10], abs=0.01)
    model = tutorial.train_model(*sure(), num_epochs=1)
    assert numbers() == pytest.approx([4, 4], abs=0.01)
    assert same_weights(page, model)


# -- docs/parity.md -----------------------------------------------------------------------------------------


def named_tests(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    return {f"{name}::{node.name}" for node in tree.body if getattr(node, "name", "").startswith("test_")}


def test_the_parity_page_names_every_test():
    page = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    named = set(re.findall(r"tests/\w+\.py::\w+", page))
    files = {name.split("::")[0] for name in named}
    assert named <= set().union(*map(named_tests, files))
    assert named_tests("tests/test_seed.py") <= named
