"""What several processes decide, count and refuse together."""

import os
import shutil
import signal
import threading
import warnings
from pathlib import Path

import group
import numpy as np
import pytest
import torch
from test_processes import alone, digits, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import epochal
from epochal.checkpoint.weights import load_weights

pytestmark = pytest.mark.distributed


# -- evaluation --


def confusion(rank, form):
    images, labels = digits()
    val = (images, labels) if form == "arrays" else DataLoader(TensorDataset(images, labels), batch_size=100)
    result = epochal.fit(
        network(), (images[:64], labels[:64]), val, loss="cross_entropy", metrics=["confusion", "accuracy"], epochs=1,
        seed=0, observers=(), ignore=["val-in-train"],
    )  # fmt: skip
    row = result.history.rows[-1]
    return int(np.sum(row["val_confusion"])), row["val_loss"], row["val_accuracy"]


def padded(rank):
    """What the usual way counts: each process evaluates what DistributedSampler gives it."""
    data = TensorDataset(*digits())
    loader = DataLoader(data, batch_size=100, sampler=DistributedSampler(data, 4, rank, shuffle=False))
    return sum(len(labels) for _, labels in loader)


@pytest.mark.parametrize("form", ["arrays", "loader"])
def test_every_sample_is_evaluated_once(form):
    whole = alone(confusion, form)
    shares = group.run(confusion, 4, form)
    assert whole[0] == 1797
    for counted, loss, accuracy in shares:
        assert (counted, loss) == (1797, pytest.approx(whole[1], rel=1e-5)) and accuracy == pytest.approx(whole[2])
    assert sum(padded(rank) for rank in range(4)) == 1800  # the control


def with_torchmetrics(rank):
    from torchmetrics import MeanSquaredError, MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

    images, labels = digits()
    metrics = [MulticlassAccuracy(10), MetricCollection({"auc": MulticlassAUROC(10)})]
    result = epochal.fit(
        network(), (images[:300], labels[:300]), (images[300:403], labels[300:403]), loss="cross_entropy",
        metrics=metrics, epochs=2, batch_size=50, seed=0, observers=(), optimizer="sgd", lr=0.1,
    )  # fmt: skip
    del MeanSquaredError
    return {name: value for name, value in result.history.rows[-1].items() if "_m" in name or "_a" in name}


def test_torchmetrics_count_what_all_processes_have():
    whole = alone(with_torchmetrics)
    assert set(whole) == {f"{side}_{name}" for side in ("train", "val") for name in ("multiclass_accuracy", "auc")}
    for share in group.run(with_torchmetrics, 4):
        assert share == pytest.approx(whole, abs=1e-5)


# -- what is not finite --


def poisoned(rank, strategy, options):
    """The 70th sample, in the second half of the second batch, is not a number."""
    images, labels = digits()
    images = images[:200].clone()
    images[115] = torch.nan
    warnings.simplefilter("ignore")
    try:
        result = epochal.fit(
            network(), (images, labels[:200]), loss="cross_entropy", batch_size=64, shuffle=False, epochs=1, seed=0,
            strategy=strategy, observers=(), **options,
        )  # fmt: skip
    except epochal.NonFiniteError as error:
        return str(error)
    return result.history.rows[-1]["skipped"], [p.isfinite().all().item() for p in result.model.parameters()]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_is_not_finite_in_one_process_stops_all_of_them_with_its_cause(strategy):
    texts = group.run(poisoned, 2, strategy, {})
    assert texts[0] == texts[1]
    assert texts[0].startswith("the inputs hold a value that is not finite; the weights were not touched.")
    assert "where: step 1, epoch 1, batch 1, the share of rank 1; row 19 of it; loss nan" in texts[0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_leave_out_the_same_update(strategy):
    for skipped, finite in group.run(poisoned, 2, strategy, {"nonfinite": "skip"}):
        assert skipped == 1 and all(finite)


# -- weights of means --


def weighted(rank, options):
    """Class weights, targets that are ignored (all of them in one share), a clipped gradient and a mean over tokens."""
    images, labels = digits()
    images, labels = images[:330], labels[:330].clone()
    labels[8:16] = -100
    labels[::3] = -100
    loss = nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 10))
    options = (
        {"loss": loss} | ({"loss": None, "objective": over_some} if options.pop("custom", False) else {}) | options
    )
    result = epochal.fit(
        network(), (images, labels), batch_size=16, accumulate=2, shuffle=False, epochs=2, optimizer="sgd", lr=0.1,
        clip=0.7, seed=0, observers=(), **options,
    )  # fmt: skip
    return result.history.train_loss, [full(p).detach().numpy() for p in result.model.parameters()]


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def over_some(model, batch):
    """A mean over what counts, which is no number where nothing does."""
    images, labels = batch
    counts = labels >= 0
    losses = nn.functional.cross_entropy(model(images), labels, reduction="none")
    return epochal.Loss(losses[counts].sum() / counts.sum(), weight=counts.sum())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("custom", [False, True])
def test_means_are_over_what_counts_in_all_processes(custom, strategy):
    losses, weights = alone(weighted, {"custom": custom})
    for theirs, their_weights in group.run(weighted, 2, {"custom": custom, "strategy": strategy}):
        assert theirs == pytest.approx(losses, rel=1e-5)
        for one, other in zip(weights, their_weights):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)


# -- models --


class Paths(nn.Module):
    """One layer that is never used, one that is frozen, and one only every other time."""

    def __init__(self, turns):
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.sometimes, self.turns, self.calls = nn.Linear(4, 4), turns, 0
        self.frozen.requires_grad_(False)

    def forward(self, x):
        self.calls += 1
        x = self.frozen(self.used(x))
        return (self.sometimes(x) if self.turns and self.calls % 2 else x).sum(1, keepdim=True)


def winding(rank, turns, strategy):
    torch.manual_seed(0)
    X, y = torch.randn(64, 3), torch.randn(64, 1)
    model = Paths(turns)
    result = epochal.fit(
        model, (X, y), loss="mse", optimizer="sgd", lr=0.01, epochs=2, batch_size=16, seed=0, strategy=strategy,
        observers=(),
    )  # fmt: skip
    del result
    return {name: full(p).detach().numpy() for name, p in model.named_parameters()}


def test_weights_that_get_no_gradient():
    whole = alone(winding, False, "auto")
    for strategy in ("ddp", "fsdp"):
        for found in group.run(winding, 2, False, strategy):
            for name, weight in whole.items():
                np.testing.assert_allclose(found[name], weight, rtol=1e-5, atol=1e-7)


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, x):
        if self.training:
            self.drawn.append(torch.rand(1).item())
        return x


def normed(rank):
    """Running statistics and a buffer of the user's own; random numbers in the model."""
    torch.manual_seed(rank)  # every process would begin with other weights
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), Draws(), nn.Dropout(0.5), nn.Linear(8, 1))
    X = torch.linspace(-1, 1, 400).reshape(100, 4)
    result = epochal.fit(model, (X, X[:, :1]), val=0.2, loss="mse", epochs=3, batch_size=16, observers=())
    return {name: value.numpy() for name, value in result.model.state_dict().items()}, model[2].drawn


def test_all_begin_and_end_with_the_same_model_and_draw_different_numbers():
    (first, drawn), (second, also_drawn) = group.run(normed, 2)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert len(drawn) == len(also_drawn) and not set(drawn[3:]) & set(also_drawn[3:])


# -- decisions --


def stopped_by(rank, how):
    torch.manual_seed(0)
    X = torch.randn(640, 3)
    seen = []

    def observer(event):
        if isinstance(event, epochal.StepDone):
            seen.append(event.step)
            if how == "observer" and event.step == 5:
                return epochal.Stop("enough")
        return None

    def objective(model, batch):
        if how == "signal" and rank == 1 and len(counted) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        counted.append(1)
        return model(batch[0]).pow(2).mean()

    counted = []
    options = {"max_time": 0.5, "epochs": 10**6} if how == "time" else {"epochs": 3}
    with epochal.Plan(
        nn.Linear(3, 1), (X, X), objective=objective, batch_size=16, seed=0, observers=[observer], **options
    ).prepare() as run:
        for _ in run:
            pass
    return run.result.reason.name, run.state.progress.step


@pytest.mark.parametrize(("how", "reason"), [("observer", "ASKED"), ("signal", "INTERRUPTED"), ("time", "MAX_TIME")])
def test_all_end_after_the_same_step(how, reason):
    (first, step), (second, other) = group.run(stopped_by, 2, how)
    assert (first, second) == (reason, reason) and step == other > 0


def early(rank):
    torch.manual_seed(0)
    X = torch.randn(64, 3)
    result = epochal.fit(
        nn.Linear(3, 1), (X, torch.randn(64, 1)), val=0.25, loss="mse", lr=1.0, epochs=50, patience=2, seed=0,
        schedule="plateau", observers=(),
    )  # fmt: skip
    return result.reason.name, len(result.history.rows), result.best.epoch


def test_early_stopping_is_that_of_one_process():
    assert group.run(early, 2) == [alone(early)] * 2


# -- mistakes --


def mistaken(rank, what):
    X = torch.randn(20, 3)
    model, options = nn.Linear(3, 1), {"loss": "mse", "epochs": 1, "observers": (), "batch_size": 4}
    data = (torch.zeros(20, 3), torch.zeros(20, 1))
    if what == "another model" and rank == 1:
        model = nn.Linear(3, 2)
    if what == "sampler":
        data = TensorDataset(*data)
        data = DataLoader(data, sampler=DistributedSampler(data, 2, rank))
        options.pop("batch_size")
    if what == "drift":
        options |= {"step": drifting, "run": "run", "save": epochal.Saving("1 step", share=None)}
    del X
    try:
        epochal.fit(model, data, **options)
    except epochal.EpochalError as error:
        return type(error).__name__, str(error)
    return None


def drifting(state, window):
    with torch.no_grad():
        state.model.bias.add_(float(os.environ["RANK"]))
    return epochal.StepResult(torch.tensor(0.0))


@pytest.mark.parametrize(
    ("what", "kind", "told"),
    [
        ("another model", "ModelError", "rank 0 has ('weight', (1, 3), 'torch.float32'), rank 1 has ('weight', (2"),
        ("sampler", "PlanError", "a DistributedSampler fills up the shares with samples that are there twice."),
        ("drift", "ModelError", "the processes have drifted apart: the weight 'bias' is not the same in all of them."),
    ],
)
def test_mistakes_are_told_by_all_processes_alike(what, kind, told):
    first, second = group.run(mistaken, 2, what)
    assert first == second and first[0] == kind and told in first[1]


# -- memory --


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)) for _ in range(4)
        )
        self.head = nn.Linear(256, 1)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def held(rank, strategy):
    """Bytes of weights, and of what the optimizer keeps, in this process."""
    X = torch.randn(64, 256)
    with epochal.Plan(
        Wide(), (X, X[:, :1]), loss="mse", optimizer="adamw", epochs=1, strategy=strategy, seed=0, observers=()
    ).prepare() as run:
        for event in run:
            if isinstance(event, epochal.Evaluated):  # at the end the model is whole again
                kept = [value for state in run.state.optimizer.state.values() for value in state.values()]
                every = [*run.state.model.parameters(), *kept]
                return sum(local(one).nbytes for one in every if isinstance(one, torch.Tensor))
    return None


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def test_four_processes_hold_a_quarter_each():
    whole = alone(held, "auto")
    for share in group.run(held, 4, "fsdp"):
        assert share == pytest.approx(whole / 4, rel=0.1)


def rarely(rank):
    """From the second epoch on the model of one process leaves a layer out."""
    torch.manual_seed(0)
    model = Paths(turns=False)
    model.unused.requires_grad_(False)
    model.sometimes.requires_grad_(False)
    used, calls = model.used.forward, []

    def forward(x):
        calls.append(1)
        return torch.zeros(len(x), 4) + model.spare if rank == 1 and len(calls) > 8 else used(x)

    model.spare = nn.Parameter(torch.zeros(4))
    model.used.forward = lambda x: forward(x) + 0 * model.spare
    X = torch.randn(64, 3)
    try:
        epochal.fit(model, (X, X[:, :1]), loss="mse", epochs=3, batch_size=16, seed=0, observers=(), run="run")
    except epochal.EpochalError as error:
        return type(error).__name__, str(error)
    return None


def test_a_weight_that_is_not_used_any_more_is_named_before_any_weight_moves():
    (kind, told), (their_kind, their_told) = group.run(rarely, 2)
    assert their_kind == "ModelError" and "rank 1; used.weight, used.bias" in their_told
    assert kind == "ProcessError" and "rank 1" in told


def used_afterwards(rank, strategy):
    """What a result can do when the run is over; by one process alone, where each has the whole model."""
    torch.manual_seed(0)
    X = torch.randn(50, 3)
    given = {"metrics": ["mae"], "strategy": strategy, "observers": (), "seed": 0, "epochs": 2}
    result = epochal.fit(nn.Linear(3, 1), (X, X[:, :1]), val=0.2, loss="mse", **given)
    if rank == 1 and strategy == "ddp":
        return None
    return result.evaluate((X, X[:, :1])), result.predict(X).numpy()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_result_can_be_used_after_the_run(strategy):
    measured, predicted = alone(used_afterwards, "auto")
    for answer in filter(None, group.run(used_afterwards, 2, strategy)):
        assert answer[0] == pytest.approx(measured, rel=1e-4)
        np.testing.assert_allclose(answer[1], predicted, rtol=1e-4, atol=1e-6)


class Blocks(nn.Module):
    """Blocks in a list, as those of a transformer, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(11, 16)
        layers = (nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(3))
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).transpose(1, 2)


def transformed(rank, strategy, given):
    tokens = torch.randint(0, 11, (60, 9), generator=torch.Generator().manual_seed(1))
    model = Blocks()
    strategy = epochal.Strategy(strategy, **given)
    plan = epochal.Plan(
        model, (tokens[:, :-1], tokens[:, 1:]), loss="cross_entropy", optimizer="sgd", lr=0.1, clip=1.0,
        epochs=3, batch_size=16, seed=0, strategy=strategy, observers=(), run="run",
    )  # fmt: skip
    with plan.prepare() as run:
        names = {type(part).__name__ for part in model.modules()}
        for _ in run:
            pass
    return run.result.history.train_loss, sorted(name for name in names if name.startswith("FSDP"))


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ({}, ["FSDPTransformerEncoderLayer"]),
        ({"wrap": [nn.MultiheadAttention]}, ["FSDPMultiheadAttention"]),
        ({"activation_checkpointing": True}, ["FSDPTransformerEncoderLayer"]),
    ],
)
def test_fsdp_wraps_repeated_blocks_or_the_classes_that_are_named(given, kinds):
    (losses, none), weights = alone(transformed, "auto", {}), Path("run/model.safetensors")
    whole = load_weights(weights)
    shutil.rmtree("run")
    for theirs, their_kinds in group.run(transformed, 2, "fsdp", given):
        assert theirs == pytest.approx(losses, rel=1e-5) and their_kinds == kinds
    for name, weight in load_weights(weights).items():
        np.testing.assert_allclose(weight, whole[name], rtol=1e-3, atol=1e-5)
    assert none == []


def wrapped_wrongly(rank):
    try:
        transformed(rank, "fsdp", {"wrap": [nn.Embedding]})
    except epochal.PlanError as error:
        return str(error)
    return None


def test_a_weight_that_is_shared_cannot_be_wrapped():
    told = "a module to wrap shares the weight 'head.weight' with others."
    assert all(told in answer for answer in group.run(wrapped_wrongly, 2))


def counts_now_and_then(rank, strategy):
    """A weight that is never used, and shares in which an objective counts nothing."""
    torch.manual_seed(0)
    X, y = torch.randn(64, 3), torch.randn(64, 1)
    y[8:16] = torch.nan

    def objective(model, batch):
        counts = batch[1].isfinite()
        errors = (model(batch[0]) - batch[1])[counts].square()
        return epochal.Loss(errors.sum() / counts.sum(), weight=counts.sum())

    model = Paths(False)
    epochal.fit(
        model, (X, y), objective=objective, optimizer="sgd", lr=0.01, epochs=2, batch_size=16, shuffle=False, seed=0,
        strategy=strategy, observers=(),
    )  # fmt: skip
    return {name: full(p).detach().numpy() for name, p in model.named_parameters()}


def test_a_share_in_which_nothing_counts_beside_a_weight_that_is_not_used():
    whole = alone(counts_now_and_then, "auto")
    for strategy in ("ddp", "fsdp"):
        for found in group.run(counts_now_and_then, 2, strategy):
            for name, weight in whole.items():
                np.testing.assert_allclose(found[name], weight, rtol=1e-5, atol=1e-7)


def one_after_another(rank):
    """Runs in one group: one that ends, one that fails, and one more."""
    X = torch.linspace(-1, 1, 96).reshape(32, 3)
    losses = []
    for data in ((X, X[:, :1]), (X, X[:, :2]), (X, X[:, :1])):
        torch.manual_seed(0)
        try:
            result = epochal.fit(nn.Linear(3, 1), data, loss="mse", epochs=1, seed=0, observers=())
            losses.append(result.history.train_loss[0])
        except epochal.EpochalError as error:
            losses.append(type(error).__name__)
    return losses, threading.active_count()


def test_several_runs_in_one_group():
    for losses, threads in group.run(one_after_another, 2):
        assert losses[0] == losses[2] and losses[1] == "LossShapeError" and threads <= 2
