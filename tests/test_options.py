"""Every option of ``fit``: what it accepts, and that it does what it says."""

import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import epochal
from epochal import losses
from epochal.data.split import split_indices
from epochal.events import Ended, Evaluated, Saved, Started, StepDone
from epochal.optim import optimizers, schedules
from epochal.plan import options

X, Y = (torch.tensor(part[:200]) for part in load_digits(return_X_y=True))
X = (X / 16).float()
A = torch.linspace(-1, 1, 100)[:, None]
B = 2 * A + 1


def fit(*arguments, **given):
    arguments = arguments or (nn.Linear(64, 10), (X, Y))
    if not {"loss", "objective", "step"} & given.keys():
        given["loss"] = "cross_entropy"
    if not {"epochs", "max_steps", "max_time"} & given.keys():
        given["epochs"] = 2
    return epochal.fit(*arguments, **{"observers": (), "seed": 0, **given})


def rates(**given):
    """The learning rate at each step."""
    model, seen = nn.Linear(64, 10), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def note(event):
        if isinstance(event, StepDone):
            seen.append(optimizer.param_groups[0]["lr"])

    fit(model, (X, Y), optimizer=optimizer, observers=[note], **given)
    return seen


def test_every_option_is_tested_here():
    text = Path(__file__).read_text()
    assert [name for name in options() if f"{name}=" not in text and f'"{name}"' not in text] == []


# loss, objective


@pytest.mark.parametrize("name", sorted(losses.NAMES))
def test_loss_by_name(name):
    squash = {"bce": nn.Sigmoid(), "nll": nn.LogSoftmax(1)}.get(name, nn.Identity())
    if name in losses.CLASS_INDEX:
        model, data = nn.Sequential(nn.Linear(64, 10), squash), (X, Y)
    else:
        model, data = nn.Sequential(nn.Linear(64, 1), squash), (X, (Y[:, None] > 4).float())
    result = fit(model, data, loss=name, lr=0.01, epochs=5)
    assert result.history.train_loss[-1] < 0.9 * result.history.train_loss[0]


def test_loss_as_a_module_and_as_a_function():
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    by_module = fit(nn.Linear(64, 10), (X, Y), loss=smooth)
    by_function = fit(nn.Linear(64, 10), (X, Y), loss=lambda outputs, targets: smooth(outputs, targets))
    assert by_module.history.train_loss == pytest.approx(by_function.history.train_loss, rel=1e-6)


def test_objective():
    def objective(model, batch):
        x, y = batch
        outputs = model(x)
        return epochal.Loss(nn.functional.cross_entropy(outputs, y), weight=len(y), outputs=outputs, targets=y)

    torch.manual_seed(0)
    one = fit(nn.Linear(64, 10), (X, Y), objective=objective, metrics=["accuracy"])
    torch.manual_seed(0)
    two = fit(nn.Linear(64, 10), (X, Y), loss="cross_entropy", metrics=["accuracy"])
    assert torch.equal(one.model.weight, two.model.weight)
    assert one.history["train_accuracy"] == two.history["train_accuracy"]


# optimizer, lr, weight_decay


@pytest.mark.parametrize("name", sorted(optimizers.NAMES))
def test_optimizer_by_name(name):
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    result = fit(model, (X, Y), optimizer=name, lr=0.01, weight_decay=0.001, epochs=6)
    assert result.history.train_loss[-1] < result.history.train_loss[0]


def test_lr_and_weight_decay_reach_a_named_optimizer_and_it_is_fused():
    plan = epochal.Plan(
        nn.Linear(64, 10), (X, Y), loss="cross_entropy", optimizer="adamw", lr=0.02, weight_decay=0.3, epochs=1
    )
    with plan.prepare() as run:
        defaults = run.state.optimizer.defaults
    assert (defaults["lr"], defaults["weight_decay"], defaults["fused"]) == (0.02, 0.3, True)


def test_muon_moves_matrices_and_adamw_the_rest_and_a_schedule_moves_both():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    with epochal.Plan(
        model, (X, Y), loss="cross_entropy", optimizer="muon", lr=0.1, schedule=epochal.Schedule("step", step_size=1),
        epochs=2, observers=(),
    ).prepare() as run:  # fmt: skip
        for _ in run:
            pass
    muon, adamw = run.state.optimizer.optimizers
    assert [p.dim() for p in muon.param_groups[0]["params"]] == [2, 2]
    assert [p.dim() for p in adamw.param_groups[0]["params"]] == [1, 1]
    assert muon.param_groups[0]["lr"] == adamw.param_groups[0]["lr"] == pytest.approx(0.001)
    saved = run.state.optimizer.state_dict()
    run.state.optimizer.load_state_dict(saved)
    assert muon.param_groups[0] is run.state.optimizer.param_groups[0]


def test_optimizer_as_a_factory_and_as_an_object():
    weights = []
    for make in (lambda model: torch.optim.SGD, lambda model: torch.optim.SGD(model.parameters())):
        torch.manual_seed(0)
        model = nn.Linear(64, 10)
        fit(model, (X, Y), optimizer=make(model))
        weights.append(model.weight)
    assert torch.equal(*weights)


# schedule


@pytest.mark.parametrize("name", schedules.NAMES)
def test_schedule_by_name(name):
    schedule = epochal.Schedule("multistep", milestones=[1]) if name == "multistep" else name
    if name == "step":
        schedule = epochal.Schedule("step", step_size=1)
    if name == "plateau":
        schedule = epochal.Schedule("plateau", patience=0, threshold=10.0)  # nothing is ever good enough
    assert len(set(rates(schedule=schedule, epochs=3))) > 1


def test_a_schedule_of_steps_ends_where_the_run_ends():
    assert rates(schedule="linear", epochs=2)[-1] == pytest.approx(0)
    assert rates(schedule="cosine", max_steps=5)[-1] == pytest.approx(0)


def test_warmup_rises_to_exactly_the_full_rate():
    seen = rates(schedule=epochal.Schedule("step", warmup=4, step_size=1), epochs=3)
    assert seen[:4] == pytest.approx([0.04, 0.06, 0.08, 0.1])
    assert seen[3:7] == [0.1] * 4  # not an ulp off
    assert seen[7:] == pytest.approx([0.01] * 7 + [0.001] * 7)


@pytest.mark.parametrize("make", [
    lambda optimizer: StepLR(optimizer, step_size=1, gamma=0.5),
    lambda optimizer: CosineAnnealingLR(optimizer, T_max=3),
])  # fmt: skip
def test_schedule_as_a_factory_and_as_an_object_moves_every_epoch(make):
    by_factory = rates(schedule=make, epochs=3)
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    fit(
        model, (X, Y), optimizer=optimizer, schedule=make(optimizer), epochs=3,
        observers=[lambda event: seen.append(optimizer.param_groups[0]["lr"]) if isinstance(event, StepDone) else None],
    )  # fmt: skip
    assert seen == by_factory
    assert [len(set(seen[i : i + 7])) for i in (0, 7, 14)] == [1, 1, 1]


def test_schedule_per_step_by_kind_and_as_said():
    onecycle = rates(schedule=lambda optimizer: OneCycleLR(optimizer, max_lr=1.0, total_steps=14))
    assert len(set(onecycle)) == 14
    said = rates(schedule=epochal.Schedule(lambda optimizer: StepLR(optimizer, 1, 0.9), per="step"))
    assert said == pytest.approx([0.1 * 0.9 ** (k + 1) for k in range(14)])


def test_plateau_is_fed_with_the_monitored_value():
    fed = []

    class Listening(ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            fed.append(metrics)
            super().step(metrics)

    result = fit(
        nn.Linear(64, 10), (X, Y), val=0.2, metrics=["accuracy"], monitor="val_accuracy", epochs=3,
        optimizer=torch.optim.SGD, schedule=lambda optimizer: Listening(optimizer, mode="max"),
    )  # fmt: skip
    assert fed == result.history["val_accuracy"]


def test_a_schedule_never_moves_before_the_optimizer(recwarn):
    bad = X.clone()
    bad[:64] = torch.nan
    fit(
        nn.Linear(64, 10), (bad, Y), optimizer=torch.optim.SGD, schedule="linear", nonfinite="skip", shuffle=False,
        epochs=1,
    )  # fmt: skip
    assert [str(warning.message) for warning in recwarn] == []


# epochs, max_steps, max_time


def test_epochs_max_steps_max_time_whichever_comes_first():
    assert fit(epochs=2).reason is epochal.StopReason.EPOCHS
    result = fit(epochs=2, max_steps=9)
    assert (result.reason, result.history.rows[-1]["step"], len(result.history)) == (epochal.StopReason.MAX_STEPS, 9, 2)
    result = fit(epochs=10**9, max_time=0.3)
    assert result.reason is epochal.StopReason.MAX_TIME
    assert result.history.rows[-1]["time"] < 5
    assert fit(max_time="1 s", max_steps=1).reason is epochal.StopReason.MAX_STEPS


# batch_size, shuffle, workers, accumulate, clip


def windows(**given):
    seen = []

    def step(state, window):
        seen.append(window)
        return epochal.StepResult(torch.zeros(()))

    fit(nn.Linear(64, 10), (X, Y, torch.arange(200)), step=step, epochs=2, **given)
    return seen


def test_batch_size_and_accumulate_make_the_windows():
    assert [window.sizes for window in windows(batch_size=60, accumulate=3)] == [[60, 60, 60], [20]] * 2


def test_shuffle():
    in_order = torch.cat([window.batches[0][2] for window in windows(shuffle=False)])
    assert in_order.tolist() == [*range(200), *range(200)]
    shuffled = torch.cat([window.batches[0][2] for window in windows(shuffle=True)])
    first, second = shuffled[:200].tolist(), shuffled[200:].tolist()
    assert sorted(first) == sorted(second) == list(range(200))
    assert first != second != list(range(200))


def test_workers_give_the_same_batches():
    weights = []
    for workers in (0, 1):
        torch.manual_seed(0)
        data = Subset(TensorDataset(X, Y), range(100))
        weights.append(fit(nn.Linear(64, 10), data, workers=workers).model.weight)
    assert torch.equal(*weights)


def test_clip_is_the_largest_gradient_norm():
    norms = []

    def note(event):
        if isinstance(event, StepDone):
            grads = [p.grad for p in model.parameters()]
            norms.append((event.result.grad_norm.item(), torch.nn.utils.get_total_norm(grads).item()))

    model = nn.Linear(64, 10)
    fit(model, (X, Y), clip=0.05, observers=[note])
    assert all(before > 0.05 for before, after in norms)
    assert [after for before, after in norms] == pytest.approx([0.05] * len(norms), rel=1e-3)


# target, and the kinds of data


def test_target_of_tables_and_paths(tmp_path):
    features, target = load_diabetes(return_X_y=True, as_frame=True)
    frame = features.assign(target=target)
    frame.to_csv(tmp_path / "d.csv", index=False)
    frame.to_parquet(tmp_path / "d.parquet")
    np.savez(tmp_path / "d.npz", x=features.to_numpy(), target=target.to_numpy()[:, None])
    losses = []
    for data in (frame, pl.from_pandas(frame), tmp_path / "d.csv", str(tmp_path / "d.parquet")):
        torch.manual_seed(0)
        result = fit(nn.Linear(10, 1), data, target="target", loss="mse", lr=0.01, epochs=3)
        losses.append(result.history.train_loss[-1])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    assert fit(nn.Linear(10, 1), tmp_path / "d.npz", target="target", loss="mse").predict(
        features.to_numpy()
    ).shape == (442, 1)


def test_a_table_is_divided_before_anything_is_learned_from_it():
    frame = pd.DataFrame({"a": np.arange(100) ** 2 * 0.37, "y": np.arange(100) * 0.5})
    result = fit(nn.Linear(1, 1), frame, val=0.3, target="y", loss="mse", epochs=1)
    train, val = split_indices(100, 0.3, seed=0)
    features = result.setting.encoding.features(pl.from_pandas(frame))[:, 0]
    assert features[train].mean() == pytest.approx(0, abs=1e-5) and features[train].std() == pytest.approx(1, rel=1e-5)
    assert abs(features.mean()) > 1e-3
    assert result.predict(frame.drop(columns="y")).shape == (100, 1)
    held_out = frame.iloc[val.tolist()]
    assert result.evaluate(held_out)["loss"] == pytest.approx(result.history.val_loss[-1])


def test_val_as_a_fraction_is_stratified_and_seeded():
    rare = torch.cat([torch.zeros(90, dtype=torch.long), torch.ones(10, dtype=torch.long)])
    held = []
    for _ in range(2):
        seen = []
        fit(
            nn.Linear(1, 2), (torch.arange(100.0)[:, None] / 100, rare), val=0.2, seed=None, epochs=1,
            metrics={"ones": lambda outputs, targets: targets.float().mean()},
            observers=[lambda event, seen=seen: seen.append(event.row) if isinstance(event, Evaluated) else None],
        )  # fmt: skip
        held.append(seen[0]["val_ones"])
        assert seen[0]["train_ones"] == pytest.approx(0.1)
    assert held == pytest.approx([0.1, 0.1])


def test_val_of_every_kind():
    x, y = X.clone(), Y.clone()
    for val in [(x, y), {"x": x, "y": y}, TensorDataset(x, y), DataLoader(TensorDataset(x, y), batch_size=64), 0.5]:
        assert len(fit(nn.Linear(64, 10), (X, Y), val=val).history.val_loss) == 2


# metrics


def test_metrics_of_every_kind():
    result = fit(
        nn.Linear(64, 10), (X, Y), val=(X.clone(), Y.clone()), lr=0.01,
        metrics=["accuracy", "confusion", "f1", MulticlassAccuracy(10, average="micro")],
    )  # fmt: skip
    row = result.history.rows[-1]
    scores = result.predict(X)
    assert row["val_accuracy"] == pytest.approx((scores.argmax(1) == Y).float().mean().item())
    assert row["val_accuracy"] == pytest.approx(row["val_multiclass_accuracy"])
    assert sum(map(sum, row["val_confusion"])) == 200
    named = fit(nn.Linear(64, 10), (X, Y), metrics={"top": lambda outputs, targets: outputs.max()})
    assert "train_top" in named.history.columns


# patience, early_stopping, restore_best, monitor


def worse_and_worse(**given):
    """Trains towards B and validates against -B: the first epoch is the best."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    return fit(model, (A, B), val=(A.clone(), -B), loss="mse", lr=0.05, **{"epochs": 30, **given})


def test_patience_stops_and_the_best_weights_are_restored():
    result = worse_and_worse(patience=3)
    assert result.reason is epochal.StopReason.EARLY_STOPPING
    assert result.message == "early stopping: val_loss has not improved for 3 evaluations"
    assert (len(result.history), result.best.epoch, result.restored) == (4, 1, True)
    assert result.evaluate((A, -B))["loss"] == pytest.approx(result.best.value)


def test_early_stopping_with_its_own_settings():
    stopping = epochal.EarlyStopping("train_loss", patience=2, min_delta=100.0, restore_best=False)
    result = worse_and_worse(early_stopping=stopping)
    assert (len(result.history), result.best.epoch, result.best.metric, result.restored) == (3, 1, "train_loss", False)
    assert stopping.counter == 0  # the plan's own value is not used up


@pytest.mark.parametrize("given", [{}, {"max_steps": 20}, {"max_time": 0.5, "epochs": 10**6}])
def test_restore_best_however_the_run_ended(given):
    result = worse_and_worse(**given)
    assert result.restored and result.evaluate((A, -B))["loss"] == pytest.approx(result.best.value)


def test_restore_best_when_the_run_is_broken_off_or_fails():
    for mistake in (None, KeyboardInterrupt(), RuntimeError("boom")):
        model, seen, caught = nn.Linear(1, 1), [], None
        plan = epochal.Plan(
            model, (A, B), val=(A.clone(), -B), loss="mse", lr=0.05, epochs=9, observers=[seen.append], seed=0
        )
        try:
            with plan.prepare() as run:
                for event in run:
                    if isinstance(event, Evaluated) and event.row["epoch"] == 4:
                        if mistake is None:
                            break
                        raise mistake
        except (KeyboardInterrupt, RuntimeError) as error:
            caught = error
        assert caught is mistake
        assert isinstance(seen[-1], Ended) and seen[-1].restored
        assert epochal.evaluate(model, (A, -B), loss="mse")["loss"] == pytest.approx(seen[-1].best.value)
        reasons = {None: "CLOSED", KeyboardInterrupt: "INTERRUPTED", RuntimeError: "FAILED"}
        assert seen[-1].reason.name == reasons[type(mistake) if mistake else None]


def test_restore_best_off_and_without_val_keeps_the_last_weights():
    kept = worse_and_worse(restore_best=False)
    assert not kept.restored and kept.evaluate((A, -B))["loss"] == pytest.approx(kept.history.val_loss[-1])
    assert not fit(nn.Linear(64, 10), (X, Y), lr=5.0).restored


@pytest.mark.parametrize("name", ["val_loss", "val/loss", "eval_loss", "valid_loss", "eval/loss", "valid/loss"])
def test_monitor_in_other_spellings(name):
    assert fit(nn.Linear(64, 10), (X, Y), val=0.2, monitor=name).best.metric == "val_loss"


def test_monitor_a_metric_takes_its_direction():
    result = fit(nn.Linear(64, 10), (X, Y), val=0.2, metrics=["accuracy"], monitor="val_accuracy", lr=0.01, epochs=5)
    assert result.best.value == max(result.history["val_accuracy"])


def test_a_nan_is_never_best():
    values = iter([torch.nan, 3.0, torch.nan, 2.0, torch.nan])

    def odd(outputs, targets):
        return torch.tensor(next(values) if len(outputs) == 50 else 0.0)

    result = fit(
        nn.Linear(64, 10), (X, Y), val=(X[:50].clone(), Y[:50].clone()), batch_size=100, epochs=5, metrics={"odd": odd},
        early_stopping=epochal.EarlyStopping("val_odd", patience=9, mode="min"),
    )  # fmt: skip
    assert (result.best.epoch, result.best.value) == (4, 2.0)


# evaluate_every, nonfinite


def test_evaluate_every():
    assert [row["step"] for row in fit(evaluate_every="3 steps", epochs=1).history] == [3, 6, 7]
    assert [row["epoch"] for row in fit(evaluate_every="2 epochs", epochs=5).history] == [2, 4, 5]


def test_nonfinite_stop_leaves_the_weights_as_they_were():
    bad = X.clone()
    bad[70] = torch.inf
    model, untouched = nn.Linear(64, 10), nn.Linear(64, 10)
    untouched.load_state_dict(model.state_dict())
    with pytest.raises(epochal.EpochalError, match="not finite; the weights were not touched") as caught:
        fit(model, (bad, Y), shuffle=False)
    assert "step 2, epoch 1, batch 2" in caught.value.where
    assert caught.value.exit_code == 3
    fit(untouched, (X[:64], Y[:64]), shuffle=False, epochs=1)
    assert torch.equal(model.weight, untouched.weight)


def test_nonfinite_skip_equals_a_run_without_those_updates():
    bad = X.clone()
    bad[70] = torch.nan
    torch.manual_seed(0)
    one = nn.Linear(64, 10)
    two = nn.Linear(64, 10)
    two.load_state_dict(one.state_dict())
    skipped = fit(one, (bad, Y), shuffle=False, nonfinite="skip", epochs=1)
    keep = torch.cat([torch.arange(64), torch.arange(96, 200)])
    without = fit(two, (X[keep], Y[keep]), shuffle=False, epochs=1)
    assert torch.equal(one.weight, two.weight)
    assert skipped.history.rows[0]["skipped"] == 1
    assert skipped.history.train_loss == without.history.train_loss


def test_an_error_that_has_a_place_of_its_own_is_recorded_all_the_same(tmp_path):
    def fail(event):
        if isinstance(event, epochal.StepDone):
            error = LookupError("no such picture")
            error.where, error.fix = tmp_path, ["look"]
            raise error

    with pytest.raises(LookupError):
        fit(nn.Linear(64, 10), (X, Y), epochs=1, observers=[fail], run="r")
    facts = json.loads(Path("r/run.json").read_text())
    told = {name: facts[name] for name in ("reason", "message", "where", "fix")}
    assert told == {"reason": "failed", "message": "no such picture", "where": None, "fix": None}


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_validation_that_is_not_finite_is_told_once_and_never_the_best(value):
    told = []
    val = X[:64].clone(), torch.randn(64, 1)
    val[1][5] = float(value)
    listening = [lambda event: told.append(event.message) if isinstance(event, epochal.Noted) else None]
    result = epochal.fit(
        nn.Linear(64, 1), (X, X[:, :1]), val=val, loss="mse", epochs=3, observers=listening, monitor="val_loss"
    )
    assert told == [f"val_loss is {value}: a sample of val, or what the model makes of it, is to blame"]
    assert result.best is None and not result.restored and len(result.history) == 3


def test_a_training_that_stands_still_is_told():
    bad, told = X.clone(), []
    bad[::32] = torch.nan  # a row of every batch
    listening = [lambda event: told.append(event.message) if isinstance(event, epochal.Noted) else None]
    model = nn.Linear(64, 10)
    fit(model, (bad, Y), shuffle=False, nonfinite="skip", epochs=2, observers=listening)
    assert told == ["every update since the last evaluation was left out: the weights stand still"] * 2
    told.clear()
    bad[::32][1:] = 0.0
    fit(model, (bad, Y), shuffle=False, nonfinite="skip", epochs=2, observers=listening)
    assert told == []


# device, precision, compile, strategy, seed


def test_device_and_strategy():
    result = fit(device="cpu", strategy="auto")
    assert next(result.model.parameters()).device.type == "cpu"


@pytest.mark.cuda
def test_device_auto_takes_the_accelerator():
    result = fit(nn.Linear(64, 10), (X, Y), val=0.2, lr=0.01, epochs=5, metrics=["accuracy"], device="auto")
    assert next(result.model.parameters()).device.type == "cuda"
    assert result.history.train_loss[-1] < result.history.train_loss[0]
    assert result.predict(X).device.type == "cpu"


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_on_cuda(precision):
    loader = DataLoader(TensorDataset(X, Y), batch_size=32, pin_memory=True, num_workers=2)
    result = fit(nn.Linear(64, 10), loader, val=loader, lr=0.01, epochs=4, precision=precision, clip=1.0, device="cuda")
    assert result.history.val_loss[-1] < result.history.val_loss[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision(precision):
    types = set()
    model = nn.Linear(64, 10)
    model.register_forward_hook(lambda module, inputs, outputs: types.add(outputs.dtype))
    plan = epochal.Plan(
        model, (X, Y), loss="cross_entropy", precision=precision, lr=0.01, epochs=4, val=0.2, clip=1.0, observers=(),
        schedule="linear",
    )  # fmt: skip
    with plan.prepare() as run:
        for _ in run:
            pass
    assert types == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert (run.state.scaler is not None) == (precision == "fp16")
    assert run.result.history.val_loss[-1] < run.result.history.val_loss[0]
    assert model.weight.dtype == torch.float32


def test_seed_makes_two_runs_equal_and_none_leaves_the_generators_alone():
    weights = []
    for _ in range(2):
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 10))
        nn.init.constant_(model[1].weight, 0.01)
        nn.init.zeros_(model[1].bias)
        weights.append(fit(model, (X, Y), seed=7).model[1].weight)
    assert torch.equal(*weights)
    loader = DataLoader(TensorDataset(X, Y), batch_size=50, generator=torch.Generator())
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    fit(nn.Linear(64, 10).requires_grad_(), loader, seed=None)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]


# run, resume, save, observers, step


def test_run_writes_a_folder_and_nothing_is_written_without_it(tmp_path):
    import csv
    import json
    import tomllib

    from safetensors.torch import load_file

    fit(nn.Linear(64, 10), (X, Y))
    assert list(tmp_path.iterdir()) == []
    result = fit(nn.Linear(64, 10), (X, Y), val=0.2, metrics=["accuracy", "confusion"], run="runs/one", epochs=3)
    folder = tmp_path / "runs" / "one"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "checkpoints", "config.toml", "journal.jsonl", "metrics.jsonl", "model.safetensors", "results.csv",
        "run.json",
    ]  # fmt: skip
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["status"], facts["reason"], facts["best"]["epoch"]) == ("ended", "epochs", result.best.epoch)
    assert facts["environment"]["torch"] == torch.__version__
    config = tomllib.loads((folder / "config.toml").read_text())
    assert (config["model"], config["loss"], config["epochs"]) == ("Linear", "cross_entropy", 3)
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [float(row["val_loss"]) for row in rows] == result.history.val_loss
    events = [json.loads(line)["event"] for line in (folder / "journal.jsonl").read_text().splitlines()]
    events = [event for event in events if event != "found"]
    assert (events[:2], events[-2:]) == (["started", "saved"], ["saved", "ended"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{name: value for name, value in row.items() if name != "time"} for row in result.history]
    assert torch.equal(load_file(folder / "model.safetensors")["weight"], result.model.weight)


def test_save_and_resume_at_the_edge_of_an_epoch(tmp_path):
    def model():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 10))

    given = {
        "val": (X.clone(), Y.clone()), "optimizer": "adamw", "schedule": "step", "metrics": ["accuracy"],
        "patience": 50, "loss": "cross_entropy", "seed": 3, "observers": (),
    }  # fmt: skip
    straight = epochal.fit(model(), (X, Y), epochs=6, run="runs/straight", **given)
    saving = epochal.Saving("1 epoch", keep=2, share=None)
    epochal.fit(model(), (X, Y), epochs=3, run="runs/broken", save=saving, **given)
    assert len(list((tmp_path / "runs/broken/checkpoints").iterdir())) == 2
    resumed = epochal.fit(model(), (X, Y), epochs=6, run="runs/broken", resume=True, **given)
    for one, two in zip(straight.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(one, two)
    plain = [[{k: v for k, v in row.items() if k != "time"} for row in r.history] for r in (straight, resumed)]
    assert plain[0] == plain[1]


def test_save_every_steps(tmp_path):
    fit(nn.Linear(64, 10), (X, Y), run="r", save=epochal.Saving("5 steps", share=None), epochs=2)
    assert sorted(path.name for path in (tmp_path / "r/checkpoints").iterdir()) == [
        "step-00000005", "step-00000010", "step-00000014"
    ]  # fmt: skip
    fit(nn.Linear(64, 10), (X, Y), run="s", save="5 steps", epochs=2)  # as far as it costs little time
    assert (tmp_path / "s/checkpoints/step-00000014").is_dir()


def test_observers_see_every_event_and_may_stop():
    seen = []

    def watch(event):
        seen.append(type(event))
        if isinstance(event, StepDone) and event.step == 3:
            return epochal.Stop("three are enough")
        return None

    result = fit(nn.Linear(64, 10), (X, Y), observers=[watch])
    assert seen == [Started, StepDone, StepDone, StepDone, Evaluated, Ended]
    assert (result.reason, result.message) == (epochal.StopReason.ASKED, "three are enough")
    assert Saved not in seen


def test_step_replaces_the_maths_of_an_update():
    def sign_descent(state, window):
        x, y = window.batches[0]
        loss = nn.functional.cross_entropy(state.model(x), y)
        for p, g in zip(state.model.parameters(), torch.autograd.grad(loss, list(state.model.parameters()))):
            p.data -= 0.01 * g.sign()
        return epochal.StepResult(loss.detach(), weight=window.samples, values={"size": torch.tensor(float(len(x)))})

    result = fit(
        nn.Linear(64, 10),
        (X, Y),
        step=sign_descent,
        val=(X.clone(), Y.clone()),
        loss="cross_entropy",
        metrics=["accuracy"],
    )
    assert result.history.val_loss[-1] < result.history.val_loss[0]
    assert result.history.rows[0]["train_size"] == pytest.approx((6 * 32 * 32 + 8 * 8) / 200)
    assert result.history.rows[0]["lr"] is None
    with_optimizer = fit(nn.Linear(64, 10), (X, Y), step=sign_descent, optimizer="adam")
    assert with_optimizer.history.rows[0]["lr"] == 0.001


def test_a_step_without_a_loss():
    def nothing(state, window):
        return epochal.StepResult(torch.ones(()))

    assert fit(nn.Linear(64, 10), (X, Y), step=nothing).history.train_loss == [1.0, 1.0]


@pytest.mark.slow
def test_compile():
    eager = fit(nn.Linear(64, 10), (X, Y), seed=1)
    model = nn.Linear(64, 10)
    assert type(fit(model, (X, Y), compile=True, seed=1).model) is nn.Linear
    assert "_orig_mod" not in "".join(model.state_dict())
    assert len(eager.history) == 2


# the levels: Plan, prepare, check


def test_plan_is_fit_and_its_run_can_be_owned():
    torch.manual_seed(0)
    one = epochal.Plan(nn.Linear(64, 10), (X, Y), loss="cross_entropy", epochs=2, observers=(), seed=0).fit()
    events = []
    torch.manual_seed(0)
    with epochal.Plan(nn.Linear(64, 10), (X, Y), loss="cross_entropy", epochs=2, observers=(), seed=0).prepare() as run:
        for event in run:
            events.append(event)
    assert torch.equal(one.model.weight, run.result.model.weight)
    assert [type(event).__name__ for event in events].count("StepDone") == 14


def test_check_finds_mistakes_and_trains_nothing(tmp_path):
    model = nn.Linear(64, 10)
    before = model.weight.clone()
    plan = epochal.Plan(model, (X, Y), loss="cross_entropy", epochs=1, run="runs/x")
    assert [one for one in plan.check() if one.level != "info"] == []
    assert torch.equal(model.weight, before)
    assert list(tmp_path.iterdir()) == []
    found = plan.replace(model=nn.Linear(64, 10).requires_grad_(False)).check()
    assert [(one.code, one.level, one.what) for one in found] == [
        ("all-frozen", "error", "the model has no parameter to train.")
    ]


# what goes wrong later than at the start


def test_a_step_that_returns_something_else():
    for wrong, name in ((1.0, "float"), (epochal.StepResult(1.0), "float")):
        with pytest.raises(epochal.EpochalError) as caught:
            fit(nn.Linear(64, 10), (X, Y), step=lambda state, window, wrong=wrong: wrong)
        assert caught.value.describe() == (
            f"PlanError: the step returned {name}.\n"
            "  where: step=<lambda>\n"
            "  fix:   return epochal.StepResult(loss), with the loss as a scalar tensor"
        )


def test_evaluating_without_a_loss():
    result = fit(nn.Linear(64, 10), (X, Y), step=lambda state, window: epochal.StepResult(torch.ones(())))
    with pytest.raises(epochal.EpochalError, match="nothing to evaluate with"):
        result.evaluate((X, Y))


def test_a_column_that_is_no_number_cannot_decide():
    stopping = epochal.EarlyStopping("train_confusion", mode="max")
    with pytest.raises(epochal.EpochalError, match="there is no number 'train_confusion' to monitor"):
        fit(nn.Linear(64, 10), (X, Y), metrics=["confusion"], early_stopping=stopping)


def test_a_plateau_looks_at_evaluations():
    with pytest.raises(epochal.EpochalError, match="a plateau looks at evaluations, not at steps"):
        epochal.Schedule("plateau", per="step")


def test_the_size_of_a_batch_is_that_of_its_named_target():
    series = {"x": torch.randn(5, 12, 2), "price": torch.randn(12, 1)}  # time first

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x):
            return self.layer(x[-1])

    loader = DataLoader([series] * 3, batch_size=None)
    result = fit(Last(), loader, target="price", loss="mse", epochs=1)
    with epochal.Plan(Last(), loader, target="price", loss="mse", epochs=1, observers=()).prepare() as run:
        for _ in run:
            pass
    assert run.state.progress.samples == 36
    assert len(result.history) == 1


def test_ignore_silences_what_the_doctor_finds():
    given = {"loss": "cross_entropy", "epochs": 1, "seed": 0, "observers": ()}
    with pytest.raises(epochal.FaultError, match="the validation is made on data that are trained on") as caught:
        epochal.fit(nn.Linear(64, 10), (X, Y), val=(X, Y), **given)
    assert caught.value.finding.code == caught.value.code == "val-in-train"
    for ignore in (["val-in-train"], ["val-*"], ("*",)):
        assert epochal.fit(nn.Linear(64, 10), (X, Y), val=(X, Y), ignore=ignore, **given).findings == ()
    with pytest.raises(epochal.UnknownNameError, match="'val-in-trian' is not a known finding") as unknown:
        epochal.Plan(nn.Linear(64, 10), (X, Y), ignore=["val-in-trian"], **given)
    assert "did you mean 'val-in-train'?" in unknown.value.fix
    with pytest.raises(epochal.PlanError, match="ignore must be a list of codes"):
        epochal.Plan(nn.Linear(64, 10), (X, Y), ignore="val-in-train", **given)
