"""``tune_speed`` and ``profile`` measure, and change nothing; what an update costs in operations and calls."""

import collections
import copy
import gc
import json
import os
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import epochal
from epochal.cli import tune
from epochal.speed import profiling, tuning

pytestmark = pytest.mark.timeout(300)

torch.manual_seed(0)
X, Y = torch.randn(200, 4), torch.randn(200, 1)


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))


class Drawing(Dataset):
    """Draws from a generator of its own."""

    def __init__(self, pause=0.0):
        self.generator, self.pause = torch.Generator().manual_seed(3), pause

    def __len__(self):
        return 64

    def __getitem__(self, index):
        time.sleep(self.pause)
        return torch.randn(4, generator=self.generator), Y[index]


class State:
    """All that must be as it was."""

    def __init__(self, plan):
        self.weights = copy.deepcopy(plan.model.state_dict())
        self.optimizer = (
            copy.deepcopy(plan.optimizer.state_dict()) if isinstance(plan.optimizer, torch.optim.Optimizer) else None
        )
        self.training = [part.training for part in plan.model.modules()]
        self.threads, self.generator = torch.get_num_threads(), torch.get_rng_state()
        self.own = plan.train.generator.get_state() if isinstance(plan.train, Drawing) else None

    def __eq__(self, other):
        tensors = all(torch.equal(*pair) for pair in zip(self.weights.values(), other.weights.values(), strict=True))
        own = (self.own is None and other.own is None) or torch.equal(self.own, other.own)
        plain = (self.training, self.threads, str(self.optimizer)) == (
            other.training,
            other.threads,
            str(other.optimizer),
        )
        return tensors and own and plain and torch.equal(self.generator, other.generator)


def with_an_optimizer():
    net = model()
    return epochal.Plan(
        net, (X, Y), loss="mse", optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), epochs=2
    )


PLANS = {
    "arrays": lambda: epochal.Plan(
        model(), (X, Y), val=0.2, loss="mse", metrics=["mae"], patience=3, epochs=2, compile=True
    ),
    "optimizer": with_an_optimizer,
    "loader": lambda: epochal.Plan(model(), DataLoader(TensorDataset(X, Y), 16, shuffle=True), loss="mse", epochs=2),
    "own_generator": lambda: epochal.Plan(model(), Drawing(), loss="mse", max_steps=30, workers=0),
    "schedule": lambda: epochal.Plan(model(), (X, Y), loss="mse", schedule="cosine", accumulate=2, clip=1.0, epochs=2),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("measure", [tuning.tune_speed, profiling.profile])
def test_nothing_is_changed(name, measure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = PLANS[name]()
    before, batches = State(plan), None
    if isinstance(plan.train, DataLoader):
        torch.manual_seed(1)
        batches = list(plan.train)
        torch.manual_seed(1)
        before = State(plan)
    if measure is tuning.tune_speed:
        plan = plan.replace(compile=True) if not plan.compile else plan  # not to compile in each of these tests
        plan = plan.replace(precision="bf16")
    measure(plan.replace(compile=False) if measure is profiling.profile else plan, seconds=0.0)
    assert State(plan) == before and os.listdir() == []
    if batches is not None:
        assert all(torch.equal(one[0], other[0]) for one, other in zip(batches, plan.train))


def test_what_is_tried_and_suggested(monkeypatch):
    """With given times: what saves at least 5 % is kept while the next thing is tried."""
    took = {
        "as planned": 10.0,
        "1 thread": 9.8,
        "2 threads": 8.0,
        "2 threads, precision bf16": 7.9,
        "2 threads, compile": 5.0,
    }
    threads = torch.get_num_threads()

    def tried(plan, *, seconds, warm_up=3, channels_last=False, **options):
        now = torch.get_num_threads()
        setting = tuning.Setting(options, now if now != threads else None, channels_last)
        return tuning.Trial(took[setting.name], 32.0, 3.0 if "compile" in options else 0.0, 1.0, 0.5, 1000)

    monkeypatch.setattr(tuning, "tried", tried)
    monkeypatch.setattr(tuning.os, "sched_getaffinity", lambda _: {0, 1})
    torch.set_num_threads(4)
    threads = 4
    try:
        told = []
        plan = epochal.Plan(model(), (X, Y), loss="mse", epochs=10)
        found = tuning.tune_speed(plan, tell=told.append)
    finally:
        torch.set_num_threads(1)
    assert [row.setting.name for row in found.rows] == list(took)
    assert [setting.name for setting in told] == [*took, *["as planned", "2 threads"] * 2]  # again, in turns
    # 1000 updates in 5 ms and 3 seconds of compiling are 8 s, as long as without it
    assert found.best.setting.name == "2 threads" and found.factor == 1.25
    assert found.code() == ["torch.set_num_threads(2)"]
    assert "suggested: 2 threads, 1.25 times as fast (1.25 to 1.25, measured 3 times)" in str(found)
    took["2 threads, compile"], took["2 threads, precision bf16"] = 1.0, 6.0
    took["2 threads, precision bf16, compile"] = 1.0
    torch.set_num_threads(4)
    try:
        found = tuning.tune_speed(plan)
    finally:
        torch.set_num_threads(1)
    assert found.best.setting.name == "2 threads, precision bf16, compile"
    assert found.code()[-1] == "epochal.fit(..., precision='bf16', compile=True)" and "bf16" in found.best.setting.price
    took["2 threads, precision bf16"], took["2 threads, precision bf16, compile"] = 7.9, 0.5  # little alone, more then
    took["2 threads, compile"] = 1.0
    torch.set_num_threads(4)
    try:
        found = tuning.tune_speed(plan.replace(epochs=100))
    finally:
        torch.set_num_threads(1)
    names = [row.setting.name for row in found.rows]
    assert names[-2:] == ["2 threads, compile", "2 threads, precision bf16, compile"] and found.best is found.rows[-1]


def test_a_setting_that_cannot_be_is_a_row(monkeypatch):
    class Fp32Only(nn.Linear):
        def forward(self, x):
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError("no bf16 here")
            return super().forward(x)

    found = tuning.tune_speed(epochal.Plan(Fp32Only(4, 1), (X, Y), loss="mse", epochs=1, compile=True), seconds=0.0)
    (row,) = [row for row in found.rows if row.trial is None]
    assert "bf16" in row.setting.name and row.why == "no bf16 here" and "cannot be: no bf16 here" in str(found)


@pytest.mark.parametrize("measure", [epochal.tune_speed, epochal.profile])
def test_a_plan_that_cannot_be_trained_is_told_as_ever(measure):
    with pytest.raises(epochal.LossError, match="the loss is computed over tensors of different shapes") as caught:
        measure(epochal.Plan(model(), (X, Y[:, 0]), loss="mse", epochs=1), seconds=0.0)
    assert "batch 0 of train" in caught.value.where
    for seconds in (float("nan"), float("inf"), -1.0):
        with pytest.raises(epochal.PlanError, match="the time to measure must be a number of seconds"):
            measure(epochal.Plan(model(), (X, Y), loss="mse", epochs=1), seconds=seconds)


def test_a_gain_that_is_not_seen_again_is_not_suggested(monkeypatch):
    """The plan as it is was measured in a slow moment of the machine."""
    took = {"as planned": iter([10.0, 5.0, 5.0]), "compile": iter([5.0, 5.0, 5.0])}

    def tried(plan, *, seconds, warm_up=3, channels_last=False, **options):
        times = took["compile" if options else "as planned"] if warm_up == 5 else iter([1.0])
        return tuning.Trial(next(times), 32.0, 0.0, 1.0, 0.5, None)

    monkeypatch.setattr(tuning, "tried", tried)
    monkeypatch.setattr(tuning.os, "sched_getaffinity", lambda _: {0})
    found = tuning.tune_speed(epochal.Plan(model(), (X, Y), loss="mse", epochs=10, precision="bf16"))
    assert found.best is found.rows[0] and "leave it as planned" in str(found)


def test_a_short_start_is_no_gain(monkeypatch):
    """Of a run of milliseconds, the start is most, and differs by chance."""
    started = {"as planned": 0.02, "compile": 0.001}

    def tried(plan, *, seconds, warm_up=3, channels_last=False, **options):
        return tuning.Trial(1.0, 32.0, started["compile" if options else "as planned"], 1.0, 0.5, 2)

    monkeypatch.setattr(tuning, "tried", tried)
    monkeypatch.setattr(tuning.os, "sched_getaffinity", lambda _: {0})
    found = tuning.tune_speed(epochal.Plan(model(), (X, Y), loss="mse", epochs=10, precision="bf16"))
    assert found.best is found.rows[0]


def test_what_was_not_compiled_is_no_row_of_compiling(monkeypatch):
    def tried(plan, *, seconds, warm_up=3, channels_last=False, **options):
        notes = ("compile: the model is not compiled: it prints",) if options else ()
        return tuning.Trial(1.0, 32.0, 0.0, 1.0, 0.5, 2, notes)

    monkeypatch.setattr(tuning, "tried", tried)
    monkeypatch.setattr(tuning.os, "sched_getaffinity", lambda _: {0})
    found = tuning.tune_speed(epochal.Plan(model(), (X, Y), loss="mse", epochs=10, precision="bf16"))
    assert found.rows[1].trial is None and "cannot be: the model is not compiled: it prints" in str(found)


class Stream(IterableDataset):
    """Knows its place."""

    def __init__(self):
        self.place = 7

    def __iter__(self):
        while self.place < 300:
            self.place += 1
            yield X[self.place % 200], Y[self.place % 200]
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("measure", [epochal.tune_speed, epochal.profile])
def test_a_stream_is_where_it_was(measure, wrapped):
    stream = Stream()
    data = DataLoader(stream, batch_size=8) if wrapped else stream
    options = {"compile": True, "precision": "bf16"} if measure is epochal.tune_speed else {}
    measure(epochal.Plan(model(), data, loss="mse", max_steps=30, **options), seconds=0.0)
    assert stream.place == 7


@pytest.mark.parametrize("measure", [epochal.tune_speed, epochal.profile])
def test_a_model_that_the_objective_holds_is_as_it_was(measure):
    """It is trained then, and not its copy."""
    torch.manual_seed(0)
    held = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    held.register_buffer("passed", torch.zeros(()), persistent=False)
    held[0].drawn = torch.Generator().manual_seed(5)
    held[2].bias.requires_grad_(False)
    held[0].weight.grad = torch.ones(4, 4)
    held[1].eval()

    def objective(model, batch):
        held.passed += 1
        held[2].bias.requires_grad_(True)
        torch.rand(1, generator=held[0].drawn)
        return nn.functional.mse_loss(held(batch[0]), batch[1])

    before, generator = copy.deepcopy(held.state_dict()), held[0].drawn.get_state()
    options = {"compile": True, "precision": "bf16"} if measure is epochal.tune_speed else {}
    measure(epochal.Plan(held, (X, Y), objective=objective, epochs=1, **options), seconds=0.0)
    assert all(torch.equal(value, held.state_dict()[name]) for name, value in before.items())
    assert torch.equal(held[0].weight.grad, torch.ones(4, 4)) and held[0].bias.grad is None
    assert held.passed == 0 and torch.equal(held[0].drawn.get_state(), generator)
    assert not held[2].bias.requires_grad and held.training and not held[1].training


def test_a_lazy_model_is_measured():
    plan = epochal.Plan(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)), (X, Y), loss="mse", epochs=1)
    assert epochal.profile(plan, seconds=0.0).whole > 0
    assert torch.nn.parameter.is_lazy(plan.model[0].weight)


def bound(wanted, *data, **options):
    """The profile of a plan; measured again where a moment of the machine hid what bounds it."""
    for _ in range(3):
        found = epochal.profile(epochal.Plan(*data, loss="mse", epochs=1, **options), seconds=0.1)
        if found.bound == wanted:
            break
    return found


def test_a_profile_names_what_bounds_an_update():
    slow = epochal.profile(epochal.Plan(model(), Drawing(pause=0.001), loss="mse", epochs=1), seconds=0.0)
    assert slow.bound == "data" and slow.milliseconds["data"] > 30 and "workers=" in str(slow)
    small = bound("launches", model(), (X, Y), batch_size=2)
    assert small.bound == "launches" and "try compile=True" in str(small)
    compiled = bound("launches", model(), (X, Y), batch_size=2, compile=True)
    assert "compile=True, as planned" in compiled.advice
    wide = nn.Sequential(nn.Linear(4, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 1))
    large = bound("arithmetic", wide, (X, Y), batch_size=100)
    assert large.bound == "arithmetic" and large.growth > 1.4
    assert large.milliseconds["forward"] > large.milliseconds["data"]


def test_watchers_are_measured_and_a_trace_is_written(tmp_path):
    def slow(event):
        time.sleep(0.002)

    plan = epochal.Plan(model(), (X, Y), loss="mse", epochs=1, observers=[slow])
    found = epochal.profile(plan, seconds=0.0, trace=tmp_path / "trace.json")
    assert found.milliseconds["watchers"] == 0  # nobody else's code is run unless it is asked for
    assert epochal.profile(plan, seconds=0.0, observers=True).milliseconds["watchers"] >= 2
    with pytest.raises(epochal.PlanError, match="a trace is a JSON file"):
        epochal.profile(plan, trace=tmp_path / "recipe.py")
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())
    with pytest.raises(epochal.PlanError, match="a step of your own cannot be tried out on a copy"):
        epochal.profile(epochal.Plan(model(), (X, Y), step=lambda state, window: None, epochs=1))


RECIPE = """
import torch, epochal

def plan(width: int = 8) -> epochal.Plan:
    X = torch.randn(100, 4)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 1))
    return epochal.Plan(model, (X, X[:, :1]), loss="mse", epochs=2, compile=True)
"""


def command(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "epochal", *arguments], capture_output=True, text=True, cwd=cwd, timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_commands(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "folder.png").mkdir()
    code, out, err = command(
        "tune-speed", "recipe.py", "--seconds", "0.01", "--width", "4", "--set", "compile=false", "--precision", "bf16",
        "--write", "fast.toml", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["rows"][0]["name"] == "as planned" and "measuring: as planned" in err
    if found["suggested"]["name"] == "as planned":
        assert "fast.toml is not written: nothing is suggested" in err and not (tmp_path / "fast.toml").exists()
    else:
        flags = tomllib.loads((tmp_path / "fast.toml").read_text())
        assert (
            "written: fast.toml" in err and flags["width"] == 4 and found["suggested"]["flags"].items() <= flags.items()
        )
    (tmp_path / "fast.toml").write_text('threads = 1\nchannels-last = true\nset = ["batch_size=50"]\n')
    code, out, err = command(
        "train", "recipe.py", "--set", "compile=false", "--config", "fast.toml", "--run", "r", cwd=tmp_path
    )
    assert code == 0 and "cpu (1 thread)" in err, err
    code, out, err = command("profile", "recipe.py", "--seconds", "0.01", "--picture", "parts.png", cwd=tmp_path)
    assert code == 0 and "forward" in out and (tmp_path / "parts.png").stat().st_size > 5000, err
    code, out, err = command("profile", "recipe.py", "--picture", "parts.gif", cwd=tmp_path)
    assert code == 2 and "suffix of a picture" in err and "Traceback" not in err
    code, out, err = command("tune-speed", "recipe.py", "--write", "fast.yaml", cwd=tmp_path)
    assert code == 2 and "name a file that ends in .toml" in err
    code, out, err = command("tune-speed", "recipe.py", "--write", "fast.toml", cwd=tmp_path)
    assert (
        code == 2 and "there is such a file already" in err and "batch_size=50" in (tmp_path / "fast.toml").read_text()
    )
    code, out, err = command("train", "recipe.py", "--threads", "99999", cwd=tmp_path)
    assert code == 2 and "far fewer than 99999" in err and "Traceback" not in err
    for asked in (
        ("tune-speed", "--write", "no/x.toml"),
        ("profile", "--picture", "no/x.png"),
        ("profile", "--trace", "no/x.json"),
        ("profile", "--picture", "folder.png"),
    ):
        code, out, err = command(asked[0], "recipe.py", *asked[1:], cwd=tmp_path)
        assert code == 2 and "folder" in err and "Traceback" not in err
    code, out, err = command("profile", "recipe.py", "--trace", "recipe.py", cwd=tmp_path)
    assert code == 2 and "a trace is a JSON file" in err and (tmp_path / "recipe.py").read_text() == RECIPE
    code, out, err = command("tune-speed", "nothing.py", cwd=tmp_path)
    assert code == 1 and "no such recipe" in err and "Traceback" not in err


def test_what_is_written_holds_what_was_asked_for(tmp_path):
    flags = tune._together(
        {"lr": 0.5, "set": ["batch_size=50", "compile=false"]}, {"threads": 2, "set": ["compile=true"]}
    )
    assert flags == {"lr": 0.5, "threads": 2, "set": ["batch_size=50", "compile=true"]}


def test_changes_of_the_file_and_of_the_command_line_are_both_made(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "some.toml").write_text('set = ["compile=false", "batch_size=50"]\n')
    code, _, err = command(
        "train", "recipe.py", "--config", "some.toml", "--set", "batch_size=25", "--set", "epochs=1", "--run", "r",
        cwd=tmp_path,
    )  # fmt: skip
    assert code == 0 and "batches of 25" in err and "compiled" not in err, err


@pytest.mark.parametrize("words", [("tune-speed",), ("profile",)])
def test_a_signal_ends_what_is_measured(tmp_path, words):
    (tmp_path / "recipe.py").write_text(RECIPE.replace("compile=True", "compile=False"))
    asked = [sys.executable, "-m", "epochal", *words, "recipe.py", "--seconds", "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(asked, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        time.sleep(8)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 130 and err.endswith("interrupted\n") and "Traceback" not in err, err


# -- What an update costs, counted and not timed -------------------------------------------------------------


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def seeds_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))


DATA = torch.randn(96, 10), torch.randn(96, 1)


def operations_of_an_update(**options):
    """What the second epoch of three batches runs, divided by its updates."""
    with (
        Counted() as counted,
        epochal.Plan(seeds_model(), DATA, loss="mse", epochs=3, observers=(), **options).prepare() as run,
    ):
        for event in run:
            if isinstance(event, epochal.StepDone):
                if event.step == 4:
                    counted.operations.clear()
                if event.step == 6:
                    break
    return collections.Counter(counted.operations)


def test_an_update_runs_the_bare_operations_and_few_more():
    found, model, index = operations_of_an_update(), seeds_model(), torch.arange(32)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    with Counted() as counted:
        for update in range(3):
            if update == 1:
                counted.operations.clear()
            x, y = (part.index_select(0, index) for part in DATA)
            for weight in model.parameters():
                weight.grad = None
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    bare = collections.Counter(counted.operations)
    # Of an update: the order's slice, the loss without its graph, the look for what is not finite, its flag and the
    # loss as numbers, the counts of the optimizer as one tensor; and none of three that torch's own wrappers run.
    more = {
        "clone": 2,
        "slice": 2,
        "detach": 2,
        "_amp_foreach_non_finite_check_and_unscale_": 2,
        "_local_scalar_dense": 4,
        "add_": 2,
    }
    assert found - bare <= collections.Counter(more), found - bare
    assert sum(found.values()) <= sum(bare.values()) + 6, (found - bare, bare - found)


def calls_of_an_update(**options):
    """Python functions of epochal's that are called in an update, and all of Python's and C's."""
    ours = everything = 0
    watched = False

    def watch(frame, kind, argument):
        nonlocal ours, everything
        if watched and kind in ("call", "c_call"):
            everything += 1
            ours += kind == "call" and "/epochal/" in frame.f_code.co_filename

    with epochal.Plan(seeds_model(), DATA, loss="mse", epochs=4, observers=(), **options).prepare() as run:
        for event in run:
            if isinstance(event, epochal.StepDone):
                if event.step == 7:
                    sys.setprofile(watch)
                    watched = True
                if event.step == 8:
                    watched = False
                    sys.setprofile(None)
                    break
    return ours, everything


def test_an_update_makes_few_calls():
    ours, everything = calls_of_an_update()
    assert ours <= 75 and everything <= 330, (ours, everything)


def test_an_update_leaves_nothing_to_the_garbage_collector():
    collected = []

    def note(phase, info):
        collected.append(info["generation"])

    with epochal.Plan(
        seeds_model(), DATA, loss="mse", epochs=400, observers=(), evaluate_every="10000 steps"
    ).prepare() as run:
        for event in run:
            if isinstance(event, epochal.StepDone) and event.step == 30:
                gc.collect()
                gc.callbacks.append(note)
            if isinstance(event, epochal.StepDone) and event.step == 1030:
                gc.callbacks.remove(note)
                break
    assert len(collected) <= 2  # where each update left a cycle of objects, it would be hundreds
