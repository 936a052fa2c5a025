"""What the doctor watches must not be disturbed, and must not be called a mistake: odd programs that are right."""

from dataclasses import dataclass, field

import faulty
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import epochal
from epochal.doctor import finding

X, Y = faulty.X, faulty.Y
LINE = faulty.LINE
USUAL = {"epochs": 1, "seed": 0, "observers": (), "batch_size": 32}


@pytest.fixture(autouse=True)
def _rules_may_not_fail(monkeypatch):
    monkeypatch.setattr(finding, "RAISES", True)


class Calling(nn.Module):
    """A model of one layer and a function of the layer and its inputs."""

    def __init__(self, function, layer=None):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.layer = function, layer or nn.Linear(8, 1)

    def forward(self, x):
        return self.function(self.layer, x)


@dataclass(slots=True)
class Slotted:
    scores: torch.Tensor


@dataclass
class Tree:
    value: torch.Tensor
    parent: object = None
    children: list = field(default_factory=list)


class Passing(nn.Module):
    def forward(self, value):
        return value


def packed(layer, x):
    rnn = nn.RNN(1, 4, batch_first=True).requires_grad_(False)
    lengths = torch.full((len(x),), 8)
    return layer(rnn(pack_padded_sequence(x[..., None], lengths, batch_first=True))[1][0].repeat(1, 2))


def sampled(layer, x):
    return 5 * torch.vmap(lambda row: torch.tanh(layer(row)))(x)


def by_keyword(layer, x):
    return layer(torch.mul(input=x, other=torch.ones_like(x)))


def slotted(layer, x):
    return Passing()(Slotted(layer(x))).scores


def tree(layer, x):
    root = Tree(layer(x))
    root.children.append(Tree(x, parent=root))
    return Passing()(root).value


def complex_numbers(layer, x):
    return torch.tanh(layer(x.to(torch.cfloat))).abs()


def reentrant(layer, x):
    return checkpoint(layer, x.requires_grad_(), use_reentrant=True)


ODD = [packed, sampled, by_keyword, slotted, tree, reentrant]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", [*ODD, complex_numbers])
def test_what_is_watched_goes_on(function):
    layer = nn.Linear(8, 1, dtype=torch.cfloat) if function is complex_numbers else None
    model = Calling(function, layer)
    result = epochal.fit(model, (X, LINE), loss="mse", **USUAL)
    assert [one.code for one in result.findings if one.level != "info"] == []


def trained(make, **options):
    """The weights with and without a watch."""
    found = []
    for ignore in ((), ("*",)):
        torch.manual_seed(1)
        model, given = make()
        epochal.fit(model, ignore=ignore, **{**USUAL, **given, **options})
        found.append([value.clone() for value in model.state_dict().values()] + [torch.get_rng_state()])
    return found


def alike(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Teacher(nn.Module):
    """A frozen encoder in eval mode, for which torch takes a shorter way, and a head."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
        self.head = nn.Linear(8, 1)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, x):
        with torch.no_grad():
            padding = torch.arange(4) >= 3
            seen = self.encoder(x[:, None].repeat(1, 4, 1), src_key_padding_mask=padding.repeat(len(x), 1))
        return self.head(seen.mean(1))


@pytest.mark.filterwarnings("ignore")
def test_a_shorter_way_of_torchs_stays_open():
    assert alike(*trained(lambda: (Teacher(), {"train": (X, LINE), "loss": "mse"})))
    teacher = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()

    def distil(model, batch):
        with torch.no_grad():
            aim = teacher(batch[0][:, None], src_key_padding_mask=torch.zeros(len(batch[0]), 1, dtype=torch.bool))
        return F.mse_loss(model(batch[0]), aim[:, 0])

    assert alike(*trained(lambda: (faulty.mlp(8, 8), {"train": (X, LINE), "objective": distil})))


class Drawing(torch.autograd.Function):
    """Counts its backward passes, and draws in them."""

    calls = 0

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        Drawing.calls += 1
        return gradient * (1 + 0.01 * torch.randn(()))


def test_nothing_goes_back_twice():
    def objective(model, batch):
        return Drawing.apply(F.mse_loss(model(batch[0]), batch[1]))

    Drawing.calls = 0
    assert alike(*trained(lambda: (faulty.mlp(8, 1), {"train": (X, LINE), "objective": objective})))
    assert Drawing.calls == 2 * 10


def levels(result):
    return [one.code for one in result.findings if one.level != "info"]


def test_a_loader_that_is_divided_by_samplers_is_no_leak():
    data = TensorDataset(X, LINE)
    loaders = [DataLoader(data, 16, sampler=SubsetRandomSampler(rows)) for rows in (range(256), range(256, 320))]

    class Endless(IterableDataset):
        def __iter__(self):
            yield from zip(X[:64], LINE[:64])

    one = Endless()
    for train, val in (loaders, [DataLoader(one, 16), DataLoader(one, 16)]):
        assert levels(epochal.fit(faulty.mlp(8, 1), train, val, loss="mse", epochs=1, observers=())) == []


def test_steps_of_several_networks():
    generator, critic = faulty.mlp(4, 8), faulty.mlp(8, 1)
    of_generator, of_critic = (torch.optim.Adam(net.parameters(), lr=1e-3) for net in (generator, critic))

    def step(state, window):
        for (real,) in window.batches:
            fake = generator(torch.randn(len(real), 4))
            of_critic.zero_grad()
            (F.softplus(-critic(real)) + F.softplus(critic(fake.detach()))).mean().backward()
            of_critic.step()
            of_generator.zero_grad()
            loss = F.softplus(-critic(fake)).mean()
            loss.backward()
            of_generator.step()
        return epochal.StepResult(loss.detach(), window.samples)

    for accumulate in (1, 2):
        assert levels(epochal.fit(generator, (X,), step=step, accumulate=accumulate, **USUAL)) == []


def test_steps_that_move_weights_in_ways_of_their_own():
    def by_hand(state, window):
        x, y = window.batches[0]
        loss = F.mse_loss(state.model(x), y)
        state.model.zero_grad()
        loss.backward()
        for p in state.model.parameters():
            p.data = p.data - 0.01 * p.grad
        return epochal.StepResult(loss, window.samples)

    assert levels(epochal.fit(faulty.mlp(8, 1), (X, LINE), step=by_hand, **USUAL)) == []
    policy = faulty.mlp(8, 3)
    rising = torch.optim.SGD(policy.parameters(), lr=1e-2, maximize=True)

    def reward(state, window):
        rising.zero_grad()
        loss = F.log_softmax(state.model(window.batches[0][0]), 1)[:, 0].mean()
        loss.backward()
        rising.step()
        return epochal.StepResult(loss.detach(), window.samples)

    assert levels(epochal.fit(policy, (X, Y), step=reward, **USUAL)) == []


def test_a_schedule_of_an_earlier_run_has_moved():
    net = faulty.mlp(8, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)

    def step(state, window):
        x, y = window.batches[0]
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        return epochal.StepResult(loss.detach(), window.samples)

    for _ in range(2):
        assert levels(epochal.fit(net, (X, LINE), step=step, **USUAL)) == []


def masked(model, batch):
    wanted = torch.where(batch[0][:, :1] > 1, -1.0, (batch[1] > 0).float())
    return F.binary_cross_entropy_with_logits(model(batch[0]), wanted, reduction="none")[wanted >= 0].mean()


def to_a_constant(model, batch):
    return F.mse_loss(model(batch[0]), torch.tensor(1.0))


def contrastive(model, batch):
    seen = model(batch[0])
    near, far = (F.cosine_similarity(seen, batch[0][:, at : at + 1]) for at in (0, 1))
    return (far - near).mean()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("objective", [masked, to_a_constant, contrastive])
def test_objectives_that_are_meant_so(objective):
    assert levels(epochal.fit(faulty.mlp(8, 1), (X, LINE), objective=objective, **USUAL)) == []


def test_centres_as_many_as_samples():
    class Radial(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres, self.head = nn.Parameter(torch.randn(32)), nn.Linear(32, 1)

        def forward(self, x):
            return self.head((-((x[:, :1] - self.centres) ** 2)).exp())

    assert levels(epochal.fit(Radial(), (X, LINE), loss="mse", **USUAL)) == []


def test_an_error_that_the_step_swallows_is_raised_all_the_same():
    net = faulty.mlp(8, 3, nn.Softmax(1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(state, window):
        x, y = window.batches[0]
        loss = F.cross_entropy(net(x), y)
        try:
            loss.backward()
            optimizer.step()
        except Exception:
            pass
        return epochal.StepResult(loss.detach(), window.samples)

    with pytest.raises(epochal.FaultError, match="takes the softmax of them once more"):
        epochal.fit(net, (X, Y), step=step, **USUAL)


def test_a_model_that_the_user_has_compiled_is_left_alone():
    torch.manual_seed(0)
    net = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), fullgraph=True, backend="eager")
    assert levels(epochal.fit(net, (X, LINE), loss="mse", **USUAL)) == []
    torch._dynamo.reset()


def test_a_check_copies_what_functions_hold():
    import torch.nn.functional as functional

    moved = nn.BatchNorm1d(8)
    log = {"calls": 0, "net": moved}

    def helper(model, batch):
        log["calls"] += 1
        return functional.mse_loss(model(log["net"](batch[0])), batch[1])

    def objective(model, batch, counted=log):
        counted["calls"] += 1
        return helper(model, batch)

    before = [value.clone() for value in moved.state_dict().values()]
    plan = epochal.Plan(faulty.mlp(8, 1), (X, LINE), objective=objective, epochs=2, observers=())
    assert [one.code for one in plan.check() if one.level == "error"] == []
    assert log["calls"] == 0 and all(torch.equal(*pair) for pair in zip(before, moved.state_dict().values()))
