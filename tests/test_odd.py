"""Odd but right: things that real models do, which a training loop must not stumble over."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import epochal

QUIET = {"observers": (), "seed": 0}


def digits(count=300):
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X[:count] / 16, dtype=torch.float32), torch.tensor(y[:count])


def line():
    X = torch.linspace(-1, 1, 96)[:, None]
    return X, 3 * X + 0.5


def falls(result):
    losses = result.history.train_loss
    return losses[-1] < 0.7 * losses[0]


class ScaledLoss(nn.Module):
    """A loss with a parameter of its own: the log of the noise of a Gaussian."""

    def __init__(self):
        super().__init__()
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, outputs, targets):
        return (((outputs - targets) / self.log_noise.exp()) ** 2).mean() / 2 + self.log_noise


def test_parameters_inside_the_loss_belong_to_the_state():
    loss = ScaledLoss()
    with epochal.Plan(nn.Linear(1, 1), line(), loss=loss, epochs=20, lr=0.05, **QUIET).prepare() as run:
        for _ in run:
            pass
    assert loss.log_noise.item() < -0.3  # it was trained: the fit is far better than noise 1
    assert run.state.state_dict()["loss"].keys() == {"log_noise"}


def test_the_best_weights_of_a_loss_module_are_restored_with_the_model():
    loss, seen = ScaledLoss(), []

    def note(event):
        if type(event).__name__ == "Evaluated":
            seen.append((event.row["val_loss"], loss.log_noise.item()))

    X, y = line()
    epochal.fit(nn.Linear(1, 1), (X, y), val=(X.clone(), -y), loss=loss, epochs=8, lr=0.05, observers=[note], seed=0)
    assert loss.log_noise.item() == min(seen)[1]


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(64, 16)
            self.decode = nn.Linear(16, 64)
            self.twin = nn.Linear(64, 16)
            self.twin.weight = self.encode.weight

        def forward(self, x):
            return self.decode(torch.relu(self.encode(x) + self.twin(x)))

    X, _ = digits()
    model = Tied()
    result = epochal.fit(model, (X, X), val=(X.clone(), X.clone()), loss="mse", epochs=4, lr=0.01, **QUIET)
    assert model.twin.weight is model.encode.weight
    assert falls(result)
    size = result.save(tmp_path / "model.safetensors").stat().st_size
    assert size < 4 * (64 * 16 * 2 + 200) + 2000  # two matrices, not three
    from epochal.checkpoint.weights import load_weights

    loaded = load_weights(tmp_path / "model.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    assert torch.equal(loaded["twin.weight"], model.encode.weight)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_sparse_gradients(clip, accumulate):
    words = torch.randint(0, 50, (200, 3), generator=torch.Generator().manual_seed(0))
    y = (words.sum(1, keepdim=True) > 75).float()
    model = nn.Sequential(nn.EmbeddingBag(50, 8, sparse=True), nn.Linear(8, 1))
    result = epochal.fit(
        model, (words, y), loss="bce_with_logits", optimizer="sgd", lr=0.5 if clip is None else 2.0, epochs=15,
        clip=clip, accumulate=accumulate, **QUIET,
    )  # fmt: skip
    assert result.history.train_loss[-1] < result.history.train_loss[0]
    assert model[0].weight.grad is None or model[0].weight.grad.is_sparse


def test_clipping_sparse_gradients_uses_the_norm_over_all():
    torch.manual_seed(0)
    sparse, dense = nn.Embedding(10, 4, sparse=True), nn.Embedding(10, 4)
    dense.load_state_dict(sparse.state_dict())
    words, y = torch.tensor([1, 1, 2, 7]), torch.full((4, 4), 30.0)
    for model in (sparse, dense):
        epochal.fit(model, (words, y), loss="mse", optimizer="sgd", lr=1.0, max_steps=3, clip=0.1, **QUIET)
    torch.testing.assert_close(sparse.weight, dense.weight)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_complex_weights(optimizer):
    class Rotation(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor([1.0 + 0.0j]))

        def forward(self, z):
            return z * self.factor

    z = torch.randn(64, 1, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    model = Rotation()
    distance = lambda outputs, targets: (outputs - targets).abs().square().mean()
    epochal.fit(model, (z, 1j * z), loss=distance, optimizer=optimizer, lr=0.1, epochs=40, clip=5.0, **QUIET)
    assert abs(model.factor.item() - 1j) < 0.05


def test_a_conjugated_complex_weight():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def forward(self, z):
            return (z @ self.w.conj()).real

    z = torch.randn(64, 4, dtype=torch.complex64)
    assert falls(epochal.fit(Inner(), (z, z[:, 0].imag), loss="mse", optimizer="sgd", lr=0.05, epochs=20, **QUIET))


def test_packed_sequences_and_dict_batches():
    class Series(Dataset):
        def __init__(self, count):
            rng = np.random.default_rng(0)
            self.items = [torch.tensor(rng.normal(size=(n, 2)), dtype=torch.float32) for n in rng.integers(2, 9, count)]

        def __len__(self):
            return len(self.items)

        def __getitem__(self, i):
            return self.items[i], self.items[i].sum(0)[:1]

    def collate(samples):
        return {
            "series": pack_sequence([x for x, _ in samples], enforce_sorted=False),
            "target": torch.stack([y for _, y in samples]),
        }

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(2, 16, batch_first=True), nn.Linear(16, 1)

        def forward(self, series):
            assert isinstance(series, PackedSequence)
            hidden, lengths = pad_packed_sequence(self.rnn(series)[0], batch_first=True)
            return self.head(hidden[torch.arange(len(lengths)), lengths - 1])

    loader = DataLoader(Series(103), batch_size=16, collate_fn=collate)
    result = epochal.fit(Reader(), loader, val=loader, ignore=["val-in-train"], loss="mse", lr=0.01, epochs=10, **QUIET)
    assert falls(result)
    assert result.history.rows[0]["step"] == 7
    assert result.predict(loader).shape == (103, 1)
    # a mean over samples: 103 = 6 × 16 + 7
    parts = [((result.model(b["series"]) - b["target"]) ** 2).mean(1) for b in loader]
    assert result.evaluate(loader)["loss"] == pytest.approx(torch.cat(parts).mean().item(), rel=1e-5)


def test_several_inputs_by_position_and_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, a, b):
            return self.layer(torch.cat([a, b], 1))

    X, _ = line()
    y = X + 2 * X**2
    for data in [(X, X**2, y), {"b": X**2, "a": X, "y": y}]:
        result = epochal.fit(Two(), data, loss="mse", lr=0.1, epochs=40, **QUIET)
        assert result.history.train_loss[-1] < 0.01
        inputs = (X, X**2) if isinstance(data, tuple) else {"a": X, "b": X**2}
        assert result.predict(inputs).shape == y.shape
        assert torch.equal(result.predict(inputs), result.predict(data))


def test_several_outputs():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(64, 32), nn.Linear(32, 10), nn.Linear(32, 1)

        def forward(self, x):
            hidden = torch.relu(self.body(x))
            return self.a(hidden), {"even": self.b(hidden)}

    X, y = digits()

    def both(outputs, targets):
        digit, rest = outputs
        even = (targets % 2 == 0).float()[:, None]
        return nn.functional.cross_entropy(digit, targets) + nn.functional.binary_cross_entropy_with_logits(
            rest["even"], even
        )

    result = epochal.fit(Heads(), (X, y), val=0.2, loss=both, lr=0.01, epochs=8, **QUIET)
    digit, rest = result.predict(X)
    assert falls(result)
    assert digit.shape == (300, 10)
    assert rest["even"].shape == (300, 1)


def test_no_targets_at_all():
    X, _ = digits()
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64))
    rebuild = lambda model, x: nn.functional.mse_loss(model(x), x)
    result = epochal.fit(model, X, val=0.2, objective=rebuild, lr=0.01, epochs=6, **QUIET)
    assert falls(result)
    assert result.predict(X).shape == X.shape


def test_activations_in_place_leave_the_data_alone():
    X, y = digits()
    X = X - 0.5
    before = X.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(64, 10))
    for shuffle in (True, False):
        epochal.fit(model, (X, y), val=(X.clone(), y.clone()), loss="cross_entropy", epochs=1, shuffle=shuffle, **QUIET)
        assert torch.equal(X, before)


class Wobbly(Dataset):
    """Augments with all three kinds of randomness."""

    def __init__(self):
        self.X, self.y = digits(120)

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        import random

        noise = torch.rand(64) + torch.from_numpy(np.random.rand(64)).float() + random.random()
        return self.X[i] + 0.05 * noise, self.y[i]


def test_two_loader_workers():
    models = []
    for workers in (0, 2):
        torch.manual_seed(3)
        models.append(nn.Sequential(nn.Dropout(0.2), nn.Linear(64, 10)))
        epochal.fit(models[-1], Wobbly(), loss="cross_entropy", epochs=3, workers=workers, **QUIET)
    assert torch.equal(models[0][1].weight, models[1][1].weight)


class Stream(IterableDataset):
    def __init__(self, count=70):
        self.X, self.y = digits(count)

    def __iter__(self):
        return iter(zip(self.X, self.y))


@pytest.mark.parametrize("workers", [0, 1])
def test_iterable_data_sets(workers):
    model = nn.Linear(64, 10)
    result = epochal.fit(model, Stream(), loss="cross_entropy", epochs=3, workers=workers, lr=0.01, **QUIET)
    assert [row["step"] for row in result.history] == [3, 6, 9]
    assert falls(result) or result.history.train_loss[-1] < result.history.train_loss[0]


def test_an_iterator_that_is_used_up_is_an_error_and_not_an_endless_loop():
    class Once(IterableDataset):
        def __init__(self):
            self.samples = iter(zip(*digits(40)))

        def __iter__(self):
            return self.samples

    with pytest.raises(epochal.EpochalError) as caught:
        epochal.fit(nn.Linear(64, 10), Once(), loss="cross_entropy", epochs=3, **QUIET)
    assert str(caught.value) == (
        "the training data gave no batch.\n"
        "  where: train, epoch 2\n"
        "  fix:   an iterable data set has to start anew at every __iter__; drop_last drops a lone small batch"
    )


def test_a_model_that_takes_gradients_itself():
    """A force field: the force is the gradient of the energy, in training, evaluation and prediction."""

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=self.training)
            return -force

    x = torch.randn(128, 2, generator=torch.Generator().manual_seed(0))
    result = epochal.fit(Field(), (x, -x), val=0.25, loss="mse", lr=0.02, epochs=30, **QUIET)
    assert result.history.val_loss[-1] < 0.1 * result.history.val_loss[0]
    assert not result.predict(x).requires_grad


def test_modes_are_put_back():
    X, y = digits(100)
    frozen = nn.BatchNorm1d(64).eval()
    model = nn.Sequential(frozen, nn.Dropout(0.5), nn.Linear(64, 10))
    before = {name: value.clone() for name, value in frozen.state_dict().items() if "running" in name}
    result = epochal.fit(model, (X, y), val=(X.clone(), y.clone()), loss="cross_entropy", epochs=2, **QUIET)
    assert [part.training for part in model] == [False, True, True]
    assert all(torch.equal(frozen.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(result.predict(X), result.predict(X))  # no dropout
    assert [part.training for part in model] == [False, True, True]
    model.eval()
    assert epochal.fit(model, (X, y), loss="cross_entropy", epochs=1, **QUIET).model.training is False


def test_a_data_loader_is_taken_as_it_is():
    X, y = digits(100)
    seen = []

    def collate(samples):
        seen.append(len(samples))
        return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])

    loader = DataLoader(TensorDataset(X, y), batch_size=30, collate_fn=collate, drop_last=True)
    result = epochal.fit(nn.Linear(64, 10), loader, loss="cross_entropy", epochs=2, **QUIET)
    assert seen == [30] * 6
    assert result.history.rows[-1]["step"] == 6


def test_numpy_data_of_every_layout():
    X, y = load_diabetes(return_X_y=True)
    y = (y - y.mean()) / y.std()
    forms = [X, np.asfortranarray(X), X[::-1][::-1], X.astype(">f8"), X.astype(np.float32), X.tolist()]
    results = []
    for form in forms:
        torch.manual_seed(0)
        model = nn.Linear(10, 1)
        epochal.fit(model, (form, y[:, None]), loss="mse", epochs=1, **QUIET)
        results.append(model.weight)
    for weight in results[1:]:
        torch.testing.assert_close(weight, results[0])


def test_a_model_in_float64_gets_numpy_data_in_float64():
    X, y = load_diabetes(return_X_y=True)
    result = epochal.fit(nn.Linear(10, 1).double(), (X, y[:, None]), loss="mse", epochs=1, **QUIET)
    assert result.predict(X).dtype == torch.float64


def test_small_integer_labels_from_numpy():
    X, y = load_digits(return_X_y=True)
    for kind in (np.uint8, np.int8, np.int16, np.int32, np.int64):
        result = epochal.fit(nn.Linear(64, 10), (X, y.astype(kind)), loss="cross_entropy", max_steps=2, **QUIET)
        assert result.history.rows[-1]["step"] == 2


def test_scalars_lists_of_samples_and_namedtuples():
    X, y = digits(50)
    samples = [(x, int(label)) for x, label in zip(X, y)]
    result = epochal.fit(nn.Linear(64, 10), samples, loss="cross_entropy", epochs=2, **QUIET)
    assert result.history.rows[-1]["step"] == 4


def test_a_plan_can_be_run_twice():
    X, y = line()
    plan = epochal.Plan(nn.Linear(1, 1), (X, y), val=(X.clone(), y.clone()), loss="mse", epochs=3, patience=1, **QUIET)
    first, second = plan.fit(), plan.fit()
    assert len(first.history) == len(second.history) == 3


def test_the_users_own_random_numbers_are_left_alone():
    import random

    X, y = digits(64)
    loader = DataLoader(TensorDataset(X, y), batch_size=16)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    epochal.fit(nn.Linear(64, 10), loader, loss="cross_entropy", epochs=1, observers=())
    epochal.fit(nn.Linear(64, 10), Wobbly(), loss="cross_entropy", epochs=1, observers=(), val=0.2)
    assert (random.random(), np.random.rand()) == expected


def test_lazy_layers_learn_their_sizes_from_the_data():
    X, y = digits(60)
    model = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(10))
    result = epochal.fit(model, (X, y), val=0.2, loss="cross_entropy", epochs=2, **QUIET)
    assert model[0].weight.shape == (16, 64)
    assert model[1].num_batches_tracked == 4  # the look at the sizes counted for nothing
    assert falls(result) or result.history.train_loss[-1] < result.history.train_loss[0]


def test_a_table_trains_a_model_in_the_unit_of_its_target():
    frame = load_diabetes(as_frame=True).frame
    result = epochal.fit(
        nn.LazyLinear(1), frame, val=0.2, target="target", loss="l1", lr=1.0, epochs=60, metrics=["mae"], **QUIET
    )
    predicted = result.predict(frame)
    assert 120 < predicted.mean() < 180
    assert result.history.rows[-1]["val_mae"] == pytest.approx(result.history.val_loss[-1], rel=1e-5)


def test_rows_of_numbers_are_predicted_one_by_one():
    X, y = line()
    result = epochal.fit(nn.Linear(1, 1), (X, y), loss="mse", epochs=1, **QUIET)
    assert torch.equal(result.predict([[0.1], [0.2], [0.3]]), result.predict(torch.tensor([[0.1], [0.2], [0.3]])))


def test_a_stream_that_knows_its_length_can_have_a_schedule():
    class Sized(Stream):
        def __len__(self):
            return 70

    result = epochal.fit(nn.Linear(64, 10), Sized(), loss="cross_entropy", schedule="linear", epochs=2, **QUIET)
    assert result.history.rows[-1]["lr"] == pytest.approx(0)
