"""The start and the memory of a training, each in a process of its own.

    python -m benchmarks.speed.cold WORK [--arms seed hand epochal compiled] [--rounds 5]

first: seconds from the end of ``import torch`` until the second pass of the model begins, so that one update is over.
peak: the largest resident memory of the process, above what it had when torch and the data were there; "data" is what
the arrays take. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time


def child(name: str, arm: str, threads: int) -> None:
    import torch

    began = time.perf_counter()
    torch.set_num_threads(threads)
    from dataclasses import replace

    from . import peers
    from .arms import ARMS
    from .works import WORKS

    loading = time.perf_counter()
    work = WORKS[name]()
    loaded = time.perf_counter() - loading  # the data are the same for all
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    passes: list[float] = []

    def model():
        made = work.model()
        if arm != "compiled":  # a hook would be part of what is compiled

            def note(module, given):
                if module.training and len(passes) < 2:
                    passes.append(time.perf_counter())

            made.register_forward_pre_hook(note)
        return made

    {**ARMS, **peers.ARMS}[arm](replace(work, model=model, epochs=1), lambda now=None: None)
    first = passes[1] - began - loaded if len(passes) > 1 else float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    data = sum(part.nbytes for pair in (work.train, work.val) for part in pair)
    print(json.dumps({"first": first, "peak": peak / 1024, "data": data / 2**20, "whole": time.perf_counter() - began}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work")
    parser.add_argument("--arms", nargs="+", default=["seed", "hand", "epochal"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.work, options.child, options.threads)
        return
    found: dict[str, list[dict]] = {arm: [] for arm in options.arms}
    for _ in range(options.rounds):
        for arm in options.arms:
            command = [sys.executable, "-m", "benchmarks.speed.cold", options.work, "--child", arm]
            done = subprocess.run(
                [*command, "--threads", str(options.threads)], capture_output=True, text=True, check=True
            )
            found[arm].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{options.work}, one epoch; medians of {options.rounds}")
    print(f"{'':12}{'first s':>10}{'peak MB':>10}{'data MB':>10}{'whole s':>10}")
    for arm, rounds in found.items():
        middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        print(f"{arm:12}{middle['first']:10.2f}{middle['peak']:10.1f}{middle['data']:10.1f}{middle['whole']:10.2f}")


if __name__ == "__main__":
    main()
