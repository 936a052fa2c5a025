"""What an update of ``fit`` costs in several processes, against a loop over DistributedDataParallel written by hand.

    python benchmarks/processes.py [--processes 2] [--rounds 15] [--batch 64]

All train the same network on handwritten digits in the same processes, an epoch each in turn, forwards and backwards,
so that what else the machine does meets all of them alike; before each epoch the processes wait for each other, and
that does not count. The loop by hand takes its share of each batch by one index operation, its optimizer is fused, and
it reads nothing back; the usual one has a DataLoader and a DistributedSampler, as in PyTorch's tutorials, and adds up
loss.item(). One thread each. What counts is the time of an epoch in the first process, with what fit does
at the end of the one before.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import epochal

EPOCHS = 9  # of a training; the first one is not counted


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def by_hand(images, labels, batch, *, tells=False):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = DistributedDataParallel(network())
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    loss_of = nn.CrossEntropyLoss()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        total = torch.zeros(())
        for rows in order.split(batch):
            mine = rows.tensor_split(size)[rank]
            optimizer.zero_grad()
            loss = loss_of(model(images.index_select(0, mine)), labels.index_select(0, mine))
            loss.backward()
            if tells:
                facts = torch.zeros(10, dtype=torch.float64)
                torch.distributed.all_reduce(facts)
                facts.tolist()
            optimizer.step()
            total += loss.detach() * len(mine)
            yield


def by_hand_again(*given):
    """The same once more: how far two equal loops are apart."""
    return by_hand(*given)


def by_hand_telling(*given):
    """The same, with the few numbers that epochal's processes tell each other as a collective of their own."""
    return by_hand(*given, tells=True)


def by_usual_hand(images, labels, batch):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = DistributedDataParallel(network())
    optimizer = torch.optim.Adam(model.parameters())
    loss_of = nn.CrossEntropyLoss()
    sampler = DistributedSampler(data := TensorDataset(images, labels), size, rank)
    loader = DataLoader(data, batch_size=batch // size, sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
            yield


def by_fit(images, labels, batch):
    plan = epochal.Plan(
        network(), (images, labels), loss="cross_entropy", optimizer="adam", batch_size=batch, epochs=EPOCHS, seed=0,
        observers=(),
    )  # fmt: skip
    with plan.prepare() as run:
        for event in run:
            if isinstance(event, epochal.StepDone):
                yield


def in_turns(arms, given, updates):
    """The seconds of each arm's epochs after the first one."""
    begun = {arm: arm(*given) for arm in arms}
    seconds = {arm: [] for arm in arms}
    for epoch in range(EPOCHS):
        for arm in arms if epoch % 2 else reversed(arms):
            torch.distributed.barrier()
            start = time.perf_counter()
            for _ in range(updates):
                next(begun[arm])
            seconds[arm].append(time.perf_counter() - start)
    for one in begun.values():
        one.close()
    return {arm: some[1:] for arm, some in seconds.items()}


def measure(rounds, batch):
    torch.set_num_threads(1)
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images[:, None]).float() / 16, torch.from_numpy(digits.target).long()
    arms, updates = [by_hand, by_hand_again, by_hand_telling, by_usual_hand, by_fit], -(-len(images) // batch)
    list(by_fit(images, labels, batch))  # joins the group, and warms up
    times = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, some in in_turns(arms, (images, labels, batch), updates).items():
            times[arm] += some
    if torch.distributed.get_rank() == 0:
        for arm, some in times.items():
            ratios = sorted(one / hand for one, hand in zip(some, times[by_hand]))
            low, high = ratios[len(ratios) // 4], ratios[-len(ratios) // 4]
            told = f"ratio {statistics.median(ratios):.3f} (half of the epochs {low:.2f} to {high:.2f})"
            print(f"{arm.__name__:15} {statistics.median(some) / updates * 1e3:7.2f} ms an update, {told}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options.rounds, options.batch)
        return
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    world = {"WORLD_SIZE": str(options.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen([sys.executable, *sys.argv], env=os.environ | world | {"RANK": str(rank)})
        for rank in range(options.processes)
    ]
    sys.exit(max(one.wait() for one in started))


if __name__ == "__main__":
    main()
