"""Rules that share a code with others: of each a program in which it finds something, and its twin that is in order."""

import faulty
import pytest
import torch
from faulty import LINE, X, Y, classes, mlp, numbers
from torch import nn
from torch.nn import functional as F

import epochal
from epochal.doctor import finding


@pytest.fixture(autouse=True)
def _rules_may_not_fail(monkeypatch):
    monkeypatch.setattr(finding, "RAISES", True)


def told(options):
    """What a check and a run of it tell, but for info."""
    from benchmarks.faults.judging import by_epochal
    from benchmarks.faults.program import Program

    found = by_epochal(Program(lambda: options() if callable(options) else options)).findings
    return {one.code: str(one) for one in found if one.level != "info"}, {one.code: str(one) for one in found}


def constant(model, *values):
    for part, value in zip((one for one in model if isinstance(one, nn.Linear)), values):
        nn.init.constant_(part.weight, value)
        nn.init.zeros_(part.bias)
    return model


def test_constant_weights_under_a_cross_entropy_whose_gradient_is_zero():
    text = told(lambda: classes(constant(mlp(), 0.1, 0.1)))[0]["symmetric-init"]
    assert "which the next layer reads alike" in text and "0.weight" in text
    assert "symmetric-init" not in told(lambda: classes(constant(mlp(), 0.1)))[1]


def in_columns(outputs, targets):
    return ((outputs > 0) == targets).float().mean()  # (n, 1) and (n,)


def in_rows(outputs, targets):
    return ((outputs[:, 0] > 0) == targets).float().mean()


def test_a_metric_that_compares_each_with_each():
    def make(metric):
        targets = (X[:, 0] > 0).float()

        def loss(outputs, wanted):
            return F.binary_cross_entropy_with_logits(outputs[:, 0], wanted)

        return numbers(train=(X, targets), loss=loss, metrics=[metric], val=0.2)

    assert "(320, 1)" not in told(lambda: make(in_rows))[0].get("impossible-metric", "")
    assert "compares each sample with all others" in told(lambda: make(in_columns))[0]["impossible-metric"]
    assert "impossible-metric" not in told(lambda: make(in_rows))[1]


RARE = (torch.arange(320) % 8 == 0).long()


@pytest.mark.parametrize(
    ("loss", "is_reversed"),
    [
        (lambda: nn.CrossEntropyLoss(weight=torch.tensor([7.0, 1.0])), True),
        (lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 7.0])), False),
        (lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(1 / 7)), True),
        (lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(7.0)), False),
    ],
)
def test_class_weights_the_wrong_way_round(loss, is_reversed):
    def make():
        if isinstance(loss(), nn.BCEWithLogitsLoss):
            return numbers(train=(X, RARE.float()[:, None]), loss=loss())
        return classes(mlp(8, 2), train=(X, RARE), loss=loss())

    assert ("class-imbalance" in told(make)[0]) is is_reversed


def own_loss(outputs, targets):
    return (outputs - targets).abs().pow(1.5).mean()


def test_an_activation_before_a_loss_of_the_users():
    assert (
        "cannot give these" in told(lambda: numbers(mlp(8, 1, nn.Sigmoid()), loss=own_loss))[0]["unreachable-targets"]
    )
    assert (
        "unreachable-targets"
        not in told(lambda: numbers(mlp(8, 1, nn.Sigmoid()), train=(X, LINE.sigmoid()), loss=own_loss))[1]
    )


def test_nothing_but_norms_is_trained():
    def make(*trained):
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).requires_grad_(False)
        for at in trained:
            model[at].requires_grad_(True)
        return classes(model)

    assert "scales and shifts of norms" in told(lambda: make(1))[1]["all-frozen"]
    assert "all-frozen" not in told(lambda: make(1, 3))[1]


class Forgetful(nn.Module):
    """Makes its last layer anew in each pass."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)

    def forward(self, x):
        return nn.Linear(16, 3)(self.first(x).relu())


class Frozen(nn.Module):
    """Goes through another model, which is not its own, and which nobody has frozen."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.outer = [mlp(16, 3).requires_grad_(False)]

    def forward(self, x):
        return self.outer[0](self.first(x).relu())


def test_a_layer_that_the_forward_makes():
    assert "in each pass" in told(lambda: classes(Forgetful()))[0]["hidden-modules"]
    assert "hidden-modules" not in told(lambda: classes(Frozen()))[1]


def test_val_on_another_scale():
    val = faulty.draw(100, 8, seed=3)
    assert "another scale" in told(lambda: classes(val=(val * 255, val[:, :3].argmax(1))))[0]["unnormalised-inputs"]
    assert "unnormalised-inputs" not in told(lambda: classes(val=(val * 2, val[:, :3].argmax(1))))[1]


def test_the_target_is_among_the_inputs():
    assert "column 8 of 9" in told(lambda: numbers(mlp(9, 1), train=(torch.cat([X, LINE], 1), LINE)))[0]["causal-leak"]
    assert "causal-leak" not in told(lambda: numbers(mlp(9, 1), train=(torch.cat([X, LINE + 0.1], 1), LINE)))[1]


def test_it_is_told_when_overfitting_begins(capsys):
    rows = faulty.draw(60, 8, seed=1)
    labels = torch.randint(3, (60,), generator=torch.Generator().manual_seed(0))
    epochal.fit(mlp(), (rows, labels), (X, Y), loss="cross_entropy", epochs=12, lr=0.05, batch_size=16, seed=0)
    lines = capsys.readouterr().err.splitlines()
    begins = [line for line in lines if line.startswith("fit: the model has been overfitting since epoch")]
    assert len(begins) == 1 and "a gap of" in begins[0]
