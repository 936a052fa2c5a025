"""What the non-finite guard costs: ``fit`` over the seed's example (64-32-1, batch 32, Adam), with and without it.

    python benchmarks/guard.py [--rounds 100] [--epochs 5] [--threads 1]

Without it nothing is kept before an update and nothing is looked at. Both run in one process, in turns, the order
drawn anew each time; the figure is the ratio of the medians, with that of the quicker quarters beside it. ``--steps``
times the bare updates instead, without the rest of ``fit``: there the guard is a larger part of less. ``--parts`` times
what the guard does in an update, piece by piece, over the gradients of the same network.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from speed.works import SimpleModel
from torch import nn
from torch.utils.benchmark import Timer

import epochal
from epochal import prepare
from epochal.accumulation import gradients
from epochal.buffers import Buffers
from epochal.data.window import windows
from epochal.objective import Supervised
from epochal.state import TrainState
from epochal.step import Update, _flag_nonfinite


class _Zero:
    def item(self):
        return 0.0


class Unguarded(Update):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._found = _Zero()  # a number, where the guard has a tensor to read

    def _keep(self, state):
        return None

    def _look_for_nonfinite(self, state, loss):
        return gradients(state)


def by_epochal(model, train, val, epochs):
    epochal.fit(model, train, val=val, loss="mse", epochs=epochs, observers=())


def seconds_of_fit(kind, train, val, epochs):
    model, prepare.Update = SimpleModel(), kind
    began = time.perf_counter()
    by_epochal(model, train, val, epochs)
    return time.perf_counter() - began


def seconds_of_updates(kind, train, val, epochs):
    model = SimpleModel()
    update = kind(Supervised(nn.MSELoss()), model, torch.device("cpu"), keeps_outputs=False)
    state = TrainState(model, torch.optim.Adam(model.parameters(), fused=True))
    batches = list(zip(*(part.split(32) for part in train)))
    began = time.perf_counter()
    for window in windows(batches * epochs):
        update(state, window)
    return time.perf_counter() - began


def print_parts():
    """The median microseconds of each piece of the guard."""
    model = SimpleModel()
    state = TrainState(model, torch.optim.Adam(model.parameters()))
    (loss := model(torch.randn(32, 10)).square().mean()).backward()
    looked_at, flag, one = [*gradients(state), loss.detach()], torch.zeros(1), torch.ones(1)
    names = {
        "keep buffers and generators": ("b.keep()", {"b": Buffers([model], torch.device("cpu"))}),
        "gather the gradients": ("g(s)", {"g": gradients, "s": state}),
        f"look at {len(looked_at)} tensors": (
            "f(l, x, y)",
            {"f": _flag_nonfinite, "l": looked_at, "x": flag, "y": one},
        ),
        "read the flag": ("x.item()", {"x": flag}),
    }
    for name, (statement, names_in_it) in names.items():
        taken = Timer(statement, globals=names_in_it).blocked_autorange(min_run_time=1.0)
        print(f"{name:28} {taken.median * 1e6:6.2f} µs")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--parts", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.parts:
        print_parts()
        return
    torch.manual_seed(0)
    train, val = ((torch.randn(count, 10), torch.randn(count, 1)) for count in (1000, 200))
    seconds = seconds_of_updates if options.steps else seconds_of_fit
    times = {Unguarded: [], Update: []}
    for number in range(options.rounds + 2):
        for kind in random.sample(list(times), 2):
            took = seconds(kind, train, val, options.epochs)
            if number >= 2:  # after a warm-up
                times[kind].append(took)
    without, guarded = (sorted(taken) for taken in times.values())
    median = statistics.median(guarded) / statistics.median(without)
    quicker = statistics.quantiles(guarded)[0] / statistics.quantiles(without)[0]
    per_epoch = 1000 / options.epochs
    print(f"without  {statistics.median(without) * per_epoch:7.2f} ms an epoch (median of {options.rounds})")
    print(f"with     {statistics.median(guarded) * per_epoch:7.2f} ms an epoch")
    print(f"ratio    {median:7.3f} (of the quicker quarters {quicker:.3f})")


if __name__ == "__main__":
    main()
