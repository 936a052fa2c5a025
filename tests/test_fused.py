"""The update by the fused kernel alone: the same bits as ``optimizer.step()``, whatever happens between two updates."""

import copy
import functools
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook

import epochal
from epochal.optim.fused import Fused

SETTINGS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adam_decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True, maximize=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.9), eps=1e-6, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, fused=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, fused=True),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, maximize=True, fused=True),
    "sgd_dampening": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.5, fused=True),
    "two_groups": lambda p: torch.optim.AdamW(
        [{"params": p[:2], "lr": 0.1}, {"params": p[2:], "weight_decay": 0.5, "amsgrad": True}], fused=True
    ),
    # left to torch
    "adam_plain": lambda p: torch.optim.Adam(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}
DIRECT = [name for name in SETTINGS if name not in ("adam_plain", "adagrad", "rmsprop")]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Linear(1, 1))


class Pair:
    """Two equal trainings: one moved by ``optimizer.step()``, one by ``Fused``."""

    def __init__(self, name, module=None):
        self.torchs, self.ours = module or model(), copy.deepcopy(module or model())
        self.by_torch, by_us = (SETTINGS[name](list(one.parameters())) for one in (self.torchs, self.ours))
        self.move, self.calls = Fused(by_us), 0

    @property
    def by_us(self):
        return self.move.optimizer

    def update(self, count=1, skip=()):
        for _ in range(count):
            x = torch.randn(5, 3)
            for one in (self.torchs, self.ours):
                one.zero_grad()
                one(x).square().mean().backward()
                for number in skip:
                    list(one.parameters())[number].grad = None
            self.by_torch.step()
            held = [p for group in self.by_us.param_groups for p in group["params"] if p.grad is not None]
            self.move([p.grad for p in held])
            self.compare()

    def compare(self):
        for one, other in zip(self.torchs.parameters(), self.ours.parameters(), strict=True):
            assert torch.equal(one, other)
        states = self.by_torch.state_dict()["state"], self.by_us.state_dict()["state"]
        assert states[0].keys() == states[1].keys()
        for number, state in states[0].items():
            for name, value in state.items():
                assert value is states[1][number][name] is None or torch.equal(value, states[1][number][name]), name


class Steps(list):
    """The first weight of each call of torch's own update, which ``step`` calls once for a group."""

    def of(self, optimizer):
        return sum(one is optimizer.param_groups[0]["params"][0] for one in self)


@pytest.fixture
def steps(monkeypatch):
    """How often torch's own ``step`` of these optimizers did an update."""
    counted = Steps()
    for module, name in ((sys.modules["torch.optim.adam"], "adam"), (sys.modules["torch.optim.sgd"], "sgd")):
        own = getattr(module, name)

        def update(weights, *given, own=own, **named):
            counted.append(weights[0])
            return own(weights, *given, **named)

        monkeypatch.setattr(module, name, update)
    return counted


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_bits_as_step(name):
    Pair(name).update(7)


@pytest.mark.parametrize("name", DIRECT)
def test_step_is_called_for_the_first_update_at_most(name, steps):
    pair = Pair(name)
    pair.update(7)
    at_first = 1 if isinstance(pair.by_us, torch.optim.SGD) else 0  # its momentum begins with a gradient
    assert steps.of(pair.by_us) == at_first and steps.of(pair.by_torch) == 7


def test_a_weight_without_gradient_keeps_its_state(steps):
    pair = Pair("adamw")
    pair.update(2)
    pair.update(2, skip=[1, 3])
    pair.update(3)
    assert steps.of(pair.by_us) == 2 and float(pair.by_us.state_dict()["state"][1]["step"]) == 5


def test_a_weight_that_never_has_a_gradient(steps):
    pair = Pair("adam")
    pair.update(3, skip=[5])
    assert steps.of(pair.by_us) == 3


def test_settings_are_read_at_each_update():
    pair = Pair("two_groups")
    for number in range(4):
        for one in (pair.by_torch, pair.by_us):
            one.param_groups[0]["lr"] = 0.1 / (number + 1)
            one.param_groups[1]["betas"] = (0.5, 0.7 + number / 10)
        pair.update(2)


def test_a_schedule_counts_as_it_does_with_torch(recwarn):
    pair = Pair("sgd_momentum")
    schedules = [StepLR(one, step_size=2, gamma=0.5) for one in (pair.by_torch, pair.by_us)]
    for _ in range(5):
        pair.update()
        for schedule in schedules:
            schedule.step()
    assert not recwarn.list and schedules[0].get_last_lr() == schedules[1].get_last_lr()


def test_hooks_are_called():
    pair, called = Pair("adam"), []
    pair.update(2)
    handle = pair.by_us.register_step_pre_hook(lambda *_: called.append("before"))
    pair.by_us.register_step_post_hook(lambda *_: called.append("after"))
    pair.update(2)
    assert called == ["before", "after"] * 2
    handle.remove()
    everywhere = register_optimizer_step_post_hook(lambda *_: called.append("all"))
    pair.update()
    everywhere.remove()
    assert called.count("all") == 2 and called.count("before") == 2


def test_a_step_that_somebody_replaced_is_called():
    pair, called = Pair("adam"), []
    pair.update(2)
    own = pair.by_us.step
    pair.by_us.step = lambda: (called.append(1), own())
    pair.update(3)
    assert len(called) == 3


def test_a_state_that_was_loaded_or_exchanged_is_the_one_that_counts():
    pair = Pair("adamw")
    pair.update(3)
    for one in (pair.by_torch, pair.by_us):
        one.load_state_dict(copy.deepcopy(one.state_dict()))
    pair.update(2)
    for one, module in ((pair.by_torch, pair.torchs), (pair.by_us, pair.ours)):
        weight = module[2].weight
        one.state[weight] = {"step": torch.tensor(1.0), "exp_avg": weight * 0, "exp_avg_sq": weight.detach() ** 2}
    pair.update(2)
    for one, module in ((pair.by_torch, pair.torchs), (pair.by_us, pair.ours)):
        one.state[module[0].bias]["exp_avg"] = torch.ones(4)
        one.state[module[0].bias]["step"] = torch.tensor(9.0)
    pair.update(2)
    for one, module in ((pair.by_torch, pair.torchs), (pair.by_us, pair.ours)):
        del one.state[module[0].weight]  # it comes back as the last one
    pair.update(3)
    for one in (pair.by_torch, pair.by_us):
        one.state.clear()
    pair.update(2)


def test_weights_that_were_added_or_exchanged_are_moved():
    pair = Pair("adamw")
    pair.update(2)
    more = nn.Linear(1, 1)
    pair.torchs.append(more), pair.ours.append(copy.deepcopy(more))
    for one, module in ((pair.by_torch, pair.torchs), (pair.by_us, pair.ours)):
        one.add_param_group({"params": list(module[-1].parameters()), "lr": 1.0})
    pair.update(3)
    for one, module in ((pair.by_torch, pair.torchs), (pair.by_us, pair.ours)):
        del one.state[module[0].weight]
        module[0].weight = nn.Parameter(module[0].weight.detach().clone())
        one.param_groups[0]["params"][0] = module[0].weight
    pair.update(3)


def test_momentum_and_a_rate_that_is_a_tensor():
    pair = Pair("sgd")
    pair.update(2)
    for one in (pair.by_torch, pair.by_us):
        one.param_groups[0]["momentum"] = 0.9
    pair.update(3)
    pair = Pair("adam")
    pair.update(2)
    for one in (pair.by_torch, pair.by_us):
        one.param_groups[0]["lr"] = torch.tensor(0.02)
    pair.update(3)


def test_mixed_types_are_left_to_torch(steps):
    mixed = model()
    mixed[2].double()
    pair = Pair("adam")
    pair.torchs, pair.ours = mixed, copy.deepcopy(mixed)
    pair.by_torch = SETTINGS["adam"](list(mixed.parameters()))
    pair.move = Fused(SETTINGS["adam"](list(pair.ours.parameters())))
    for _ in range(3):
        for one in (pair.torchs, pair.ours):
            for p in one.parameters():
                p.grad = torch.ones_like(p)
        pair.by_torch.step()
        pair.move([p.grad for p in pair.ours.parameters()])
        pair.compare()
    assert steps.of(pair.by_us) == 3


@pytest.mark.parametrize("name", ["adam", "sgd_momentum"])
def test_an_update_that_is_left_out_moves_nothing(name):
    pair = Pair(name)
    pair.update(3)
    before = copy.deepcopy(pair.by_us.state_dict()), [p.detach().clone() for p in pair.ours.parameters()]
    for p in pair.ours.parameters():
        p.grad = torch.ones_like(p)
    pair.move([p.grad for p in pair.ours.parameters()], torch.ones(()))
    assert all(torch.equal(p, was) for p, was in zip(pair.ours.parameters(), before[1]))
    for number, state in pair.by_us.state_dict()["state"].items():
        assert all(torch.equal(value, before[0]["state"][number][key]) for key, value in state.items())
    pair.move([p.grad for p in pair.ours.parameters()], torch.zeros(()))
    assert not torch.equal(next(pair.ours.parameters()), before[1][0])


def test_copies_of_the_optimizer_and_of_its_state_stand_alone():
    pair = Pair("adam")
    pair.update(3)
    saved = copy.deepcopy(pair.by_us.state_dict())
    pair.update(2)
    assert {float(state["step"]) for state in saved["state"].values()} == {3.0}


def test_momentum_that_a_schedule_moves(steps):
    pair = Pair("sgd_momentum")
    schedules = [OneCycleLR(one, max_lr=0.1, total_steps=8) for one in (pair.by_torch, pair.by_us)]
    for _ in range(8):
        pair.update()
        for schedule in schedules:
            schedule.step()
    assert steps.of(pair.by_us) == 1


def test_the_first_update_does_not_import_the_compiler():
    code = """
import sys, torch, epochal
X = torch.randn(40, 3)
model = torch.nn.Linear(3, 1)
epochal.fit(model, (X, X[:, :1]), val=0.2, loss="mse", schedule="cosine", epochs=1, observers=())
print("torch._dynamo" in sys.modules)
other = torch.optim.Adam(model.parameters())
other.state_dict()
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["False", "True"], done.stderr  # what torch does is as it was


def test_a_step_that_was_replaced_before_is_called():
    for when in ("before a schedule", "after it", "the class's"):
        pair, called = Pair("adam"), []
        one = pair.by_us
        own = one.step

        @functools.wraps(own)
        def step(*given, own=own, called=called):
            called.append(1)
            return own()

        if when == "the class's":
            kind = type(one)
            kept = kind.step
            kind.step = lambda self, kept=kept, called=called: (called.append(1), kept(self))[1]
            try:
                pair.update(3)
            finally:
                kind.step = kept
            assert len(called) == 6  # both of the pair
            continue
        if when == "after it":
            StepLR(one, step_size=2)
            own = one.step
        one.step = step if when == "after it" else types.MethodType(lambda self: step(), one)
        if when == "before a schedule":
            StepLR(one, step_size=2)
            StepLR(pair.by_torch, step_size=2)
        pair.update(3)
        assert len(called) == 3, when


def test_a_momentum_that_is_none_is_left_to_torch():
    pair = Pair("sgd_momentum")
    for one in (pair.by_torch, pair.by_us):
        for group in one.param_groups:
            for weight in group["params"]:
                one.state[weight]["momentum_buffer"] = None
    pair.move.learn()
    pair.update(3)


def test_a_gradient_that_is_changed_in_place_is_the_users():
    """By a function or a hook, under torch's eyes or not: by hand and by fit."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient.numpy()[...] *= 2
            return gradient

    X, Y = torch.randn(64, 3), torch.randn(64, 1)

    def loss(outputs, targets):
        return Doubled.apply(((outputs - targets) ** 2).mean())

    one, two = model(), model()
    optimizer = torch.optim.SGD(one.parameters(), lr=0.01)
    for _ in range(3):
        for x, y in zip(X.split(16), Y.split(16)):
            optimizer.zero_grad()
            loss(one(x), y).backward()
            optimizer.step()
    given = {"loss": loss, "epochs": 3, "batch_size": 16, "shuffle": False, "observers": ()}
    epochal.fit(two, (X, Y), optimizer=lambda p: torch.optim.SGD(p, lr=0.01), **given)
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), two.parameters()))
