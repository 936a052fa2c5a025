"""Small programs with a mistake, for findings that no program of the benchmark's tuned half shows."""

import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import epochal


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = draw(320, 8)
Y = X[:, :3].argmax(1)
LINE = X @ draw(8, 1, seed=1)


def mlp(inputs=8, outputs=3, *last):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs), *last)


def classes(model=None, **options):
    model = mlp() if model is None else model
    return {"model": model, "train": (X, Y), "loss": "cross_entropy", "epochs": 3, "seed": 0} | options


def numbers(model=None, **options):
    model = mlp(8, 1) if model is None else model
    return {"model": model, "train": (X, LINE), "loss": "mse", "epochs": 3, "seed": 0} | options


def all_frozen():
    return classes(mlp().requires_grad_(False))


def batch_norm_of_one():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
    return classes(model, train=(X[:33], Y[:33]))


class Constant(nn.Module):
    """Its answer depends on whether the first number is above 0, and on no more."""

    def __init__(self):
        super().__init__()
        self.sides = nn.Parameter(torch.zeros(2, 3))

    def forward(self, x):
        return self.sides[(x[:, 0] > 0).long()]


def cannot_fit():
    return classes(Constant(), train=(X, (X[:, 1] > 0).long() + (X[:, 2] > 0)), lr=1e-2, epochs=6)


class Slow(Dataset):
    """Takes its time for the first samples."""

    def __init__(self):
        self.fetched = 0

    def __len__(self):
        return 64

    def __getitem__(self, at):
        self.fetched += 1
        time.sleep(0.25 if self.fetched <= 20 else 0)
        return X[at], Y[at]


def out_of_time():
    return classes(train=Slow(), batch_size=16, epochs=1, shuffle=False)


def class_imbalance():
    return classes(train=(X, (torch.arange(320) % 40 == 0).long()))


def decayed_norms():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    return classes(model, optimizer="adamw", weight_decay=0.1)


def impossible_metric():
    def accuracy(outputs, targets):
        return (outputs.argmax(1) == targets).float().sum() * 10

    return classes(metrics=[accuracy], val=0.2)


def duplicates_in_val():
    rows = torch.cat([X[:10], draw(60, 8, seed=4)])
    return classes(val=(rows, rows[:, :3].argmax(1)))


def init_scale():
    model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 3))
    torch.manual_seed(0)
    for part in model:
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=8.0)
    return classes(model)


def missing_nonlinearity():
    torch.manual_seed(0)
    return classes(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)))


def own(step, **options):
    return classes(optimizer="sgd", lr=0.1, step=step, **options)


def missing_zero_grad():
    def step(state, window):
        x, y = window.batches[0]
        loss = F.cross_entropy(state.model(x), y)
        loss.backward()
        state.optimizer.step()
        return epochal.StepResult(loss.detach())

    return own(step)


def negative_loss():
    def objective(model, batch):
        return F.cross_entropy(model(batch[0]).repeat(1, 2), -torch.ones(len(batch[0]), 2))

    return numbers(objective=objective, loss=None)


def nonfinite_targets():
    targets = LINE.clone()
    targets[40] = float("nan")
    return numbers(train=(X, targets))


class Raising(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        raise KeyError("colour")


def raises():
    return classes(Raising())


class Fixed(Sampler):
    """Draws from a generator that it makes anew."""

    def __iter__(self):
        yield from torch.randperm(320, generator=torch.Generator().manual_seed(3)).tolist()

    def __len__(self):
        return 320


def same_order():
    return classes(train=DataLoader(TensorDataset(X, Y), batch_size=32, sampler=Fixed()))


def schedule_before_step():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = ExponentialLR(optimizer, 0.9)

    def step(state, window):
        x, y = window.batches[0]
        schedule.step()
        optimizer.zero_grad()
        loss = F.cross_entropy(state.model(x), y)
        loss.backward()
        optimizer.step()
        return epochal.StepResult(loss.detach())

    return classes(model, step=step)


def softmax_dim():
    return classes(mlp(8, 3, nn.LogSoftmax(0)), loss="nll")


def step_without_effect():
    def step(state, window):
        x, y = window.batches[0]
        loss = F.cross_entropy(state.model(x), y)
        loss.backward()
        state.optimizer.zero_grad()
        state.optimizer.step()
        return epochal.StepResult(loss.detach())

    return own(step)


def sum_loss():
    return numbers(
        loss=None, objective=lambda model, batch: F.mse_loss(model(batch[0]), batch[1], reduction="sum"), lr=1e-5
    )


def unreachable_targets():
    return numbers(mlp(8, 1, nn.Sigmoid()))


def wrong_average():
    def rmse(outputs, targets):
        return (outputs - targets).square().mean().sqrt()

    spread = torch.where(torch.arange(320)[:, None] < 300, 0.1, 20.0)
    return numbers(
        train=(X, LINE * spread), val=(draw(96, 8, seed=5), torch.cat([draw(64, 1), 40 * draw(32, 1)])), metrics=[rmse]
    )


def fp16_unscaled():
    def step(state, window):
        x, y = window.batches[0]
        state.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(state.model(x), y)
        loss.backward()
        state.optimizer.step()
        return epochal.StepResult(loss.detach().float(), window.samples)

    return own(step)
