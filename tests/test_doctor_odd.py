"""Healthy programs that a hostile reader wrote: nobody is accused, and what is watched keeps its bits."""

import copy
import io
import pickle
import threading
import warnings
import weakref
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

import epochal
from epochal import StepResult
from epochal.doctor import finding
from epochal.runtime.seeding import generators_in

DRAWN = torch.Generator().manual_seed(7)
X, Y = torch.randn(96, 8, generator=DRAWN), torch.randint(0, 3, (96,), generator=DRAWN)
PROGRAMS = {}


@pytest.fixture(autouse=True)
def _rules_may_not_fail(monkeypatch):
    monkeypatch.setattr(finding, "RAISES", True)


def program(make):
    PROGRAMS[make.__name__.removeprefix("of_")] = make
    return make


def mlp(outputs=3):
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, outputs))


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr)


def plan(model, train=(X, Y), **options):
    return {"model": model, "train": train, "epochs": 2} | options


def stepping(model, optimizer, before=lambda state: None, after=lambda state: None, **options):
    """Steps that are right, with something odd around them."""

    def step(state, window):
        before(state)
        x, y = window.batches[0]
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(state)
        return StepResult(loss.detach())

    return plan(model, step=step, **options)


# -- Objects that do not like to be asked --


class Config(dict):
    __getattr__ = dict.__getitem__


@program
def of_a_dict_with_attributes():
    config = Config(scale=0.5)
    return plan(
        nn.Linear(8, 3), objective=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) * config.scale
    )


class Lazy:
    @property
    def __class__(self):
        raise RuntimeError("not ready")


class Warm(LRScheduler):
    def __init__(self):
        pass


@program
def of_proxies():
    gone = weakref.proxy(Lazy())
    held = [Lazy(), Warm(), gone]
    model = mlp()
    return stepping(model, sgd(model), before=lambda state: held and None)


class Wrapper(torch.optim.Optimizer):
    def __init__(self, inner):
        self.inner = inner

    def step(self):
        self.inner.step()

    def zero_grad(self):
        self.inner.zero_grad()


@program
def of_a_wrapped_optimizer():
    model = mlp()
    return stepping(model, Wrapper(sgd(model)))


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.1 * p.grad)


@program
def of_an_optimizer_without_a_rate():
    model = mlp()
    return plan(model, loss="cross_entropy", optimizer=WithoutRate(model.parameters()))


@program
def of_gradients_without_versions():
    model = mlp()
    optimizer = sgd(model, 0.01)

    def step(state, window):
        x, y = window.batches[0]
        with torch.inference_mode():
            loss = F.cross_entropy(model(x), y)
            gradients = [torch.randn(p.shape) * loss for p in model.parameters()]
        for p, gradient in zip(model.parameters(), gradients):
            p.grad = gradient
        optimizer.step()
        return StepResult(loss.clone())

    return plan(model, step=step)


class Locked:
    def __init__(self):
        self.lock = threading.Lock()


@program
def of_batches_that_cannot_be_copied():
    def collate(rows):
        return {"x": torch.stack([x for x, _ in rows]), "y": torch.stack([y for _, y in rows]), "lock": Locked()}

    train = DataLoader(TensorDataset(X, Y), 32, shuffle=True, collate_fn=collate)
    return plan(mlp(), train, objective=lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]))


# -- Modes, hooks and copies --


class Larger(TorchFunctionMode):
    """Makes what a linear layer gives larger."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 1.5 if getattr(function, "__name__", "") == "linear" else result


@program
def of_a_mode_around_a_module():
    model, modes = nn.Linear(8, 3), []
    model.register_forward_pre_hook(lambda *_: modes.append(Larger()) or (modes[-1].__enter__() and None))
    model.register_forward_hook(lambda *_: modes.pop().__exit__(None, None, None))
    return plan(model, loss=lambda outputs, targets: F.cross_entropy(F.linear(outputs, torch.eye(3)), targets))


@program
def of_a_mode_over_some_updates():
    model, mode = mlp(), Larger()

    def switch(state):
        if state.progress.step == 0:
            mode.__enter__()
        if state.progress.step == 5:
            mode.__exit__(None, None, None)

    return stepping(model, sgd(model), switch, batch_size=8)


@program
def of_copies_and_pickles():
    model, averages = mlp(), []

    def copies(state):
        assert not model._forward_hooks and not model[0]._forward_pre_hooks
        pickle.dumps(model)
        averages.append(AveragedModel(model))
        torch.save(averages[-1], io.BytesIO())

    return stepping(model, sgd(model), after=copies)


@program
def of_a_model_that_was_compiled_in_place():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))
    model.compile(backend="eager")
    return plan(model, loss="cross_entropy")


# -- Gradients --


@program
def of_passes_that_differ_in_number():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)], nn.Linear(8, 3))
    optimizer = sgd(model, 0.01)

    def step(state, window):
        x, y = window.batches[0]
        parts = 1 + state.progress.step % 3
        optimizer.zero_grad()
        for part, targets in zip(x.chunk(parts), y.chunk(parts)):
            loss = F.cross_entropy(model(part), targets) / parts
            loss.backward()
        optimizer.step()
        return StepResult(loss.detach())

    return plan(model, step=step, batch_size=24, epochs=4)


class Judge(nn.Module):
    """Whether, and which."""

    def __init__(self):
        super().__init__()
        self.trunk, self.real, self.kind = nn.Linear(8, 16), nn.Linear(16, 1), nn.Linear(16, 3)

    def forward(self, x):
        inner = self.trunk(x).relu()
        return self.real(inner)[:, 0], self.kind(inner)


@program
def of_gradients_that_are_set_to_zero():
    model = nn.ModuleDict({"writer": nn.Linear(4, 8), "judge": Judge()})
    writer, judge = model["writer"], model["judge"]
    first, second = torch.optim.Adam(writer.parameters()), torch.optim.Adam(judge.parameters())

    def step(state, window):
        x, y = window.batches[0]
        noise = torch.randn(len(x), 4)
        real, kind = judge(writer(noise))
        first.zero_grad(set_to_none=False)
        (F.softplus(-real).mean() + F.cross_entropy(kind, y)).backward()
        first.step()
        second.zero_grad(set_to_none=False)
        real, kind = judge(x)
        loss = F.softplus(-real).mean() + F.softplus(judge(writer(noise).detach())[0]).mean()
        if state.progress.step % 2 == 0:
            loss = loss + F.cross_entropy(kind, y)
        loss.backward()
        second.step()
        return StepResult(loss.detach())

    return plan(model, step=step)


@program
def of_gradients_that_are_divided():
    model = mlp()
    optimizer = sgd(model)

    def step(state, window):
        optimizer.zero_grad()
        total = torch.zeros(())
        for x, y in window.batches:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            total += loss.detach()
        for p in model.parameters():
            p.grad.div_(len(window.batches))
        optimizer.step()
        return StepResult(total / len(window.batches))

    return plan(model, step=step, batch_size=8, accumulate=3)


class Ascent(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=group["lr"])


@program
def of_a_likelihood_that_is_made_large():
    model = mlp()
    optimizer = Ascent(model.parameters(), 0.1)

    def step(state, window):
        x, y = window.batches[0]
        optimizer.zero_grad()
        likelihood = torch.log_softmax(model(x), 1).gather(1, y[:, None]).mean()
        likelihood.backward()
        optimizer.step()
        return StepResult(-likelihood.detach())

    return plan(model, step=step)


# -- Optimizers that wait, rates that rise --


class Trainer:
    def __init__(self, writer, judge):
        self.writer, self.judge = torch.optim.Adam(writer.parameters()), torch.optim.Adam(judge.parameters())


class InTurns:
    """The judge three times, then the writer."""

    def __init__(self, writer, judge, trainer):
        self.writer, self.judge, self.trainer = writer, judge, trainer

    def __call__(self, state, window):
        x = window.batches[0][0]
        noise = torch.randn(len(x), 4)
        if state.progress.step % 4 < 3:
            self.trainer.judge.zero_grad()
            loss = F.softplus(-self.judge(x)).mean() + F.softplus(self.judge(self.writer(noise).detach())).mean()
            loss.backward()
            self.trainer.judge.step()
        else:
            self.trainer.writer.zero_grad()
            loss = F.softplus(-self.judge(self.writer(noise))).mean()
            loss.backward()
            self.trainer.writer.step()
        return StepResult(loss.detach())


def of_turns(wrapped):
    writer, judge = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8)), mlp(1)
    return plan(writer, step=wrapped(InTurns(writer, judge, Trainer(writer, judge))), batch_size=16)


PROGRAMS["a trainer in an object"] = partial(of_turns, lambda step: step)
PROGRAMS["a trainer in a partial"] = partial(of_turns, lambda step: partial(InTurns.__call__, step))
PROGRAMS["a trainer in a closure"] = partial(of_turns, lambda step: lambda state, window: step(state, window))


class Critical(nn.Module):
    """Hides its critic from its own parameters."""

    def __init__(self):
        super().__init__()
        self.inner, self.critic = nn.Linear(4, 8), [mlp(1)]

    def forward(self, noise):
        return self.inner(noise)


@program
def of_a_critic_in_a_list():
    model = Critical()
    (critic,) = model.critic
    first, second = torch.optim.Adam(model.parameters()), torch.optim.Adam(critic.parameters())

    def step(state, window):
        x = window.batches[0][0]
        made = model(torch.randn(len(x), 4))
        is_first = state.progress.step % 2 == 0
        loss = -critic(made).mean() if is_first else critic(made.detach()).mean() - critic(x).mean()
        optimizer = first if is_first else second
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return StepResult(loss.detach())

    return plan(model, step=step, batch_size=16)


@program
def of_a_closure_and_a_rate_from_0():
    model = mlp()
    optimizer = sgd(model)
    schedule = LambdaLR(optimizer, lambda number: min(1, number / 5))

    def step(state, window):
        x, y = window.batches[0]

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        schedule.step()
        return StepResult(loss.detach())

    return plan(model, step=step, batch_size=8)


@program
def of_a_frozen_backbone_with_an_optimizer():
    model = mlp()
    model[0].requires_grad_(False)
    head, backbone = sgd(model[2]), sgd(model[0])
    schedule = LambdaLR(head, lambda number: min(1, number / 5))

    def both(state):
        backbone.step()
        schedule.step()

    return stepping(model, head, after=both, batch_size=8)


@program
def of_a_schedule_that_is_told_the_step():
    model = mlp()
    optimizer = sgd(model)
    schedule = LambdaLR(optimizer, lambda number: 0.9**number)

    def move(state):
        with warnings.catch_warnings(action="ignore"):
            schedule.step(state.progress.step)

    return stepping(model, optimizer, move)


@program
def of_three_steps_an_update():
    model = mlp()
    optimizer = sgd(model)
    schedule = LambdaLR(optimizer, lambda number: min(1, number / 5))

    def step(state, window):
        x, y = window.batches[0]
        for part, targets in zip(x.chunk(3), y.chunk(3)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(part), targets)
            loss.backward()
            optimizer.step()
        schedule.step()
        return StepResult(loss.detach())

    return plan(model, step=step)


GLOBAL = nn.Linear(8, 3)
OPTIMIZER = sgd(GLOBAL, 0.0)


class OverGlobals:
    def __call__(self, state, window):
        x, y = window.batches[0]
        OPTIMIZER.param_groups[0]["lr"] = 1e-3
        loss = F.cross_entropy(state.model(x), y)
        OPTIMIZER.zero_grad()
        loss.backward()
        OPTIMIZER.step()
        return StepResult(loss.detach())


@program
def of_a_step_over_globals():
    with torch.no_grad():
        GLOBAL.weight.copy_(torch.linspace(-1, 1, 24).view(3, 8))
        GLOBAL.bias.zero_()
    return plan(GLOBAL, step=OverGlobals())


# -- Losses --


@program
def of_targets_within_a_hardtanh():
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1), nn.Hardtanh(-3, 3))
    return plan(model, (X, (X[:, :1] * 3).clamp(-3, 3)), loss="mse")


@program
def of_targets_within_an_elu():
    return plan(nn.Sequential(nn.Linear(8, 1), nn.ELU(3.0)), (X, (X[:, :1] * 3).clamp(min=-2.9)), loss="mse")


@program
def of_a_histogram():
    bins = torch.linspace(-3, 3, 32)
    wanted = torch.softmax(-(bins**2), 0)

    def objective(model, batch):
        weights = torch.exp(-((model(batch[0]).squeeze(1)[:, None] - bins) ** 2) / 0.1)
        return ((weights.sum(0) / weights.sum() - wanted) ** 2).sum()

    return plan(mlp(1), objective=objective, batch_size=32)


@program
def of_the_nearest_of_all():
    def objective(model, batch):
        apart = (model(batch[0])[:, 0][:, None] - batch[1].float()).abs()
        return apart.min(1).values.mean() + apart.min(0).values.mean()

    return plan(mlp(1), objective=objective)


@program
def of_the_distance_to_a_centre():
    centre = torch.randn(4)

    def objective(model, batch):
        with warnings.catch_warnings(action="ignore"):
            return F.mse_loss(model(batch[0]), centre)

    return plan(mlp(4), objective=objective)


@program
def of_many_classes_in_bf16():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 151), nn.LogSoftmax(1))
    nn.init.normal_(model[2].weight, std=1e-3)
    nn.init.zeros_(model[2].bias)
    return plan(model, (X, torch.arange(96) % 151), loss="nll", precision="bf16", ignore=["missing-class"])


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return F.normalize(self.one(x), dim=1) @ F.normalize(self.other(x.flip(1)), dim=1).T * 5


@program
def of_pairs_both_ways():
    def objective(model, batch):
        scores = model(batch[0])
        places = torch.arange(len(scores))
        return F.nll_loss(F.log_softmax(scores, 1), places) + F.nll_loss(F.log_softmax(scores, 0).T, places)

    return plan(Pairs(), objective=objective)


@program
def of_a_last_sample_that_is_never_reached():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    train = torch.cat([X, X[:1]]), torch.cat([Y, Y[:1]])
    return plan(model, train, loss="cross_entropy", batch_size=32, epochs=None, max_steps=2)


@program
def of_powers_of_one_number():
    x = torch.rand(5000, 1, generator=torch.Generator().manual_seed(0))
    powers = torch.cat([x**number for number in range(1, 6)], 1)
    return plan(nn.Linear(5, 1), (powers, x.sin()), val=0.2, loss="mse", batch_size=250, epochs=1)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def suspected(found):
    return [str(one) for one in found if one.level != "info"]


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("name", PROGRAMS)
def test_nobody_is_accused_and_no_bit_differs(name):
    def trained(**options):
        torch.manual_seed(3)
        given = PROGRAMS[name]()
        ignore = [*given.pop("ignore", []), *options.pop("ignore", [])]
        result = epochal.fit(**given, seed=0, observers=(), ignore=ignore, **options)
        return weights(given["model"]), result

    plain, (watched, result) = trained(ignore=["*"])[0], trained()
    assert torch.equal(plain, watched) and suspected(result.findings) == []
    torch.manual_seed(3)
    assert suspected(epochal.Plan(**PROGRAMS[name](), seed=0, observers=()).check()) == []
    hooks = modules._global_forward_hooks, modules._global_forward_hooks_with_kwargs, modules._global_forward_pre_hooks
    assert not any((*hooks, optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks))


# -- What a check has to say, and to leave alone --


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 3)

    def forward(self, x):
        return self.inner(x).sigmoid().add_(1)


def test_what_ends_the_training_is_told_by_the_check():
    (one,) = [
        one for one in epochal.Plan(InPlace(), (X, Y), loss="cross_entropy", epochs=1).check() if one.level == "error"
    ]
    assert one.code == "raises" and "modified by an inplace operation" in one.what


TEACHER = nn.Linear(8, 3)


class Teaching:
    def __call__(self, model, batch):
        with torch.no_grad():
            for p, trained in zip(TEACHER.parameters(), model.parameters()):
                p.lerp_(trained, 0.1)
        return F.cross_entropy(model(batch[0]), batch[1])


def test_a_teacher_that_an_object_moves_stays():
    before = weights(TEACHER).clone()
    epochal.Plan(nn.Linear(8, 3), (X, Y), objective=Teaching(), epochs=1).check()
    assert torch.equal(weights(TEACHER), before)


class Noise:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, x):
        return x + torch.randn(x.shape, generator=self.generator)


class Augmented(Dataset):
    def __init__(self):
        self.augment, self.others = Noise(), [Noise()]

    def __len__(self):
        return len(X)

    def __getitem__(self, at):
        return self.others[0](self.augment(X[at])), Y[at]


def collate(generator, rows):
    return torch.stack([x for x, _ in rows]) + torch.rand((), generator=generator), torch.stack([y for _, y in rows])


def test_generators_are_put_back_wherever_they_lie():
    data, drawn = Augmented(), torch.Generator().manual_seed(2)
    generators = data.augment.generator, data.others[0].generator, drawn
    before = [one.get_state() for one in generators]
    train = DataLoader(data, 32, shuffle=True, collate_fn=partial(collate, drawn))
    epochal.Plan(mlp(), train, loss="cross_entropy", epochs=1).check()
    assert all(torch.equal(one.get_state(), state) for one, state in zip(generators, before))
    next(iter(train))
    assert not any(torch.equal(one.get_state(), state) for one, state in zip(generators, before))


class Unready(Augmented):
    """Has parts that cannot be asked what they are, many that need not be, and itself."""

    def __init__(self):
        super().__init__()
        self.lazy, self.whole, self.many = Lazy(), self, [{"at": at} for at in range(10_000)]


def test_a_data_set_with_odd_parts_is_read():
    generators = generators_in(Unready())
    assert len(generators) == 2
    train = DataLoader(Unready(), 32, shuffle=True)
    result = epochal.fit(mlp(), train, loss="cross_entropy", epochs=1, observers=())
    assert result.history.rows[-1]["step"] == 3


@dataclass(frozen=True)
class Frozen:
    scale: float = 1.0

    def __call__(self, model, batch):
        return self.scale * F.cross_entropy(model(batch[0]), batch[1]) + 0 * TEACHER.weight.detach().sum()


def test_an_objective_that_is_frozen_is_checked():
    assert epochal.Plan(mlp(), (X, Y), objective=Frozen(), epochs=5).check() == []


def test_rows_are_those_of_the_data():
    x = torch.randn(20000, 8, generator=torch.Generator().manual_seed(0))
    x[10000:10010, 3] = torch.nan
    found = epochal.Plan(mlp(), (x, torch.arange(20000) % 3), loss="cross_entropy", epochs=1).check()
    (one,) = [one for one in found if one.code == "nonfinite-inputs"]
    rows = one.where.partition("rows ")[2].partition(";")[0].split(", ")
    assert rows and all(10000 <= int(row) < 10010 for row in rows)


class Softened(nn.Module):
    def forward(self, outputs, targets):
        return F.cross_entropy(outputs.softmax(1), targets)


def test_a_loss_that_is_a_module_is_looked_into():
    with pytest.raises(epochal.FaultError, match="takes the softmax of them once more") as error:
        epochal.fit(mlp(), (X, Y), loss=Softened(), epochs=1, observers=())
    assert error.value.finding.fix == "give the scores themselves to cross_entropy"


class Slow(torch.autograd.Function):
    updates = []

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        threading.Event().wait(1.5)
        return gradient


def test_a_check_says_that_it_saw_one_update_only():
    given = plan(mlp(), objective=lambda model, batch: F.cross_entropy(Slow.apply(model(batch[0])), batch[1]))
    (one,) = epochal.Plan(**given).check()
    assert one.code == "out-of-time" and "of a training on a copy only 1 updates" in one.measured


def test_a_code_counts_once_an_update():
    """Three heads, of which the first batch alone has next to no targets."""
    targets = torch.full((320,), -100)
    targets[32:] = torch.arange(288) % 3

    def objective(model, batch):
        scores = model(batch[0])
        kept = F.cross_entropy(scores, batch[1], reduction="sum") / 32
        return kept + F.cross_entropy(scores, batch[1].clone(), reduction="sum") / 32

    x = torch.randn(320, 8, generator=torch.Generator().manual_seed(0))
    result = epochal.fit(mlp(), (x, targets), objective=objective, epochs=2, shuffle=False, observers=())
    assert suspected(result.findings) == []


def test_a_model_that_is_copied_takes_no_hook_along():
    model, copies = mlp(), []

    def objective(net, batch):
        copies.append(copy.deepcopy(net))
        return F.cross_entropy(net(batch[0]), batch[1])

    epochal.fit(model, (X, Y), objective=objective, epochs=1, observers=())
    assert not any(part._forward_hooks or part._forward_pre_hooks for one in copies for part in one.modules())
