"""Trainings that a watch could break, or accuse: they go on, with the same bits, and nothing is told of them."""

from concurrent.futures import ThreadPoolExecutor

import faulty
import pytest
import torch
from faulty import LINE, X, Y, classes, mlp, numbers
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import epochal
from epochal.doctor import finding


@pytest.fixture(autouse=True)
def _rules_may_not_fail(monkeypatch):
    monkeypatch.setattr(finding, "RAISES", True)


def stepping(step, model=None, **options):
    return classes(model, optimizer="sgd", lr=0.1, step=step, batch_size=32) | options


def usual(state, window, loss_of=F.cross_entropy):
    x, y = window.batches[0]
    state.optimizer.zero_grad()
    loss = loss_of(state.model(x), y)
    loss.backward()
    state.optimizer.step()
    return epochal.StepResult(loss.detach())


class Checkpointed(nn.Module):
    def __init__(self, reentrant, *last):
        super().__init__()
        self.inner, self.head, self.reentrant = (
            mlp(8, 8),
            nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3), *last),
            reentrant,
        )

    def forward(self, x):
        return checkpoint(lambda x: self.head(self.inner(x)), x.requires_grad_(), use_reentrant=self.reentrant)


class Scaling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 1.5 if func is F.linear else result


def in_a_mode(model, batch):
    with Scaling():
        scores = model(batch[0])
    return F.cross_entropy(scores, batch[1])


def in_threads(model, batch):
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(model, batch[0].chunk(2))
    return F.cross_entropy(torch.cat([one, two]), batch[1])


def assigned(state, window):
    x, y = window.batches[0]
    loss = F.cross_entropy(state.model(x), y)
    parameters = list(state.model.parameters())
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        if p.grad is None:
            p.grad = gradient
        else:
            p.grad.copy_(gradient)
    state.optimizer.step()
    return epochal.StepResult(loss.detach())


def with_momentum():
    """It swings over the lowest point, and then goes along the newest gradient for a while."""
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def step(state, window):
        x, y = window.batches[0]
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return epochal.StepResult(loss.detach())

    return numbers(model, train=(X + 2, LINE), step=step, optimizer="sgd", loss=None)


def in_turns():
    """The critic learns in four of five updates; the plan's model is the generator."""
    torch.manual_seed(0)
    generator, critic = mlp(4, 8), mlp(8, 1)
    ours, theirs = (torch.optim.Adam(net.parameters(), lr=1e-3) for net in (generator, critic))
    count = []

    def step(state, window):
        (x,) = window.batches[0][:1]
        count.append(1)
        made = generator(x[:, :4])
        if len(count) % 5:
            loss = critic(made).mean() - critic(x).mean()
            theirs.zero_grad()
            loss.backward()
            theirs.step()
        else:
            loss = -critic(made).mean()
            ours.zero_grad()
            loss.backward()
            ours.step()
        return epochal.StepResult(loss.detach())

    return classes(generator, step=step, optimizer="sgd", loss=None)


def scaled():
    """The first updates overflow, and are left out."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    def step(state, window):
        x, y = window.batches[0]
        state.optimizer.zero_grad()
        loss = F.cross_entropy(state.model(x), y)
        scaler.scale(loss).backward()
        scaler.step(state.optimizer)
        scaler.update()
        return epochal.StepResult(loss.detach())

    return stepping(step)


def warmed_up():
    count = []

    def step(state, window):
        for group in state.optimizer.param_groups:
            group["lr"] = 0.01 * len(count)
        count.append(1)
        return usual(state, window)

    return stepping(step)


class Physical(nn.Module):
    """Asks for the slope by its inputs, which it keeps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp(8, 1)

    def forward(self, x):
        self.x = x.detach().clone().requires_grad_()
        made = self.net(self.x)
        (slope,) = torch.autograd.grad(made.sum(), self.x, create_graph=True)
        return made + 0.01 * slope.sum(1, keepdim=True)


def weighted(model, batch):
    known = (batch[1] >= 0).float()
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1], weight=known)


def advantage(model, batch):
    return F.binary_cross_entropy_with_logits(model(batch[0]), (batch[1] > 0).float(), weight=batch[1] - 0.5)


def quantiles(model, batch):
    made, wanted = model(batch[0]), batch[1].expand(-1, 5)
    return F.smooth_l1_loss(made.unsqueeze(2).expand(-1, -1, 5), wanted.unsqueeze(1), reduction="none").mean()


class Bins(nn.Module):
    """As many centres as samples in a batch, which move."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.centers = mlp(8, 32), nn.Parameter(torch.linspace(-3, 3, 32))

    def forward(self, x):
        return self.net(x)


def to_bins(model, batch):
    apart = batch[1] - model.centers
    return F.cross_entropy(model(batch[0]), (-apart.square()).softmax(1)) + apart.abs().amin(1).mean()


class Seasons(nn.Module):
    """Two layers side by side that begin with means."""

    def __init__(self):
        super().__init__()
        self.trend, self.season = (nn.Linear(8, 8, bias=False) for _ in range(2))
        for layer in (self.trend, self.season):
            nn.init.constant_(layer.weight, 1 / 8)

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        return self.trend(mean.expand(-1, 8)) + self.season(x - mean)


def evolving(state, window):
    x, y = window.batches[0]
    with torch.no_grad():
        before = F.cross_entropy(state.model(x), y)
        moves = [0.05 * torch.randn_like(p) for p in state.model.parameters()]
        for p, move in zip(state.model.parameters(), moves):
            p += move
        if (after := F.cross_entropy(state.model(x), y)) > before:
            for p, move in zip(state.model.parameters(), moves):
                p -= move
    return epochal.StepResult(torch.minimum(before, after))


def portfolio(outputs, targets):
    return -(outputs * targets).sum(0).mean()


def a_part(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1] // 2) + F.cross_entropy(model(batch[0]), batch[1] % 2)


def left_out(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1].where(batch[1] != 2, 255), ignore_index=255)


POSITIVE = F.relu(LINE) + 0.01 * faulty.draw(320, 1, seed=8)
SOUND = {
    "checkpoint": lambda: stepping(usual, Checkpointed(False)),
    "reentrant checkpoint": lambda: stepping(usual, Checkpointed(True)),
    "checkpoint that ends in a softmax": lambda: classes(Checkpointed(False, nn.LogSoftmax(1)), loss="nll"),
    "a mode": lambda: classes(loss=None, objective=in_a_mode),
    "threads": lambda: classes(loss=None, objective=in_threads),
    "compiled loss": lambda: classes(loss=torch.compile(F.cross_entropy, backend="eager")),
    "gradients put in place": lambda: stepping(assigned),
    "momentum": with_momentum,
    "turns": in_turns,
    "scaler": scaled,
    "warm-up from 0": warmed_up,
    "inputs kept": lambda: numbers(Physical()),
    "weights of entries": lambda: numbers(
        train=(X, (LINE > 0).float() - (X[:, :1] > 1).float()), loss=None, objective=weighted
    ),
    "advantages": lambda: numbers(loss=None, objective=advantage),
    "quantiles": lambda: numbers(mlp(8, 5), loss=None, objective=quantiles),
    "bins": lambda: numbers(Bins(), loss=None, objective=to_bins, batch_size=32),
    "means": lambda: numbers(Seasons(), train=(X, X.roll(1, 1))),
    "targets of 0": lambda: numbers(
        nn.Linear(8, 1), train=(X, LINE * (torch.arange(320) >= 32)[:, None]), shuffle=False
    ),
    "evolution": lambda: stepping(evolving, mlp().requires_grad_(False), optimizer=None, lr=None),
    "noise below 0": lambda: numbers(mlp(8, 1, nn.ReLU()), train=(X, POSITIVE)),
    "portfolio": lambda: numbers(mlp(8, 1, nn.Softmax(0)), loss=portfolio),
    "a part of the targets": lambda: classes(mlp(8, 2), loss=None, objective=a_part),
    "another index that is ignored": lambda: classes(mlp(8, 2), loss=None, objective=left_out),
    "two parts of one set": lambda: classes(
        train=(X, Y.where(torch.arange(320) < 200, -100)), val=(X, Y.where(torch.arange(320) >= 200, -100))
    ),
    "divergence of two": lambda: classes(
        mlp(8, 3, nn.LogSoftmax(1)), train=(X, X[:, :3].softmax(1)), loss=nn.KLDivLoss(reduction="batchmean")
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SOUND)
def test_it_goes_on_with_the_same_bits(name):
    def trained(ignore):
        torch.manual_seed(3)
        return epochal.fit(**SOUND[name]() | {"ignore": ignore, "observers": ()})

    watched, plain = trained(()), trained(("*",))
    assert [str(one) for one in watched.findings if one.level == "error"] == []
    told = [one.code for one in watched.findings if one.level == "warning"]
    assert told == (["softmax-dim"] if name == "portfolio" else [])  # which mixes samples, and is meant so
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[key]), key


class Coding(nn.Module):
    """Puts words into a code, and takes them out again."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(11, 8), nn.Linear(96, 32)
        self.outer = nn.Linear(32, 12 * 11)

    def forward(self, x):
        return self.outer(self.inner(self.embedding(x).flatten(1)).relu()).view(-1, 11, 12)


def with_lbfgs():
    model = nn.Linear(8, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def step(state, window):
        x, y = window.batches[0]

        def loss():
            optimizer.zero_grad()
            value = F.mse_loss(model(x), y)
            value.backward()
            return value

        return epochal.StepResult(optimizer.step(loss).detach())

    return numbers(model, step=step, optimizer="sgd", loss=None)


def percent(outputs, targets):
    return 100 * (outputs.argmax(1) == targets).float().mean()


class Keeping(nn.Module):
    """Cannot be copied after its first pass."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.seen = self.net(X[:4])

    def forward(self, x):
        self.seen = self.net(x)
        return self.seen


TEXT = torch.randint(11, (200, 12), generator=torch.Generator().manual_seed(0))
UNBLAMED = {
    "a code of words": lambda: classes(Coding(), train=(TEXT, TEXT)),
    "LBFGS in a step": with_lbfgs,
    "percent": lambda: classes(metrics={"accuracy": percent}, val=0.2),
    "what cannot be copied": lambda: classes(Keeping()),
    "a part of the targets": SOUND["a part of the targets"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNBLAMED)
def test_a_check_tells_no_error(name):
    assert [str(one) for one in epochal.Plan(**UNBLAMED[name]()).check() if one.level == "error"] == []


def test_what_a_recipe_prints_is_not_among_the_findings(command, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import epochal, torch\nprint('read')\n\n\ndef plan() -> epochal.Plan:\n    print('made')\n"
        "    x = torch.randn(64, 3)\n"
        "    return epochal.Plan(torch.nn.Linear(3, 1), (x, x[:, :1]), loss='mse', epochs=2)\n"
    )
    code, out, err = command("check", str(recipe), "--json")
    assert code == 0 and out.startswith("[") and "read" in err and "made" in err


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, at):
        raise KeyError("no such file")


def test_a_data_set_that_raises_is_a_finding():
    (found,) = epochal.Plan(**classes(train=Broken())).check()
    assert (found.code, found.what) == ("raises", "KeyError is raised: 'no such file'")
    assert found.where == "batch 0 of train was read"
