"""The doctor: a check leaves everything as it was, what is watched changes no bit, and what is found is told."""

import copy
import json
import random
import re
from pathlib import Path

import faulty
import numpy as np
import pytest
import torch
from test_examples import REACHED, small
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import epochal
from epochal.__main__ import main
from epochal.doctor import finding
from epochal.doctor.finding import Finding, every, known, ordered
from epochal.doctor.graph import leaves, made_by
from epochal.doctor.trace import Trace
from epochal.observe.fitting import improvement, verdict
from epochal.runtime.seeding import generator_states

ROOT = Path(__file__).parent.parent
X, Y = faulty.X, faulty.Y


@pytest.fixture(autouse=True)
def _rules_may_not_fail(monkeypatch):
    monkeypatch.setattr(finding, "RAISES", True)


def codes(found, *levels):
    return [one.code for one in found if not levels or one.level in levels]


def whole(value):
    """A structure with tensors and arrays as bytes, to be compared."""
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [whole(part) for part in value]
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.detach().numpy().tobytes())
    return value.tobytes() if isinstance(value, np.ndarray) else value


# -- A check leaves everything as it was --


class Drawing(Dataset):
    """Draws from a generator of its own, and from numpy's and python's."""

    def __init__(self):
        self.rng, self.fetched = np.random.default_rng(3), 0

    def __len__(self):
        return 96

    def __getitem__(self, i):
        self.rng.random(), np.random.rand(), random.random()
        return X[i] + 0.01 * torch.randn(8), Y[i]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def in_memory():
    return {"train": (X, Y), "val": 0.2}


def loaders():
    generator = torch.Generator().manual_seed(5)
    train = DataLoader(TensorDataset(X[:200], Y[:200]), batch_size=16, shuffle=True, generator=generator)
    return {"train": train, "val": DataLoader(TensorDataset(X[200:], Y[200:]), batch_size=16)}


def drawing():
    return {"train": DataLoader(Drawing(), batch_size=16, shuffle=True), "val": (X[96:], Y[96:])}


def workers():
    return {"train": DataLoader(Drawing(), batch_size=16, shuffle=True, num_workers=2), "val": (X[96:], Y[96:])}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("data", [in_memory, loaders, drawing, workers])
def test_a_check_leaves_everything_as_it_was(data, mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def prepared():
        torch.manual_seed(1), np.random.seed(2), random.seed(3)
        net = model().train(mode)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        given = data()
        plan = epochal.Plan(
            net, loss=nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 1.0])), optimizer=optimizer, schedule=schedule,
            epochs=3, metrics=["accuracy"], run="runs/one", observers=(), **given,
        )  # fmt: skip
        return plan, net, optimizer, schedule, given["train"]

    def state(net, optimizer, schedule, train):
        own = getattr(getattr(train, "dataset", None), "rng", None)
        return whole([
            net.state_dict(), [p.grad for p in net.parameters()], [part.training for part in net.modules()],
            optimizer.state_dict(), schedule.state_dict(), generator_states(),
            train.generator.get_state() if getattr(train, "generator", None) is not None else None,
            own.bit_generator.state if own is not None else None, sorted(map(str, Path.cwd().rglob("*"))),
        ])  # fmt: skip

    plan, *parts = prepared()
    before = state(*parts)
    assert codes(plan.check(), "error") == []
    assert state(*parts) == before
    checked = plan.fit()
    other, *_ = prepared()
    plain = other.replace(run="runs/two").fit()
    assert whole(checked.model.state_dict()) == whole(plain.model.state_dict())
    assert [{**row, "time": 0} for row in checked.history] == [{**row, "time": 0} for row in plain.history]


def test_a_step_in_a_closure_is_checked_on_copies():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    calls = []

    def step(state, window):
        x, y = window.batches[0]
        calls.append(len(x))
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        return epochal.StepResult(loss.detach(), window.samples)

    before = whole([net.state_dict(), optimizer.state_dict(), generator_states()])
    assert codes(epochal.Plan(net, (X, Y), step=step, epochs=3, observers=()).check(), "error", "warning") == []
    assert whole([net.state_dict(), optimizer.state_dict(), generator_states()]) == before
    assert calls == []  # the copy has a list of its own


# -- What is watched changes no bit --


def bits(result):
    rows = [{**row, "time": 0} for row in result.history]
    return whole([result.model.state_dict(), rows, torch.get_rng_state()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": 0.5, "accumulate": 3},
        {"precision": "bf16"},
        {"optimizer": "sgd", "lr": 0.05, "schedule": "cosine"},
        {"optimizer": lambda p: torch.optim.RMSprop(p, lr=1e-3), "nonfinite": "skip"},
        {"compile": True},
    ],
)
@pytest.mark.parametrize("data", [in_memory, loaders, drawing])
def test_a_watched_run_has_the_bits_of_one_that_is_not(data, options):
    if "compile" in options and data is not in_memory:
        pytest.skip("one kind of data is enough for it")

    def trained(ignore):
        net, given = model(), data()
        torch.manual_seed(1), np.random.seed(2), random.seed(3)
        plan = {"loss": "cross_entropy", "epochs": 6, "metrics": ["accuracy"], "observers": ()}
        plan |= {"batch_size": 16} if data is in_memory else {}
        return bits(epochal.fit(net, **{**plan, **given, **options}, ignore=ignore))

    assert trained(()) == trained(("*",))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(REACHED))
def test_examples_have_the_same_bits_watched_or_not(name):
    def trained(ignore):
        _, plan = small(name)
        torch.manual_seed(1)
        return bits(plan.replace(observers=(), ignore=ignore, max_steps=60).fit())

    assert trained(()) == trained(("*",))


def test_what_was_watched_is_let_go():
    plan = epochal.Plan(model(), (X, Y), loss="cross_entropy", epochs=12, observers=(), ignore=["too-few-epochs"])
    with plan.prepare() as run:
        for _ in run:
            pass
    assert run.watch.vitals.looks[-1].step == 100
    assert [look.step for look in run.watch.vitals.looks] == [0, 1, 2, 50, 100]
    assert all(layer.input is None and layer.output is None for one in run.watch.case.passes for layer in one.layers)
    assert all(one.batch is None for one in run.watch.case.passes) and "sample" not in run.watch.case.__dict__
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plan.model.modules())


# -- What fit does by itself --


def test_an_error_stops_before_a_weight_moves():
    net = faulty.mlp(8, 3, nn.Softmax(1))
    before = whole(net.state_dict())
    with pytest.raises(epochal.FaultError) as caught:
        epochal.fit(net, (X, Y), loss="cross_entropy", epochs=3, observers=())
    assert whole(net.state_dict()) == before
    found = caught.value.finding
    assert (found.code, found.level, found.step, caught.value.exit_code) == ("softmax-before-loss", "error", 0, 1)
    assert caught.value.where.startswith("step 0, batch 0 of train; 3 (Softmax), the plan at test_doctor.py:")
    assert caught.value.fix.endswith("if it is meant so: ignore=['softmax-before-loss']")
    assert found in [found] and copy.deepcopy(caught.value.args) == caught.value.args
    epochal.fit(net, (X, Y), loss="cross_entropy", epochs=1, observers=(), ignore=["softmax-before-loss"])


def test_a_warning_is_told_once_and_only_after_three_looks(capsys):
    net = nn.Sequential(faulty.mlp(8, 3), nn.ReLU())
    heard = []
    result = epochal.fit(
        net, (X, Y), loss="cross_entropy", epochs=3, val=0.2, observers=[epochal.Console(), heard.append], seed=0,
        run="runs/one",
    )  # fmt: skip
    (one,) = [event.finding for event in heard if isinstance(event, epochal.Found) and event.finding.level == "warning"]
    assert (one.code, one.step) == ("activation-before-loss", 2)
    assert one in result.findings
    told = capsys.readouterr().err
    assert told.count("warning activation-before-loss: an activation (ReLU) stands between") == 1
    lines = [json.loads(line) for line in Path("runs/one/journal.jsonl").read_text().splitlines()]
    assert next(line["finding"]["code"] for line in lines if line["event"] == "found") == "activation-before-loss"


def test_the_line_of_the_loss_is_told():
    def criterion(outputs, targets):
        return (outputs - targets).square().mean()

    with pytest.raises(epochal.FaultError) as caught:
        epochal.fit(faulty.mlp(8, 1), (X, X[:, 0]), loss=criterion, epochs=1, observers=())
    line = criterion.__code__.co_firstlineno + 1
    assert caught.value.finding.where == f"test_doctor.py:{line}"
    assert caught.value.finding.measured == "(32, 1) and (32,) made (32, 32)"


def test_a_loss_of_the_wrong_sign_is_found():
    plan = epochal.Plan(
        faulty.mlp(8, 1), (X, faulty.LINE), loss=lambda o, t: -((o - t) ** 2).mean(), epochs=2, observers=()
    )
    (one,) = [one for one in plan.check() if one.level == "error"]
    assert (one.code, one.what) == ("gradient-ascent", "the loss is lower for wrong outputs than for right ones.")


def test_a_rule_that_fails_ends_nothing(monkeypatch):
    monkeypatch.setattr(finding, "RAISES", False)

    def broken(case):
        raise RuntimeError("a rule with a mistake")
        yield

    assert every()
    one = finding.Rule("broken", "error", "batch", broken, "batch")
    monkeypatch.setitem(finding.BY_STAGE, "batch", [*finding.BY_STAGE["batch"], one])
    assert codes(epochal.fit(model(), (X, Y), loss="cross_entropy", epochs=1, observers=()).findings) == []


# -- Pairwise losses, streams, and other things that look like a mistake --


def test_what_compares_samples_on_purpose_is_left_alone():
    def ranking(net, batch):
        scores, order = net(batch[0])[:, 0], batch[1].float()
        return F.softplus(-(scores[:, None] - scores) * (order[:, None] - order).sign()).mean()

    assert (
        codes(epochal.Plan(model(), (X, Y), objective=ranking, epochs=2, observers=()).check(), "error", "warning")
        == []
    )


class Endless(IterableDataset):
    def __iter__(self):
        for _ in range(64):
            yield torch.randn(8), torch.randint(3, ()).item()


def test_a_stream_without_a_length_is_checked():
    plan = epochal.Plan(model(), Endless(), loss="cross_entropy", max_steps=20, observers=())
    assert codes(plan.check(), "error") == []


# -- The parts --


def test_what_made_a_tensor():
    x = torch.randn(4, 3, requires_grad=True)
    assert made_by(torch.softmax(x, 1).view(2, 6).unsqueeze(0)) == "Softmax"
    assert made_by(F.linear(x, torch.ones(2, 3)).squeeze()) in ("Addmm", "Mm")
    assert made_by(x) == ""
    assert leaves((x * 2).sum()) == leaves(x) == ({id(x)}, False)
    assert made_by(torch.tanh(x).t()) == "Tanh"


def test_a_trace_notes_losses_whoever_calls_them():
    net, notes = faulty.mlp(8, 3), []
    with Trace(net) as trace:
        plain = F.cross_entropy(net(X[:8]), Y[:8])
        nn.CrossEntropyLoss()(net(X[:8]), Y[:8])
        notes.append((net(X[:8]) > 0.5).sum())
    assert [call.name for call in trace.calls] == ["cross_entropy", "cross_entropy"]
    assert trace.calls[0].result is plain and trace.calls[0].place.startswith("test_doctor.py:")
    assert [layer.path for layer in trace.layers[:4]] == ["0", "1", "2", ""]


def test_symptoms_are_info_where_their_cause_is_found():
    def one(code, level, stage):
        return Finding(code, level, "", "", "", "", "", None, stage)

    symptom, cause = one("dead-units", "warning", "symptom"), one("unnormalised-inputs", "warning", "data")
    assert [(f.code, f.level) for f in ordered([symptom])] == [("dead-units", "warning")]
    assert [(f.code, f.level) for f in ordered([symptom, cause])] == [
        ("unnormalised-inputs", "warning"), ("dead-units", "info"),
    ]  # fmt: skip
    assert codes(ordered([one("raises", "error", "other"), one("broadcast-loss", "error", "batch")])) == [
        "broadcast-loss"
    ]


# -- In words --


def rows(train, val):
    return [{"epoch": n + 1, "train_loss": a, "val_loss": b, "train_accuracy": 0.9, "val_accuracy": 0.8}
            for n, (a, b) in enumerate(zip(train, val))]  # fmt: skip


def test_how_it_fits_is_told_in_words():
    over = rows([1, 0.6, 0.4, 0.3, 0.2, 0.1], [1, 0.7, 0.6, 0.7, 0.8, 0.9])
    assert verdict(over, restored=3, stopped=True) == (
        "overfitting since epoch 4: val_loss rose from 0.6 to 0.9 while train_loss fell to 0.1; train_accuracy 0.9000, "
        "val_accuracy 0.8000: a gap of 0.1000; the run was stopped, and the weights of epoch 3 are back"
    )
    assert verdict(over).endswith("; the last weights are kept")
    still = rows([1, 0.8, 0.6, 0.5], [1, 0.8, 0.6, 0.5])
    assert verdict(still) == "still improving: val_loss fell by 18.8% an evaluation at the end; more epochs would help"
    flat = rows([1, 0.5, 0.5, 0.5, 0.5], [1, 0.5, 0.5, 0.5, 0.5])
    assert verdict(flat).startswith("levelled off: the loss no longer falls; train_accuracy 0.9000")
    assert verdict(rows([1, 0.5], [1, 0.5])) is None and improvement([]) is None


# -- The command line --

RECIPE = """
import torch
from torch import nn
import epochal

def plan(last: bool = True):
    torch.manual_seed(0)
    x = torch.randn(320, 8)
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3), *([nn.Softmax(1)] if last else [])]
    data = x, x[:, :3].argmax(1)
    return epochal.Plan(nn.Sequential(*layers), data, val=0.2, loss="cross_entropy", epochs=4, lr=1e-2)
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.py").write_text(RECIPE)
    return "recipe.py"


def ran(capsys, *words):
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr()
    return code, told.out, told.err


def test_check_of_a_recipe(recipe, capsys):
    code, out, err = ran(capsys, "check", recipe)
    assert code == 1
    assert out.startswith(
        "error softmax-before-loss: cross_entropy gets probabilities, and takes the softmax of them once more."
    )
    assert re.search(r"where:    3 \(Softmax\), the plan at recipe\.py:\d+\n", out)
    assert err.splitlines()[-1] == "1 error; epochal explain softmax-before-loss says more"
    assert sorted(path.name for path in Path.cwd().iterdir() if path.name != "__pycache__") == ["recipe.py"]
    code, out, err = ran(capsys, "check", recipe, "--json")
    assert code == 1 and json.loads(out)[0]["code"] == "softmax-before-loss"
    code, out, err = ran(capsys, "check", recipe, "--no-last", "--set", 'ignore=["too-few-epochs"]')
    assert (code, out) == (0, "nothing found\n")
    code, out, err = ran(capsys, "check", recipe, "--set", "lr=-1")
    assert (code, out) == (2, "") and err.startswith("PlanError: lr must be a number above 0.")


def test_a_recipe_with_a_mistake_is_not_trained(recipe, capsys):
    code, out, err = ran(capsys, "train", recipe)
    assert code == 1 and out == ""
    assert "FaultError: cross_entropy gets probabilities" in err and "Traceback" not in err


def test_explain(capsys):
    code, out, _ = ran(capsys, "explain", "softmax-before-loss")
    assert code == 0 and out.startswith("softmax-before-loss (error)\n\nA softmax of a softmax is nearly flat")
    assert out.endswith('Silence it with ignore=["softmax-before-loss"] in the plan.\n')
    code, out, _ = ran(capsys, "explain")
    assert len(out.splitlines()) == len(known())
    code, out, _ = ran(capsys, "explain", "lr-too-low", "--json")
    assert json.loads(out)[0]["level"] == "warning"
    code, _, err = ran(capsys, "explain", "softmax")
    assert code == 2 and "'softmax' is not a known finding" in err


def test_every_code_is_documented():
    page = (ROOT / "docs" / "doctor.md").read_text()
    for code, one in known().items():
        assert f"| `{code}` | {one.level} | {one.why} |" in page, code
        assert len(one.page.split("\n\n")) >= 2 or one.page.count("\n") >= 2, code


def test_every_rule_has_a_page_and_a_stage():
    for one in every():
        assert one.page and one.stage in finding.STAGES and one.told in finding.STAGES and one.level in finding.LEVELS
