"""Rules that share a code with others: of each a program in which it finds something, and its twin that is in order."""

import faulty
import numpy as np
import pytest
import torch
from faulty import LINE, X, Y, classes, mlp, numbers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

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


# -- a program for each rule, and the word that it is known by --

SERIES = faulty.draw(200, 30, seed=5).cumsum(1)


def stepping(step, **options):
    return lambda: classes(optimizer="sgd", lr=0.1, step=step, batch_size=32, **options)


def climbing(state, window):
    x, y = window.batches[0]
    state.model.zero_grad()
    loss = F.cross_entropy(state.model(x), y)
    loss.backward()
    with torch.no_grad():
        for p in state.model.parameters():
            p += 0.1 * p.grad
    return epochal.StepResult(loss.detach())


def never_clearing(state, window):
    x, y = window.batches[0]
    loss = F.cross_entropy(state.model(x), y)
    loss.backward()
    with torch.no_grad():
        for p in state.model.parameters():
            p -= 0.01 * p.grad
    return epochal.StepResult(loss.detach())


def by_argmax(state, window):
    x, y = window.batches[0]
    state.optimizer.zero_grad()
    loss = (state.model(x).argmax(1) - y).abs().float().mean().requires_grad_()
    loss.backward()
    state.optimizer.step()
    return epochal.StepResult(loss.detach())


def of_chunks(state, window):
    x, y = window.batches[0]
    state.optimizer.zero_grad()
    losses = []
    for part, wanted in zip(x.chunk(4), y.chunk(4)):
        scores = state.model(part).log_softmax(1)
        losses.append(-scores[torch.arange(len(part)), wanted].mean())
        losses[-1].backward()
    state.optimizer.step()
    return epochal.StepResult(torch.stack(losses).mean().detach())


def with_an_adam_of_its_own():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)

    def step(state, window):
        x, y = window.batches[0]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return epochal.StepResult(loss.detach())

    return classes(model, optimizer=optimizer, step=step) | {"optimizer": "sgd"}


def in_half():
    def objective(model, batch):
        with torch.autocast("cpu", dtype=torch.float16):
            return F.cross_entropy(model(batch[0]).float(), batch[1])

    return classes(loss=None, objective=objective)


class Forecast(nn.Module):
    def __init__(self, padding):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.padding = nn.Conv1d(1, 1, 3), padding

    def forward(self, x):
        return self.layer(F.pad(x, self.padding))


def forecasts(padding):
    series = SERIES[:, None]
    return numbers(Forecast(padding), train=(series[..., :-1], series[..., 1:]))


class Words(nn.Module):
    def __init__(self, both):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.rnn = nn.Embedding(11, 8), nn.GRU(8, 8, batch_first=True, bidirectional=both)
        self.head = nn.Linear(16 if both else 8, 11)

    def forward(self, x):
        return self.head(self.rnn(self.embedding(x))[0])


def words(both):
    text = torch.randint(11, (200, 12), generator=torch.Generator().manual_seed(0))

    def objective(model, batch):
        (x,) = batch if isinstance(batch, list | tuple) else (batch,)
        return F.cross_entropy(model(x[:, :-1]).transpose(1, 2), x[:, 1:])

    return classes(Words(both), train=(text,), loss=None, objective=objective)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(1, 8, 2, batch_first=True, dropout=0.95), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Functional(nn.Module):
    def __init__(self, p=0.95):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.p = nn.Linear(8, 64), nn.Linear(64, 3), p

    def forward(self, x):
        return self.last(F.dropout(self.first(x).relu(), self.p, self.training))


def clamped(outputs, targets):
    return F.binary_cross_entropy(outputs.clamp(1e-6, 1 - 1e-6), targets)


def explained(outputs, targets):
    return 1 - (outputs - targets).square().sum() / (targets - targets.mean()).square().sum()


def summed(outputs, targets):
    return (outputs - targets).square().sum()


def likelihood(sign):
    def objective(model, batch):
        return sign * torch.distributions.Normal(model(batch[0]), 1.0).log_prob(batch[1]).mean()

    return objective


class Closure(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        hidden = nn.Linear(8, 16)
        self.first, self.last = lambda x: hidden(x).relu(), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.first(x))


class Attention(nn.Module):
    """Over eight numbers of a sample, as if they were a sequence."""

    def __init__(self, dim, scores=1):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.head, self.dim = nn.Linear(4, scores), nn.Linear(4, 3), dim

    def forward(self, x):
        x = x[:, :, None] * torch.tensor([1.0, -1.0, 0.5, 2.0])
        weights = self.query(x).softmax(self.dim)
        return self.head((x * weights).sum(1))


def large(model, by):
    with torch.no_grad():
        for p in model.parameters():
            p *= by
    return model


def deep(by):
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(8, 8), nn.ReLU())]
    return large(nn.Sequential(*layers, nn.Linear(8, 3)), by)


def dead():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    nn.init.constant_(model[0].bias, -50)
    return classes(model)


def twins():
    x = X[:160].repeat(2, 1)
    return numbers(train=(x, torch.cat([LINE[:160], LINE[:160] + 4])))


def labels(constant):
    y = (X[:, :4] > (1.6 if not constant else 0)).float()
    y[:, 3] = 0.0 if constant else y[:, 3]
    return numbers(mlp(8, 4), train=(X, y), loss="bce_with_logits")


def begun_schedule(moves):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(moves):
        schedule.step()
    return classes(model, optimizer=optimizer, schedule=schedule)


class Stream(IterableDataset):
    def __init__(self, order):
        self.order = order

    def __iter__(self):
        yield from ((X[i], Y[i]) for i in self.order)


def noisy(rows):
    return torch.stack([x + torch.rand(8) for x, _ in rows]), torch.stack([y for _, y in rows])


def windows(shuffled):
    line = faulty.draw(400, seed=7).cumsum(0)
    every = line.unfold(0, 12, 1)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)) if shuffled else range(len(every))
    every = every[torch.as_tensor(order)]
    train, val = every[:300], every[312:]
    return numbers(mlp(11, 1), train=(train[:, :-1], train[:, -1:]), val=(val[:, :-1], val[:, -1:]))


def nearly_copied(noise):
    val = X[:100] + noise * faulty.draw(100, 8, seed=9)
    return classes(val=(val, Y[:100]))


def judged_by(metric):
    """A binary classifier with a metric of the user's."""
    binary = (LINE > 0).float()
    return numbers(train=(X, binary), val=(X[:100] + 0.01, binary[:100]), loss="bce_with_logits", metrics=[metric])


def right_by_numpy(above, scale=lambda scores: scores):
    def right(outputs, targets):
        return float(((scale(outputs.numpy()) > above) == (targets.numpy() > 0.5)).mean())

    return lambda: judged_by(right)


TOLD = {
    "gradient-ascent: goes up": stepping(climbing),
    "missing-zero-grad: still in those": stepping(never_clearing),
    "detached-loss: cut off": stepping(by_argmax),
    "unscaled-accumulation: sum over its parts": stepping(of_chunks),
    "absurd-lr: lr 1": with_an_adam_of_its_own,
    "fp16-unscaled: not scaled": in_half,
    "causal-leak: sees what it is": lambda: forecasts((1, 1)),
    "causal-leak: with the last of 11": lambda: words(True),
    "constant-feature: channels 1": lambda: classes(
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten()),
        train=(torch.stack([X[:, :4].reshape(-1, 2, 2), torch.ones(320, 2, 2)], 1), Y),
    ),
    "dropout: p = 0.95": lambda: numbers(Recurrent(), train=(SERIES[:, :, None], SERIES[:, -1:])),
    "dropout: F.dropout in Functional": lambda: classes(Functional()),
    "bce-on-logits: scores of a layer": lambda: numbers(train=(X, (LINE > 0).float()), loss=clamped),
    "gradient-ascent: away from the targets": lambda: numbers(loss=explained),
    "gradient-ascent: pushes the outputs away": lambda: numbers(loss=None, objective=likelihood(1)),
    "initial-loss: far away": lambda: numbers(large(mlp(8, 1), 30)),
    "hidden-modules: not the model's": lambda: classes(Closure()),
    "conflicting-labels: different targets": twins,
    "class-imbalance: rarer": lambda: labels(False),
    "missing-class: same for all samples": lambda: labels(True),
    "softmax-dim: over the samples": lambda: classes(Attention(0)),
    "softmax-over-one: always 1": lambda: classes(Attention(-1)),
    "sum-loss: taken twice": lambda: numbers(loss=summed),
    "schedule-before-step: 2 moves": lambda: begun_schedule(2),
    "same-order: nothing shuffles": lambda: classes(train=DataLoader(TensorDataset(X, Y), 32)),
    "unshuffled: sorted by their targets": lambda: classes(train=DataLoader(Stream(Y.argsort().tolist()), 32)),
    "random-validation: made twice": lambda: classes(val=DataLoader(TensorDataset(X, Y), 32, collate_fn=noisy)),
    "duplicates-in-val: moved by one place": lambda: windows(True),
    "duplicates-in-val: next to a sample": lambda: nearly_copied(1e-4),
    "init-scale: fades": lambda: classes(deep(0.01)),
    "dead-units: nearly all": dead,
    "logit-threshold: takes scores of 0.3 for the negative class": right_by_numpy(0.5),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mistake", TOLD)
def test_a_mistake_is_told(mistake):
    code, _, words = mistake.partition(": ")
    assert words in told(TOLD[mistake])[1][code]


def gathering():
    """Steps with every fourth batch, which it counts itself."""
    seen = []

    def step(state, window):
        x, y = window.batches[0]
        loss = F.cross_entropy(state.model(x), y)
        (loss / 4).backward()
        seen.append(1)
        if len(seen) % 4 == 0:
            state.optimizer.step()
            state.optimizer.zero_grad()
        return epochal.StepResult(loss.detach())

    return stepping(step)()


QUIET = {
    "step-without-effect: gradients that are gathered": gathering,
    "causal-leak: a causal convolution": lambda: forecasts((2, 0)),
    "causal-leak: words from left to right": lambda: words(False),
    "gradient-ascent: a likelihood with its minus": lambda: numbers(loss=None, objective=likelihood(-1)),
    "softmax-dim: a softmax over a sequence": lambda: classes(Attention(1)),
    "dropout: a functional one": lambda: classes(Functional(0.2)),
    "schedule-before-step: a schedule at its start": lambda: begun_schedule(0),
    "duplicates-in-val: windows in their order": lambda: windows(False),
    "duplicates-in-val: samples with noise": lambda: nearly_copied(0.3),
    "batch-mixing: a model in half precision": lambda: classes(mlp().bfloat16(), train=(X.bfloat16(), Y)),
    "init-scale: torch's own": lambda: classes(deep(1.0)),
    "logit-threshold: scores that are compared with 0": right_by_numpy(0.0),
    "logit-threshold: probabilities": right_by_numpy(0.5, lambda scores: 1 / (1 + np.exp(-scores))),
    "logit-threshold: the error of scores": lambda: judged_by(
        lambda outputs, targets: (outputs - targets).abs().mean()
    ),
    "logit-threshold: a metric that is always the same": lambda: judged_by(lambda outputs, targets: 1.0),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", QUIET)
def test_nothing_is_told_of(program):
    assert program.partition(": ")[0] not in told(QUIET[program])[1]


def test_all_of_val_in_train_is_an_error_and_a_large_column_is_no_copy():
    assert "all samples of val" in told(lambda: classes(val=(X[:100].clone(), Y[:100])))[0]["duplicates-in-val"]
    val = faulty.draw(100, 8, seed=3)
    scale = torch.tensor([1.0] * 7 + [50_000.0])
    made = told(lambda: classes(train=(X * scale, Y), val=(val * scale, val[:, :3].argmax(1))))[1]
    assert "unnormalised-inputs" in made and "duplicates-in-val" not in made
