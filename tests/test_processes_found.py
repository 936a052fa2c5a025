"""What a hostile reading found in several processes, each kept from coming back."""

import itertools
import resource
from pathlib import Path

import group
import pytest
import torch
from test_processes import Numbers, alone
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import epochal

pytestmark = pytest.mark.distributed


class InPlace(nn.Linear):
    def forward(self, x):
        return super().forward(x.mul_(0.5))


def in_place(rank):
    torch.manual_seed(0)
    X = torch.linspace(-1, 1, 48).reshape(16, 3)
    result = epochal.fit(
        InPlace(3, 1), (X, X[:, :1]), loss="mse", optimizer="sgd", lr=0.1, epochs=2, batch_size=8, seed=0, observers=()
    )
    return result.history.train_loss


def test_a_model_that_works_in_place():
    for losses in group.run(in_place, 2):
        assert losses == pytest.approx(alone(in_place), rel=1e-5)


class Drawing(Dataset):
    """Draws from the generator that its loader draws the order from."""

    def __init__(self, generator):
        self.generator = generator

    def __len__(self):
        return 11

    def __getitem__(self, number):
        torch.rand(1, generator=self.generator)
        return torch.tensor([float(number)])


def from_one_generator(rank):
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(Drawing(generator), batch_size=11, shuffle=True, generator=generator)
    return seen_by(loader, 3)


def seen_by(data, epochs, **options):
    found = []

    def step(state, window):
        for batch, counted in zip(window.batches, window.sizes):
            found.append((batch[0] if isinstance(batch, list) else batch)[:counted].flatten().tolist())
        return epochal.StepResult(torch.tensor(1.0), float(sum(window.sizes)))

    epochal.fit(nn.Linear(1, 1), data, step=step, epochs=epochs, observers=(), **options)
    return found


def test_an_order_stays_one_though_the_data_set_draws_from_its_generator():
    for batch in zip(*group.run(from_one_generator, 2)):
        assert sorted(itertools.chain(*batch)) == list(range(11))


class Pairs(Numbers):
    """The stream of numbers, one part of which is shorter than the other."""

    def __iter__(self):
        import os

        rank = int(os.environ.get("RANK", 0))
        return iter([torch.tensor([float(number)]) for number in range(rank * 2, 2 if rank == 0 else 10)])


def divided(rank, options):
    return seen_by(Pairs(10, split=True), 1, batch_size=1, **options)


def test_a_stream_that_divides_itself_counts_as_a_whole_and_is_resumed_after_its_first_end():
    options = {"run": "run", "save": epochal.Saving("1 step", share=None), "seed": 0}
    first, second = group.run(divided, 2, {**options, "max_steps": 4})
    assert (list(itertools.chain(*first)), list(itertools.chain(*second))) == ([0, 1], [2, 3, 4, 5])
    first, second = group.run(divided, 2, {**options, "resume": True})
    assert (list(itertools.chain(*first)), list(itertools.chain(*second))) == ([], [6, 7, 8, 9])


def unlike(rank):
    X = torch.full((10, 3), float(rank))
    try:
        epochal.fit(nn.Linear(3, 1), (X, X[:, :1]), loss="mse", epochs=1, observers=())
    except epochal.DataError as error:
        return str(error)
    return None


def test_different_data_are_refused():
    for told in group.run(unlike, 2):
        assert told.startswith("the processes have different data in train.\n  where: rank 1 against rank 0")


class Own(Dataset):
    def __init__(self, rows):
        self.rows, self.cache = rows, {}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number], self.rows[number].sum(0, keepdim=True)


def drawn_apart(rank, is_seeded, as_loader):
    torch.manual_seed(7 if is_seeded else rank)
    data, told = Own(torch.randn(12, 3)), []
    train = DataLoader(data, batch_size=4) if as_loader else torch.utils.data.ConcatDataset([data])
    told = []
    observers = [lambda event: told.append(event.message) if isinstance(event, epochal.Noted) else None]
    options = {} if as_loader else {"batch_size": 4}
    epochal.fit(nn.Linear(3, 1), train, loss="mse", epochs=1, seed=0, observers=observers, **options)
    return told


@pytest.mark.parametrize("as_loader", [False, True])
def test_of_a_data_set_that_differs_a_word_is_said(as_loader):
    said = group.run(drawn_apart, 2, False, as_loader)[0]  # the first process tells
    path = "Own.rows" if as_loader else "ConcatDataset.datasets[0].rows"
    told = f"{path} of train differs between rank 0 and 1: if it is data, seed it: samples are left out."
    assert said == [told]
    assert group.run(drawn_apart, 2, True, as_loader)[0] == []


def tiny_batches(rank):
    told = []
    observers = [lambda event: told.append(event.message) if isinstance(event, epochal.Noted) else None]
    X = torch.ones(3, 3)
    epochal.fit(nn.Linear(3, 1), (X, X[:, :1]), loss="mse", epochs=1, batch_size=1, observers=observers)
    return told


def test_processes_without_work_are_mentioned():
    assert group.run(tiny_batches, 2)[0] == ["a batch of 1 keeps no more than 1 of the processes busy."]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x):
        return x + self.inner(x)


def made_whole(rank):
    """A model after a run of fsdp: used by one process, saved, trained again, with a hook that was added meanwhile."""
    torch.manual_seed(0)
    X = torch.randn(30, 6)
    model = nn.Sequential(Block(), Block(), nn.Linear(6, 6), nn.Linear(6, 1))
    model[3].weight = nn.Parameter(model[2].weight[:1].detach().clone())
    model[2].weight.requires_grad = False
    kinds, calls = [type(part) for part in model.modules()], []

    def hang(event):
        if isinstance(event, epochal.Started):
            model[0].register_forward_hook(lambda *_: calls.append(1))

    plan = {"loss": "mse", "epochs": 2, "batch_size": 16, "seed": 0, "optimizer": "adamw", "strategy": fsdp(Block)}
    result = epochal.fit(model, (X, X[:, :1]), val=(X.clone(), X[:, :1].clone()), observers=[hang], **plan)
    assert result.model is model and [type(part) for part in model.modules()] == kinds
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert [p.requires_grad for p in model[2:].parameters()] == [False, True, True, True]
    before = len(calls)
    if rank == 1:  # alone: nobody else is asked for anything
        result.save("one.pt")
        predicted = result.predict(X)
        assert len(calls) == before == 0  # only the first process's observers are called
        assert result.evaluate((X, X[:, :1]))["loss"] == pytest.approx(min(result.history.val_loss), rel=1e-5)
        other = nn.Sequential(Block(), Block(), nn.Linear(6, 6), nn.Linear(6, 1))
        other.load_state_dict(torch.load("one.pt", weights_only=True))
        assert torch.equal(epochal.predict(other, X), predicted)
    elif before:
        model(X)
        assert len(calls) == before + 1  # what was hung on it by others stays
    again = epochal.fit(model, (X, X[:, :1]), observers=(), **plan)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return result.history.train_loss + again.history.train_loss, weights.tolist()


def fsdp(kind):
    return epochal.Strategy("fsdp", wrap=[kind])


def test_after_a_run_of_fsdp_the_model_is_whole_and_the_users():
    one, other = group.run(made_whole, 2)
    assert one == other
    assert one[0] == sorted(one[0], reverse=True) and len(one[0]) == 4  # it went on from where it was


def failing_at_its_end(rank):
    def fail(event):
        if isinstance(event, epochal.Ended):
            raise OSError("no room for the last word")

    X = torch.ones(8, 3)
    epochal.fit(nn.Linear(3, 1), (X, X[:, :1]), loss="mse", epochs=1, observers=[fail])


def test_what_fails_in_the_end_of_the_first_process_fails_in_all():
    for _, error in group.outcomes_of(failing_at_its_end, 2):
        assert "OSError: no room for the last word" in error


def over_before(rank):
    X = torch.ones(8, 3)

    def step(state, window):
        if rank == 1:
            raise ValueError("only here")
        epochal.average_gradients(state.model.parameters(), window)
        return epochal.StepResult(torch.tensor(0.0))

    epochal.fit(nn.Linear(3, 1), (X, X[:, :1]), step=step, epochs=1, observers=())


def test_who_waits_hears_what_ended_the_other():
    (_, waited), (_, cause) = group.outcomes_of(over_before, 2)
    assert "ValueError: only here" in cause
    assert "ProcessError: rank 1 has ended: ValueError: only here.\n  where: rank 0, which waited for it" in waited


def wrapped_before(rank):
    torch.distributed.init_process_group("gloo")
    X, model = torch.ones(8, 3), nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
    try:
        epochal.fit(model, (X, X[:, :1]), loss="mse", epochs=1, observers=())
    except epochal.ModelError as error:
        return error.fix


def test_a_model_in_ddp_already_is_refused():
    assert (
        group.run(wrapped_before, 2) == ["give model.module; fit wraps it itself where there are several processes"] * 2
    )


def planned_apart(rank, option, values):
    X = torch.ones(16, 3)
    plan = {"loss": "mse", "epochs": 1, "observers": (), option: values[rank]}
    try:
        epochal.fit(nn.Linear(3, 1), (X, X[:, :1]), **plan)
    except epochal.PlanError as error:
        return str(error)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("seed", (0, 1)),
        ("batch_size", (4, 8)),
        ("run", ("x", None)),
        ("strategy", ("ddp", "fsdp")),
        ("clip", (None, 1.0)),
    ],
)
def test_different_options_are_refused(option, values):
    told = group.run(planned_apart, 2, option, values)
    what = f"the processes were given different options: {option} is not the same in all of them.\n  where: rank 0 has"
    assert told[0] == told[1] and told[0].startswith(
        f"{what} {option}={values[0]!r}, rank 1 has {option}={values[1]!r}"
    )


class Experts(nn.Module):
    """Two layers, of which each sample takes one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        takes_a = x[:, 0] > 0
        parts = [layer(x[mask]) for layer, mask in ((self.a, takes_a), (self.b, ~takes_a)) if mask.any()]
        return torch.cat(parts).sum(1, keepdim=True)


def routed(rank, strategy):
    X = torch.ones(16, 4)
    X[1::2] *= -1  # of each batch the first row goes to a, the second to b
    model = Experts()
    before = [p.detach().clone() for p in model.parameters()]
    options = {"loss": "mse", "epochs": 1, "batch_size": 2, "shuffle": False, "seed": 0, "observers": ()}
    try:
        return epochal.fit(model, (X, X[:, :1]), strategy=strategy, **options).history.train_loss
    except epochal.ModelError as error:
        whole = [p.full_tensor() for p in model.parameters()]
        return str(error), all(map(torch.equal, before, whole))


def test_fsdp_does_not_mix_gradients_of_different_weights():
    (one, first), (other, second) = group.run(routed, 2, "fsdp")
    assert one.startswith("the processes have used different weights in this update") and first and second
    assert "without a gradient here: b.weight, b.bias" in one and "without a gradient here: a.weight, a.bias" in other
    assert group.run(routed, 2, "ddp")[0] == group.run(routed, 2, "ddp")[1]


def unshardable(rank, what):
    X = torch.ones(8, 3)
    model = {"scalar": nn.PReLU(), "sparse": nn.Sequential(nn.Embedding(3, 2, sparse=True)), "muon": nn.Linear(3, 1)}[
        what
    ]
    if what == "scalar":
        model.weight = nn.Parameter(torch.tensor(0.5))
    optimizer = "muon" if what == "muon" else "sgd"
    plan = {"loss": "mse", "epochs": 1, "strategy": "fsdp", "observers": (), "optimizer": optimizer}
    try:
        epochal.fit(model, (X, X), **plan)
    except epochal.PlanError as error:
        return f"{error.what} {error.where}"


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("scalar", "fsdp cuts weights by rows, and one is a single number. strategy: fsdp; weight"),
        ("sparse", "fsdp does not add up sparse gradients. strategy: fsdp; 0"),
        ("muon", "fsdp puts parts of weights in the place of weights, of which the optimizer muon does not know."),
    ],
)
def test_what_fsdp_cannot_do_is_told_before(what, told):
    assert all(one.startswith(told) for one in group.run(unshardable, 2, what))


def measured(rank, run, until=None, resume=False):
    """until: the step after which it is left, in the midst of a row."""
    X = torch.randn(160, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plan = epochal.Plan(
        nn.Linear(3, 1), (X, X.sum(1, keepdim=True)), loss="mse", metrics=["r2", "mae"], batch_size=10, epochs=2,
        seed=0, observers=(), run=run, resume=resume,
    )  # fmt: skip
    with plan.prepare() as prepared:
        for event in prepared:
            if isinstance(event, epochal.StepDone) and event.step == until:
                break


def cut(rank, at):
    measured(rank, f"cut-{at}", until=at)
    measured(rank, f"cut-{at}", resume=True)


@pytest.mark.parametrize("at", [7, 11, 25])
def test_what_was_measured_before_a_resume_is_added_up_to_the_same_bit(at):
    group.run(measured, 2, "uncut")
    group.run(cut, 2, at)
    assert Path("uncut/results.csv").read_bytes() == Path(f"cut-{at}/results.csv").read_bytes()


def only_in_the_first(rank):
    X = torch.ones(8, 3)
    if rank == 0:
        strategy = epochal.Strategy(timeout="2 s")
        epochal.fit(nn.Linear(3, 1), (X, X[:, :1]), loss="mse", epochs=1, observers=(), strategy=strategy)


def test_fit_in_the_first_process_alone():
    error = group.outcomes_of(only_in_the_first, 2)[0][1]
    assert "ProcessError: not all of the 2 processes came within 2 s.\n  where: rank 0; " in error, error
    assert "fix:   call fit in every process, and not only in the first" in error


def ignored(rank):
    torch.manual_seed(0)
    X, y = torch.randn(3, 4), torch.tensor([-100, -100, 1])
    result = epochal.fit(nn.Linear(4, 2), (X, y), loss="cross_entropy", epochs=1, shuffle=False, seed=0, observers=())
    return result.history.train_loss[0]


def test_a_stand_in_whose_targets_are_all_ignored():
    assert group.run(ignored, 4) == pytest.approx([alone(ignored)] * 4, rel=1e-5)


class Heads(nn.Module):
    """Two blocks that fsdp wraps, and a head that no objective here uses."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.head, self.unused = nn.Linear(6, 1), nn.Linear(6, 1)

    def features(self, x):
        for block in self.body:
            x = block(x)
        return x

    def forward(self, x):
        return self.head(self.features(x)), self.unused(self.features(x))


def of_parts(model, batch):
    return (model.head(model.features(batch[0])) - batch[1]).square().mean()


def over_large(model, batch):
    counts = batch[1].abs() > 0.5
    return epochal.Loss((model(batch[0])[0] - batch[1])[counts].square().mean(), weight=counts.sum())


def penalised(model, batch):
    outer = [*model.head.parameters(), *model.unused.parameters()]  # the blocks' own are theirs
    return of_parts(model, batch) + 0.01 * sum(weight.square().sum() for weight in outer)


def penalised_over_large(model, batch):
    loss = over_large(model, batch)
    return loss._replace(value=loss.value + 0.01 * model.head.weight.square().sum())


def last_alone(rank, objective, strategy):
    """33 samples in batches of 8: the last update has nothing for the second process."""
    torch.manual_seed(0)
    X, y = torch.randn(33, 6), torch.randn(33, 1)
    model = Heads()
    result = epochal.fit(
        model, (X, y), objective=objective, optimizer="sgd", lr=0.05, epochs=3, batch_size=8, seed=0, observers=(),
        strategy=strategy,
    )  # fmt: skip
    return result.history.train_loss, {name: weight.tolist() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("objective", [of_parts, over_large, penalised, penalised_over_large])
def test_an_objective_that_calls_what_it_likes_goes_on_where_a_share_is_empty(objective, strategy):
    losses, weights = alone(last_alone, objective, "auto")
    for theirs, moved in group.run(last_alone, 2, objective, strategy):
        assert theirs == pytest.approx(losses, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(torch.tensor(moved[name]), torch.tensor(weight), rtol=1e-4, atol=1e-6)


def clamped(model, batch):
    x, y, counts = batch
    errors = (model(x) - y).square() * counts
    return epochal.Loss(errors.sum() / counts.sum().clamp(min=1), weight=counts.sum())


def over_counted(model, batch):
    x, y, counts = batch
    outputs = model(x)
    return epochal.Loss(((outputs - y).square() * counts).sum() / counts.sum(), counts.sum(), outputs, y)


class Reentrant(nn.Module):
    """A graph within the graph."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.c(checkpoint(lambda h: self.b(h).tanh(), self.a(x), use_reentrant=True))


def masked(rank, given):
    """Batches of 8, of which rows do not count, those that are the second process's share or a whole batch."""
    torch.manual_seed(0)
    X, y, counts = torch.randn(24, 3), torch.randn(24, 1), torch.ones(24, 1)
    counts[given["rows"]] = 0
    model = Reentrant() if given.get("reentrant") else nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.autograd.set_detect_anomaly(given.get("anomaly", False)):
        result = epochal.fit(
            model, (X, y, counts), objective=given["objective"], optimizer="adamw", lr=0.05, epochs=2, seed=0,
            batch_size=8, shuffle=False, metrics=["mae"] if given["objective"] is over_counted else None, observers=(),
        )  # fmt: skip
    return [result.history.train_loss, [row.get("train_mae", 0.0) for row in result.history]]


@pytest.mark.parametrize(
    "given",
    [
        {"rows": slice(8, 16), "objective": clamped}, {"rows": slice(0, 8), "objective": clamped},
        {"rows": slice(4, 8), "objective": clamped}, {"rows": slice(4, 8), "objective": over_counted},
        {"rows": slice(4, 8), "objective": over_counted, "reentrant": True},
        {"rows": slice(4, 8), "objective": over_counted, "anomaly": True},
    ],
)  # fmt: skip
def test_what_does_not_count_changes_nothing_in_any_number_of_processes(given):
    whole = alone(masked, given)
    for found in group.run(masked, 2, given):
        for one, other in zip(found, whole):
            assert one == pytest.approx(other, rel=1e-5)


def of_a_class_without_weight(rank):
    torch.manual_seed(0)
    X, y = torch.randn(24, 3), torch.arange(24) % 3
    y[4:8] = 0  # the second process's share of the first batch
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 2.0]))
    result = epochal.fit(
        nn.Linear(3, 3), (X, y), loss=loss, epochs=2, batch_size=8, shuffle=False, seed=0, observers=()
    )
    return result.history.train_loss


def test_a_share_whose_classes_have_no_weight():
    for losses in group.run(of_a_class_without_weight, 2):
        assert losses == pytest.approx(alone(of_a_class_without_weight), rel=1e-5)


def steep(model, batch):
    x, z, counts = batch
    return epochal.Loss(((model(x) * z).abs().sqrt() * counts).sum() / counts.sum(), counts.sum())


def to_blame(rank, strategy):
    """A root of 0 in the second process's share, while the first's counts nothing."""
    torch.manual_seed(0)
    z, counts = torch.ones(8, 1), torch.ones(8, 1)
    z[5], counts[:4] = 0, 0
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    epochal.fit(
        model, (torch.randn(8, 3), z, counts), objective=steep, batch_size=8, shuffle=False, epochs=1, seed=0,
        strategy=strategy, observers=(),
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_share_in_which_nothing_counts_is_not_to_blame(strategy):
    for _, error in group.outcomes_of(to_blame, 2, strategy):
        assert "NonFiniteError: the backward pass of the loss made the first gradient" in error, error
        assert "the share of rank 1" in error, error


def penalised_whole(model, batch):
    return of_parts(model, batch) + 0.01 * sum(weight.square().sum() for weight in model.parameters())


def test_a_penalty_on_what_fsdp_has_cut_is_told_with_its_way_out():
    assert alone(last_alone, penalised_whole, "auto")[0] == pytest.approx(
        group.run(last_alone, 2, penalised_whole, "ddp")[1][0], rel=1e-5
    )
    for _, error in group.outcomes_of(last_alone, 2, penalised_whole, "fsdp"):
        assert "ModelError: the objective works on weights of a block outside of the block's call" in error, error
        assert 'weight_decay=; or give strategy="ddp"' in error


def lone(rank):
    X = torch.randn(10, 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    epochal.fit(model, (X, X[:, :1]), loss="mse", batch_size=8, epochs=1, seed=0, observers=())


def test_batch_norm_of_a_single_sample_of_a_share():
    for _, error in group.outcomes_of(lone, 2):
        assert "no lone sample of each process's share at the end" in error, error


def writes_little(rank):
    X = torch.linspace(-1, 1, 96).reshape(32, 3)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    try:
        epochal.fit(model, (X, X[:, :1]), loss="mse", epochs=2, seed=0, run="run", observers=())
    except epochal.CheckpointError as error:
        return error.describe(), error.is_shared


def test_whose_disk_cannot_be_written_is_told():
    for told, is_shared in group.run(writes_little, 2):
        assert (
            told.startswith("rank 1: CheckpointError: the checkpoint cannot be written: File too large") and is_shared
        )


class Holds:
    """An observer whose state is the model's own memory."""

    def __init__(self, model):
        self.model = model

    def __call__(self, event):
        pass

    def state_dict(self):
        return {"w": self.model.state_dict()}

    def load_state_dict(self, state):
        pass


def held(rank):
    torch.manual_seed(0)
    X = torch.linspace(-1, 1, 96).reshape(32, 3)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    epochal.fit(
        model, (X, X[:, :1]), loss="mse", epochs=2, seed=0, run="run", observers=[Holds(model)],
        save=epochal.Saving("1 step", share=None),
    )  # fmt: skip


def test_checkpoints_are_whole_though_an_observer_holds_weights():
    group.run(held, 2)
    paths = sorted(Path("run/checkpoints").iterdir())
    assert len(paths) > 1
    for path in paths:
        assert len(epochal.Checkpoints("run/checkpoints").load(path)["model"]) == 4


def timed_out(rank):
    X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def objective(model, batch):
        if rank == 1:
            raise RuntimeError("the request to the server timed out")
        return model(batch[0]).mean()

    try:
        epochal.fit(nn.Linear(3, 1), (X, X), objective=objective, epochs=1, observers=())
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_an_error_of_the_users_own_is_not_taken_for_a_lost_process():
    assert group.run(timed_out, 2)[1] == ("RuntimeError", "the request to the server timed out")


def draws_afterwards(rank):
    X = torch.linspace(-1, 1, 96).reshape(32, 3)
    epochal.fit(nn.Linear(3, 1), (X, X[:, :1]), loss="mse", epochs=1, seed=0, observers=())
    return torch.randperm(20).tolist()


def test_what_a_program_draws_after_a_run_is_alike():
    first, second = group.run(draws_afterwards, 2)
    assert first == second
