"""A compiled run that nobody watches evaluates no guards, and computes what it computes where they are evaluated."""

import gc
import os
import random
import shutil
import types
import weakref

import pytest
import torch
from torch import nn

import epochal
from epochal.runtime.attributes import MOST, Attributes

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch compiles with a C++ compiler"),
    pytest.mark.timeout(300),
]

torch.manual_seed(0)
X = torch.randn(64, 6)
Y = (X @ torch.randn(6, 1)).tanh()
GIVEN = {"batch_size": 16, "shuffle": False, "seed": 0, "device": "cpu", "restore_best": False}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 1), 1.0

    def forward(self, x):
        return self.layer(x) * self.scale


def fit(kind, *, watched, epochs=4, **options):
    torch.manual_seed(1)
    model, observers = kind(), [lambda event: None] if watched else ()
    options = {"val": (X.clone(), Y.clone()), "loss": "mse", "compile": True, **GIVEN, **options}
    return epochal.fit(model, (X, Y), epochs=epochs, observers=observers, **options)


class BufferOfBefore(Scaled):
    """What it was given before counts, too, and no kernel computes it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("before", torch.zeros(16, 6))

    def forward(self, x):
        found = self.layer(x + 0.5 * self.before)
        self.before = x
        return found


class DictOfBefore(Scaled):
    def __init__(self):
        super().__init__()
        self.kept = {"before": torch.zeros(16, 6)}

    def forward(self, x):
        found = self.layer(x + 0.5 * self.kept["before"])
        self.kept["before"] = x
        return found


class ObjectOfBefore(Scaled):
    def __init__(self):
        super().__init__()
        self.kept = types.SimpleNamespace(before=torch.zeros(16, 6))

    def forward(self, x):
        found = self.layer(x + 0.5 * self.kept.before)
        self.kept.before = x
        return found


class SwitchingItself(Scaled):
    def train(self, mode=True):
        if not mode:
            self.scale *= 0.9
        return super().train(mode)


@pytest.mark.parametrize("kind", [Scaled, BufferOfBefore, DictOfBefore, ObjectOfBefore, SwitchingItself])
def test_unwatched_it_computes_what_it_computes_watched(kind):
    watched, alone = (fit(kind, watched=watched, val=(X[:16].clone(), Y[:16].clone())) for watched in (True, False))
    weights = zip(watched.model.parameters(), alone.model.parameters())
    assert all(torch.equal(*pair) for pair in weights)
    assert [row["val_loss"] for row in watched.history.rows] == [row["val_loss"] for row in alone.history.rows]


def test_after_the_run_nothing_is_taken_on_trust():
    result = fit(Scaled, watched=False)
    model, inputs = result.model, X[:16]
    for _ in range(3):
        assert torch.allclose(result.predict(inputs), model(inputs), atol=1e-6)
    model.scale = 10.0
    assert torch.allclose(result.predict(inputs), model(inputs), atol=1e-5)
    model.layer = nn.Linear(6, 1)
    wanted = nn.functional.mse_loss(model(X), Y).item()
    assert result.evaluate((X, Y))["loss"] == pytest.approx(wanted, rel=1e-5)
    model.layer.register_forward_hook(lambda module, given, found: found * 0)
    assert result.predict(inputs).abs().max() == 0


def test_nor_after_an_error():
    model = Scaled()
    plan = epochal.Plan(model, (X, Y), loss="mse", epochs=9, compile=True, observers=(), **GIVEN)
    run = plan.prepare()
    given = []

    def ends():
        with run:
            for event in run.alone():
                if isinstance(event, epochal.StepDone) and event.step == 12:
                    given.append(run.trust.is_given)
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ends()
    assert given == [True] and not run.trust.is_given


@pytest.mark.parametrize("watched", [True, False])
def test_models_are_let_go(watched):
    gone = []
    for _ in range(3):
        result = fit(Scaled, watched=watched, epochs=3)
        gone.append(weakref.ref(result.model))
        del result
        gc.collect()
    assert [one() for one in gone] == [None] * 3


class Drawing(Scaled):
    def forward(self, x):
        return self.layer(x) * (1 + random.random() / 10)


def test_what_python_draws_is_not_frozen():
    """The graph takes it as an input, so it is not repeated without it."""
    torch.manual_seed(1)
    losses = [row["train_loss"] for row in fit(Drawing, watched=False, lr=1e-9, val=None).history.rows]
    assert len(set(losses)) == len(losses)


def test_numbers_that_only_float64_holds_are_finite():
    X64, Y64 = X.double(), Y.double() * 1e25
    torch.manual_seed(1)
    model = nn.Linear(6, 1).double()
    result = epochal.fit(model, (X64, Y64), loss="mse", epochs=3, compile=True, observers=(), **GIVEN)
    assert result.history.rows[-1]["train_loss"] > 1e38


class Annealed:
    """Something of the model changes at every update, so that each would be compiled."""

    def __init__(self):
        self.model = None

    def __call__(self, event):
        if isinstance(event, epochal.StepDone):
            self.model.scale = 1 / event.step


@pytest.mark.parametrize("cut", [2, 3, 4, 6])
def test_a_resumed_run_gives_up_compiling_where_the_whole_one_does(tmp_path, cut):
    def annealed(**options):
        torch.manual_seed(1)
        watch = Annealed()
        watch.model = Scaled()
        if options.get("resume"):
            watch.model.scale = 1 / cut
        return epochal.fit(
            watch.model, (X, Y), loss="mse", compile=True, observers=[watch], epochs=9, **GIVEN, **options
        ).model

    whole = annealed(max_steps=10)
    annealed(max_steps=cut, run=tmp_path / "run")
    resumed = annealed(max_steps=10, run=tmp_path / "run", resume=True)
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters()))


class Merging(nn.Linear):
    """Adds its second weight to the first in eval mode, as adapters of low rank do, and takes it out in train mode."""

    def __init__(self):
        super().__init__(6, 1)
        self.added, self.is_merged = nn.Parameter(torch.full((1, 6), 0.1)), False

    def train(self, mode=True):
        if mode is self.is_merged:
            self.weight.data += -self.added.data if mode else self.added.data
            self.is_merged = not mode
        return super().train(mode)

    def forward(self, x):
        return nn.functional.linear(x, self.weight if self.is_merged else self.weight + self.added, self.bias)


def test_a_module_with_a_train_of_its_own_is_asked_to_train_again():
    torch.manual_seed(1)
    model, batches = Merging(), list(zip(X.split(16), Y.split(16)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        model.train()
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        model.eval()
    model.train()
    torch.manual_seed(1)
    other = Merging()
    sgd = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    epochal.fit(other, (X, Y), val=(X.clone(), Y.clone()), loss="mse", optimizer=sgd, epochs=3, observers=(), **GIVEN)
    assert other.training and not other.is_merged
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters()))


def test_a_module_that_was_put_to_eval_mode_stays_so():
    model = nn.Sequential(nn.Linear(6, 6), Merging())
    model[0].eval()
    epochal.fit(model, (X, Y), val=(X.clone(), Y.clone()), loss="mse", epochs=2, observers=(), **GIVEN)
    assert model.training and not model[0].training and model[1].training


def test_attributes_see_what_is_written_anywhere():
    model = nn.Module()
    model.inner = types.SimpleNamespace(lists=[{"a": (1, [2])}])
    model.register_buffer("held", torch.zeros(2))
    model.drawn, model.pythons = torch.Generator(), random.Random(1)
    before = Attributes([model])
    assert before == Attributes([model])
    for write in (
        lambda: model.inner.lists[0]["a"][1].append(3),
        lambda: setattr(model, "held", torch.zeros(2)),
        lambda: torch.rand(1, generator=model.drawn),
        model.pythons.random,
        lambda: setattr(model.inner, "more", 1),
    ):
        before = Attributes([model])
        write()
        assert before != Attributes([model])
    before, versions = Attributes([model]), Attributes([model], versions=True)
    model.held += 1
    assert before == Attributes([model]) and versions != Attributes([model], versions=True)
    model.many = list(range(MOST + 1))
    assert Attributes([model]) != Attributes([model])
