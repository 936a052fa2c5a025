"""Who trains: loops by hand, the bare operations, and epochal. Each calls ``clock()`` at the end of every epoch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch.utils.data import DataLoader, TensorDataset

import epochal
from epochal.speed.tuning import Setting

from .works import Work

Arm = Callable[[Work, Callable[[], None]], None]


def seeds_loop(work: Work, clock: Callable[[], None]) -> None:
    """The loop of PyTorch's training page: its train_epoch and validate."""
    model, criterion = work.model(), work.criterion()
    train_loader = DataLoader(TensorDataset(*work.train), batch_size=work.batch_size, shuffle=work.shuffle)
    val_loader = DataLoader(TensorDataset(*work.val), batch_size=work.batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    for _ in range(work.epochs):
        model.train()
        total_loss = 0
        for batch_X, batch_y in train_loader:
            outputs = model(batch_X)
            loss = criterion(outputs, batch_y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.item()
        model.eval()
        val_loss = 0
        with torch.no_grad():
            for batch_X, batch_y in val_loader:
                val_loss += criterion(model(batch_X), batch_y).item()
        clock()


def _order(work: Work, epoch: int) -> torch.Tensor:
    count = len(work.train[0])
    return (
        torch.randperm(count, generator=torch.Generator().manual_seed(epoch)) if work.shuffle else torch.arange(count)
    )


def _validate(model, criterion, work: Work) -> float:
    """In batches of 1,024 samples: one for the small works."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for inputs, targets in zip(work.val[0].split(1024), work.val[1].split(1024)):
            total += criterion(model(inputs), targets) * len(inputs)
    model.train()
    return total.item() / len(work.val[0])


def by_hand(work: Work, clock: Callable[[], None]) -> None:
    """The best loop that we can write with what torch documents: batches by one index operation (slices where the order
    is the data's), a fused optimizer, nothing read back before the epoch's end, a validation in large batches."""
    model, criterion = work.model(), work.criterion()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    inputs, targets = work.train
    for epoch in range(work.epochs):
        total = torch.zeros(())
        for rows in _rows(work, epoch):
            optimizer.zero_grad()
            loss = criterion(model(inputs[rows]), targets[rows])
            loss.backward()
            optimizer.step()
            total += loss.detach()
        total.item()
        _validate(model, criterion, work)
        clock()


def _rows(work: Work, epoch: int):
    if work.shuffle:
        return _order(work, epoch).split(work.batch_size)
    return [slice(at, at + work.batch_size) for at in range(0, len(work.train[0]), work.batch_size)]


def bare(work: Work, clock: Callable[[], None]) -> None:
    """The operations of an update and nothing else: one index operation for inputs and targets each, the model and the
    loss, ``backward``, the optimizer's kernel called directly. No loss is added up, nothing is looked at."""
    model, criterion = work.model(), work.criterion()
    weights = list(model.parameters())
    move = _adam(weights)
    inputs, targets = work.train
    for epoch in range(work.epochs):
        for rows in _rows(work, epoch):
            for weight in weights:
                weight.grad = None
            batch, wanted = (inputs[rows], targets[rows]) if isinstance(rows, slice) else (
                inputs.index_select(0, rows), targets.index_select(0, rows)
            )  # fmt: skip
            criterion(model(batch), wanted).backward()
            move([weight.grad for weight in weights])
        _validate(model, criterion, work)
        clock()


def _adam(weights):
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    counts = [torch.zeros(()) for _ in weights]

    @torch.no_grad()
    def move(gradients):
        torch._foreach_add_(counts, 1)
        torch._fused_adam_(
            weights, gradients, first, second, [], counts, lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    return move


def bare_graph(work: Work, clock: Callable[[], None]) -> None:
    """As ``bare``, with forward, loss and backward compiled into one graph, one for each shape, with its guards."""
    model, criterion = work.model(), work.criterion()
    weights = list(model.parameters())
    move = _adam(weights)
    inputs, targets = work.train

    def update(batch, wanted):
        loss = criterion(model(batch), wanted)
        return loss.detach(), torch.autograd.grad(loss, weights)

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        graph = torch.compile(update, fullgraph=True, dynamic=False)
        for epoch in range(work.epochs):
            for rows in _rows(work, epoch):
                batch, wanted = (inputs[rows], targets[rows]) if isinstance(rows, slice) else (
                    inputs.index_select(0, rows), targets.index_select(0, rows)
                )  # fmt: skip
                _, gradients = graph(batch, wanted)
                move(list(gradients))
            _validate(model, criterion, work)
            clock()


def by_epochal(work: Work, clock: Callable[..., None], **options) -> None:
    """Its own clock is read: an observer would be called at every update."""
    result = epochal.fit(
        work.model(), work.train, val=work.val, loss=work.loss, optimizer="adam", batch_size=work.batch_size,
        shuffle=work.shuffle, epochs=work.epochs, restore_best=False, device="cpu", observers=(), **options,
    )  # fmt: skip
    for row in result.history.rows:
        clock(row["time"])


def compiled(work: Work, clock: Callable[[], None]) -> None:
    by_epochal(work, clock, compile=True)


def tuned(work: Work, clock: Callable[..., None]) -> None:
    """With what ``tune_speed`` suggests for 2,000 epochs, asked once, with as many threads as it is measured with."""
    setting = _suggested(work, torch.get_num_threads())
    layout = {"memory_format": torch.channels_last} if setting.channels_last else {}
    arrays = [
        tuple(part.contiguous(**layout) if part.dim() == 4 else part for part in pair)
        for pair in (work.train, work.val)
    ]
    made = replace(work, model=lambda: work.model().to(**layout), train=arrays[0], val=arrays[1])
    by_epochal(made, clock, **setting.options)


@cache
def _suggested(work: Work, threads: int) -> Setting:
    plan = epochal.Plan(
        work.model(),
        work.train,
        loss=work.loss,
        optimizer="adam",
        batch_size=work.batch_size,
        epochs=2000,
        device="cpu",
    )
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(list(cores)[:threads]))  # else more threads would be tried
    try:
        found = epochal.tune_speed(plan, seconds=2.0)
    finally:
        os.sched_setaffinity(0, cores)
    print(f"{work.name}, what tune-speed found:\n{found}")
    return replace(found.best.setting, threads=None)


ARMS: dict[str, Arm] = {
    "seed": seeds_loop, "hand": by_hand, "bare": bare, "bare_graph": bare_graph, "epochal": by_epochal,
    "compiled": compiled, "tuned": tuned,
}  # fmt: skip
