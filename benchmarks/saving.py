"""What a run folder costs on the seed's own example: a checkpoint every epoch, keep=3, the default policy.

    python benchmarks/saving.py [--rounds 41] [--epochs 100] [--threads 1]

The same run with and without a folder, in one process, in turns and after a warm-up, each first as often as second:
the ratio of the medians, and of the quicker quarters, which other processes disturb less. Everything counts:
checkpoints, metrics, the record of the run, its final weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from speed.works import SimpleModel

import epochal


def seconds(train, val, epochs, **options):
    model = SimpleModel()
    began = time.perf_counter()
    epochal.fit(model, train, val=val, loss="mse", epochs=epochs, observers=(), **options)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    train = torch.randn(1000, 10), torch.randn(1000, 1)
    val = torch.randn(200, 10), torch.randn(200, 1)
    saving = epochal.Saving("1 epoch", keep=3)
    times: dict[bool, list[float]] = {False: [], True: []}
    saved = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            run = Path(folder, str(number))
            for has_folder in (False, True) if number % 2 else (True, False):
                given = {"run": run, "save": saving} if has_folder else {}
                took = seconds(train, val, options.epochs, **given)
                if number:  # the first one is the warm-up
                    times[has_folder].append(took)
            saved.append((run / "journal.jsonl").read_text().count('"saved"'))
    without, within = times[False], times[True]
    quick = [statistics.quantiles(some)[0] for some in (within, without)]
    print(f"saved    {statistics.median(saved):7.0f} checkpoints in {options.epochs} epochs (median)")
    ratio = statistics.median(within) / statistics.median(without)
    print(f"ratio    {ratio:7.3f} (of the quicker quarters {quick[0] / quick[1]:.3f})")


if __name__ == "__main__":
    main()
