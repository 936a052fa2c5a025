"""Workers that are killed or hang: noticed, named, none left behind; the run goes on from where it was saved."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

import epochal
from epochal.checkpoint import codec
from epochal.data import workers
from epochal.data.given import GivenLoader
from epochal.data.workers import worker_error

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Troubled(Dataset):
    """Dies or hangs at one sample, once: the file is there only until then."""

    def __init__(self, trouble=None, at=21):
        self.trouble, self.at, self.mark = trouble, at, Path("trouble").absolute()
        if trouble:
            self.mark.touch()

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        if i == self.at and self.trouble and self.mark.exists():
            self.mark.unlink()
            self.trouble()
        return X[i] + torch.rand(()), Y[i]


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def gone():
    os._exit(7)


def hung():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # not even this ends it
    time.sleep(600)


AGES = 40  # seconds: nobody hangs, on however busy a machine; how fast it is, no test can say


def given(data, **options):
    return GivenLoader(DataLoader(data, 4, shuffle=False, num_workers=2, **options))


def own(data, **options):
    return epochal.Loader(data, 4, workers=2, **options)


def living():
    return {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}


# torch's handler raises wherever the process is: in a callback of the garbage collector Python only prints it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(("trouble", "told"), [(killed, "signal 9: Killed"), (gone, "exit code 7")])
def test_a_dead_worker_is_named(trouble, told, persistent):
    before = living()
    loader = given(Troubled(trouble), persistent_workers=persistent)
    began = time.perf_counter()
    with pytest.raises(epochal.WorkerError) as caught:
        list(loader.batches(0))
    assert time.perf_counter() - began < AGES
    # Sample 21 is in batch 5, which is worker 1's; its death may be seen while an earlier one is awaited.
    assert caught.value.where.split(";")[0] in [f"batch {i} was awaited" for i in range(6)]
    assert re.fullmatch(rf"batch \d was awaited; worker 1 \(pid \d+, {told}\)", caught.value.where)
    assert caught.value.what == "a process that loads data died."
    assert living() <= before
    assert len(list(loader.batches(0))) == 10  # the trouble is over, and the loader can be read again
    loader.loader._iterator = None  # left to the collector of cycles, torch waits five seconds for each worker


@pytest.mark.parametrize("make", [given, own])
def test_a_hung_worker_is_named_in_time(make):
    before, loader = living(), make(Troubled(hung), timeout=1.0)
    batches, began = loader.batches(0), time.perf_counter()
    with pytest.raises(epochal.WorkerError) as caught:
        list(batches)
    assert 1 <= time.perf_counter() - began < AGES
    assert caught.value.what == "a process that loads data hangs: it gave no batch in 1 seconds."
    assert caught.value.where.startswith("batch 5 was awaited; worker 1 (pid ")
    assert living() <= before
    assert len(list(loader.batches(0))) == 10
    loader.close()
    assert living() <= before


@pytest.mark.parametrize("make", [given, own])
def test_closing_ends_the_workers(make):
    before, loader = living(), make(Troubled())
    for count in (2, 10):
        batches = loader.batches(0)
        assert len([next(batches) for _ in range(count)]) == count
        assert living() - before
        loader.close()
        assert living() <= before
    kept = given(Troubled(), persistent_workers=True)
    list(kept.batches(0))
    kept.close()
    assert living() - before  # they are the user's
    kept.loader._iterator = None


def test_a_stream_in_a_hung_worker():
    class Stuck(IterableDataset):
        def __iter__(self):
            assert get_worker_info() is not None
            yield from zip(X[:8], Y[:8])
            hung()

    before = living()
    with pytest.raises(epochal.WorkerError) as caught:
        list(epochal.Loader(Stuck(), 4, workers=1, timeout=0.5).batches(0))
    assert caught.value.where.startswith("batch 2 was awaited; worker 0 (pid ")
    assert living() <= before


def test_without_workers_there_is_no_timeout():
    assert len(list(epochal.Loader(Troubled(), 4, timeout=0.001).batches(0))) == 10


def test_an_error_of_the_data_set_stays_itself():
    class Failing(Troubled):
        def __getitem__(self, i):
            raise RuntimeError("DataLoader worker of my own")

    before = living()
    with pytest.raises(RuntimeError, match="of my own") as caught:
        list(given(Failing()).batches(0))
    assert not isinstance(caught.value, epochal.EpochalError)
    assert living() <= before

    class Absent(Troubled):
        def __getitem__(self, i):
            raise FileNotFoundError("no such picture")

    for count in (0, 2):
        began = time.perf_counter()
        with pytest.raises(FileNotFoundError):
            list(GivenLoader(DataLoader(Absent(), 4, num_workers=count)).batches(0))
        assert time.perf_counter() - began < AGES


def test_what_torch_says_elsewhere_is_understood_too():
    error = RuntimeError("DataLoader worker (pid(s) 12, 345) exited unexpectedly")
    told = worker_error(error, "step 7")
    assert told.where == "step 7; pid 12, 345"
    assert worker_error(RuntimeError("shapes cannot be multiplied"), "step 7") is None
    assert worker_error(ValueError(str(error)), "step 7") is None


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))


def prepared(make, data):
    plan = epochal.Plan(model(), (X, Y), loss="mse", lr=0.1, epochs=2, seed=1, observers=())
    run = plan.prepare()
    run.train = make(data)
    run.state.extras["data.train"] = run.train
    return run


def train(run):
    """Trains, and gives the state after each step while it can."""
    with run:
        for event in run:
            if isinstance(event, epochal.StepDone):
                yield codec.encode(copy.deepcopy(run.state.state_dict()))


@pytest.mark.parametrize("make", [given, own])
def test_after_a_kill_the_run_has_the_same_bits(make):
    with prepared(make, Troubled()) as run:
        for _ in run:
            pass
    run.train.close()
    expected = copy.deepcopy(run.state.model.state_dict())

    states = []
    with pytest.raises((epochal.WorkerError, RuntimeError)) as caught:
        # A second later, for the first steps to be done on a busy machine, too.
        states.extend(train(prepared(make, Troubled(lambda: (time.sleep(1.0), killed())))))
    # torch may tell of the worker while a step is under way
    assert isinstance(caught.value, epochal.WorkerError) or worker_error(caught.value, "a step")
    saved = states[-1]
    assert 1 <= json.loads(json.dumps(saved[0]))["progress"]["step"] <= 6

    torch.manual_seed(99)
    with prepared(make, Troubled()) as run:
        run.state.load_state_dict(codec.decode(json.loads(json.dumps(saved[0])), saved[1]))
        for _ in run:
            pass
    run.train.close()
    for name, value in expected.items():
        assert torch.equal(value, run.state.model.state_dict()[name]), name


@pytest.mark.parametrize("trouble", ["killed", "hung"])
@pytest.mark.parametrize("persistent", [False, True])
def test_nothing_hangs_when_python_ends(trouble, persistent):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_workers import Troubled, given, killed, hung
loader = given(Troubled({trouble}), timeout=1.0, persistent_workers={persistent})
list(loader.batches(0))
"""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert time.perf_counter() - began < AGES
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-3].startswith("epochal.WorkerError: a process that loads data"), (
        done.stderr
    )


class DiesOnce(Dataset):
    """Validation data that end their own worker, the first time that they are read."""

    def __init__(self, mark):
        self.mark = mark

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 7 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((3,), index / 8), torch.ones(1)


def test_a_worker_that_dies_in_the_validation_costs_no_row(tmp_path):
    """At the end of an epoch: what was not measured is measured after the resume."""

    def fit(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))
        return epochal.fit(
            model, Troubled(), DiesOnce(tmp_path / "died"), loss="mse", epochs=3, workers=2, seed=1, batch_size=4,
            observers=(), save=epochal.Saving("1 step", share=None), **options,
        )  # fmt: skip

    with pytest.raises((epochal.WorkerError, RuntimeError)):
        fit(run=tmp_path / "r")
    resumed = fit(run=tmp_path / "r", resume=True)
    fit(run=tmp_path / "straight")
    assert len(resumed.history) == 3
    for name in ("model.safetensors", "metrics.jsonl", "results.csv"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


class Stopping(Dataset):
    """One of its workers is stopped in its second epoch, wherever it is."""

    def __init__(self, mark):
        self.mark = mark

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 3:
            if self.mark.exists():
                os.kill(os.getpid(), signal.SIGSTOP)
            self.mark.touch()
        return torch.full((3,), index / 8), torch.ones(1)


@pytest.mark.parametrize("own", [True, False])
def test_a_stopped_worker_is_noticed(tmp_path, own):
    data = Stopping(tmp_path / "seen")
    if own:
        loader = epochal.Loader(data, 3, workers=2, timeout=1.0)
    else:
        loader = GivenLoader(DataLoader(data, 3, num_workers=2, timeout=1.0))
    assert len(list(loader.batches(0))) == 4
    with pytest.raises(epochal.WorkerError, match=r"hangs|died"):
        list(loader.batches(1))
    loader.close()


def test_persistent_workers_that_die_between_two_epochs_are_named_at_once(tmp_path):
    loader = DataLoader(Troubled(), 4, num_workers=2, persistent_workers=True)

    def kill(event):
        if isinstance(event, epochal.StepDone) and event.step == 10:
            for worker in loader._iterator._workers:
                worker.kill()
            time.sleep(0.3)

    began = time.perf_counter()
    options = {"loss": "mse", "epochs": 3, "seed": 0, "run": "r"}
    with pytest.raises(epochal.WorkerError, match="died"):
        epochal.fit(nn.Linear(3, 1), loader, observers=[kill], **options)
    assert time.perf_counter() - began < AGES
    assert json.loads(Path("r/run.json").read_text())["reason"] == "failed"
    assert Path("r/checkpoints/step-00000010").is_dir()
    loader._iterator = None
    epochal.fit(nn.Linear(3, 1), loader, observers=(), resume=True, **options)
    loader._iterator = None


class Marked(Dataset):
    """Kills its worker, once the file is there, at the first sample after the ``spared`` ones that it gives."""

    def __init__(self, spared):
        self.spared, self.mark = spared, Path("mark").absolute()

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        self.spared -= 1
        if self.spared < 0 and self.mark.exists():
            time.sleep(0.3)
            killed()
        return X[i], Y[i]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("persistent", "accumulate"), [(False, 1), (True, 1), (False, 2)])
def test_a_worker_lost_before_the_first_update_of_an_epoch_costs_no_bit(tmp_path, persistent, accumulate):
    def fit(seed, **options):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        data = Marked(spared=4 if accumulate > 1 else 0)
        loader = DataLoader(data, 4, shuffle=True, num_workers=1, persistent_workers=persistent)
        torch.manual_seed(seed)  # of no account after a resume
        options |= {"save": epochal.Saving("1000 steps"), "loss": "mse", "epochs": 3, "accumulate": accumulate}
        try:
            return epochal.fit(model, loader, **options).model.state_dict()
        finally:
            loader._iterator = None

    def mark(event):
        if isinstance(event, epochal.Evaluated):
            Path("mark").touch()

    straight = fit(1, run="straight", observers=())
    with pytest.raises(epochal.WorkerError):
        fit(1, run="r", observers=[mark])
    Path("mark").unlink()
    assert Path(f"r/checkpoints/step-{10 // accumulate:08d}").is_dir()
    resumed = fit(2, run="r", observers=(), resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(("event", "spared"), [(epochal.Evaluated, 0), (epochal.Evaluated, 8), (epochal.StepDone, 24)])
def test_a_loader_that_keeps_its_place_is_not_asked_for_it_after_a_loss(tmp_path, event, spared, persistent):
    """It has read on meanwhile, or would start workers anew: the run goes on from where it was saved before."""

    def fit(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.2))
        loader = StatefulDataLoader(Marked(spared), 4, shuffle=True, num_workers=1, persistent_workers=persistent)
        save = epochal.Saving("2 steps", share=None)
        return epochal.fit(model, loader, loss="mse", epochs=3, accumulate=2, save=save, **options).model.state_dict()

    straight, before = fit(run="straight", observers=()), living()
    told = []

    def watch(one):
        if isinstance(one, event):
            Path("mark").touch()
        if isinstance(one, epochal.Noted):
            told.append(one.message)

    with pytest.raises(epochal.WorkerError) as caught:
        fit(run="r", observers=[watch])
    assert told == ["a loader that keeps its place lost it with a worker: only earlier steps are saved"]
    assert living() <= before and not hasattr(caught.value, "__notes__")
    Path("mark").unlink()
    resumed = fit(run="r", observers=(), resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


class Slow(DataLoader):
    """Takes its time to begin."""

    def __iter__(self):
        time.sleep(1.5)
        return super().__iter__()


def test_a_slow_start_is_no_worker_that_hangs():
    class Absent(Troubled):
        def __getitem__(self, i):
            if i == 30:
                raise FileNotFoundError("no such picture")
            return super().__getitem__(i)

    loader = Slow(Absent(), 4, num_workers=1, timeout=0.3)
    with pytest.raises(FileNotFoundError, match="no such picture"):
        epochal.fit(nn.Linear(3, 1), loader, loss="mse", epochs=1, observers=())


def with_long_texts(rows):
    x, y = zip(*rows)
    return {
        "x": torch.stack(x),
        "y": torch.stack(y),
        "text": "a" * 2**22,
    }  # through a pipe, which is full before its end


def losing(number, at):
    """An objective that sends the workers a signal at batch ``at``, while they hand the next one over."""
    seen = []

    def lose(model, batch):
        seen.append(batch)
        if len(seen) == at:
            time.sleep(0.5)
            for worker in psutil.Process().children():
                worker.send_signal(number)
        return (model(batch["x"]) - batch["y"]).square().mean()

    return lose


@pytest.mark.parametrize(("number", "timeout", "what"), [(signal.SIGKILL, 0, "died"), (signal.SIGSTOP, 1, "hangs")])
def test_a_worker_that_is_lost_while_it_hands_a_batch_over_is_noticed(number, timeout, what):
    loader = DataLoader(Troubled(), 1, num_workers=1, collate_fn=with_long_texts, timeout=timeout)
    began = time.perf_counter()

    with pytest.raises(epochal.WorkerError, match=what):
        epochal.fit(nn.Linear(3, 1), loader, objective=losing(number, at=2), epochs=1, observers=())
    assert time.perf_counter() - began < AGES


class Uneven(IterableDataset):
    """The first worker has one sample, and is done."""

    def __iter__(self):
        for i in range(1 if get_worker_info().id == 0 else len(X)):
            yield X[i], Y[i]


@pytest.mark.parametrize("timeout", [0, 1])
def test_a_worker_that_has_ended_does_not_hide_that_another_died(timeout):
    loader = DataLoader(Uneven(), 1, num_workers=2, collate_fn=with_long_texts, timeout=timeout)
    began = time.perf_counter()

    with pytest.raises(epochal.WorkerError) as caught:
        epochal.fit(nn.Linear(3, 1), loader, objective=losing(signal.SIGKILL, at=8), epochs=1, observers=())
    assert re.search(r"; worker 1 \(pid \d+, signal 9: Killed\)$", caught.value.where)
    assert time.perf_counter() - began < AGES


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_program_with_a_sigchld_handler_of_its_own_does_not_hang(number):
    list(DataLoader(X, 4, num_workers=1))  # now torch has set its own
    loader = DataLoader(Troubled(), 1, num_workers=1, collate_fn=with_long_texts, timeout=1)

    before, began = signal.signal(signal.SIGCHLD, lambda *_: None), time.perf_counter()
    try:
        with pytest.raises(epochal.WorkerError):
            epochal.fit(nn.Linear(3, 1), loader, objective=losing(number, at=2), epochs=1, observers=())
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert time.perf_counter() - began < AGES


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("number", "timeout", "what"),
    [(signal.SIGKILL, 0, "died"), (signal.SIGKILL, 1, "died"), (signal.SIGSTOP, 1, "hangs")],
)
def test_outside_the_main_thread_a_lost_worker_is_noticed_too(number, timeout, what):
    loader = DataLoader(Troubled(), 1, num_workers=1, collate_fn=with_long_texts, timeout=timeout)
    caught = []

    def fit():
        try:
            epochal.fit(nn.Linear(3, 1), loader, objective=losing(number, at=2), epochs=1, observers=())
        except epochal.WorkerError as error:
            caught.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and what in caught[0].what and "worker 0 (pid" in caught[0].where


PINNED = """
import os, sys, time, psutil, torch
from torch.utils.data import DataLoader, Dataset, dataloader
from epochal.data.given import GivenLoader
from epochal.data.workers import heard_while_awaited
from epochal.errors import WorkerError

# torch's thread that pins memory is only there beside an accelerator: here it only passes on.
torch.accelerator.is_available = lambda: True
torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cuda")
torch.accelerator.current_device_index = lambda: 0
torch.accelerator.set_device_index = lambda index: None
dataloader._utils.pin_memory.pin_memory = lambda data, device=None: data


class Data(Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, i):
        return torch.ones(3)


def collate(rows):
    return {"x": torch.stack(rows), "text": "a" * 2**27}


loader = DataLoader(Data(), 1, num_workers=1, collate_fn=collate, pin_memory=True, prefetch_factor=8)
given = GivenLoader(loader)
try:
    with heard_while_awaited():
        for i, _ in enumerate(given.batches(0)):
            assert given._reading._pin_memory_thread.is_alive()
            if i == 1:
                time.sleep(float(sys.argv[1]))
                psutil.Process().children()[0].kill()
except WorkerError as error:
    print(error.what, flush=True)
"""


@pytest.mark.parametrize("pause", [0.05, 0.2, 0.25])
def test_a_worker_lost_while_its_batch_is_pinned_is_noticed(pause):
    command = [sys.executable, "-c", PINNED, str(pause)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    # On stderr may stand what torch's thread met by itself: half a tensor.
    assert (ended.returncode, ended.stdout) == (0, "a process that loads data died.\n"), ended.stderr


def test_a_death_is_heard_where_a_queue_is_polled_and_nowhere_else(monkeypatch):
    told, dog = [], workers._Watchdog(0, lambda: None)
    torch_tells = workers.signal_handling._error_if_any_worker_fails

    def handler():  # as torch's, which is called wherever the main thread is
        workers.signal_handling._error_if_any_worker_fails()

    def select():
        handler()

    def recv_bytes():
        handler()

    with monkeypatch.context() as patch, workers.heard_while_awaited(), workers.heard_while_awaited():
        patch.setattr(workers, "_raise", lambda: told.append("heard"))
        select()
        assert not told  # no batch is awaited
        patch.setattr(workers, "_AWAITING", {dog})
        recv_bytes()
        assert not told
        select()
        assert len(told) == 1
        dog.insists = True
        recv_bytes()
        assert len(told) == 2
    with workers.heard_while_awaited(), workers.heard_while_awaited():
        assert workers.signal_handling._error_if_any_worker_fails is workers._tell
    assert workers.signal_handling._error_if_any_worker_fails is torch_tells


def test_a_worker_that_others_have_taken_note_of_is_named_at_once():
    train = DataLoader(Troubled(), 4, num_workers=1, persistent_workers=True, timeout=60)
    killed_at = []

    def kill(event):
        if isinstance(event, epochal.StepDone) and event.step == 10:
            worker = train._iterator._workers[0]
            worker.kill()
            worker.join()  # as multiprocessing does for all that have ended, when it starts a process
            killed_at.append(time.perf_counter())

    with pytest.raises(epochal.WorkerError, match="died"):
        epochal.fit(nn.Linear(3, 1), train, loss="mse", epochs=2, observers=[kill])
    assert time.perf_counter() - killed_at[0] < AGES
    train._iterator = None
