"""R13, small: memory that runs out costs no sample; the batch is done in smaller pieces, with the same result."""

import copy
import random
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import epochal
from epochal.data.batch import pieces
from epochal.data.window import windows
from epochal.objective import Custom, Supervised
from epochal.step import Update

X = torch.randn(43, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
USUAL = {"loss": "mse", "epochs": 2, "shuffle": True, "seed": 0, "observers": (), "lr": 0.05}


def allocator(count):
    torch.empty(1 << 50)  # four pebibytes: torch's own allocator refuses


def device(count):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def python(count):
    raise MemoryError


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, check):
        ctx.check = check
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.check(len(gradient))
        return gradient, None


class Full(nn.Module):
    """Memory for ``room`` samples at once, in the forward or in the backward pass."""

    def __init__(self, room, fail=device, backward=False):
        super().__init__()
        self.room, self.fail, self.backward, self.failures = room, fail, backward, 0

    def check(self, count):
        if count > self.room:
            self.failures += 1
            self.fail(count)

    def forward(self, x):
        if not self.training:
            return x
        if self.backward:
            return InBackward.apply(x, self.check)
        self.check(len(x))
        return x


def net(*last):
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 1), *(last or [nn.Identity()])
    )


def bits(model):
    return [*(value.clone() for value in model.state_dict().values()), torch.get_rng_state()]


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("fail", [allocator, device, python])
def test_the_result_is_that_of_a_run_begun_with_the_smaller_batches(fail, backward):
    full = Full(8, fail, backward)
    one, two = net(full), net()
    cut = epochal.fit(one, (X, Y), val=(X.clone(), Y.clone()), batch_size=16, **USUAL)
    begun = epochal.fit(two, (X, Y), val=(X.clone(), Y.clone()), batch_size=8, accumulate=2, **USUAL)
    assert full.failures == 1, "the size is kept"
    assert same(bits(one), bits(two))
    assert cut.history.train_loss == begun.history.train_loss
    assert cut.history.val_loss == pytest.approx(begun.history.val_loss), "evaluated in batches of another size"


@pytest.mark.parametrize("options", [
    {"optimizer": "muon"}, {"clip": 0.1}, {"precision": "bf16"}, {"precision": "fp16"}, {"metrics": ["mae"]},
])  # fmt: skip
def test_so_it_is_with_other_options(options):
    one, two = net(Full(8)), net()
    cut = epochal.fit(one, (X, Y), batch_size=16, **USUAL, **options)
    begun = epochal.fit(two, (X, Y), batch_size=8, accumulate=2, **USUAL, **options)
    assert same(bits(one), bits(two))
    assert cut.history.train_loss == begun.history.train_loss


def test_it_is_halved_until_it_fits_and_classes_that_do_not_count_stay_so():
    targets = torch.arange(43) % 3
    targets[5:30] = -100
    last = nn.Sequential(nn.Linear(1, 3), Full(3))
    one, two = net(last), net(nn.Sequential(copy.deepcopy(last[0]), nn.Identity()))
    one[1], two[1] = nn.LayerNorm(6), nn.LayerNorm(6)
    given = {**USUAL, "loss": "cross_entropy", "shuffle": False}
    epochal.fit(one, (X, targets), batch_size=12, accumulate=2, **given)
    epochal.fit(two, (X, targets), batch_size=3, accumulate=8, **given)
    assert same(bits(one), bits(two)) and last[1].failures == 2


def updates(model, fail_at=(), cut_from=None, size=12, steps=6, pieces_of=3):
    """The model after some windows of two batches, memory failing at the given calls of the model (once each)."""
    calls, seen = [0], []

    def objective(forward, batch):
        calls[0] += 1
        if calls[0] in fail_at:
            device(len(batch[0]))
        seen.extend(batch[2].tolist())
        return (forward(batch[0]) - batch[1]).square().mean()

    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(size, width, generator=generator) for width in (4, 1) for _ in range(2 * steps)]
    batches = list(zip(data[: 2 * steps], data[2 * steps :], torch.arange(2 * steps * size).split(size)))
    state = epochal.TrainState(model, torch.optim.Adam(model.parameters(), lr=0.05))
    step, told, sizes = Update(Custom(objective), model, torch.device("cpu")), [], []
    for window in windows(batches, accumulate=2):
        if cut_from is not None and state.progress.step in cut_from:
            step.micro_batch = cut_from[state.progress.step]
        result = step(state, window)
        told += [(state.progress.step, note) for note in result.notes]
        sizes.append(step.micro_batch)
        state.progress.tick(window)
    return told, sizes, seen


def test_memory_that_runs_out_anywhere_costs_no_sample():
    draw = random.Random(5)
    for _ in range(25):
        fail_at = sorted(draw.sample(range(1, 13), draw.choice([1, 2])))
        one, two = net(), net()
        torch.manual_seed(1)
        told, sizes, _ = updates(one, fail_at)
        after = bits(one)
        assert told and {step for step, _ in told} == {i for i in range(6) if sizes[i] != ([None, *sizes])[i]}
        torch.manual_seed(1)
        _, _, seen = updates(two, cut_from={step: sizes[step] for step, _ in told})
        assert seen == list(range(144))
        assert same(after, bits(two)), (fail_at, told)


def test_it_is_told_once_and_kept_in_the_state():
    def step_and_state(model):
        state = epochal.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        return Update(Supervised(nn.MSELoss()), model, torch.device("cpu")), state

    step, state = step_and_state(net(Full(5)))
    assert step.state_dict() == {"micro_batch": None}
    notes = [step(state, window).notes for window in windows(list(zip(X.split(20), Y.split(20))))]
    told = "out of memory: batches of 20 are now done in pieces of 5; batch norm sees the smaller pieces"
    assert [list(one) for one in notes] == [[told], [], []]
    assert step.state_dict() == {"micro_batch": 5}
    full = Full(5)
    again, state = step_and_state(nn.Sequential(nn.Linear(4, 1), full))
    again.load_state_dict(step.state_dict())
    (window,) = windows([(X, Y)])
    assert list(again(state, window).notes) == [] and full.failures == 0
    again.load_state_dict({"micro_batch": None})
    assert again(state, window).notes == ["out of memory: batches of 43 are now done in pieces of 3"]


@pytest.mark.parametrize("backward", [False, True])
def test_what_filled_the_memory_is_given_back_before_the_next_try(backward):
    alive, held = [], []

    class Holding(Full):
        def forward(self, x):
            alive.append([one() is not None for one in held])
            held.append(weakref.ref(x))
            outputs = super().forward(x)
            held[-1] = weakref.ref(outputs)  # which the loss keeps for its backward pass
            return outputs

    epochal.fit(net(Holding(4, backward=backward)), (X, Y), batch_size=16, max_steps=1, **USUAL)
    assert alive[1] == [False] and alive[2] == [False, False]


def test_a_batch_that_cannot_be_made_smaller_is_told():
    with pytest.raises(epochal.EpochalError) as caught:
        epochal.fit(nn.Sequential(nn.Linear(4, 1), Full(0, allocator)), (X, Y), batch_size=16, **USUAL)
    error = caught.value
    assert type(error).__name__ == "ModelError" and isinstance(error.__cause__, RuntimeError)
    assert error.what == "memory ran out, and the batch cannot be made smaller."
    assert error.where.startswith("step 0, batch 0 of train; the batch is (float32 (1, 4), float32 (1, 1)); ")
    assert "you tried to allocate" in error.where and "more memory" in error.fix
    model = nn.Linear(4, 1)
    before = copy.deepcopy(model.state_dict())

    def objective(model, batch):
        model(batch.data)
        raise torch.OutOfMemoryError

    packed = pack_sequence([torch.ones(3, 4), torch.ones(2, 4)])
    state = epochal.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    (window,) = windows([packed])
    with pytest.raises(epochal.EpochalError, match="cannot be made smaller") as caught:
        Update(Custom(objective), model, torch.device("cpu"))(state, window)
    assert (
        "(float32 (5, 4), int64 (3,), NoneType, NoneType); OutOfMemoryError" in caught.value.where
        and "batch_size" in caught.value.fix
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_errors_are_left_alone():
    def wrong(count):
        raise RuntimeError("a mistake of the user's own")

    full = Full(0, wrong)
    with pytest.raises(RuntimeError, match="of the user's own"):
        epochal.fit(nn.Sequential(nn.Linear(4, 1), full), (X, Y), **USUAL)
    assert full.failures == 1


Named = namedtuple("Named", "x y")


def test_what_can_be_cut_and_what_cannot():
    x, y = torch.arange(10.0).view(5, 2), torch.arange(5)
    first, last = pieces(Named(x, y), 3)
    assert type(first) is Named and torch.equal(first.x, x[:3]) and torch.equal(last.y, y[3:])
    assert pieces((x, y), 5)[0][0] is x
    given = {"x": x, "text": list("abcde"), "pair": (x, y), "array": np.arange(5), "scale": 2.0, "none": None, "y": y}
    parts = pieces(given, 2)
    assert [part["text"] for part in parts] == [["a", "b"], ["c", "d"], ["e"]]
    assert all(part["scale"] == 2.0 and part["none"] is None for part in parts)
    assert [part["array"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([part["pair"][0] for part in parts]), x)
    two = pieces((x[:2], y[:2]), 1)
    assert [len(part) for part in two] == [2, 2] and torch.equal(two[1][0], x[1:2])
    boxes = [{"box": torch.ones(count, 4)} for count in (1, 3, 2, 1, 4)]
    assert [part[0] for part in pieces((boxes, x), 3)] == [boxes[:3], boxes[3:]]
    assert [len(part) for part in pieces(x, 2, no_lone=True)] == [2, 2, 1]
    assert [len(part) for part in pieces(torch.zeros(9), 4, no_lone=True)] == [4, 3, 2]
    lone = Full(4)
    epochal.fit(net(lone), (X[:25], Y[:25]), batch_size=16, **USUAL)  # its last batch of 9 is cut to 4, 3 and 2
    assert lone.failures == 2
    others = (x, object()), (x, torch.tensor(1.0), y), (x[:3], y), {"x": x[:1], "y": y}
    assert [pieces(whole, 1) for whole in (pack_sequence([x, x[:2]]), *others)] == [None] * 5
