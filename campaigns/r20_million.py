"""R20: a million steps with everything on: memory and open files stay flat, every step and row is told once."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

import epochal
from campaigns import harness
from campaigns.harness import Outcome, Part
from epochal.observe.console import Console

WHAT = "a million steps with everything on"
STEPS = {"small": 3_000, "full": 1_000_000}
EVERY = 100  # steps, between two evaluations
MOST_A_ROW = 4096  # bytes of memory for a row of the history, which a run keeps; and nothing else may grow
MOST_AT_ALL = 8 * 2**20  # bytes that the allocators may come and go by


class Sampler:
    """An observer that counts what it is told, and looks at the process once in a hundredth of the run."""

    def __init__(self, steps: int, leak: Callable[[], None] = lambda: None):
        self.every, self.leak = max(1, steps // 100), leak
        self.process = psutil.Process()
        self.steps, self.rows = 0, 0
        self.last: tuple[int, int] = (0, 0)
        self.repeated = 0
        self.samples: list[tuple[int, int, int]] = []

    def __call__(self, event: epochal.Event) -> None:
        if isinstance(event, epochal.StepDone):
            self.steps += 1
            self.repeated += event.step != self.steps
            self.leak()
            if event.step % self.every == 0:
                self.samples.append((event.step, self.process.memory_info().rss, self.process.num_fds()))
        elif isinstance(event, epochal.Evaluated):
            self.rows += 1


def run(scale: str) -> Outcome:
    return harness.outcome("R20", WHAT, lambda part, *_: _train(part, STEPS[scale]))


def bites() -> Outcome:
    """An observer that keeps a file open and a little memory at some steps."""

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        kept: list[Any] = []
        _train(part, 2_000, lambda: kept.append((os.dup(1) if len(kept) % 100 == 0 else None, bytearray(16_384))))

    return harness.outcome("R20", WHAT, work)


def _train(part: Part, steps: int, leak: Callable[[], None] = lambda: None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = torch.randn(64, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 2))
    sampler = Sampler(steps, leak)
    with harness.scratch() as folder, (folder / "console.txt").open("w") as told:
        os.chdir(folder)
        began = time.perf_counter()
        result = epochal.fit(
            model, (inputs, (inputs.sum(1) > 0).long()), val=(inputs[:8].clone(), (inputs[:8].sum(1) > 0).long()),
            loss="cross_entropy", optimizer="sgd", lr=0.01, schedule="cosine", clip=1.0, metrics=["accuracy"],
            max_steps=steps, batch_size=4, patience=steps, evaluate_every=f"{EVERY} steps", seed=0, run=folder / "run",
            observers=[Console(told), sampler],
        )  # fmt: skip
        part.figures["steps a second"] = steps / (time.perf_counter() - began)
        part.tried = sampler.steps
        _flat(part, sampler.samples)
        if result.reason is not epochal.StopReason.MAX_STEPS or sampler.steps != steps or sampler.repeated:
            part.fail(f"{sampler.steps} steps were told, {sampler.repeated} out of their order: {result.message}")
        _rows(part, folder / "run", steps, sampler)


def _flat(part: Part, samples: list[tuple[int, int, int]]) -> None:
    """Compares the second tenth of the run with the last."""
    early, late = samples[10:20], samples[90:]
    grown = sum(rss for _, rss, _ in late) / len(late) - sum(rss for _, rss, _ in early) / len(early)
    rows = 0.8 * samples[-1][0] / EVERY
    part.figures["MiB that memory has grown by, from the second tenth to the last"] = grown / 2**20
    part.figures["bytes a row"] = grown / rows
    part.figures["most open files"] = max(files for *_, files in samples)
    if grown > MOST_AT_ALL + MOST_A_ROW * rows:
        part.fail(f"memory has grown by {grown / 2**20:.1f} MiB")
    if max(files for *_, files in late) > max(files for *_, files in early):
        part.fail(f"open files: {early[0][2]}, and {late[-1][2]} at the end")


def _rows(part: Part, folder: Path, steps: int, sampler: Sampler) -> None:
    planned = list(range(EVERY, steps + 1, EVERY))
    found = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    listed = len((folder / "results.csv").read_text().splitlines()) - 1
    part.figures["rows"] = len(found)
    if found != planned or sampler.rows != len(planned) or listed != len(planned):
        part.fail(f"{len(planned)} rows were planned; {sampler.rows} told, {len(found)} and {listed} in the files")
