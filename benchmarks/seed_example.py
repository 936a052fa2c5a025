"""The seed's own example, by hand and by ``epochal.fit``: 1,000×10, 64-32-1, batch 32, Adam, with validation.

    python benchmarks/seed_example.py [--rounds 15] [--epochs 20] [--threads 1]

Both run in one process, in turns, after a warm-up; the figure is the median over the rounds of the ratio
of two runs that followed each other, so that a slow moment of the machine hits both.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import epochal


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
        return self.fc3(x)


def by_hand(model, train, val, epochs):
    """The loop of the seed's page: its train_epoch and validate."""
    train_loader = DataLoader(TensorDataset(*train), batch_size=32, shuffle=True)
    val_loader = DataLoader(TensorDataset(*val), batch_size=32)
    criterion, optimizer = nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=0.001)
    for _ in range(epochs):
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


def by_epochal(model, train, val, epochs):
    epochal.fit(model, train, val=val, loss="mse", epochs=epochs, observers=())


def seconds(run, *arguments):
    model = SimpleModel()
    began = time.perf_counter()
    run(model, *arguments)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    train = torch.randn(1000, 10), torch.randn(1000, 1)
    val = torch.randn(200, 10), torch.randn(200, 1)
    for run in (by_hand, by_epochal):
        seconds(run, train, val, 3)
    hand, ours = [], []
    for _ in range(options.rounds):
        hand.append(seconds(by_hand, train, val, options.epochs))
        ours.append(seconds(by_epochal, train, val, options.epochs))
    ratios = sorted(b / a for a, b in zip(hand, ours))
    per_epoch = 1000 / options.epochs
    print(f"by hand  {statistics.median(hand) * per_epoch:7.2f} ms an epoch (median of {options.rounds})")
    print(f"epochal  {statistics.median(ours) * per_epoch:7.2f} ms an epoch")
    print(f"ratio    {statistics.median(ratios):7.3f} (lowest {ratios[0]:.3f}, highest {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
