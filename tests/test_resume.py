"""Exact resume: stopped anywhere and continued, a run leaves the bits and the files of one that was never disturbed."""

import copy
import errno
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import epochal
from epochal.checkpoint import files, saver
from epochal.checkpoint.store import Checkpoints
from epochal.checkpoint.weights import load_weights, save_weights
from epochal.observe import recorder
from epochal.optim.optimizers import load_exactly
from epochal.runtime.lock import Lock

EVERY_STEP = epochal.Saving("1 step", share=None, keep=2)
FILES = ("model.safetensors", "metrics.jsonl", "results.csv")


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, 4, generator=generator)
    return X, X @ torch.randn(4, 1, generator=generator)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))


def given(**changes):
    usual = {"loss": "mse", "lr": 0.1, "epochs": 3, "seed": 3, "batch_size": 10, "observers": (), "save": EVERY_STEP}
    return {"model": net(), "train": data(43, 0), "val": data(20, 1), **usual, **changes}


class PullThePlug(Exception):
    pass


def unplug_at(step):
    def observer(event):
        if isinstance(event, epochal.StepDone) and event.step == step:
            raise PullThePlug

    return observer


def notes(seen):
    return [event.message for event in seen if isinstance(event, epochal.Noted)]


def test_unplugged_at_every_step_the_files_are_those_of_an_undisturbed_run(tmp_path):
    straight = epochal.fit(**given(run="straight", metrics=["mae"], patience=2))
    for step in range(1, 15):
        for stop in (step, step + 1):  # twice, the second time right after the resume
            again = {"resume": stop != step, "observers": [unplug_at(stop)]}
            with pytest.raises(PullThePlug):
                epochal.fit(**given(run=f"broken-{step}", metrics=["mae"], patience=2, **again))
        resumed = epochal.fit(**given(run=f"broken-{step}", metrics=["mae"], patience=2, resume=True))
        assert (resumed.best, resumed.reason) == (straight.best, straight.reason)
        for name in FILES:
            assert Path(f"broken-{step}", name).read_bytes() == Path("straight", name).read_bytes(), (step, name)


def test_without_a_seed_the_start_is_in_the_first_checkpoint(tmp_path):
    torch.manual_seed(5)
    straight = epochal.fit(**given(run="straight", seed=None, save=None))
    torch.manual_seed(5)
    with pytest.raises(PullThePlug):
        epochal.fit(**given(run="broken", seed=None, save=None, observers=[unplug_at(1)]))
    torch.manual_seed(6)
    resumed = epochal.fit(**given(run="broken", seed=None, save=None, resume=True))
    for one, two in zip(straight.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(one, two)


def test_a_run_that_has_ended_trains_no_further(tmp_path):
    epochal.fit(**given(run="r"))
    before = {path: path.read_bytes() for path in Path("r/checkpoints").rglob("*") if path.is_file()}
    seen = []
    result = epochal.fit(**given(run="r", resume=True, observers=[seen.append]))
    assert not any(isinstance(event, epochal.StepDone) for event in seen)
    assert (result.reason, len(result.history)) == (epochal.StopReason.EPOCHS, 3)
    assert notes(seen) == ["resumed from step-00000015-2, after 15 steps."]
    assert before == {path: path.read_bytes() for path in Path("r/checkpoints").rglob("*") if path.is_file()}


@pytest.mark.parametrize("schedule", [None, "exponential", "plateau"])
def test_asked_for_more_epochs_it_goes_on_as_if_they_had_been_planned(tmp_path, schedule):
    straight = epochal.fit(**given(run="straight", epochs=5, schedule=schedule))
    epochal.fit(**given(run="longer", epochs=2, schedule=schedule))
    seen = []
    longer = epochal.fit(**given(run="longer", epochs=5, schedule=schedule, resume=True, observers=[seen.append]))
    assert notes(seen)[1:] == ["changed since: epochs 2 → 5."]
    assert longer.history.lr == straight.history.lr
    for name in FILES:
        assert Path("longer", name).read_bytes() == Path("straight", name).read_bytes(), name


@pytest.mark.parametrize("schedule", ["cosine", "linear", "onecycle", epochal.Schedule("cosine", warmup=4)])
def test_a_schedule_over_the_whole_run_is_stretched_when_the_run_is_made_longer(tmp_path, schedule):
    straight = epochal.fit(**given(epochs=5, schedule=schedule, save=None))
    epochal.fit(**given(run="longer", epochs=2, schedule=schedule))
    seen = []
    longer = epochal.fit(**given(run="longer", epochs=5, schedule=schedule, resume=True, observers=[seen.append]))
    moves = (6, 21) if isinstance(schedule, epochal.Schedule) and schedule.warmup else (10, 25)
    told = f"no longer exact: the schedule is stretched from {moves[0]} moves to {moves[1]}, and the rate follows."
    assert notes(seen)[-1] == told
    assert longer.history.lr[2:] == pytest.approx(straight.history.lr[2:], rel=1e-9, abs=1e-12)


def test_early_stopping_is_kept_unless_more_is_asked_for(tmp_path):
    stopping = epochal.EarlyStopping(patience=2, min_delta=100.0)
    first = epochal.fit(**given(run="r", epochs=9, early_stopping=stopping))
    assert (first.reason, len(first.history)) == (epochal.StopReason.EARLY_STOPPING, 3)
    seen = []
    again = epochal.fit(**given(run="r", epochs=9, early_stopping=stopping, resume=True, observers=[seen.append]))
    told = "it had ended, and is not trained further: for that, raise epochs, max_steps, max_time or patience."
    assert notes(seen)[-1] == told
    assert (again.reason, len(again.history)) == (epochal.StopReason.EARLY_STOPPING, 3)
    more = epochal.fit(**given(run="r", epochs=20, early_stopping=stopping, resume=True, observers=[seen.append]))
    assert notes(seen)[-1] == "early stopping begins to count anew."
    assert (more.reason, len(more.history)) == (epochal.StopReason.EARLY_STOPPING, 5)


@pytest.mark.parametrize(("patience", "epochs"), [(3, 4), (6, 7), (None, 9)])
def test_a_new_patience_decides_over_what_was_counted(tmp_path, patience, epochs):
    def limits(patience):
        stopping = epochal.EarlyStopping(patience=patience, min_delta=100.0) if patience else None
        return given(run="r", epochs=9, early_stopping=stopping)

    epochal.fit(**limits(2))
    again = epochal.fit(**limits(patience), resume=True)
    ended = epochal.StopReason.EARLY_STOPPING if patience else epochal.StopReason.EPOCHS
    assert (again.reason, len(again.history)) == (ended, epochs)


def failing(monkeypatch, name, at):
    """Half of the ``at``-th line that is added to the file, and then an error of the disk."""
    append, seen = files.append, []

    def half(path, line):
        seen.append(path.name)
        if path.name == name and seen.count(name) == at:
            append(path, line[: len(line) // 2])
            raise OSError(errno.EIO, "broken")
        append(path, line)

    monkeypatch.setattr(files, "append", half)


def test_a_run_whose_start_cannot_be_written_has_not_begun(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, "journal.jsonl", 1)
        with pytest.raises(epochal.FileError):
            epochal.fit(**given(run="r"))
    assert not Path("r/model.safetensors").exists()
    assert epochal.fit(**given(run="r", resume=True)).reason is epochal.StopReason.EPOCHS


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.csv"])
def test_half_a_line_is_mended_at_the_end(tmp_path, monkeypatch, name):
    monkeypatch.setattr(recorder, "SECONDS_A_LINE", 0.0)
    epochal.fit(**given(run="whole"))
    with monkeypatch.context() as patch:
        failing(patch, name, 1)
        with pytest.raises(epochal.FileError):
            epochal.fit(**given(run="r"))
    for file in ("metrics.jsonl", "results.csv"):
        found = Path("r", file).read_text()
        assert found.endswith("\n") and Path("whole", file).read_text().startswith(found)
    epochal.fit(**given(run="r", resume=True))
    assert all(Path("r", file).read_bytes() == Path("whole", file).read_bytes() for file in FILES)


def test_weights_that_an_update_made_infinite_are_not_saved(tmp_path):
    model = nn.Linear(4, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    huge = data(10, 0)[0] * 1e8, torch.ones(10, 1)
    usual = {"lr": 3e38, "optimizer": "sgd", "val": None, "train": huge, "epochs": 1, "model": model}
    with pytest.raises(epochal.NonFiniteError) as caught:
        epochal.fit(**given(run="r", **usual))
    assert caught.value.what == "the weight 'weight' is not finite, though loss and gradients were; it is not saved."
    assert caught.value.where == "after step 1"
    assert [path.name for path in Path("r/checkpoints").iterdir()] == ["step-00000000"]
    assert not Path("r/model.safetensors").exists()
    assert json.loads(Path("r/run.json").read_text())["status"] == "stopped"


def test_a_run_is_iterated_over_once(tmp_path):
    with epochal.Plan(**given(save=None)).prepare() as run:
        for event in run:
            if isinstance(event, epochal.StepDone):
                break
        with pytest.raises(epochal.PlanError, match="iterated over once"):
            next(iter(run))
    with pytest.raises(epochal.PlanError, match="iterated over once"):
        next(iter(run))


@pytest.mark.parametrize("kind", ["step", "optimizer"])
def test_half_an_update_does_not_become_the_final_weights(tmp_path, kind):
    class Half(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise RuntimeError("halfway")

    def step(state, window):
        raise RuntimeError("halfway")

    model = net()
    changes = {"optimizer": lambda p: Half(p, lr=0.1), "lr": None}
    if kind == "step":
        changes = {"step": step, "loss": None, "lr": None, "val": None}
    with pytest.raises(RuntimeError, match="halfway"):
        epochal.fit(**given(run="r", model=model, **changes))
    facts = json.loads(Path("r/run.json").read_text())
    assert (facts["status"], facts["reason"]) == ("stopped", "failed")
    assert not Path("r/model.safetensors").exists()


def test_an_imported_run_without_its_checkpoints_is_not_written_over(tmp_path):
    Path("r").mkdir()
    save_weights(net().state_dict(), Path("r/imported.safetensors"))
    Path("r/run.json").write_text('{"status": "imported"}')
    epochal.fit(**given(run="r", epochs=2, resume=True))
    before = Path("r/metrics.jsonl").read_bytes()
    shutil.rmtree("r/checkpoints")
    with pytest.raises(epochal.RunFolderError, match="no checkpoint that could be resumed from"):
        epochal.fit(**given(run="r", epochs=2, resume=True))
    assert Path("r/metrics.jsonl").read_bytes() == before


def test_a_run_at_work_is_told_as_one_also_to_a_new_start(tmp_path):
    with epochal.Plan(**given(run="r")).prepare() as run:
        next(iter(run))
        with pytest.raises(epochal.RunFolderError, match="another run is at work"):
            epochal.fit(**given(run="r"))
    with pytest.raises(epochal.RunFolderError, match="not empty"):
        epochal.fit(**given(run="r"))


def test_what_was_planned_is_written_once_the_disk_has_room_again(tmp_path, monkeypatch):
    write = files.replace_bytes

    def full(path, *chunks):
        if Path(path).name == "config.toml":
            error = OSError(errno.ENOSPC, "No space left on device")
            raise epochal.FileError("config.toml cannot be written", where=str(path)) from error
        write(path, *chunks)

    def room(event):
        if isinstance(event, epochal.Evaluated):
            monkeypatch.setattr(files, "replace_bytes", write)

    monkeypatch.setattr(files, "replace_bytes", full)
    goes_on = epochal.Saving(on_full="continue")
    epochal.fit(**given(run="r", save=goes_on, observers=[room]))
    epochal.fit(**given(run="s", save=goes_on))
    assert Path("r/config.toml").read_text() == Path("s/config.toml").read_text().replace('"s"', '"r"')


def test_checkpoints_by_hand_refuse_what_cannot_be(tmp_path):
    for keep in (0, -1, 1.5, True):
        with pytest.raises(epochal.PlanError, match="keep must be an integer of at least 1"):
            Checkpoints(tmp_path, keep=keep)
    checkpoints = Checkpoints(tmp_path / "c")
    with pytest.raises(epochal.PlanError, match="a step is not negative"):
        checkpoints.save(-1, {})
    assert not (tmp_path / "c").exists()


def test_files_of_somebody_else_are_left_alone(tmp_path):
    Path("mine").mkdir()
    for name in ("recipe.py", "config.toml"):
        Path("mine", name).write_text("mine")
    with pytest.raises(epochal.RunFolderError, match="not empty"):
        epochal.fit(**given(run="mine", epochs=1))
    assert Path("mine/recipe.py").read_text() == Path("mine/config.toml").read_text() == "mine"
    Path("hidden").mkdir()
    Path("hidden/.draft.tmp").write_text("mine")
    epochal.fit(**given(run="hidden", epochs=1))
    assert Path("hidden/.draft.tmp").read_text() == "mine"


def test_a_run_that_failed_before_its_first_update_gives_its_name_back(tmp_path):
    wrong = nn.Linear(5, 1)  # of samples that have 4 numbers
    for _ in range(2):
        with pytest.raises(epochal.ModelError, match="inputs of this shape"):
            epochal.fit(**given(run="r", model=wrong))
        assert sorted(os.listdir("r/checkpoints")) == ["step-00000000"]
    epochal.fit(**given(run="r"))
    epochal.fit(**given(run="s"))
    for name in FILES:
        assert Path("r", name).read_bytes() == Path("s", name).read_bytes()
    events = [json.loads(line) for line in Path("r/journal.jsonl").read_text().splitlines()]
    assert [one["reason"] for one in events if one["event"] == "ended"] == ["failed", "failed", "epochs"]
    with pytest.raises(epochal.RunFolderError, match="not empty"):
        epochal.fit(**given(run="r"))


@pytest.mark.parametrize("what", ["an update", "a file", "a checkpoint", "a stop", "a damaged note"])
def test_any_other_run_keeps_its_name(what, tmp_path):
    model, observers = (net(), [unplug_at(1)]) if what == "an update" else (nn.Linear(5, 1), [])
    with pytest.raises((PullThePlug, epochal.ModelError)):
        epochal.fit(**given(run="r", model=model, observers=observers))
    if what == "a file":
        Path("r/mine.txt").write_text("mine")
    elif what == "a checkpoint":
        shutil.copytree("r/checkpoints/step-00000000", "r/checkpoints/step-00000007")
    elif what == "a stop":
        shutil.rmtree("r")
        with epochal.Plan(**given(run="r")).prepare() as run:
            next(iter(run))
    elif what == "a damaged note":
        Path("r/run.json").write_text("{")
    before = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
    with pytest.raises(epochal.RunFolderError, match="not empty"):
        epochal.fit(**given(run="r"))
    assert {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()} == before


def test_a_best_model_that_cannot_be_put_back_ends_the_run_all_the_same(tmp_path):
    model, seen = net(), []

    def cut(event):
        seen.append(event)
        if isinstance(event, epochal.Evaluated):
            prune.random_unstructured(model[0], "weight", amount=0.5)

    with pytest.raises(RuntimeError, match="Missing key"):
        epochal.fit(**given(run="r", model=model, epochs=1, observers=[cut], save="9 epochs"))
    assert isinstance(seen[-1], epochal.Ended) and not seen[-1].restored
    assert Lock(Path("r")).release() is None


def test_limits_of_time_are_compared_as_times(tmp_path):
    stopping = epochal.EarlyStopping(patience=1, min_delta=100.0)
    usual = {"run": "r", "early_stopping": stopping, "epochs": 9}
    epochal.fit(**given(max_time="5 min", **usual))
    for longest, rows in (("4 min", 2), ("10 min", 3)):
        assert len(epochal.fit(**given(max_time=longest, resume=True, **usual)).history) == rows


def test_what_has_changed_is_told(tmp_path):
    epochal.fit(**given(run="r", epochs=1))
    seen = []
    changes = {"train": data(44, 0), "batch_size": 20, "lr": 0.01, "epochs": 2}
    epochal.fit(**given(run="r", resume=True, observers=[seen.append], **changes))
    _, harmless, serious, kept = notes(seen)
    assert harmless == "changed since: epochs 1 → 2."
    assert serious.startswith("no longer exact, as these have changed: batch_size 10 → 20, train ")
    assert kept == "the checkpoint's own goes on: lr 0.1 instead of 0.01."
    assert "43 → 44" in serious


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"optimizer": "sgd"}, "it was begun with optimizer Adam, and now SGD"),
        ({"schedule": "cosine"}, "it was begun with schedule none, and now CosineAnnealingLR"),
        ({"precision": "fp16"}, "its state holds no scaler"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_touched(tmp_path, changes, where):
    epochal.fit(**given(run="r", epochs=1))
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(epochal.CheckpointError, match="the checkpoint does not fit the plan") as caught:
        epochal.fit(**given(model=model, run="r", resume=True, epochs=2, **changes))
    assert caught.value.where == f"r/checkpoints/step-00000005-2; {where}"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    epochal.fit(**given(run="r", resume=True, epochs=2))  # and the folder is not locked


def test_a_damaged_checkpoint_is_named_and_stays(tmp_path):
    straight = epochal.fit(**given(run="straight"))
    with pytest.raises(PullThePlug):
        epochal.fit(**given(run="r", observers=[unplug_at(7)]))
    newest = Checkpoints("r/checkpoints").all()[-1]
    file = newest / "tensors-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    seen = []
    resumed = epochal.fit(**given(run="r", resume=True, observers=[seen.append], epochs=3))
    assert notes(seen) == [
        "step-00000006 is left out: the checkpoint is damaged: tensors-00000.safetensors is not what was written.",
        "resumed from step-00000005, after 5 steps.",
    ]
    for one, two in zip(straight.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(one, two)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    with pytest.raises(epochal.RunFolderError) as caught:
        epochal.fit(**given(run="mine", resume=True))
    assert caught.value.describe() == (
        "RunFolderError: there is no run in the folder that could be resumed.\n"
        "  where: mine: notes.txt\n"
        "  fix:   name the folder of a run, or choose another name"
    )
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]


class Unsaveable:
    def __call__(self, event):
        pass

    def state_dict(self):
        return {"hook": print}

    def load_state_dict(self, state):
        pass


def test_what_is_saved_needs_a_folder(tmp_path):
    plan = epochal.Plan(**given(save="1 epoch"))  # as a recipe may plan it
    with pytest.raises(epochal.PlanError) as caught:
        plan.fit()
    assert caught.value.describe() == (
        "PlanError: save needs a run folder.\n  where: save='1 epoch', run=None\n  fix:   give run=\"runs/x\""
    )
    plan.check()


def test_a_state_that_cannot_be_saved_is_known_before_training(tmp_path):
    with pytest.raises(epochal.CheckpointError) as caught:
        epochal.fit(**given(run="r", observers=[Unsaveable()]))
    assert caught.value.where == "state.extras.observers.Unsaveable.0.hook"


def test_an_observer_that_was_not_there_begins_anew(tmp_path):
    class Counting:
        def __init__(self):
            self.steps = 0

        def __call__(self, event):
            self.steps += isinstance(event, epochal.StepDone)

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]

    epochal.fit(**given(run="r", epochs=1, observers=[]))
    epochal.fit(**given(run="r", epochs=2, resume=True, observers=[counting := Counting()]))
    assert counting.steps == 5
    epochal.fit(**given(run="r", epochs=3, resume=True, observers=[counting := Counting()]))
    assert counting.steps == 10


def test_averages_in_fp32_of_weights_in_bf16_keep_their_bits():
    class Wide(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    average = self.state[p].setdefault("average", torch.zeros(p.shape))
                    average.add_(p.detach().float() / 3)

    weight = nn.Parameter(torch.randn(5).bfloat16())
    one, two = Wide([weight], lr=0.1), Wide([weight], lr=0.1)
    one.step()
    load_exactly(two, copy.deepcopy(one.state_dict()))
    assert two.state[weight]["average"].dtype == torch.float32
    assert torch.equal(one.state[weight]["average"], two.state[weight]["average"])


def test_two_runs_in_one_process_do_not_share_a_folder(tmp_path):
    plan = epochal.Plan(**given(run="r"))
    with plan.prepare() as run:
        iterator = iter(run)
        next(iterator)
        with pytest.raises(epochal.RunFolderError) as caught:
            plan.replace(resume=True).prepare()
        assert caught.value.where == "r; this process"
        with pytest.raises(epochal.RunFolderError, match="another run is at work"):
            plan.replace(resume=True).prepare()
        iterator.close()
    plan.replace(resume=True).fit()


def test_the_journal_tells_what_happened_and_when(tmp_path):
    with pytest.raises(PullThePlug):
        epochal.fit(**given(run="r", observers=[unplug_at(3)]))
    epochal.fit(**given(run="r", resume=True))
    entries = [json.loads(line) for line in Path("r/journal.jsonl").read_text().splitlines()]
    begun = [entry for entry in entries if entry["event"] in ("started", "resumed", "ended")]
    assert [(entry["event"], entry.get("step", entry.get("reason"))) for entry in begun] == [
        ("started", 0), ("ended", "failed"), ("resumed", 2), ("ended", "epochs")
    ]  # fmt: skip
    assert all("at" in entry for entry in entries)


def test_there_is_a_word_when_the_disk_is_small(tmp_path, monkeypatch):
    class Tiny:
        f_bavail, f_frsize = 100, 1

    from epochal.checkpoint import store

    monkeypatch.setattr(store.os, "statvfs", lambda path: Tiny)
    with pytest.raises(epochal.DiskFullError) as caught:
        epochal.fit(**given(run="r"))
    assert caught.value.describe() == (
        "DiskFullError: there is no room on the disk for a checkpoint.\n"
        "  where: r; a checkpoint takes about 0.1 MiB, and 0.0 MiB are free\n"
        '  fix:   free some space, choose another disk, or give save=epochal.Saving(on_full="continue")'
    )
    seen = []
    result = epochal.fit(**given(run="s", save=epochal.Saving(on_full="continue"), observers=[seen.append]))
    assert result.reason is epochal.StopReason.EPOCHS
    assert notes(seen)[0].startswith("the disk is nearly full")
    assert notes(seen)[1] == ("the checkpoint cannot be written: No space left on device. The run does without it.")


@pytest.mark.parametrize("optimizer", ["muon", "rmsprop", "adam"])
def test_one_cycle_goes_with_every_optimizer(optimizer):
    rates = epochal.fit(**given(optimizer=optimizer, schedule="onecycle", save=None)).history.lr
    assert max(rates) > rates[-1] > 0


class Drawing(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((4,), index / 12) + torch.rand(()), torch.ones(1)


def test_without_a_seed_the_validation_draws_the_same_too(tmp_path):
    torch.manual_seed(5)
    straight = epochal.fit(**given(run="straight", seed=None, val=Drawing()))
    torch.manual_seed(5)
    with pytest.raises(PullThePlug):
        epochal.fit(**given(run="r", seed=None, val=Drawing(), observers=[unplug_at(7)]))
    torch.manual_seed(6)
    resumed = epochal.fit(**given(run="r", seed=None, val=Drawing(), resume=True))
    assert resumed.history.val_loss == straight.history.val_loss


def test_a_finished_run_without_its_checkpoints_is_not_written_over(tmp_path):
    import shutil

    epochal.fit(**given(run="r"))
    before = Path("r/model.safetensors").read_bytes(), Path("r/metrics.jsonl").read_bytes()
    shutil.rmtree("r/checkpoints")
    with pytest.raises(epochal.RunFolderError, match="no checkpoint that could be resumed from"):
        epochal.fit(**given(run="r", resume=True))
    assert before == (Path("r/model.safetensors").read_bytes(), Path("r/metrics.jsonl").read_bytes())


def test_damaged_checkpoints_take_nobodys_place(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (20, 30, 40):
        checkpoints.save(step, {"w": torch.ones(3)})
    for step in (30, 40):
        (tmp_path / f"step-000000{step}" / "state.json").write_text("{}")
    again = Checkpoints(tmp_path, keep=3)
    assert again.newest_whole().path.name == "step-00000020"
    for step in (22, 24, 26):
        again.save(step, {"w": torch.ones(3)})
    names = [path.name for path in again.all()]
    assert names == [f"step-000000{step}" for step in (22, 24, 26, 30, 40)]


def test_leaving_the_loop_saves_what_was_done(tmp_path):
    with epochal.Plan(**given(run="r", save=None)).prepare() as run:
        for event in run:
            if isinstance(event, epochal.StepDone) and event.step == 3:
                break
    assert Checkpoints("r/checkpoints").newest_whole().state["progress"]["step"] == 3


def test_an_error_while_leaving_does_not_hide_the_first_one_and_ends_the_run(tmp_path):
    def fails_when_saved(event):
        if isinstance(event, epochal.Saved) and event.step:
            raise ValueError("of the observer")

    run = epochal.Plan(**given(run="r", observers=[fails_when_saved])).prepare()
    with pytest.raises(KeyError) as caught, run:  # noqa: PT012 (it is the loop that is left)
        for event in run:
            if isinstance(event, epochal.StepDone) and event.step == 1:
                run.saver.start(1, {**run.state.state_dict(), "about": run.about})
                raise KeyError("mine")
    assert caught.value.__notes__ == ["epochal: of the observer"]
    assert run.ended.reason is epochal.StopReason.FAILED
    epochal.fit(**given(run="r", resume=True))  # the folder is free


def test_links_in_a_run_folder_are_not_followed(tmp_path):
    epochal.fit(**given(run="r", epochs=1))
    Path("victim").write_text("mine")
    for name in (".lock", "journal.jsonl"):
        Path("r", name).unlink()
        Path("r", name).symlink_to(tmp_path / "victim")
        with pytest.raises(epochal.EpochalError):
            epochal.fit(**given(run="r", epochs=2, resume=True))
        Path("r", name).unlink()
    assert Path("victim").read_text() == "mine"


def test_sparse_buffers_do_no_harm(tmp_path):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)
            self.register_buffer("adjacency", torch.eye(4).to_sparse(), persistent=False)

        def forward(self, x):
            return self.layer(x @ self.adjacency.to_dense())

    assert epochal.fit(**given(model=Graph(), run="r", epochs=1)).reason is epochal.StopReason.EPOCHS


@pytest.mark.parametrize("odd", [torch.eye(4).to_sparse(), torch.eye(4, dtype=torch.complex128)])
def test_weights_that_cannot_be_kept_are_known_before_training(tmp_path, odd):
    model = net()
    model.register_buffer("odd", odd)
    with pytest.raises(epochal.CheckpointError) as caught:
        epochal.fit(**given(model=model, run="r"))
    assert caught.value.describe() == (
        f"CheckpointError: a tensor ({odd.dtype}, {odd.layout}) cannot be kept in a safetensors file.\n"
        "  where: entry 'odd' of the state dict\n"
        "  fix:   train without run=, or make it a buffer with persistent=False"
    )
    assert [path.name for path in Path("r").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({"loss": nn.SmoothL1Loss(beta=1.0)}, {"loss": nn.SmoothL1Loss(beta=0.5)}, "loss beta 1.0 → 0.5"),
        (
            {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "lr": None},
            {"optimizer": lambda p: torch.optim.SGD(p, lr=0.2), "lr": None},
            "optimizer lr 0.1 instead of 0.2",
        ),
    ],
)
def test_settings_inside_objects_are_compared(tmp_path, one, other, told):
    epochal.fit(**given(run="r", epochs=1, **one))
    seen = []
    epochal.fit(**given(run="r", epochs=2, resume=True, observers=[seen.append], **other))
    begin = "the checkpoint's own goes on" if "optimizer" in told else "no longer exact"
    assert any(told in message and message.startswith(begin) for message in notes(seen)), notes(seen)


def test_another_column_to_monitor_is_refused(tmp_path):
    epochal.fit(**given(run="r", epochs=1, metrics=["r2"]))
    with pytest.raises(epochal.CheckpointError, match=r"begun with monitor val_loss \(min\), and now val_r2 \(max\)"):
        epochal.fit(**given(run="r", epochs=2, metrics=["r2"], monitor="val_r2", resume=True))


LINE = torch.linspace(-1, 1, 64).reshape(16, 4)


@pytest.mark.parametrize(
    ("scale", "changes", "error"),
    [
        (1e15, {"lr": 1e30}, epochal.NonFiniteError),  # the update overflows, and the next step's loss shows it
        (1.0, {"lr": 1e39, "val": (LINE, torch.ones(16, 1)), "monitor": "train_loss"}, epochal.NonFiniteError),
    ],
)
def test_weights_that_an_update_made_infinite_are_never_final(tmp_path, scale, changes, error):
    plan = {"loss": "mse", "optimizer": "sgd", "epochs": 3, "batch_size": 8, "seed": 0, "observers": (), "run": "r"}
    with pytest.raises(error):
        epochal.fit(nn.Linear(4, 1), (LINE * scale, torch.ones(16, 1)), **{**plan, **changes})
    assert not Path("r/model.safetensors").exists()
    assert json.loads(Path("r/run.json").read_text())["status"] == "stopped"
    state = Checkpoints(Path("r/checkpoints")).newest_whole().state["model"]
    assert all(weight.isfinite().all() for weight in state.values())


def test_a_worker_lost_within_a_step_of_the_users_leaves_no_half_update(tmp_path):
    def fit(fails, **options):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(state, window):
            for part in range(2):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(window.batches[0][0]), window.batches[0][1])
                loss.backward()
                optimizer.step()
                if fails and part == 0 and state.progress.step == 3:
                    raise epochal.WorkerError("a worker of another loader died.")
            return epochal.StepResult(loss.detach())

        saving = EVERY_STEP if "run" in options else None
        plan = given(model=model, step=step, optimizer=optimizer, val=None, loss=None, lr=None, save=saving, **options)
        return epochal.fit(**plan).model.state_dict()

    straight = fit(False)
    with pytest.raises(epochal.WorkerError):
        fit(True, run="r")
    assert json.loads(Path("r/run.json").read_text())["status"] == "stopped"
    resumed = fit(False, run="r", resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_best_weights_that_were_put_back_by_half_are_not_final(tmp_path):
    model = net()

    def arm(event):
        if isinstance(event, epochal.Evaluated) and event.row["epoch"] == 3:
            model[4].register_load_state_dict_pre_hook(lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        epochal.fit(**given(model=model, run="r", lr=2.0, observers=[arm]))
    assert not Path("r/model.safetensors").exists()
    assert json.loads(Path("r/run.json").read_text())["status"] == "stopped"


def test_a_folder_with_a_lock_of_somebody_else_is_left_alone(tmp_path):
    Path("mine").mkdir()
    Path("mine/.lock").touch()
    Path("mine/config.toml").write_text("mine")
    with pytest.raises(epochal.RunFolderError, match="not empty"):
        epochal.fit(**given(run="mine", epochs=1))
    assert Path("mine/config.toml").read_text() == "mine"


def test_a_resume_that_never_began_leaves_the_word_of_the_run_alone(tmp_path):
    goes_on = epochal.Saving(on_full="continue")
    epochal.fit(**given(run="r", epochs=1, save=goes_on))
    before = Path("r/run.json").read_bytes()
    with epochal.Plan(**given(run="r", epochs=2, save=goes_on, resume=True)).prepare():
        pass
    assert Path("r/run.json").read_bytes() == before


@pytest.mark.parametrize("fault", ["loader", "thread"])
def test_the_lock_goes_whatever_fails_at_the_end(tmp_path, monkeypatch, fault):
    def fail(*_):
        raise RuntimeError("can't start new thread")

    def begin():
        with epochal.Plan(**given(run="r")).prepare() as run:
            events = iter(run)
            next(event for event in events if isinstance(event, epochal.Saved))
            place, name = (run.train, "close") if fault == "loader" else (saver.threading.Thread, "start")
            with monkeypatch.context() as patched:
                patched.setattr(place, name, fail)
                list(events)

    with pytest.raises(RuntimeError, match="can't start"):
        begin()
    epochal.fit(**given(run="r", resume=True))


def test_what_is_validated_and_may_have_been_trained_on_is_told(tmp_path):
    epochal.fit(**given(run="r", epochs=1, val=0.3))
    seen = []
    epochal.fit(**given(run="r", epochs=2, val=0.3, seed=4, resume=True, observers=[seen.append]))
    assert notes(seen)[-1].startswith("rows of val may have been trained on")
    assert "the checkpoint's own goes on: seed 3 instead of 4." in notes(seen)


def test_the_header_of_a_resumed_run_tells_the_rate_that_goes_on(tmp_path):
    epochal.fit(**given(run="r", epochs=1))
    seen = []
    epochal.fit(**given(run="r", epochs=2, lr=0.5, resume=True, observers=[seen.append]))
    assert next(event for event in seen if isinstance(event, epochal.Started)).facts["optimizer"] == "Adam, lr 0.1"


@pytest.mark.parametrize("changes", [{"restore_best": False}, {"val": None, "monitor": "train_loss"}])
def test_a_run_that_keeps_no_best_weights_any_more_ends_with_its_last(tmp_path, changes):
    monitor = {"monitor": "train_loss"} if "monitor" in changes else {}
    epochal.fit(**given(run="r", epochs=1, **monitor))
    model = epochal.fit(**given(run="r", epochs=2, resume=True, **changes)).model
    assert json.loads(Path("r/run.json").read_text())["status"] == "ended"
    saved = load_weights("r/model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items())


def test_the_same_data_read_otherwise_are_no_other_division(tmp_path):
    def loaders(workers):
        parts = (torch.utils.data.TensorDataset(*data(count, count)) for count in (40, 20))
        train, val = (torch.utils.data.DataLoader(part, 10, num_workers=workers) for part in parts)
        return {"train": train, "val": val, "batch_size": None}

    epochal.fit(**given(run="r", epochs=1, **loaders(0)))
    seen = []
    epochal.fit(**given(run="r", epochs=2, resume=True, observers=[seen.append], **loaders(1)))
    assert not any("trained on" in note for note in notes(seen)), notes(seen)


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_writer_that_ctrl_c_breaks_into_the_start_of_is_waited_for_or_writes_nothing(tmp_path, has_begun):
    class Interrupted(saver.Saver):
        def _write(self, *task):
            if not has_begun:
                assert self.is_left.wait(10)
            super()._write(*task)

    one = Interrupted(Checkpoints(tmp_path / "c"), EVERY_STEP)
    one.is_left, start, threads = threading.Event(), threading.Thread.start, []

    def interrupted(thread):
        start(thread)
        threads.append(thread)
        if has_begun:
            assert one._written.wait(10)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.start(1, {"x": torch.zeros(1)})
    one.is_left.set()
    assert one.is_busy == has_begun
    if has_begun:
        assert one.finished(wait=True)[0] == 1
    threads[0].join()
    assert len(one.checkpoints.all()) == has_begun


@pytest.mark.parametrize("name", ["schedule", "optimizer"])
def test_a_state_without_one_of_its_parts_is_refused_before_anything_is_touched(tmp_path, name):
    epochal.fit(**given(run="r", epochs=1, schedule="cosine"))
    checkpoints = Checkpoints(Path("r/checkpoints"))
    state = checkpoints.newest_whole().state
    del state[name]
    checkpoints.save(99, state)
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(epochal.CheckpointError) as caught:
        epochal.fit(**given(model=model, run="r", epochs=2, schedule="cosine", resume=True))
    assert caught.value.where.endswith(f"; its state holds no {name}")
    assert all(torch.equal(before[key], weight) for key, weight in model.state_dict().items())


class Interrupting(TensorDataset):
    """Sends a Ctrl-C, once, when its eighth sample is asked for and the file is there."""

    def __getitem__(self, i):
        if i == 7 and Path("mark").exists():
            Path("mark").unlink()
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("when", ["in a validation", "after an epoch's last update"])
def test_a_loader_that_keeps_its_place_is_not_read_twice_at_an_epochs_end(tmp_path, when, workers):
    X, Y = data(26, seed=0)

    def fit(run, watch=None, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.2))
        train = StatefulDataLoader(TensorDataset(X, Y), 4, shuffle=True, num_workers=workers)
        if when == "in a validation":
            options |= {"val": DataLoader(Interrupting(X.clone(), Y.clone()), 4)}
        else:
            options |= {"accumulate": 2}  # seven batches: the last window is a short one
        options |= {"loss": "mse", "epochs": 4, "save": "1000 steps", "observers": [watch] if watch else ()}
        result = epochal.fit(model, train, run=run, **options)
        return result.reason.name, model.state_dict(), [row["step"] for row in result.history.rows]

    def interrupt(event):
        if isinstance(event, epochal.StepDone) and event.step == (9 if when == "in a validation" else 8):
            Path("mark").touch() if when == "in a validation" else os.kill(os.getpid(), signal.SIGINT)

    _, straight, steps = fit("straight")
    assert fit("r", interrupt)[0] == "INTERRUPTED"
    reason, resumed, again = fit("r", resume=True)
    assert (reason, again) == ("EPOCHS", steps)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
