"""Promises that are easily broken from the side: by a bad batch, an observer, a data set, a look at the plan."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import epochal

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
QUIET = {"observers": (), "seed": 0, "batch_size": 10}


def normed():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))


class Turning(Dataset):
    """Clean in the first epoch; then one row is not a number."""

    def __init__(self):
        self.asked = 0

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        self.asked += 1
        return (X[i] * torch.nan if self.asked > 40 and i == 7 else X[i]), Y[i]


def test_a_bad_batch_leaves_the_running_statistics_and_the_best_weights():
    model, best = normed(), []

    def note(event):
        if isinstance(event, epochal.Evaluated):
            best.append(event.row["val_loss"])

    with pytest.raises(epochal.EpochalError, match="not finite"):
        epochal.fit(
            model, Turning(), val=(X.clone(), Y.clone()), loss="mse", epochs=5, **{**QUIET, "observers": [note]}
        )
    assert len(best) == 1
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    reached = normed()
    torch.manual_seed(0)
    assert (
        epochal.evaluate(model, (X, Y), loss="mse")["loss"] < epochal.evaluate(reached, (X, Y), loss="mse")["loss"] * 2
    )


def test_skipped_updates_leave_batch_norm_as_a_run_without_them():
    bad = X.clone()
    bad[13] = torch.nan
    torch.manual_seed(1)
    one, two = normed(), normed()
    two.load_state_dict(one.state_dict())
    given = {**QUIET, "loss": "mse", "shuffle": False, "epochs": 2}
    epochal.fit(one, (bad, Y), nonfinite="skip", **given)
    keep = [*range(10), *range(20, 40)]
    epochal.fit(two, (X[keep], Y[keep]), **given)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_best_weights_come_back_after_an_interrupt_in_the_middle_of_an_update():
    calls = []

    def loss(outputs, targets):
        calls.append(outputs.requires_grad)
        if calls.count(True) == 10:
            raise KeyboardInterrupt
        return F.mse_loss(outputs, targets)

    model, seen = normed(), []
    with pytest.raises(KeyboardInterrupt):
        epochal.fit(
            model,
            (X, Y),
            val=(X.clone(), Y.clone()),
            loss=loss,
            epochs=5,
            observers=[seen.append],
            batch_size=10,
            seed=0,
        )
    assert seen[-1].restored
    assert epochal.evaluate(model, (X, Y), loss="mse")["loss"] == pytest.approx(seen[-1].best.value)


def test_an_observer_that_leaves_the_model_in_eval_mode_does_not_end_training():
    model, modes = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1)), []

    def watch(event):
        if isinstance(event, epochal.StepDone):
            modes.append(model.training)
        if isinstance(event, epochal.Evaluated):
            model.eval()

    epochal.fit(model, (X, Y), val=(X.clone(), Y.clone()), loss="mse", epochs=3, observers=[watch])
    assert modes == [True] * len(modes)


class Leaking(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i == 25:
            raise StopIteration
        return X[i], Y[i]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_iteration_does_not_end_an_epoch_in_silence(workers):
    with pytest.raises(Exception, match="the data ended before their end"):
        epochal.fit(nn.Linear(4, 1), Leaking(), loss="mse", epochs=1, shuffle=False, workers=workers, **QUIET)
    if not workers:
        with pytest.raises(epochal.EpochalError) as caught:
            epochal.fit(nn.Linear(4, 1), DataLoader(Leaking(), batch_size=10), loss="mse", epochs=1, observers=())
        assert caught.value.where == "batch 2 of 4 of the DataLoader"


def test_torchs_functions_and_derived_modules_are_known_losses():
    class Mine(nn.CrossEntropyLoss):
        pass

    ids = torch.arange(40) % 4
    ids[::5] = -100
    weights = []
    for loss in (nn.CrossEntropyLoss(), F.cross_entropy, Mine()):
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        epochal.fit(model, (X, ids), loss=loss, accumulate=2, epochs=2, **QUIET)
        weights.append(model.weight)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    with pytest.raises(epochal.EpochalError, match="tensors of different shapes"):
        epochal.fit(nn.Linear(4, 1), (X, Y[:, 0]), loss=F.mse_loss, epochs=1, **QUIET)


def test_a_batch_whose_targets_are_all_ignored_teaches_nothing():
    ids = torch.arange(40) % 4
    ids[10:20] = -100
    given = {**QUIET, "loss": "cross_entropy", "epochs": 1, "shuffle": False, "optimizer": "sgd"}
    keep = [*range(10), *range(20, 40)]
    torch.manual_seed(0)
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.load_state_dict(one.state_dict())
    with_ignored = epochal.fit(one, (X, ids), **given)
    without = epochal.fit(two, (X[keep], ids[keep]), **given)
    assert torch.equal(one.weight, two.weight)
    assert with_ignored.history.train_loss == without.history.train_loss


def test_a_parameter_of_model_and_loss_is_updated_once():
    model = nn.Linear(4, 1, bias=False)

    class Regularised(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = model.weight

        def forward(self, outputs, targets):
            return F.mse_loss(outputs, targets) + 0.1 * self.w.square().sum()

    before = model.weight.detach().clone()
    epochal.fit(model, (X, Y), loss=Regularised(), optimizer="sgd", lr=0.1, max_steps=1, **QUIET)
    torch.testing.assert_close(before - model.weight, 0.1 * model.weight.grad)


def test_clipping_takes_the_norm_in_the_models_order():
    def groups(model):
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() < 2]
        return torch.optim.SGD([{"params": rest, "lr": 0.2}, {"params": decay}], lr=0.1)

    torch.manual_seed(0)
    ours, plain = normed(), normed()
    plain.load_state_dict(ours.state_dict())
    loader = DataLoader(TensorDataset(X, Y), batch_size=8)
    epochal.fit(ours, loader, loss="mse", optimizer=groups(ours), clip=0.05, epochs=3, observers=())
    optimizer = groups(plain)
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            F.mse_loss(plain(x), y).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values()))


def test_a_look_at_a_plan_changes_nothing():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = epochal.Plan(model, (X, Y), loss="mse", optimizer=optimizer, schedule="onecycle", epochs=2, observers=())
    settings, generator = dict(optimizer.param_groups[0]), torch.get_rng_state()
    plan.check()
    assert dict(optimizer.param_groups[0]) == settings
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_result_of_a_run_that_has_not_ended():
    with epochal.Plan(nn.Linear(4, 1), (X, Y), loss="mse", epochs=2, observers=()).prepare() as run:
        for _ in run:
            if run.ended is None:
                with pytest.raises(epochal.EpochalError, match="has not ended"):
                    _ = run.result
    assert run.result.reason is epochal.StopReason.EPOCHS


def test_an_observer_that_raises_leaves_a_whole_run_folder(tmp_path):
    def raising(event):
        if isinstance(event, epochal.Evaluated | epochal.Ended):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        epochal.fit(nn.Linear(4, 1), (X, Y), loss="mse", epochs=2, run="r", observers=[raising])
    assert json.loads((tmp_path / "r/run.json").read_text())["reason"] == "failed"
    assert (tmp_path / "r/model.safetensors").exists()


def test_extra_state_does_not_cost_the_run(tmp_path):
    class WithExtra(nn.Linear):
        def get_extra_state(self):
            return {"note": "kept"}

        def set_extra_state(self, state):
            self.seen = state

    result = epochal.fit(WithExtra(4, 1), (X, Y), val=0.2, loss="mse", epochs=2, run="r", **QUIET)
    assert (tmp_path / "r/model.safetensors").exists()
    assert result.model.seen == {"note": "kept"}


@pytest.mark.parametrize(("given", "text"), [
    ({"observers": [epochal.EarlyStopping()]}, "early stopping is not an observer of its own here."),
    ({"step": lambda state, window: None, "clip": 1.0}, "clip belongs to epochal's own update, which step= replaces."),
    ({"step": lambda state, window: None, "lr": 1.0}, "lr belongs to epochal's own update, which step= replaces."),
    ({"val": "0.2"}, "a fraction for val is a number."),
    ({"learning_rate": 0.1}, "'learning_rate' is not a known option."),
])  # fmt: skip
def test_options_that_would_be_ignored(given, text):
    with pytest.raises(epochal.EpochalError) as caught:
        epochal.fit(nn.Linear(4, 1), (X, Y), **{"loss": "mse", "epochs": 1, **given})
    assert caught.value.what == text


def test_other_libraries_names_are_translated():
    with pytest.raises(epochal.EpochalError) as caught:
        epochal.fit(nn.Linear(4, 1), (X, Y), loss="mse", epochs=1, learning_rate=0.1)
    assert caught.value.fix == "here it is called 'lr'"


def test_batch_norm_on_a_lone_sample_and_probabilities_are_explained():
    with pytest.raises(epochal.EpochalError, match="one sample, on which batch norm cannot be trained"):
        epochal.fit(normed(), (X[:21], Y[:21]), loss="mse", epochs=1, **QUIET)
    with pytest.raises(epochal.EpochalError, match=r"nn\.BCELoss needs probabilities"):
        epochal.fit(nn.Linear(4, 1), (5 * X, (Y > 0).float()), loss="bce", epochs=1, **QUIET)


def test_one_word_among_numbers_is_an_error_and_not_a_lost_column():
    rows = [f"{i * 0.5},{i * 0.7 + 1}" for i in range(60)]
    rows[30] = "abc,5"
    with open("t.csv", "w") as file:
        file.write("area,price\n" + "\n".join(rows))
    with pytest.raises(epochal.EpochalError) as caught:
        epochal.fit(nn.Linear(1, 1), "t.csv", target="price", loss="mse", epochs=1, observers=())
    assert caught.value.what == "the column 'area' holds numbers, but 'abc' in row 31."


def test_saving_by_default_takes_a_small_share_of_the_time(tmp_path):
    epochal.fit(nn.Linear(4, 1), (X, Y), loss="mse", epochs=200, run="r", **QUIET)
    events = [json.loads(line) for line in (tmp_path / "r/journal.jsonl").read_text().splitlines()]
    assert 1 <= sum(event["event"] == "saved" for event in events) < 100
    saving = epochal.Saving("1 epoch", share=None)
    epochal.fit(nn.Linear(4, 1), (X, Y), loss="mse", epochs=20, run="s", save=saving, **QUIET)
    events = [json.loads(line) for line in (tmp_path / "s/journal.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "saved" for event in events) == 21  # the start, and each epoch


class Restless(nn.Module):
    """Buffers that do what buffers can: be assigned anew, change their shape, vanish."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("gone", torch.ones(2))
        self.register_buffer("mask", torch.ones(3))
        with torch.inference_mode():
            self.register_buffer("frozen", torch.ones(2))

    def forward(self, x):
        y = self.layer(x)
        for _ in range(3):
            self.mean = 0.5 * self.mean + 0.5 * y.detach().mean()
        self.last = y.detach().flatten()
        self.gone = None
        return y


@pytest.mark.parametrize("accumulate", [1, 2])
def test_buffers_of_every_kind_are_put_back(accumulate):
    bad = X.clone()
    bad[25] = torch.nan
    model = Restless()
    given = {**QUIET, "shuffle": False, "accumulate": accumulate, "batch_size": 8}
    result = epochal.fit(model, (bad, Y), loss="mse", nonfinite="skip", epochs=2, **given)
    assert result.history.rows[0]["skipped"] == 1
    assert torch.isfinite(model.mean) and torch.isfinite(model.last).all()
    assert torch.equal(model.mask, torch.ones(3))


def test_a_sampler_may_give_less_than_its_length():
    class Short(torch.utils.data.Sampler):
        def __len__(self):
            return 40

        def __iter__(self):
            return iter(range(20))

    loader = DataLoader(TensorDataset(X, Y), batch_size=10, sampler=Short())
    result = epochal.fit(nn.Linear(4, 1), loader, loss="mse", epochs=2, observers=())
    assert [row["step"] for row in result.history] == [2, 4]


def test_chained_streams():
    class Some(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(X[:20], Y[:20]))

    result = epochal.fit(nn.Linear(4, 1), Some() + Some(), loss="mse", epochs=1, **QUIET)
    assert result.history.rows[0]["step"] == 4


def test_results_are_not_doubled_when_a_run_goes_on(tmp_path):
    def stopping(event):
        if isinstance(event, epochal.Evaluated) and event.row["epoch"] == 9:
            raise ValueError("enough")

    given = {"loss": "mse", "epochs": 12, "run": "r", "batch_size": 10, "seed": 0}
    with pytest.raises(ValueError, match="enough"):
        epochal.fit(nn.Linear(4, 1), (X, Y), observers=[stopping], **given)
    epochal.fit(nn.Linear(4, 1), (X, Y), observers=(), resume=True, **given)
    lines = (tmp_path / "r/results.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in lines[1:]] == list(range(1, 13))
