"""Whether an update costs the same with more rows, and later in a run.

    python -m benchmarks.speed.growth [--rounds 7]

The seed's network on 10^3 to 10^6 rows of 10 numbers, batches of 32, one epoch or 2,000 updates, in turns; and a run of
10^5 updates over 10^3 rows, its first thousand (after a hundred) against its last, and how often Python's garbage
collector ran meanwhile. What is printed are ratios to the smallest one, the medians over the rounds.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from itertools import pairwise

import torch

import epochal

from .works import SimpleModel


def microseconds(rows: int, steps: int, *, parts: int = 1) -> list[float]:
    """The median time of an update, in each of as many parts of the run; the first hundred updates do not count."""
    drawn = torch.Generator().manual_seed(0)
    data = torch.randn(rows, 10, generator=drawn), torch.randn(rows, 1, generator=drawn)
    ends: list[float] = []
    plan = epochal.Plan(
        SimpleModel(), data, loss="mse", max_steps=steps, observers=(), evaluate_every="1000000000 steps"
    )
    with plan.prepare() as run:
        for event in run:
            if isinstance(event, epochal.StepDone):
                ends.append(time.perf_counter())
    times = [1e6 * (later - earlier) for earlier, later in pairwise(ends[100:])]
    size = len(times) // parts
    return [statistics.median(times[number * size : (number + 1) * size]) for number in range(parts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [10**3, 10**4, 10**5, 10**6]
    found: dict[int, list[float]] = {rows: [] for rows in sizes}
    for _ in range(options.rounds):
        for rows in sizes:
            found[rows] += microseconds(rows, 2_100)
    for rows, times in found.items():
        ratio = statistics.median(one / first for one, first in zip(times, found[sizes[0]]))
        print(f"{rows:>10,} rows  {statistics.median(times):8.1f} µs an update  {ratio:6.3f}")
    collected: list[int] = []
    gc.callbacks.append(lambda phase, told: collected.append(told["generation"]) if phase == "stop" else None)
    parts = microseconds(10**3, 100_100, parts=100)
    for name, part in (("first", parts[0]), ("middle", parts[50]), ("last", parts[-1])):
        print(f"{name:>10} 1,000 of 100,000 updates  {part:8.1f} µs  {part / parts[0]:6.3f}")
    print(
        f"{len(collected)} garbage collections, {sum(map(bool, collected))} of them of more than the youngest objects"
    )


if __name__ == "__main__":
    main()
