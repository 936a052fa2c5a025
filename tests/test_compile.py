"""``compile=True``: the whole update as one graph that does what an eager update does, to the last bits but a few."""

import copy
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import epochal
from epochal.runtime import compiler

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch compiles with a C++ compiler"),
    pytest.mark.timeout(300),
]

torch.manual_seed(0)
X = torch.randn(70, 6)
Y = (X @ torch.randn(6, 1)).tanh()
CLASSES = (X.sum(1) > 0).long() + (X[:, 0] > 0.5).long()


def mlp(outputs=1, **options):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs), **options)


class Watch:
    """An observer that keeps what is noted, and counts updates."""

    def __init__(self, then=None):
        self.notes, self.steps, self.then = [], 0, then

    def __call__(self, event):
        if isinstance(event, epochal.Noted):
            self.notes.append(event.message)
        if isinstance(event, epochal.StepDone):
            self.steps += 1
            if self.then is not None:
                self.then(self.steps)


@pytest.fixture
def graphs(monkeypatch):
    """What was compiled: a line for each graph."""
    made = []
    compile = compiler.Graph.compile

    def counted(self, *given, **named):
        made.append(self)
        return compile(self, *given, **named)

    monkeypatch.setattr(compiler.Graph, "compile", counted)
    return made


def of_updates(graphs):
    return [graph for graph in graphs if graph._traced.__closure__ and "update" in str(_function_of(graph))]


def _function_of(graph):
    return next(cell.cell_contents for cell in graph._traced.__closure__)


def both(make, data=(X, Y), *, watch=None, **options):
    """The same training twice: eager, and compiled."""
    given = {"loss": "mse", "epochs": 4, "batch_size": 16, "seed": 3, "device": "cpu", **options}
    results = []
    for compile in (False, True):
        seen = Watch(watch() if watch is not None else None)
        results.append(epochal.fit(make(), data, compile=compile, observers=[seen], **given))
        results[-1].__dict__["seen"] = seen
    return results


def alike(eager, compiled, tolerance=2e-6):
    for (name, one), other in zip(eager.model.state_dict().items(), compiled.model.state_dict().values(), strict=True):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert compiled.history.train_loss == pytest.approx(eager.history.train_loss, rel=10 * tolerance)


OPTIONS = {
    "adam": {"optimizer": "adam", "lr": 0.01},
    "adam_decay": {"optimizer": "adam", "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.2},
    "amsgrad": {"optimizer": lambda p: torch.optim.Adam(p, amsgrad=True, maximize=False, fused=True)},
    "sgd": {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.01},
    "nesterov": {"optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, fused=True)},
    "groups": {
        "optimizer": lambda p: torch.optim.AdamW(
            [{"params": list(p)[:2], "lr": 0.02}, {"params": list(p)[2:], "betas": (0.5, 0.9)}], fused=True
        )
    },
    "clipped": {"optimizer": "sgd", "lr": 0.1, "clip": 0.05},
    "scheduled": {"optimizer": "adamw", "lr": 0.05, "schedule": "cosine"},
    "onecycle": {"optimizer": "adamw", "schedule": epochal.Schedule("onecycle", max_lr=0.05)},
    "bf16": {"precision": "bf16"},
    "metrics": {"metrics": ["mae", "r2"], "val": (X[:30].clone(), Y[:30].clone())},
    "huber": {"loss": nn.HuberLoss()},
    "own_loss": {"loss": lambda outputs, targets: (outputs - targets).abs().mean()},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_update_moves_the_weights_as_an_eager_one_does(name, graphs):
    eager, compiled = both(mlp, **OPTIONS[name])
    alike(eager, compiled, 2e-2 if name == "bf16" else 2e-6)
    assert len(of_updates(graphs)) == 2 and compiled.seen.notes == []  # a whole batch, and the ragged last one
    for name in compiled.history.rows[0].keys() - {"time"}:
        assert compiled.history.rows[-1][name] == pytest.approx(eager.history.rows[-1][name], rel=2e-2), name


def test_maximising_and_dampening(graphs):
    def ascent(p):
        return torch.optim.SGD(p, lr=0.01, momentum=0.5, dampening=0.3, maximize=True, fused=True)

    alike(*both(mlp, loss=lambda outputs, targets: -F.mse_loss(outputs, targets), optimizer=ascent))
    assert len(of_updates(graphs)) == 2


def test_batch_norm_and_class_weights(graphs):
    def normed():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), ignore_index=2)
    eager, compiled = both(
        normed,
        (X, CLASSES),
        loss=loss,
        optimizer="sgd",
        lr=0.05,
        metrics=["accuracy", "f1"],
        val=(X[:20].clone(), CLASSES[:20].clone()),
    )
    alike(eager, compiled, 1e-5)
    assert compiled.model[1].num_batches_tracked == eager.model[1].num_batches_tracked == 20
    assert of_updates(graphs) and compiled.history.rows[-1]["val_f1"] == pytest.approx(eager.history.rows[-1]["val_f1"])


def test_an_objective_with_a_weight_of_its_own(graphs):
    def masked(model, batch):
        x, y = batch
        counted = y.abs() > 0.3
        return epochal.Loss(((model(x) - y) ** 2 * counted).sum() / counted.sum(), weight=counted.sum())

    eager, compiled = both(mlp, loss=None, objective=masked, val=(X[:20].clone(), Y[:20].clone()))
    alike(eager, compiled)
    assert compiled.history.val_loss == pytest.approx(eager.history.val_loss, rel=1e-5) and of_updates(graphs)


def test_dict_batches(graphs):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.layer = nn.Linear(6, 1)

        def forward(self, x, shift):
            return self.layer(x) + shift

    alike(*both(Named, {"x": X, "shift": torch.ones(70, 1), "y": Y}))
    assert len(of_updates(graphs)) == 2


def test_a_learning_rate_that_moves_compiles_nothing_anew(graphs):
    _, compiled = both(mlp, schedule="cosine", epochs=12)
    assert compiled.seen.steps == 60 and len(of_updates(graphs)) == 2


def test_nobody_watches_and_the_bits_are_the_same(graphs):
    """With no observers guards are not evaluated at each update."""
    given = {
        "loss": "mse",
        "epochs": 6,
        "batch_size": 16,
        "seed": 3,
        "compile": True,
        "val": (X[:30].clone(), Y[:30].clone()),
    }
    watched = epochal.fit(mlp(), (X, Y), observers=[Watch()], **given)
    alone = epochal.fit(mlp(), (X, Y), observers=(), **given)
    assert all(torch.equal(*pair) for pair in zip(watched.model.parameters(), alone.model.parameters()))
    assert [row["val_loss"] for row in watched.history.rows] == [row["val_loss"] for row in alone.history.rows]


def test_dropout_is_drawn_anew_at_each_update_and_repeated_by_the_seed():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.layer, self.drop = nn.Linear(6, 1), nn.Dropout(0.5)

        def forward(self, x):
            return self.layer(self.drop(torch.ones_like(x)))

    def losses(seed):
        seen = []

        def watch(event):
            if isinstance(event, epochal.StepDone):
                seen.append(event.result.loss.item())

        given = {"loss": "mse", "epochs": 1, "batch_size": 7, "optimizer": "sgd", "lr": 1e-12, "shuffle": False}
        epochal.fit(Dropping(), (X, 0 * Y), seed=seed, compile=True, observers=[watch], **given)
        return seen

    first = losses(0)
    assert len(set(first)) == len(first) and first == losses(0) != losses(1)


# -- What changes between two updates ------------------------------------------------------------------------


def test_what_an_observer_changes_is_heeded():
    """A guard fails, and a new graph is made."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = mlp(), 1.0

        def forward(self, x):
            return self.layer(x) * self.scale

    models = []

    def make():
        models.append(Scaled())
        return models[-1]

    def then():
        model = models[-1] if models else None

        def change(step):
            if step == 7:
                models[-1].scale = 0.5
            if step == 12:
                with torch.no_grad():
                    models[-1].layer[0].weight.zero_()

        del model
        return change

    eager, compiled = both(make, watch=then)
    alike(eager, compiled)
    assert compiled.seen.notes == []


def test_a_state_of_the_optimizer_that_an_observer_resets_is_heeded():
    def training(compile):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)

        def reset(event):
            if isinstance(event, epochal.StepDone) and event.step == 8:
                optimizer.state.clear()

        return epochal.fit(
            model,
            (X, Y),
            loss="mse",
            optimizer=optimizer,
            epochs=4,
            batch_size=16,
            seed=3,
            compile=compile,
            observers=[reset],
        )

    alike(training(False), training(True))


def test_a_model_that_keeps_what_it_computed(graphs):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = mlp(), None

        def forward(self, x):
            self.last = self.layer(x)
            return self.last

    given = {"loss": "mse", "epochs": 3, "batch_size": 16, "seed": 3, "shuffle": False}
    kept = []
    for compile in (False, True):
        model = Keeping()
        epochal.fit(model, (X, Y), compile=compile, observers=(), **given)
        kept.append(model.last.detach())
    torch.testing.assert_close(*kept)


def test_a_model_that_changes_with_every_update_is_compiled_a_few_times_only(graphs):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = mlp(), 0

        def forward(self, x):
            self.calls += 1
            return self.layer(x) * (1 + self.calls % 2)

    eager, compiled = both(Counting, data=(X[:64], Y[:64]), epochs=5)
    alike(eager, compiled)
    assert 1 <= len(of_updates(graphs)) <= 5
    assert any("changes with every update" in note for note in compiled.seen.notes), compiled.seen.notes


def test_more_shapes_than_are_compiled(graphs):
    class Lengths(torch.utils.data.IterableDataset):
        def __iter__(self):
            for length in range(2, 14):
                yield X[:length], Y[:length]

    loader = torch.utils.data.DataLoader(Lengths(), batch_size=None)
    eager, compiled = both(mlp, loader, epochs=2, batch_size=None)
    alike(eager, compiled)
    assert len(of_updates(graphs)) == 8 and any("more than 8 shapes" in note for note in compiled.seen.notes)


# -- Exact ---------------------------------------------------------------------------------------------------


def resumable():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 1))


@pytest.mark.parametrize("cut", [1, 4, 5, 8])
def test_a_compiled_run_that_is_resumed_has_the_bits_of_one_that_was_not(cut, tmp_path):
    given = {"loss": "mse", "epochs": 3, "batch_size": 16, "seed": 3, "compile": True,
             "val": (X[:30].clone(), Y[:30].clone()), "clip": 1.0, "schedule": "cosine",
             "save": epochal.Saving("1 step", share=None), "observers": ()}  # fmt: skip
    whole = epochal.fit(resumable(), (X, Y), run=tmp_path / "whole", **given)
    with epochal.Plan(resumable(), (X, Y), run=tmp_path / "cut", **given).prepare() as run:
        for event in run:
            if isinstance(event, epochal.StepDone) and event.step == cut:
                break
    again = epochal.fit(resumable(), (X, Y), run=tmp_path / "cut", resume=True, **given)
    for name, one in whole.model.state_dict().items():
        assert torch.equal(one, again.model.state_dict()[name]), name
    times = [{key: value for key, value in row.items() if key != "time"} for row in whole.history.rows]
    assert times[-1] == {key: value for key, value in again.history.rows[-1].items() if key != "time"}


def test_twice_the_same_bits():
    given = {"loss": "mse", "epochs": 3, "batch_size": 16, "seed": 3, "compile": True, "observers": ()}
    one, two = (epochal.fit(resumable(), (X, Y), **given) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(one.model.state_dict().values(), two.model.state_dict().values()))


# -- What is not finite --------------------------------------------------------------------------------------


def test_a_nan_stops_before_a_weight_is_touched():
    spoilt = X.clone()
    spoilt[37] = torch.nan
    before = {}

    def keep(event):
        if isinstance(event, epochal.StepDone):
            before.update(copy.deepcopy(model.state_dict()))

    model = resumable()
    with pytest.raises(epochal.NonFiniteError, match="the inputs hold a value that is not finite") as caught:
        epochal.fit(
            model,
            (spoilt, Y),
            loss="mse",
            epochs=1,
            batch_size=16,
            shuffle=False,
            compile=True,
            seed=0,
            observers=[keep],
        )
    assert "step 2" in caught.value.where and "5" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_not_finite_is_left_out():
    spoilt = X.clone()
    spoilt[37] = torch.nan
    eager, compiled = both(resumable_without_dropout, (spoilt, Y), nonfinite="skip", shuffle=False, optimizer="sgd")
    alike(eager, compiled, 1e-5)
    assert (
        [row["skipped"] for row in compiled.history.rows] == [row["skipped"] for row in eager.history.rows] == [1] * 4
    )


def resumable_without_dropout():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))


# -- What cannot be compiled ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, of its own doing
def test_a_model_that_is_not_one_graph_is_told_and_trained():
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = mlp()

        def forward(self, x):
            return self.layer(x) * (1.0 if x.mean().item() > 0 else 0.9)

    eager, compiled = both(Deciding)
    alike(eager, compiled)
    (note,) = compiled.seen.notes
    assert note.startswith("compile: the update is not one graph: ") and "\n" not in note


def test_a_weight_without_gradient_is_told_and_trained():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.spare = mlp(), nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x)

    eager, compiled = both(Unused)
    alike(eager, compiled)
    (note,) = compiled.seen.notes
    assert note.startswith("compile: this Adam, or a weight without gradient or with a hook, cannot be in a graph")


def test_accumulated_micro_batches_and_other_optimizers_compile_the_model_alone(graphs):
    for options in ({"accumulate": 2}, {"optimizer": "rmsprop"}, {"optimizer": "muon"}):
        eager, compiled = both(mlp, **options)
        alike(eager, compiled, 1e-5)
        assert not of_updates(graphs) and graphs


def test_mistakes_are_told_as_they_are_without():
    with pytest.raises(epochal.LossShapeError, match="different shapes"):
        epochal.fit(mlp(), (X, Y[:, 0]), loss="mse", epochs=1, compile=True, observers=())
    with pytest.raises(epochal.ModelError, match="a layer cannot take inputs of this shape"):
        epochal.fit(mlp(), (X[:, :4], Y), loss="mse", epochs=1, compile=True, observers=())
    with pytest.raises(epochal.LossError, match="outside the 2 classes"):
        epochal.fit(mlp(2), (X, CLASSES), loss="cross_entropy", epochs=1, compile=True, observers=())


def test_without_a_compiler_a_line_says_so_and_it_trains(tmp_path):
    script = textwrap.dedent("""
        import torch, epochal
        notes = []
        epochal.fit(torch.nn.Linear(6, 1), (torch.ones(20, 6), torch.ones(20, 1)), loss="mse", epochs=2, compile=True,
                    observers=[lambda event: notes.append(event.message) if isinstance(event, epochal.Noted) else None])
        print(notes)
    """)
    bare = {**os.environ, "CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=bare, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "compile: the update is not one graph: " in done.stdout and "Traceback" not in done.stderr


# -- What a model or a program may do beside ----------------------------------------------------------------


def trained(make, compile, data=(X, Y), before=None, **options):
    """The weights that a training that nobody watches leaves."""
    model = make()
    given = {"loss": "mse", "epochs": 5, "batch_size": 16, "seed": 3, "observers": (), "device": "cpu", **options}
    if before is not None:
        given.update(before(model))
    epochal.fit(model, data, compile=compile, **given)
    return model


def same(make, tolerance=2e-6, **options):
    eager, compiled = trained(make, False, **options), trained(make, True, **options)
    for (name, one), other in zip(eager.state_dict().items(), compiled.state_dict().values()):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    return compiled


class Turning(nn.Module):
    """Writes an attribute in every forward pass; each of its values leads to a graph."""

    def __init__(self):
        super().__init__()
        self.layer, self.turn = mlp(), 0

    def forward(self, x):
        self.turn = (self.turn + 1) % 3
        return self.layer(x) * (1 + self.turn)


class TurningInEval(Turning):
    def forward(self, x):
        if not self.training:
            self.turn = (self.turn + 1) % 3
        return self.layer(x) * (1 + self.turn)


def test_what_a_model_writes_is_heeded_where_nobody_watches():
    same(Turning, epochs=8)
    same(TurningInEval, val=(X[:30].clone(), Y[:30].clone()), epochs=8)
    same(TurningInEval, val={"x": X[:30].clone(), "y": Y[:30].clone()}, data={"x": X, "y": Y}, epochs=8)


def test_what_a_users_schedule_or_metric_writes_is_heeded():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = mlp(), 1.0

        def forward(self, x):
            return self.layer(x) * self.scale

    models = []

    def make():
        models.append(Scaled())
        return models[-1]

    def rate(step):
        models[-1].scale = 1.0 if step < 8 else 0.5
        return 1.0

    same(make, schedule=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, rate))

    def metric(outputs, targets):
        models[-1].scale = 0.5
        return 1.0

    same(make, metrics={"own": metric})


def test_counts_of_updates_that_differ_or_are_reset():
    def uneven(model):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        weights = list(model.parameters())
        for update in range(50):
            for place, weight in enumerate(weights):
                weight.grad = torch.ones_like(weight) * 0.01 if update == 0 or place > 1 else None
            optimizer.step()
        return {"optimizer": optimizer}

    same(mlp, before=uneven)

    def reset(model):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)

        def watch(event):
            if isinstance(event, epochal.StepDone) and event.step == 9:
                for state in optimizer.state.values():
                    state["step"].zero_()

        return {"optimizer": optimizer, "observers": [watch]}

    same(mlp, before=reset)


def test_hooks_that_come_later():
    def on_a_module(model):
        def watch(event):
            if isinstance(event, epochal.StepDone) and event.step == 10:
                model[0].register_forward_hook(lambda module, given, output: output * 0.1)

        return {"observers": [watch]}

    def on_a_weight(model):
        def watch(event):
            if isinstance(event, epochal.StepDone) and event.step == 10:
                model[0].weight.register_hook(lambda gradient: gradient * 0)

        return {"observers": [watch]}

    same(mlp, before=on_a_module)
    same(mlp, before=on_a_weight)


def test_frozen_weights_and_gradients_that_are_left():
    def frozen(model):
        model[0].requires_grad_(False)
        return {"optimizer": torch.optim.SGD(model.parameters(), lr=0.01, fused=True)}

    same(mlp, before=frozen)
    assert all(weight.grad is None for weight in same(mlp).parameters())


def test_a_buffer_that_is_changed_in_place_is_put_back():
    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = mlp()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean() * 0.1)
            return self.layer(x) - self.mean

    spoilt = X.clone()
    spoilt[37] = torch.nan
    compiled = same(Averaging, data=(spoilt, Y), nonfinite="skip", shuffle=False, optimizer="sgd")
    assert compiled.mean.isfinite()


def test_a_run_that_is_cut_again_and_again_stays_compiled(tmp_path):
    notes = []

    def note(event):
        if isinstance(event, epochal.Noted):
            notes.append(event.message)

    given = {"loss": "mse", "batch_size": 16, "seed": 3, "compile": True, "observers": [note], "optimizer": "adam"}
    whole = epochal.fit(mlp(), (X, Y), epochs=7, **given)
    for epochs in range(1, 8):
        again = epochal.fit(mlp(), (X, Y), epochs=epochs, run=tmp_path / "run", resume=epochs > 1, **given)
    assert all(torch.equal(*pair) for pair in zip(whole.model.parameters(), again.model.parameters()))
    assert not [text for text in notes if text.startswith("compile")]


def test_errors_in_a_later_batch_are_told_as_ever():
    labels = CLASSES.clone()
    labels[60] = 7
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, labels), batch_size=10)
    with pytest.raises(epochal.LossError, match="Target 7 is out of bounds"):
        epochal.fit(mlp(3), loader, loss="cross_entropy", epochs=1, compile=True, observers=())


# -- A CUDA graph --------------------------------------------------------------------------------------------


def test_a_cuda_graph_needs_a_cuda_device():
    with pytest.raises(epochal.PlanError, match="a CUDA graph needs a CUDA device"):
        epochal.fit(mlp(), (X, Y), loss="mse", epochs=1, device="cpu", compile="graph")
    with pytest.raises(epochal.PlanError, match='compile must be True, False or "graph"'):
        epochal.Plan(mlp(), (X, Y), loss="mse", epochs=1, compile="yes")


@pytest.mark.cuda
@pytest.mark.parametrize(
    "options", [{}, {"clip": 0.1, "schedule": "cosine"}, {"precision": "bf16"}, {"metrics": ["mae"]}]
)
def test_a_cuda_graph_moves_the_weights_as_an_eager_update_does(options):
    given = {"loss": "mse", "epochs": 6, "batch_size": 16, "seed": 3, "device": "cuda", "observers": (), **options}
    eager = epochal.fit(mlp(), (X, Y), **given)
    for compile in (True, "graph"):
        result = epochal.fit(mlp(), (X, Y), compile=compile, **given)
        for one, other in zip(eager.model.parameters(), result.model.parameters()):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 if "precision" not in options else 1e-2)
        assert result.history.train_loss == pytest.approx(eager.history.train_loss, rel=2e-2)


@pytest.mark.cuda
def test_a_cuda_graph_draws_anew_and_is_repeated_by_the_seed():
    given = {
        "loss": "mse",
        "epochs": 6,
        "batch_size": 16,
        "seed": 3,
        "device": "cuda",
        "observers": (),
        "compile": "graph",
    }
    one, two = (epochal.fit(resumable(), (X, Y), **given) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(one.model.state_dict().values(), two.model.state_dict().values()))
    assert len(set(one.history.train_loss)) == 6


@pytest.mark.cuda
def test_a_nan_in_a_cuda_graph_is_named():
    spoilt = X.clone()
    spoilt[37] = torch.nan
    given = {"loss": "mse", "epochs": 6, "batch_size": 16, "shuffle": False, "device": "cuda", "compile": "graph"}
    with pytest.raises(epochal.NonFiniteError, match="the inputs hold a value that is not finite"):
        epochal.fit(mlp(), (spoilt, Y), observers=(), **given)
