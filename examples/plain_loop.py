"""The loop as a careful engineer writes it by hand, with nothing but torch: what ``epochal.fit`` is measured against.

``epochal.fit`` over the same DataLoaders, after the same ``torch.manual_seed``, gives the same weights to the bit
(``tests/test_exactness.py``). Run it as a script to train it on a toy problem.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset


def train(model, loader, loss, optimizer, *, epochs, scheduler=None, val_loader=None, clip=None, accumulate=1):
    """Trains ``model`` in place; gives a dict an epoch: epoch, step, lr, train_loss and, with val_loader, val_loss.

    loss: gives the mean over a batch (inputs, targets). scheduler: moves once an epoch; a plateau is fed with the
    validation's loss, or the training's. clip: the largest gradient norm. accumulate: batches in one update.
    """
    history, step = [], 0
    for epoch in range(1, epochs + 1):
        model.train()
        total, count, batches = 0.0, 0, iter(loader)
        while window := list(islice(batches, accumulate)):
            samples = sum(len(targets) for _, targets in window)
            optimizer.zero_grad()
            for inputs, targets in window:
                value = loss(model(inputs), targets)
                # Each batch counts by its samples, so that a small last one does not count too much.
                (value * (len(targets) / samples)).backward()
                total += value.item() * len(targets)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            count, step = count + samples, step + 1

        row = {"epoch": epoch, "step": step, "lr": optimizer.param_groups[0]["lr"], "train_loss": total / count}
        if val_loader is not None:
            row["val_loss"] = evaluate(model, val_loader, loss)
        history.append(row)

        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(row.get("val_loss", row["train_loss"]))
        elif scheduler is not None:
            scheduler.step()
    return history


def evaluate(model, loader, loss):
    """The mean of the loss over the samples, in eval mode and without gradients."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets in loader:
            total += loss(model(inputs), targets).item() * len(targets)
            count += len(targets)
    return total / count


def main():
    """The seed's example: 1,000 samples of 10 features, a network 10-64-32-1, here with something to learn."""
    torch.manual_seed(0)
    inputs = torch.randn(1200, 10)
    targets = inputs[:, :1] * inputs[:, 1:2] + 0.1 * torch.randn(1200, 1)
    loader = DataLoader(TensorDataset(inputs[:1000], targets[:1000]), batch_size=32, shuffle=True)
    val_loader = DataLoader(TensorDataset(inputs[1000:], targets[1000:]), batch_size=32)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    scheduler = ReduceLROnPlateau(optimizer, patience=3)
    history = train(
        model, loader, nn.MSELoss(), optimizer, epochs=20, scheduler=scheduler, val_loader=val_loader, clip=1.0
    )
    for row in history:
        print("epoch {epoch:>2}  lr {lr:g}  train_loss {train_loss:.4f}  val_loss {val_loss:.4f}".format(**row))


if __name__ == "__main__":
    main()
