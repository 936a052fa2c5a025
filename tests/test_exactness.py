"""The exactness contracts of the design: E1, E3, E4, E5, and how many frames stand above the user's code.

E1 compares with ``examples/plain_loop.py``, bit for bit: weights, optimizer state, every loss and rate.
"""

from __future__ import annotations

import importlib.util
import io
import random
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import epochal
from epochal.data.window import windows
from epochal.objective import Custom, Supervised
from epochal.step import Update

EXAMPLE = Path(__file__).parents[1] / "examples" / "plain_loop.py"
PACKAGE = str(Path(epochal.__file__).parent)


@cache
def plain_loop():
    spec = importlib.util.spec_from_file_location("plain_loop", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(a, b):
    """Whether two states are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# -- E1: the same bits as the plain loop --------------------------------------------------------------------


class Rows(nn.Module):
    """A transformer that reads an image row by row."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.place = nn.Parameter(0.1 * torch.randn(8, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.layer(self.embed(x.squeeze(1)) + self.place).mean(1))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))


def cnn():
    features = (nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*features, nn.Linear(54, 10))


MODELS = {"mlp": mlp, "cnn": cnn, "transformer": Rows}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.003),
    "adamw": partial(torch.optim.AdamW, lr=0.003, weight_decay=0.05),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.001),
}
# A threshold of 0.9 lets no epoch count as better, so that the plateau does lower the rate.
SCHEDULES = {
    "none": None,
    "step": partial(StepLR, step_size=1, gamma=0.5),
    "plateau": partial(ReduceLROnPlateau, patience=0, threshold=0.9, factor=0.3),
}


@cache
def digits():
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X[:100] / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y[:100])


def loaders(batch_size=16):
    """70 samples in shuffled batches, the last one smaller, and 30 to validate, in batches of 8 and one of 6."""
    X, y = digits()
    train = DataLoader(TensorDataset(X[:70], y[:70]), batch_size=batch_size, shuffle=True)
    return train, DataLoader(TensorDataset(X[70:], y[70:]), batch_size=8)


def parts(model="mlp", optimizer="adam", schedule="none"):
    torch.manual_seed(7)
    built = MODELS[model]()
    weights = OPTIMIZERS[optimizer](built.parameters())
    scheduler = SCHEDULES[schedule] and SCHEDULES[schedule](weights)
    torch.manual_seed(11)
    return built, weights, scheduler


@pytest.mark.parametrize("val", [False, True], ids=["no-val", "val"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_e1_the_bits_of_the_plain_loop(model, optimizer, schedule, val):
    plain, moved, scheduler = parts(model, optimizer, schedule)
    train_loader, val_loader = loaders()
    rows = plain_loop().train(
        plain, train_loader, nn.CrossEntropyLoss(), moved, epochs=3, scheduler=scheduler,
        val_loader=val_loader if val else None,
    )  # fmt: skip
    mine, optimizer, scheduler = parts(model, optimizer, schedule)
    train_loader, val_loader = loaders()
    result = epochal.fit(
        mine, train_loader, val_loader if val else None, loss=nn.CrossEntropyLoss(), optimizer=optimizer,
        schedule=scheduler, epochs=3, restore_best=False, device="cpu", observers=(),
    )  # fmt: skip
    assert same(plain.state_dict(), mine.state_dict())
    assert same(moved.state_dict(), optimizer.state_dict())
    assert [{name: row[name] for name in rows[0]} for row in result.history] == rows
    assert schedule == "none" or len({row["lr"] for row in rows}) > 1  # the schedule had something to do


@pytest.mark.parametrize("clip", [0.05, 1e6], ids=["bites", "never"])
def test_e1_clipping_too(clip):
    plain, moved, _ = parts("cnn", "sgd")
    rows = plain_loop().train(plain, loaders()[0], nn.CrossEntropyLoss(), moved, epochs=2, clip=clip)
    mine, optimizer, _ = parts("cnn", "sgd")
    result = epochal.fit(
        mine, loaders()[0], loss="cross_entropy", optimizer=optimizer, epochs=2, clip=clip, device="cpu", observers=()
    )
    assert same(plain.state_dict(), mine.state_dict())
    assert result.history.train_loss == [row["train_loss"] for row in rows]


@pytest.mark.parametrize("loss", ["mse", "l1", "huber", "bce_with_logits"])
def test_e1_losses_over_values(loss):
    def data():
        X, y = digits()
        return DataLoader(TensorDataset(X.flatten(1), (y % 2)[:, None].float()), batch_size=32, shuffle=True)

    def small():
        torch.manual_seed(0)
        return nn.Linear(64, 1)

    criterion = {"mse": nn.MSELoss, "l1": nn.L1Loss, "huber": nn.HuberLoss, "bce_with_logits": nn.BCEWithLogitsLoss}
    plain = small()
    rows = plain_loop().train(plain, data(), criterion[loss](), torch.optim.Adam(plain.parameters()), epochs=2)
    mine = small()
    optimizer = torch.optim.Adam(mine.parameters())
    result = epochal.fit(mine, data(), loss=loss, optimizer=optimizer, epochs=2, device="cpu", observers=())
    assert same(plain.state_dict(), mine.state_dict())
    assert result.history.train_loss == [row["train_loss"] for row in rows]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_e1_a_named_optimizer_gives_the_bits_of_torchs_fused_one(name):
    fused = {} if name == "rmsprop" else {"fused": True}
    kind = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
    }
    plain, _, _ = parts()
    optimizer = kind[name](plain.parameters(), lr=0.002, weight_decay=0.1, **fused)
    plain_loop().train(plain, loaders()[0], nn.CrossEntropyLoss(), optimizer, epochs=2)
    mine, _, _ = parts()
    epochal.fit(
        mine, loaders()[0], loss="cross_entropy", optimizer=name, lr=0.002, weight_decay=0.1, epochs=2,
        device="cpu", observers=(),
    )  # fmt: skip
    assert same(plain.state_dict(), mine.state_dict())


def test_e1_the_best_weights_are_those_of_the_plain_loop_at_that_epoch():
    options = {"loss": "cross_entropy", "epochs": 6, "device": "cpu", "observers": ()}
    mine, _, _ = parts("cnn")
    optimizer = torch.optim.SGD(mine.parameters(), lr=1.0)  # jumps about, so that the last epoch is not the best
    result = epochal.fit(mine, *loaders(), optimizer=optimizer, **options)
    assert result.restored and result.best.epoch < 6
    plain, _, _ = parts("cnn")
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    train_loader, val_loader = loaders()
    rows = plain_loop().train(
        plain, train_loader, nn.CrossEntropyLoss(), optimizer, epochs=result.best.epoch, val_loader=val_loader
    )
    assert same(plain.state_dict(), mine.state_dict())
    assert result.best.value == rows[-1]["val_loss"]


def test_the_plain_loop_runs_as_a_script(capsys):
    before = torch.get_rng_state()
    plain_loop().main()
    torch.set_rng_state(before)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert lines[0].startswith("epoch  1  lr 0.001  train_loss 0.8")
    assert float(lines[-1].split()[-1]) < 0.15


# -- E3: whoever watches, the same bits ---------------------------------------------------------------------


def trained(**options):
    model, optimizer, _ = parts("mlp", "adamw")
    train_loader, val_loader = loaders()
    options = {"observers": (), **options}
    result = epochal.fit(
        model, train_loader, val_loader, loss="cross_entropy", optimizer=optimizer, epochs=2, device="cpu",
        restore_best=False, **options,
    )  # fmt: skip
    return {
        "weights": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": torch.get_rng_state(),
        "losses": [result.history.train_loss, result.history.val_loss],
    }  # fmt: skip


def look_closely(event):
    """An observer that reads everything there is to read."""
    if isinstance(event, epochal.StepDone):
        event.result.loss.item()
        for outputs, targets in event.result.seen:
            (outputs.sum() + targets.sum()).item()


def watchers(folder):
    return {
        "console": {"observers": [epochal.Console(io.StringIO())]},
        "recorder": {"run": folder / "run"},
        "recorder, saving every step": {"run": folder / "steps", "save": epochal.Saving("1 steps", keep=2)},
        "default observers": {"observers": None},
        "observer": {"observers": [look_closely]},
        "observer of outputs": {"observers": [look_closely], "metrics": ["accuracy"]},
        "metrics": {"metrics": ["accuracy", "f1", "confusion", "top5"]},
        "early stopping": {"patience": 50},
        "all": {"observers": None, "run": folder / "all", "metrics": "accuracy", "patience": 50},
    }


WATCHERS = list(watchers(Path()))


@pytest.mark.parametrize("watcher", WATCHERS)
def test_e3_watching_changes_no_bit(watcher, tmp_path):
    assert same(_unwatched(), trained(**watchers(tmp_path)[watcher]))


@cache
def _unwatched():
    return trained()


# -- E4: as many workers as you like, the same batches -------------------------------------------------------


class Augmented(Dataset):
    """Draws from all three generators of the host, as augmentations do."""

    def __len__(self):
        return 22

    def __getitem__(self, index):
        X, y = digits()
        noise = torch.rand(()) + np.random.rand() + random.random()
        return X[index] + 0.1 * float(noise), y[index]


class Streamed(IterableDataset):
    def __iter__(self):
        for index in range(22):
            yield Augmented()[index]


# torch warns of more workers than cores, which is just what is wanted here.
many_workers = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@cache
def augmented_batches(workers):
    loader = epochal.Loader(Augmented(), batch_size=5, shuffle=True, seed=3, workers=workers)
    return [list(loader.batches(0)), list(loader.batches(1)), list(loader.batches(1, start=2))]


@many_workers
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_e4_the_same_batches_for_any_number_of_workers(workers):
    first, second, rest = augmented_batches(workers)
    assert [len(y) for _, y in first] == [5, 5, 5, 5, 2]
    assert same([first, second, rest], augmented_batches(0))
    assert same(second[2:], rest)  # a batch does not depend on those before it
    assert not same(first, second)  # order and noise are those of the epoch


@pytest.mark.parametrize("workers", [0, 1])
def test_e4_a_stream_gives_the_same_batches(workers):
    loader = epochal.Loader(Streamed(), batch_size=5, seed=3, workers=workers)
    assert same(list(loader.batches(1)), list(epochal.Loader(Streamed(), batch_size=5, seed=3).batches(1)))


def test_e4_drawing_batches_leaves_the_training_generators_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(epochal.Loader(Augmented(), batch_size=5, shuffle=True).batches(0))
    assert same(states, (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()))


@cache
def trained_with(workers):
    torch.manual_seed(1)
    model = mlp()
    result = epochal.fit(
        model, Augmented(), Augmented(), loss="cross_entropy", epochs=2, batch_size=5, workers=workers, seed=5,
        device="cpu", observers=(), restore_best=False,
    )  # fmt: skip
    return model.state_dict(), result.history.train_loss, result.history.val_loss


@many_workers
@pytest.mark.parametrize("workers", [1, 4])
def test_e4_training_gives_the_same_bits_for_any_number_of_workers(workers):
    assert same(trained_with(workers), trained_with(0))


# -- E5: micro-batches give the full batch's gradient --------------------------------------------------------


def gradient(objective, batches, dtype=torch.float32):
    """The gradient and the loss of one update over all the batches, and the weight it reports."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    state = epochal.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    (window,) = windows(batches, accumulate=len(batches))
    result = Update(objective, model, torch.device("cpu"))(state, window)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), result.loss, result.weight


def cut(batch, sizes):
    return list(zip(*(part.split(sizes) for part in batch)))


def check_cuts(objective, batch, sizes, dtype):
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    whole, loss, weight = gradient(objective, [batch], dtype)
    pieces, loss_of_pieces, weight_of_pieces = gradient(objective, cut(batch, sizes), dtype)
    assert (whole - pieces).norm() <= tolerance * whole.norm()
    assert abs(loss - loss_of_pieces) <= tolerance * abs(loss)
    assert float(weight) == float(weight_of_pieces)


def regression(dtype):
    generator = torch.Generator().manual_seed(1)
    X, y = (torch.randn(24, width, generator=generator, dtype=dtype) for width in (6, 4))
    return X, y


def classes(dtype, masked=()):
    X, _ = regression(dtype)
    y = torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(2))
    y[list(masked)] = -100
    return X, y


def mask_of(targets, masked):
    mask = torch.ones_like(targets)
    mask[list(masked)] = 0
    return mask


FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
CUTS = {"even": [8, 8, 8], "ragged": [10, 10, 4], "one left": [23, 1], "one by one": [1] * 24}
SIZES = pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
RAGGED_MASK = (0, 1, 2, 11, 20)
WHOLE_MASK = (*range(8, 16), 20)  # of [8, 8, 8] the second micro-batch is masked as a whole


@FLOATS
@SIZES
def test_e5_micro_batches_of_any_size(dtype, sizes):
    check_cuts(Supervised(nn.MSELoss()), regression(dtype), sizes, dtype)
    check_cuts(Supervised(nn.CrossEntropyLoss()), classes(dtype), sizes, dtype)


@FLOATS
@SIZES
@pytest.mark.parametrize("masked", [RAGGED_MASK, WHOLE_MASK], ids=["ragged", "whole"])
def test_e5_masked_by_ignore_index(dtype, sizes, masked):
    check_cuts(Supervised(nn.CrossEntropyLoss()), classes(dtype, masked), sizes, dtype)


@FLOATS
def test_e5_weighted_classes(dtype):
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 3.0, 0.5], dtype=dtype))
    check_cuts(Supervised(loss), classes(dtype, WHOLE_MASK), [8, 8, 8], dtype)


def by_tensor(model, batch):
    """The mean over the tokens that are not masked, weighted by their number, a tensor."""
    X, y, mask = batch
    tokens = mask.sum()
    return epochal.Loss(((model(X) - y).square() * mask).sum() / tokens, tokens)


def by_number(model, batch):
    value, tokens, *_ = by_tensor(model, batch)
    return epochal.Loss(value, tokens.item())


def by_ignored_class(model, batch):
    """As a language model has it: nothing but cross_entropy, and the number of tokens as a plain number."""
    X, y, _ = batch
    return epochal.Loss(F.cross_entropy(model(X), y), int((y != -100).sum()))


@FLOATS
@SIZES
@pytest.mark.parametrize("masked", [RAGGED_MASK, WHOLE_MASK], ids=["ragged", "whole"])
@pytest.mark.parametrize("objective", [by_tensor, by_number, by_ignored_class])
def test_e5_an_objective_weighted_by_tokens(dtype, sizes, masked, objective):
    X, y = classes(dtype, masked) if objective is by_ignored_class else regression(dtype)
    mask = mask_of(regression(dtype)[1], masked)
    check_cuts(Custom(objective), (X, y, mask), sizes, dtype)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_e5_any_cut_and_any_mask(data):
    sizes, left = [], 24
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    masked = data.draw(st.sets(st.integers(0, 23), max_size=23))
    check_cuts(Supervised(nn.CrossEntropyLoss()), classes(torch.float64, masked), sizes, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_e5_a_whole_run_and_the_plain_loop_over_several_batches_a_step(dtype):
    """22 micro-batches of 3 and one of 2: the last window of an epoch holds what is left."""
    X, y = (part[:68] for part in digits())
    X = X.to(dtype)

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(dtype)

    def fit(batch_size, accumulate):
        mine = model()
        optimizer = torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9)
        loader = DataLoader(TensorDataset(X, y), batch_size=batch_size)
        result = epochal.fit(
            mine, loader, loss="cross_entropy", optimizer=optimizer, accumulate=accumulate, epochs=2, device="cpu",
            observers=(),
        )  # fmt: skip
        return torch.cat([p.detach().flatten() for p in mine.parameters()]), result.history

    pieces, rows = fit(3, 4)
    whole, rows_of_whole = fit(12, 1)
    assert [row["step"] for row in rows] == [row["step"] for row in rows_of_whole] == [6, 12]
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    assert (pieces - whole).norm() <= tolerance * whole.norm()
    plain = model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(X, y), batch_size=3)
    plain_rows = plain_loop().train(plain, loader, nn.CrossEntropyLoss(), optimizer, epochs=2, accumulate=4)
    weights = torch.cat([p.detach().flatten() for p in plain.parameters()])
    assert (pieces - weights).norm() <= tolerance * weights.norm()
    assert rows.train_loss == pytest.approx([row["train_loss"] for row in plain_rows], rel=tolerance)


# -- Readable: few frames between fit and the user's code ----------------------------------------------------


def frames_of_epochal():
    names, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names[::-1]


def test_at_most_five_frames_above_the_users_loss_and_four_above_backward():
    found = {}

    class Model(nn.Linear):
        def forward(self, x):
            found["forward"] = frames_of_epochal()
            return super().forward(x)

    def loss(outputs, targets):
        if torch.is_grad_enabled():
            found["loss"] = frames_of_epochal()
            outputs.register_hook(lambda gradient: found.update(backward=frames_of_epochal()))
        return (outputs - targets).square().mean()

    epochal.fit(Model(2, 1), (torch.ones(4, 2), torch.ones(4, 1)), loss=loss, epochs=5, device="cpu", observers=())
    assert found["loss"] == ["fit", "__iter__", "steps", "__call__", "__call__"]
    assert found["forward"] == found["loss"]
    assert found["backward"] == ["fit", "__iter__", "steps", "__call__"]


def test_at_most_five_frames_above_the_users_objective():
    found = []

    def objective(model, batch):
        found.append(frames_of_epochal())
        return model(batch[0]).square().mean()

    data = (torch.ones(4, 2), torch.ones(4, 1))
    epochal.fit(nn.Linear(2, 1), data, objective=objective, epochs=5, device="cpu", observers=())
    assert len(found[-1]) <= 5  # the first three updates are watched
