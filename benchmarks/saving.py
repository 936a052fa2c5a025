"""What a run folder costs on the seed's own example: a checkpoint every epoch, keep=3, the default policy.

    python benchmarks/saving.py [--rounds 15] [--epochs 100] [--threads 1]

The same run with and without a folder, in one process, in turns, after a warm-up: the median of the ratios of two
runs that followed each other. Everything counts: checkpoints, metrics, the record of the run, its final weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from seed_example import SimpleModel

import epochal


def seconds(train, val, epochs, **options):
    model = SimpleModel()
    began = time.perf_counter()
    epochal.fit(model, train, val=val, loss="mse", epochs=epochs, observers=(), **options)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    train = torch.randn(1000, 10), torch.randn(1000, 1)
    val = torch.randn(200, 10), torch.randn(200, 1)
    saving = epochal.Saving("1 epoch", keep=3)
    ratios, saved = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            run = Path(folder, str(number))
            without = seconds(train, val, options.epochs)
            ratio = seconds(train, val, options.epochs, run=run, save=saving) / without
            if number:  # the first one is the warm-up
                ratios.append(ratio)
                saved.append((run / "journal.jsonl").read_text().count('"saved"'))
    print(f"saved    {statistics.median(saved):7.0f} checkpoints in {options.epochs} epochs (median)")
    print(f"ratio    {statistics.median(ratios):7.3f} (lowest {min(ratios):.3f}, highest {max(ratios):.3f})")


if __name__ == "__main__":
    main()
