"""R12, small: what is not finite stops the run at that very step, is traced to what made it, and harms nothing."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import epochal
from epochal.data.window import windows
from epochal.objective import Custom, Supervised
from epochal.step import Update

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
USUAL = {"loss": "mse", "epochs": 2, "batch_size": 10, "shuffle": False, "seed": 0, "observers": ()}


class Apply(nn.Module):
    """A layer that is one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Halted(torch.autograd.Function):
    """Goes through; on the way back, the gradient of the rows that are above 3 somewhere becomes infinite."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.masked_fill(ctx.rows[:, None], torch.inf), None


def planted(row, value, source=X):
    bad = source.clone()
    bad[row, 0] = value
    return bad


def net(*middle):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), *middle, nn.Linear(6, 1))


def bits(model):
    return [value.clone() for value in model.state_dict().values()]


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two))


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(part, kind)) for part in model.modules() for kind in kinds)


def stopped(model, train, **options):
    """The error of a run that stops, and the model as an equal run leaves it that ends just before."""
    straight = copy.deepcopy(model)
    with pytest.raises(epochal.EpochalError, match="the weights were not touched") as caught:
        epochal.fit(model, train, **{**USUAL, **options})
    step = int(caught.value.where.split()[1].strip(","))
    if step:
        epochal.fit(straight, train, **{**USUAL, "max_steps": step, **options})
    assert same(bits(model), bits(straight))
    assert hooks(model) == 0 and all(p.grad is None for p in model.parameters())
    assert caught.value.exit_code == 3
    return caught.value


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_in_the_inputs_names_its_rows(value):
    bad = planted(25, value)
    bad[[21, 28], 3] = value
    error = stopped(net(), (bad, Y))
    assert error.what == "the inputs hold a value that is not finite; the weights were not touched."
    assert error.where.startswith("step 2, epoch 1, batch 2; rows 1, 5, 8 of it; loss nan, gradient norm nan, lr 0.001")
    assert error.fix == 'mend or leave out these rows, or use nonfinite="skip"'


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_in_the_targets_names_its_rows(value):
    error = stopped(net(), (X, planted(39, value, Y)))
    assert error.what == "the targets hold a value that is not finite; the weights were not touched."
    assert error.where.startswith(f"step 3, epoch 1, batch 3; row 9 of it; loss {value:g}, gradient norm")


def test_many_rows_are_counted_and_a_micro_batch_is_named():
    bad = X.clone()
    bad[15:25] = torch.nan
    error = stopped(nn.Linear(4, 1), (bad, Y), batch_size=15, accumulate=2)
    assert (
        "step 0, epoch 1, batch 0, micro-batch 1; rows 0, 1, 2, 3, 4, 5, 6, 7 and 2 more of it; loss nan" in error.where
    )


def test_an_entry_of_a_dict_is_named_and_one_of_several_inputs_too():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, a, b):
            return self.layer(a) + self.layer(b)

    assert stopped(Two(), {"a": X, "b": planted(11, torch.nan), "y": Y}).what.startswith("input 'b' holds a value")
    error = stopped(Two(), (planted(11, torch.nan), X, Y))
    assert error.what.startswith("input 0 holds a value") and "row 1 of it;" in error.where


def test_the_first_layer_is_named_and_not_those_after_it():
    model = net(nn.Sequential(nn.Tanh(), Apply(torch.log)), nn.Tanh())
    error = stopped(model, (X, Y))
    assert error.what == "layer '2.1' (Apply) made the first value that is not finite; the weights were not touched."
    entered = torch.tanh(model[:2](X[:10]))
    rows = (entered <= 0).any(1).nonzero().flatten().tolist()
    assert "; ".join(error.where.split("; ")[1:2]) == "rows " + ", ".join(map(str, rows[:8])) + (
        f" and {len(rows) - 8} more of it" if len(rows) > 8 else " of it"
    )


def test_the_step_is_run_again_with_the_same_dropout():
    kept = []

    def rooted(x):
        kept.append((x == 0).any(1).nonzero().flatten().tolist())
        return torch.log(x.abs())

    error = stopped(net(nn.Dropout(0.02), Apply(rooted)), (X, Y))
    first = next(rows for rows in kept if rows)
    assert f"row{'s' if len(first) > 1 else ''} {', '.join(map(str, first))} of it; loss" in error.where
    assert "layer '3' (Apply)" in error.what


def test_a_model_that_makes_it_between_its_layers_is_named_itself():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)

        def forward(self, x):
            return self.last(torch.log(self.first(x).abs() * 0))

    model = nn.Sequential(Between())
    assert stopped(model, (X, Y)).what.startswith("layer '0' (Between) made the first value that is not finite")


def logarithm(outputs, targets):
    return (outputs - targets + 9).log().mean()


def quotient(outputs, targets):
    return (F.mse_loss(outputs, targets, reduction="none") / (targets < 9)).mean()


@pytest.mark.parametrize("loss", [logarithm, quotient])
def test_a_loss_is_named_with_its_rows(loss):
    model, targets = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()), Y.sigmoid()
    targets[32] = 99.0
    error = stopped(model, (X, targets), loss=loss)
    assert error.what == "the loss made the first value that is not finite; the weights were not touched."
    assert "step 3, epoch 1, batch 3; row 2 of it; loss " in error.where


def test_the_layer_whose_backward_pass_makes_it_is_named():
    model = net(nn.Sequential(nn.ReLU(inplace=True), Apply(lambda x: Halted.apply(x, x[:, 1] > 1.8))), nn.Tanh())
    error = stopped(model, (X, Y))
    assert error.what.startswith("the backward pass of layer '2.1' (Apply) made the first gradient that is not finite")
    assert "row" in error.where and "gradient norm nan" in error.where and "loss nan" not in error.where


def test_the_backward_pass_of_the_loss_or_of_a_models_own_code_is_named():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)

        def forward(self, x):
            return self.last((self.first(x) * 0).abs().sqrt())

    assert "backward pass of the forward of Between made" in stopped(Between(), (X, Y)).what
    error = stopped(net(), (X, Y), loss=lambda outputs, targets: (outputs - outputs).abs().sqrt().mean())
    assert "backward pass of the loss made" in error.what


def test_a_gradient_that_overflows_in_a_weight_is_named_by_it():
    model = nn.Sequential(nn.Linear(4, 1))
    nn.init.constant_(model[0].weight, 1e-12)
    error = stopped(model, (X.abs() * 1e30, Y), loss=lambda outputs, targets: (outputs * 1e10 - targets).mean())
    assert error.what == "the gradient of '0.weight' is not finite; the weights were not touched."


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named_at_the_next_step(value):
    model = net()

    def plant(event):
        if isinstance(event, epochal.StepDone) and event.step == 2:
            with torch.no_grad():
                model[2].weight[0, 3] = value

    with pytest.raises(epochal.EpochalError) as caught:
        epochal.fit(model, (X, Y), **{**USUAL, "observers": [plant]})
    assert caught.value.what == "the weight '2.weight' is not finite; the weights were not touched."
    assert caught.value.where.startswith("step 2, epoch 1, batch 2; loss")
    assert torch.isfinite(model[0].weight).all() and hooks(model) == 0


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"clip": 0.1}, {"precision": "fp16"}, {"accumulate": 2}])
def test_it_is_found_whatever_the_options(options):
    error = stopped(net(nn.Dropout(0.2)), (planted(25, torch.nan), Y), **options)
    assert error.what.startswith("the inputs hold")


def test_frozen_layers_and_an_objective_of_ones_own():
    model = net(Apply(torch.log))
    model[0].requires_grad_(False)
    given = {"loss": None, "objective": lambda model, batch: F.mse_loss(model(batch["x"]), batch["y"])}
    assert stopped(model, {"x": X, "y": Y}, **given).what.startswith("layer '2' (Apply)")
    error = stopped(net(), {"x": planted(3, torch.nan), "y": Y}, **given)
    assert error.what.startswith("part 'x' of the batch holds") and "row 3 of it;" in error.where


def test_markers_of_missing_values_that_the_model_masks_stop_nothing():
    missing = planted(slice(5, 30), torch.nan)
    result = epochal.fit(net(), (missing, Y), **{**USUAL, "loss": None}, objective=lambda model, batch: F.mse_loss(
        model(batch[0].nan_to_num()), batch[1]
    ))  # fmt: skip
    assert result.reason is epochal.StopReason.EPOCHS
    error = stopped(
        net(Apply(torch.log)), (missing, Y), loss=None,
        objective=lambda model, batch: F.mse_loss(model(batch[0].nan_to_num()), batch[1]),
    )  # fmt: skip
    assert error.what.startswith("layer '2' (Apply)"), "the markers are not to blame for what a layer did"


def test_what_does_not_happen_again_and_a_diagnosis_that_fails_leave_the_plain_error():
    calls = []

    def once(model, batch):
        calls.append(1)
        return F.mse_loss(model(batch[0]), batch[1]) * (torch.nan if len(calls) == 3 else 1)

    def fails(model, batch):
        calls.append(1)
        assert len(calls) < 4
        return F.mse_loss(model(batch[0]), batch[1]) * (torch.nan if len(calls) == 3 else 1)

    for objective, words in ((once, "but it was when the step was run again"), (fails, "raised AssertionError")):
        calls.clear()
        model = net()
        with pytest.raises(epochal.EpochalError, match="the loss is not finite") as caught:
            epochal.fit(model, (X, Y), **{**USUAL, "loss": None}, objective=objective)
        assert words in caught.value.what and caught.value.where.startswith("step 2, epoch 1, batch 2; loss nan, ")
        assert hooks(model) == 0 and all(torch.isfinite(value).all() for value in bits(model))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("options", [{}, {"clip": 0.5}, {"precision": "bf16"}, {"precision": "fp16"}])
def test_skip_equals_bit_for_bit_a_run_without_those_batches(options, optimizer):
    bad = planted([12, 13, 30], torch.nan)
    one = net(nn.ReLU(), nn.Dropout(0.3))
    two = copy.deepcopy(one)
    options = {**USUAL, "optimizer": optimizer, "lr": 0.01, **options}
    skipped = epochal.fit(one, (bad, Y), nonfinite="skip", **options)
    after = torch.get_rng_state()
    keep = [*range(10), *range(20, 30)]
    without = epochal.fit(two, (X[keep], Y[keep]), **options)
    assert same(bits(one), bits(two))
    assert skipped.history.train_loss == without.history.train_loss
    assert torch.equal(after, torch.get_rng_state()), "dropout must not have advanced"
    counts = [[row.get("skipped", 0) for row in result.history] for result in (skipped, without)]
    assert counts[0] == [count + 2 for count in counts[1]], "of fp16, a scale that is too high at first skips too"


def test_skip_leaves_an_fp16_scale_as_it_is():
    model = nn.Linear(4, 1)
    state = epochal.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step = Update(Supervised(nn.MSELoss()), model, torch.device("cpu"), precision="fp16", skip_nonfinite=True)
    for x, applied in ((X, True), (planted(1, torch.nan), False), (X, True)):
        (window,) = windows([(x, Y)])
        assert step(state, window).applied is applied
        state.progress.tick(window)
        assert state.scaler.get_scale() == 2.0**10
    assert state.scaler.state_dict()["_growth_tracker"] == 2


def test_looking_changes_no_bit():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        info = torch.finfo(dtype)
        values = torch.tensor(
            [-0.0, 0.0, info.tiny, info.tiny / 4, -info.tiny / 4, 1.5, info.max, info.min], dtype=dtype
        )
        model = nn.Linear(8, 1, bias=False).to(dtype)
        state = epochal.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.0))
        step = Update(Custom(lambda model, batch: (model.weight * batch).sum()), model, torch.device("cpu"))
        (window,) = windows([values[None]])
        step(state, window)
        as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        assert torch.equal(model.weight.grad[0].view(as_bits), values.view(as_bits))
        model.weight.data.zero_()
        loss = Custom(lambda model, batch: -(model.weight * batch).sum().abs() * 0.0)
        result = Update(loss, model, torch.device("cpu"))(state, windows([-torch.ones(1, 8, dtype=dtype)]).__next__())
        assert result.loss == 0 and torch.signbit(result.loss)


# reading the flag late, as on CUDA


def late_update(model, optimizer, loss=None):
    step = Update(Supervised(loss or nn.MSELoss()), model, torch.device("cpu"))
    step._reads_late = True  # what a CUDA device decides
    return step, epochal.TrainState(model, optimizer)


def run_steps(step, state, batches):
    """The number of steps done before an error, and the error."""
    for number, window in enumerate(windows(batches)):
        try:
            step(state, window)
        except epochal.EpochalError as error:
            return number, error
        state.progress.tick(window)
    try:
        step.settle(state)
    except epochal.EpochalError as error:
        return len(batches), error
    return len(batches), None


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("bad", [1, 2, 3])
def test_read_late_the_weights_are_untouched_and_the_right_step_is_named(kind, bad):
    batches = list(zip(planted(10 * bad + 4, torch.nan).split(10), Y.split(10)))
    left, options = [], {"momentum": 0.9} if kind is torch.optim.SGD else {}
    for given in (batches, batches[:bad]):
        model = net(nn.Dropout(0.3))
        step, state = late_update(model, kind(model.parameters(), lr=0.1, fused=True, **options))
        step._reads_late = given is batches
        done, error = run_steps(step, state, given)
        moments = [value for one in state.optimizer.state.values() for value in one.values()]
        left.append([*bits(model), *moments, torch.get_rng_state()])
        if given is batches:
            assert done == min(bad + 1, 4), "found during the step that follows, or at the end"
            assert error.what.startswith("the inputs hold") and hooks(model) == 0
            assert f"step {bad}, epoch 1, batch {bad}; row 4 of it; loss nan" in error.where
    assert same(*left), "all is as it was before the step that was not finite"


def test_read_late_finite_updates_give_the_same_bits():
    batches = list(zip(X.split(10), Y.split(10)))
    left = []
    for late in (True, False):
        model = net(nn.Dropout(0.3))
        step, state = late_update(model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True))
        step._reads_late = late
        assert run_steps(step, state, batches) == (4, None)
        left.append([*bits(model), torch.get_rng_state()])
    assert same(*left)


def test_read_late_a_window_in_which_nothing_is_counted_is_no_error():
    targets = torch.arange(40) % 3
    targets[10:20] = -100
    model = nn.Linear(4, 3)
    step, state = late_update(model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True), nn.CrossEntropyLoss())
    assert run_steps(step, state, list(zip(X.split(10), targets.split(10)))) == (4, None)
    late = bits(model)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    step, state = late_update(model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True), nn.CrossEntropyLoss())
    step._reads_late = False
    run_steps(step, state, list(zip(X.split(10), targets.split(10))))
    assert same(late, bits(model))


@pytest.mark.parametrize("empty", [slice(0, 20), slice(10, 20)])
def test_a_window_of_weight_0_moves_nothing_however_it_is_read(empty):
    counts = torch.ones(40, 1)
    counts[empty] = 0

    def objective(model, batch):
        errors = (model(batch[0]) - batch[1]).square() * batch[2]
        return epochal.Loss(errors.sum() / batch[2].sum(), batch[2].sum())

    left = []
    for late in (True, False):
        model = net()
        step = Update(Custom(objective), model, torch.device("cpu"))
        step._reads_late = late
        state = epochal.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True))
        with torch.autograd.set_detect_anomaly(True):
            batches = list(zip(X.split(10), Y.split(10), counts.split(10)))
            assert run_steps(step, state, batches) == (4, None)
        left.append(bits(model))
    model = net()  # as if the windows had never been there
    step = Update(Custom(objective), model, torch.device("cpu"))
    state = epochal.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True))
    assert run_steps(step, state, [batch for batch in batches if batch[2].any()])[1] is None
    assert same(left[0], left[1]) and same(left[0], bits(model))


def test_an_optimizer_that_cannot_leave_out_an_update_is_read_at_once():
    batches = list(zip(planted(14, torch.nan).split(10), Y.split(10)))
    model = net()
    step, state = late_update(model, torch.optim.RMSprop(model.parameters(), lr=0.1))
    done, error = run_steps(step, state, batches)
    assert done == 1 and "step 1, epoch 1, batch 1; row 4 of it" in error.where


@pytest.mark.cuda
def test_on_cuda_no_update_waits_for_the_device():
    device = torch.device("cuda")
    model = net(nn.Dropout(0.3)).to(device)
    state = epochal.TrainState(model, torch.optim.AdamW(model.parameters(), fused=True))
    step = Update(Supervised(nn.MSELoss()), model, device, clip=1.0)
    batches = [(x.to(device), y.to(device)) for x, y in zip(X.split(10), Y.split(10))]
    for number, window in enumerate(windows(batches * 3)):
        torch.cuda.set_sync_debug_mode("error" if number >= 4 else "default")
        try:
            step(state, window)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        state.progress.tick(window)
    step.settle(state)


def test_random_plants():
    """A value planted anywhere: the run stops at its step, names its row, and all weights are finite."""
    draw = random.Random(3)
    for _ in range(12):
        row, value, into_targets = draw.randrange(40), draw.choice([torch.nan, torch.inf]), draw.random() < 0.5
        train = (X, planted(row, value, Y)) if into_targets else (planted(row, value), Y)
        model = net(nn.Dropout(0.2))
        error = stopped(model, train)
        assert f"step {row // 10}, epoch 1, batch {row // 10}; row {row % 10} of it; loss" in error.where
        assert error.what.startswith("the targets hold" if into_targets else "the inputs hold")
        assert all(torch.isfinite(weight).all() for weight in bits(model))
