"""Validation in larger batches than training: only where a row of the history says the same."""

import types

import pytest
import torch
from torch import nn

import epochal
from epochal.events import Evaluated, StepDone
from epochal.loop import evaluate
from epochal.metrics.metric import Stream
from epochal.protocols import Loss

X, Y = torch.randn(90, 4), torch.randn(90, 1)
SMALL = 8


SIZES = []  # of the batches in eval mode, noted where no model keeps them


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, inputs):
        if not self.training:
            SIZES.append(len(inputs))
        return self.layer(inputs)


class Meeting(Model):
    """The samples of a batch meet."""

    def forward(self, inputs):
        return super().forward(inputs) - inputs.mean()


class Drawing(Model):
    def forward(self, inputs):
        return super().forward(inputs) + 0.1 * torch.rand(1)


class Fixed(Model):
    """Wants batches of one size, or a rest."""

    def forward(self, inputs):
        if len(inputs) > SMALL:
            raise ValueError("eight at most")
        return super().forward(inputs)


class Counting(Model):
    """Trains with what it has counted, in evaluations too."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        return super().forward(inputs) * (1 + self.calls / 100)


class CountingInside(Model):
    def __init__(self):
        super().__init__()
        self.kept = {"of": [types.SimpleNamespace(calls=0)]}

    def forward(self, inputs):
        self.kept["of"][0].calls += 1
        return super().forward(inputs) * (1 + self.kept["of"][0].calls / 100)


class CountingInABuffer(Model):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.calls += 1
        return super().forward(inputs) * (1 + self.calls / 100)


class DrawingItself(Model):
    def __init__(self):
        super().__init__()
        self.drawn = torch.Generator().manual_seed(1)

    def forward(self, inputs):
        return super().forward(inputs) + 0.1 * torch.rand(1, generator=self.drawn)


def trained(kind, *, epochs=3, before=lambda model: None, **options):
    """The sizes of the batches of each validation, and the model and the rows."""
    torch.manual_seed(0)
    SIZES.clear()
    validations = []

    def watch(event):
        if isinstance(event, Evaluated):
            validations.append(SIZES.copy())
            SIZES.clear()

    model = kind()
    before(model)
    options = {
        "loss": "mse",
        "val": (X[:40].clone(), Y[:40].clone()),
        "batch_size": SMALL,
        "restore_best": False,
        **options,
    }
    result = epochal.fit(model, (X, Y), epochs=epochs, observers=[watch], device="cpu", **options)
    return validations, model, result.history.rows


def by_hand(kind, rows, **options):
    """What the last validation should have said, in batches of the usual size."""
    _, model, _ = trained(kind, epochs=len(rows), **options)
    model.eval()
    with torch.no_grad():
        total = sum(
            nn.functional.mse_loss(model(x), y).item() * len(x)
            for x, y in zip(X[:40].split(SMALL), Y[:40].split(SMALL))
        )
    return total / 40


def test_after_the_first_validation_batches_are_larger_and_say_the_same():
    validations, _, rows = trained(Model)
    assert validations == [[8] * 5 + [40], [40], [40]]  # the first one twice: to find it out
    assert rows[-1]["val_loss"] == pytest.approx(by_hand(Model, rows), rel=1e-6)


@pytest.mark.parametrize("kind", [Meeting, Drawing, Fixed])
def test_what_would_say_something_else_keeps_its_batches(kind):
    validations, _, rows = trained(kind)
    assert validations[1:] == [[8] * 5, [8] * 5]
    if kind is not Drawing:
        assert rows[-1]["val_loss"] == pytest.approx(by_hand(kind, rows), rel=1e-6)


def test_batch_norm_without_running_statistics_keeps_its_batches():
    def with_norm(model):
        model.layer = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1))

    assert trained(Model, before=with_norm)[0][1:] == [[8] * 5, [8] * 5]


def test_batch_norm_with_running_statistics_does_not():
    def with_norm(model):
        model.layer = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    assert trained(Model, before=with_norm)[0][1:] == [[40], [40]]


def test_a_model_with_hooks_is_left_alone():
    passed = []
    validations, _, _ = trained(
        Model, before=lambda model: model.layer.register_forward_hook(lambda *given: passed.append(1))
    )
    assert validations == [[8] * 5] * 3


def contrastive(model, batch):
    inputs, _ = batch
    outputs = model(inputs)
    return Loss((outputs @ outputs.T).mean() + outputs.square().mean(), outputs=outputs)


def test_an_objective_in_which_samples_meet_keeps_its_batches():
    assert trained(Model, loss=None, objective=contrastive)[0][1:] == [[8] * 5, [8] * 5]


def hits(outputs, targets):
    """Nothing is hit in any batch at first, however large it is."""
    found = outputs > 0.9
    return (found & (targets > 0)).sum() / found.sum().clamp(min=1)


def test_a_metric_of_the_users_is_computed_over_the_usual_batches():
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X[:40].clone(), Y[:40].clone()), batch_size=SMALL
    )
    options = {"metrics": [hits], "optimizer": "sgd", "lr": 0.5}
    rows, others = (trained(Model, **options, **given)[2] for given in ({}, {"val": loader}))
    assert [row["val_hits"] for row in rows] == [row["val_hits"] for row in others]


@pytest.mark.parametrize("loss", ["huber", nn.HuberLoss(), nn.functional.smooth_l1_loss])
def test_a_known_loss_may_be_given_in_any_way(loss):
    assert trained(Model, loss=loss)[0][1:] == [[40], [40]]


def largest(outputs, targets):
    return (outputs - targets).abs().max()


def test_a_metric_that_is_a_mean_over_batches_keeps_its_batches():
    assert trained(Model, metrics=[largest])[0][1:] == [[8] * 5, [8] * 5]
    assert trained(Model, metrics=["mae"])[0][1:] == [[40], [40]]


@pytest.mark.parametrize("kind", [Counting, CountingInside, CountingInABuffer, DrawingItself])
def test_a_model_that_keeps_something_of_its_calls_has_the_bits_of_the_plain_loop(kind):
    """A DataLoader's batches are taken as they are."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X[:40].clone(), Y[:40].clone()), batch_size=SMALL
    )
    _, model, rows = trained(kind)
    _, other, others = trained(kind, val=loader)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters()))
    assert [row["val_loss"] for row in rows] == [row["val_loss"] for row in others]


def test_finding_it_out_leaves_no_trace():
    states = []
    for before in (lambda model: None, lambda model: model.register_forward_hook(lambda *given: None)):  # left alone
        trained(Drawing, epochs=1, before=before)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_outputs_that_are_large_limit_how_many_there_are():
    class Large(Model):
        def forward(self, inputs):
            super().forward(inputs)
            return self.layer(inputs).expand(-1, 2**18)  # a MB of a sample

    def mean(model, batch):
        outputs = model(batch[0])
        return Loss((outputs[:, :1] - batch[1]).square().mean(), outputs=outputs)

    assert trained(Large, loss=None, objective=mean)[0] == [[8] * 5] * 3


def resumed(folder, until, **options):
    """Trained to ``until`` epochs in two goes; the rows."""
    trained(Model, epochs=2, run=folder, **options)
    return trained(Model, epochs=until, run=folder, resume=True, **options)


def test_a_resumed_run_goes_on_in_larger_batches_with_the_same_bits(tmp_path):
    validations, model, rows = resumed(tmp_path / "run", 4)
    _, other, at_once = trained(Model, epochs=4)
    assert validations == [[40], [40]]
    timeless = [[{**row, "time": 0} for row in one] for one in (rows, at_once)]
    assert timeless[0] == timeless[1]
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters()))


def test_with_another_metric_it_is_found_out_anew(tmp_path):
    trained(Model, epochs=2, run=tmp_path / "run")
    validations, _, _ = trained(Model, epochs=4, run=tmp_path / "run", resume=True, metrics=[largest])
    assert validations == [[8] * 5, [8] * 5]
    validations, _, _ = trained(Model, epochs=6, run=tmp_path / "run", resume=True, metrics=["mae"])
    assert validations == [[8] * 5 + [40], [40]]


def test_a_signal_within_the_first_validation_leaves_it_to_the_next(tmp_path):
    """What was measured then does not count, and says nothing of larger batches."""
    SIZES.clear()
    with epochal.Plan(
        Model(), (X, Y), val=(X[:40].clone(), Y[:40].clone()), loss="mse", batch_size=SMALL, epochs=1, observers=()
    ).prepare() as run:
        for event in run:
            if isinstance(event, StepDone):
                found = run.validation.measured(run.setting, shared=False, is_cut_short=lambda: len(SIZES) >= 2)
                assert run.validation.loader.wide is None and "val_loss" in found
                break
    assert SIZES == [8, 8]


def test_evaluating_by_itself_is_in_the_usual_batches():
    """``loop.evaluate`` over batches that are given takes them as they are."""
    SIZES.clear()
    model, objective = Model(), lambda model, batch: Loss(nn.functional.mse_loss(model(batch[0]), batch[1]), 8)
    batches = list(zip(X[:16].split(8), Y[:16].split(8)))
    evaluate(
        objective, model, batches, Stream([]), modules=[model], device=torch.device("cpu"), autocast=torch.no_grad()
    )
    assert SIZES == [8, 8]
