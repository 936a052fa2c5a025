"""R13: memory that runs out at random: no sample is lost or repeated, and the bits are those of smaller micro-batches.

The errors are raised by a layer or by torch's own allocator on the CPU; an accelerator that is really full is not
tried here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import epochal
from campaigns import harness
from campaigns.harness import Outcome, Part
from epochal import step
from epochal.buffers import Buffers
from epochal.data.window import windows
from epochal.objective import Custom
from epochal.runtime import seeding
from epochal.step import Update

WHAT = "memory runs out at random micro-batches"
TIMES = {"small": 30, "full": 500}
SIZE, SAMPLES = 16, 43
X = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def allocator() -> None:
    torch.empty(1 << 50)  # four pebibytes: torch's own allocator refuses


def device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def python() -> None:
    raise MemoryError


FAILURES: Sequence[Callable[[], None]] = (allocator, device, python)


class Backward(torch.autograd.Function):
    """Goes through; looks for room on the way back."""

    @staticmethod
    def forward(ctx, x, look):
        ctx.look = look
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.look(len(gradient))
        return gradient, None


class Room(nn.Module):
    """A layer with memory for some samples at once, in the forward or in the backward pass."""

    def __init__(self, room: int, fail: Callable[[], None], backward: bool):
        super().__init__()
        self.room, self.fail, self.backward, self.failures = room, fail, backward, 0

    def look(self, count: int) -> None:
        if count > self.room:
            self.failures += 1
            self.fail()

    def forward(self, x: Tensor) -> Tensor:
        if self.backward:
            return Backward.apply(x, self.look)
        self.look(len(x))
        return x


def net(norm: nn.Module, *last: nn.Module) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 1), *(last or [nn.Identity()]))


def run(scale: str) -> Outcome:
    """Half of them with a layer that is too small, half with failures at random calls of the model."""
    return harness.outcome("R13", WHAT, lambda part, rng, *_: _fail(part, rng, TIMES[scale]))


def bites() -> Outcome:
    """A retry that goes on with the random numbers as they are after the failure."""

    def work(part: Part, rng: random.Random, share: int, shares: int) -> None:
        class Forgetting(Buffers):
            def put_back(self) -> None:
                now = seeding.generator_states()
                super().put_back()
                seeding.set_generator_states(now)

        with harness.changed(step, Buffers=Forgetting):
            _fail(part, rng, 10)

    return harness.outcome("R13", WHAT, work)


def _fail(part: Part, rng: random.Random, count: int) -> None:
    for number in range(count):
        part.tried += 1
        problems = _too_small(part, rng) if number % 2 else _at_random(part, rng)
        for problem in problems:
            part.fail(problem)


def _too_small(part: Part, rng: random.Random) -> list[str]:
    """A run in which memory never suffices for a whole batch, and one begun with what it suffices for."""
    room, fail, backward = rng.randint(1, SIZE - 1), rng.choice(FAILURES), rng.random() < 0.5
    size = SIZE
    while size > room:
        size //= 2
    # Batch norm cannot do with one sample, so that the last batch would be cut otherwise than from the beginning.
    norm = nn.BatchNorm1d if size == 8 else nn.LayerNorm
    options = {
        "loss": "mse", "epochs": 2, "seed": rng.randrange(1000), "observers": (), "lr": 0.05,
        **rng.choice(({}, {"optimizer": "muon"}, {"clip": 0.1}, {"precision": "bf16"}, {"metrics": ["mae"]})),
    }  # fmt: skip
    full = Room(room, fail, backward)
    left = []
    for last, batch, accumulate in ((full, SIZE, 1), (nn.Identity(), size, SIZE // size)):
        model = net(norm(6), last)
        result = epochal.fit(model, (X, Y), batch_size=batch, accumulate=accumulate, **options)
        rows = [{name: value for name, value in row.items() if name != "time"} for row in result.history]
        left.append(harness.digest([model.state_dict(), torch.get_rng_state(), rows]))
    part.count("failures", full.failures)
    told = f"room for {room}, {fail.__name__}, {'backward' if backward else 'forward'}, {options}"
    problems = [] if left[0] == left[1] else [f"{told}: not as with batches of {size}"]
    return problems if full.failures else [*problems, f"{told}: memory never ran out"]


def _at_random(part: Part, rng: random.Random) -> list[str]:
    """Failures at one to three random calls; then the same with the pieces cut as they were, and no failure."""
    at, fail = sorted(rng.sample(range(1, 13), rng.randint(1, 3))), rng.choice(FAILURES)
    sizes: dict[int, int | None] = {}
    left = [_updates(fail, at, sizes, cut=False), _updates(fail, [], sizes, cut=True)]
    part.count("failures", len(at))
    told = f"{fail.__name__} at calls {at}"
    problems = [] if left[0][0] == left[1][0] else [f"{told}: other bits than without a failure"]
    for what, (_, seen) in zip(("with failures", "without"), left):
        wrong = [number for number, samples in seen.items() if samples != list(range(24 * number, 24 * number + 24))]
        problems += [f"{told}: {what}: samples lost or repeated in steps {wrong}"] if wrong else []
    return problems


def _updates(
    fail: Callable[[], None], at: list[int], sizes: dict[int, int | None], *, cut: bool
) -> tuple[str, dict[int, list[int]]]:
    """Six updates over two batches each: digest, and the samples that each update was made of (its last attempt)."""
    calls, seen = [0], {}
    model = net(nn.BatchNorm1d(6))

    def objective(forward: Callable, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        calls[0] += 1
        seen[state.progress.step].extend(batch[2].tolist())
        if calls[0] in at:
            seen[state.progress.step].clear()  # what was done of this update is not counted
            fail()
        return (forward(batch[0]) - batch[1]).square().mean()

    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(144, 4, generator=generator), torch.randn(144, 1, generator=generator)
    batches = list(zip(inputs.split(12), targets.split(12), torch.arange(144).split(12)))
    state = epochal.TrainState(model, torch.optim.Adam(model.parameters(), lr=0.05))
    update = Update(Custom(objective), model, torch.device("cpu"))
    torch.manual_seed(1)
    for number, window in enumerate(windows(batches, accumulate=2)):
        seen[number] = []
        if cut:
            update.micro_batch = sizes[number]
        update(state, window)
        sizes.setdefault(number, update.micro_batch)
        state.progress.tick(window)
    return harness.digest([model.state_dict(), state.optimizer.state_dict(), torch.get_rng_state()]), seen
