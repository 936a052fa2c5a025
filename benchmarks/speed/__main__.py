"""Training the same model on the same data by several loops, in one process, in turns.

    python -m benchmarks.speed WORK... [--arms seed hand bare epochal] [--rounds 9] [--threads 1] [--usual]

In each round every arm trains once, in an order that turns round from one round to the next. What counts of it is the
median time of its epochs, validation included, without the first (the start, and whatever is compiled). An arm is
compared with another one by the ratio of these within a round, and what is printed is the median of these ratios over
all rounds, with the quarter of them below and above: a slow moment of the machine hits both, or only a few rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from itertools import pairwise

import torch

from .arms import ARMS
from .works import WORKS


def milliseconds(arm, work) -> float:
    """The median time of an epoch."""
    ends: list[float] = []
    gc.collect()
    arm(work, lambda now=None: ends.append(time.perf_counter() if now is None else now))
    assert len(ends) == work.epochs, f"{len(ends)} epochs of {work.epochs}"
    return 1000 * statistics.median(later - earlier for earlier, later in pairwise(ends))


def measured(work, arms: dict, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-1, rounds):  # the first round warms up
        names = list(arms)
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned if number % 2 else turned[::-1]:
            took = milliseconds(arms[name], work)
            if number >= 0:
                found[name].append(took)
    return found


def ratio(found: dict[str, list[float]], name: str, other: str) -> str:
    ratios = [one / two for one, two in zip(found[name], found[other])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:6.3f} ({low:.3f}–{high:.3f})"


def main() -> None:
    from . import peers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("works", nargs="+", choices=list(WORKS))
    parser.add_argument("--arms", nargs="+", default=["seed", "hand", "bare", "epochal"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--usual", action="store_true", help="other trainers as in their documentation; see peers.py")
    parser.add_argument("--json", help="where to write the times of all rounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peers.usual = options.usual
    known = {**ARMS, **peers.ARMS}
    kept = {}
    for name in options.works:
        work = WORKS[name]()
        found = kept[name] = measured(work, {arm: known[arm] for arm in options.arms}, options.rounds)
        against = [arm for arm in ("seed", "hand", "bare", "bare_graph") if arm in found]
        print(f"\n{name}: {work.what}; {options.threads} thread{'s' if options.threads > 1 else ''}")
        print(f"{'':12}{'ms an epoch':>12}" + "".join(f"{'÷ ' + arm:>24}" for arm in against))
        for arm, times in found.items():
            row = "".join(f"{ratio(found, arm, other):>24}" for other in against)
            print(f"{arm:12}{statistics.median(times):12.2f}{row}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(kept, file)


if __name__ == "__main__":
    main()
