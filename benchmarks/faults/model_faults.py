"""Faulty programs of the model, its numbers and its mode: numbers 65 to 81 of the catalogue."""

# ruff: noqa: C408
from __future__ import annotations

import torch
from benchmarks.faults.material import cnn, diabetes, digits, generator, images, line, mlp, text
from benchmarks.faults.program import faulty
from torch import Tensor, nn
from torch.nn import functional as F

import epochal


def rings(count: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points on two rings around the origin, (count, 2), and which one it is, as int64."""
    draw = generator(seed)
    y = torch.randint(2, (count,), generator=draw)
    angle = 2 * torch.pi * torch.rand(count, generator=draw)
    radius = 0.7 + 0.9 * y + 0.1 * torch.randn(count, generator=draw)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1), y


def negatives(count: int = 800, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Digits as images (count, 1, 8, 8), half of them white on black and half black on white."""
    x, y = images(count)
    sign = 2.0 * torch.randint(2, (count, 1, 1, 1), generator=generator(seed)) - 1
    return sign * x, y


def waves(count: int = 500, length: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy waves of three speeds, (count, length, 1), and the number of the speed."""
    draw = generator(seed)
    y = torch.randint(3, (count,), generator=draw)
    phase = 2 * torch.pi * torch.rand(count, 1, generator=draw)
    time = torch.arange(length)
    wave = torch.sin(phase + time * (0.3 + 0.35 * y[:, None])) + 0.2 * torch.randn(count, length, generator=draw)
    return 1.4 * wave[:, :, None], y


def openings(count: int, length: int, others: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences of words (count, length); the class is the first word, 0 to 3, and the other words say nothing."""
    draw = generator(seed)
    x = torch.randint(4, 4 + others, (count, length), generator=draw)
    x[:, 0] = torch.randint(4, (count,), generator=draw)
    return x, x[:, 0].clone()


def sentences(count: int = 400, words: int = 20) -> tuple[Tensor, Tensor]:
    """As ``text``, but no sentence is there twice."""
    x, y = text(4 * count, words=words)
    kept = list({tuple(row): i for i, row in enumerate(x.tolist())}.values())[:count]
    return x[kept], y[kept]


# 65: trained in eval mode


@faulty("train-in-eval-mode")
def images_looked_at_between_two_steps():
    """The step takes the accuracy in eval mode, and does not go back: only the first update of an epoch is in train
    mode."""

    def update(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        x, y = window.batches[0]
        state.optimizer.zero_grad()
        loss = F.cross_entropy(state.model(x), y)
        loss.backward()
        state.optimizer.step()
        state.model.eval()
        with torch.no_grad():
            right = (state.model(x).argmax(1) == y).float().mean()
        return epochal.StepResult(loss.detach(), window.samples, values={"right": right})

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(2048, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip
    x, y = images(400)
    x = x + 1.2 * torch.randn(x.shape, generator=generator())
    return dict(
        model=model, train=(x, y), val=0.3, loss="cross_entropy", step=update, restore_best=False,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9), epochs=8,
    )  # fmt: skip


class Finder(nn.Module):
    """Images (n, 1, 8, 8) to features (n, 16)."""

    def __init__(self):
        super().__init__()
        parts = []
        for inputs, outputs in ((1, 16), *[(16, 16)] * 5):
            parts += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@faulty("train-in-eval-mode")
def images_with_a_body_that_came_in_eval_mode():
    """The body comes from a function that puts it into eval mode; it is trained whole, and its norms see no batch."""

    def body() -> nn.Module:
        return Finder().eval()

    torch.manual_seed(0)
    model = nn.Sequential(body(), nn.Linear(16, 10))
    return dict(model=model, train=images(), val=0.2, loss="cross_entropy", optimizer="sgd", lr=0.1, epochs=6)


# 66 and 67: evaluated in train mode, or at random


class Dropping(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(inputs, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, outputs),
        )  # fmt: skip

    def train(self, mode: bool = True) -> Dropping:
        super().train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@faulty("eval-in-train-mode")
def digits_with_a_train_that_forgets_its_mode():
    """The model's own train() calls its parent's without the mode, so that eval() puts it to train mode."""
    torch.manual_seed(0)
    return dict(
        model=Dropping(64, 10), train=digits(), val=0.2, loss="cross_entropy", lr=2e-3, metrics=["accuracy"], epochs=6
    )


@faulty("eval-in-train-mode")
def progression_with_an_objective_that_trains():
    """The objective calls model.train(), in validation too: dropout stays on, and batch norm learns from val."""

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> epochal.Loss:
        x, y = batch
        model.train()
        outputs = model(x)
        return epochal.Loss(F.smooth_l1_loss(outputs, y), outputs=outputs, targets=y)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.4), nn.Linear(64, 1))
    return dict(model=model, train=diabetes(), val=0.3, objective=objective, lr=3e-3, metrics=["r2"], epochs=8)


class Bag(nn.Module):
    """Word numbers (n, t) to scores of two classes."""

    def __init__(self, words: int, width: int = 24):
        super().__init__()
        self.words = nn.EmbeddingBag(words, width, mode="mean")
        self.first, self.last = nn.Linear(width, 32), nn.Linear(32, 2)

    def forward(self, words: Tensor) -> Tensor:
        x = F.dropout(self.words(words), 0.3)
        x = F.dropout(F.relu(self.first(x)), 0.5)
        return self.last(x)


def opinions(count: int = 600, words: int = 40, length: int = 10) -> tuple[Tensor, Tensor]:
    """Word numbers (count, length), and whether the values of the words, which are hidden, add up to more than 0."""
    draw = generator(2)
    x = torch.randint(words, (count, length), generator=draw)
    return x, (torch.randn(words, generator=draw)[x].sum(1) > 0).long()


@faulty("stochastic-eval")
def opinions_with_functional_dropout():
    """F.dropout is called without training=self.training, and so it drops in evaluation and prediction too."""
    torch.manual_seed(0)
    return dict(
        model=Bag(40), train=opinions(), val=0.2, loss="cross_entropy", lr=1e-2, metrics=["accuracy"], epochs=10
    )


class Noisy(nn.Module):
    """A denoising autoencoder that makes its noise itself."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 48), nn.ReLU())
        self.decode = nn.Linear(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x + 0.4 * torch.randn_like(x)))


@faulty("stochastic-eval")
def autoencoder_with_noise_at_all_times():
    """The noise of the inputs is meant for training, and is added in evaluation as well."""
    x, _ = digits()
    torch.manual_seed(0)
    return dict(
        model=Noisy(), train=x, val=0.2, lr=3e-3, objective=lambda model, images: F.mse_loss(model(images), images),
        epochs=8,
    )  # fmt: skip


# 68 and 69: batch norm and dropout


@faulty("tiny-batch-norm")
def images_normalised_in_pairs():
    """Batches of 2, and batch norm behind a linear layer, where every feature of a pair becomes +1 or -1."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.BatchNorm1d(32),
        nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    return dict(
        model=model, train=images(600), val=0.2, loss="cross_entropy", batch_size=2, lr=1e-3, metrics=["accuracy"],
        epochs=4,
    )  # fmt: skip


@faulty("tiny-batch-norm")
def table_with_statistics_that_never_arrive():
    """The momentum of batch norm is 1e-4, torch's way around: its running statistics stay where they began."""
    x, y = line(800, 6)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 32), nn.BatchNorm1d(32, momentum=1e-4), nn.ReLU(),
        nn.Linear(32, 32), nn.BatchNorm1d(32, momentum=1e-4), nn.ReLU(), nn.Linear(32, 1),
    )  # fmt: skip
    return dict(model=model, train=(x, y), val=0.2, loss="mse", lr=3e-3, epochs=6)


@faulty("dropout")
def digits_with_the_share_to_keep():
    """0.95 was meant as the share to keep, as it was called elsewhere, and is the share that is dropped."""
    torch.manual_seed(0)
    keep = 0.95
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Dropout(keep), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(keep),
        nn.Linear(64, 10),
    )  # fmt: skip
    return dict(model=model, train=digits(), val=0.2, loss="cross_entropy", lr=2e-3, metrics=["accuracy"], epochs=8)


class Listener(nn.Module):
    """Waves (n, t, 1) to scores of three speeds."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.ear = nn.LSTM(1, width, num_layers=1, dropout=0.5, batch_first=True)
        self.scores = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.ear(x)[0][:, -1])


@faulty("dropout")
def waves_with_dropout_behind_the_last_layer():
    """dropout=0.5 of an LSTM works between its layers, and it has one: nothing is dropped, as torch warns."""
    x, y = waves(120)
    x = x + torch.randn(x.shape, generator=generator(6))
    torch.manual_seed(0)
    return dict(
        model=Listener(),
        train=(x, y),
        val=0.5,
        loss="cross_entropy",
        lr=2e-2,
        batch_size=8,
        restore_best=False,
        epochs=10,
    )


# 70: no nonlinearity


class Straight(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


@faulty("missing-nonlinearity")
def rings_through_three_linear_layers():
    """Nothing stands between three linear layers, which are one; no line parts two rings."""
    torch.manual_seed(0)
    return dict(model=Straight(), train=rings(), val=0.2, loss="cross_entropy", lr=1e-2, metrics=["accuracy"], epochs=8)


@faulty("missing-nonlinearity")
def negatives_through_plain_convolutions():
    """Convolution after convolution without an activation, so that an image and its negative get opposite scores."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip
    return dict(model=model, train=negatives(), val=0.2, loss="cross_entropy", lr=3e-3, metrics=["accuracy"], epochs=6)


# 71 and 72: the initial weights


@faulty("symmetric-init")
def digits_with_one_number_in_all_weights():
    """All weights of all layers are set to 0.05: the units of a hidden layer are one unit for ever."""
    model = mlp(64, 10)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.constant_(part.weight, 0.05)
            nn.init.zeros_(part.bias)
    return dict(model=model, train=digits(), val=0.2, loss="cross_entropy", lr=3e-3, metrics=["accuracy"], epochs=8)


class Weighted(nn.Module):
    """A linear layer by hand."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inputs, outputs) / inputs)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@faulty("symmetric-init")
def rings_through_layers_by_hand():
    """The layers by hand begin with ones over the number of inputs, and tanh units that are equal stay equal."""
    x, y = rings()
    torch.manual_seed(0)
    model = nn.Sequential(Weighted(2, 24), nn.Tanh(), Weighted(24, 24), nn.Tanh(), nn.Linear(24, 1))
    y = y.float()[:, None]
    return dict(model=model, train=(x, y), val=0.2, loss=nn.BCEWithLogitsLoss(), lr=2e-2, epochs=10)


@faulty("init-scale", "initial-loss")
def digits_with_weights_of_deviation_one():
    """nn.init.normal_ is called without std=, which is 1: the scores of the first batch are in the hundreds."""
    model = mlp(64, 10, hidden=128)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight)
    return dict(
        model=model, train=digits(), val=0.2, loss="cross_entropy", optimizer="adam", lr=1e-3, metrics=["accuracy"],
        epochs=5,
    )  # fmt: skip


# 73 and 74: dead and saturated units


@faulty("dead-units")
def images_with_biases_below_zero():
    """The biases of the second convolution begin at -5, below what its inputs ever add up to."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    nn.init.constant_(model[3].bias, -5.0)
    return dict(model=model, train=images(), val=0.2, loss="cross_entropy", lr=1e-3, metrics=["accuracy"], epochs=4)


@faulty("dead-units")
def digits_with_weights_below_zero():
    """The weights are drawn between -0.3 and 0 and the pixels are never negative, so that no ReLU ever opens."""
    model = mlp(64, 10, hidden=48)
    nn.init.uniform_(model[0].weight, -0.3, 0.0)
    nn.init.zeros_(model[0].bias)
    return dict(model=model, train=digits(), val=0.2, loss="cross_entropy", optimizer="adamw", lr=3e-3, epochs=4)


@faulty("saturation")
def table_with_sigmoids_at_their_ends():
    """The inputs are multiplied by 200 inside of the model, and every sigmoid is at 0 or at 1, where it is flat."""

    class Squashed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 32), nn.Linear(32, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.sigmoid(self.first(200 * x)))

    torch.manual_seed(0)
    return dict(model=Squashed(), train=line(), val=0.2, loss="mse", lr=3e-3, metrics=["r2"], epochs=10)


@faulty("saturation", "init-scale")
def waves_with_a_recurrence_at_its_ends():
    """The recurrent weights of a tanh network are drawn with deviation 5: its states are -1 and 1, and flat."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.reader = nn.RNN(1, 32, batch_first=True)
            self.scores = nn.Linear(32, 3)
            nn.init.normal_(self.reader.weight_hh_l0, std=5.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.scores(self.reader(x)[0][:, -1])

    torch.manual_seed(0)
    return dict(model=Net(), train=waves(), val=0.2, loss="cross_entropy", lr=3e-3, metrics=["accuracy"], epochs=10)


# 75: gradients that vanish or explode


@faulty("vanishing-gradient")
def digits_through_ten_sigmoids():
    """Ten layers with sigmoids, each of which lets a quarter of the gradient through at most."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (64, *[32] * 9):
        layers += [nn.Linear(inputs, 32), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    return dict(
        model=model, train=digits(), val=0.2, loss="cross_entropy", metrics=["accuracy"], epochs=8,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )  # fmt: skip


class Remembering(nn.Module):
    """Words (n, t) to the class of the whole, read by a plain recurrence from left to right."""

    def __init__(self, words: int, width: int = 32, scale: float = 1.0):
        super().__init__()
        self.words = nn.Embedding(words, width)
        nn.init.normal_(self.words.weight, std=0.3)
        self.reader = nn.RNN(width, width, batch_first=True)
        nn.init.orthogonal_(self.reader.weight_hh_l0, gain=scale)
        self.scores = nn.Linear(width, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.scores(self.reader(self.words(words))[0][:, -1])


@faulty("vanishing-gradient")
def openings_that_fade_away():
    """The class is the first of 24 words; recurrent weights of norm 0.5 carry nothing of it to the end, nor back."""
    torch.manual_seed(0)
    return dict(
        model=Remembering(6, scale=0.5), train=openings(800, 24), val=0.2, loss="cross_entropy", lr=2e-3,
        metrics=["accuracy"], epochs=8,
    )  # fmt: skip


class Doubling(nn.Module):
    """A recurrence without bounds: h becomes W h + V x, over a series (n, t, 1)."""

    def __init__(self, width: int, gain: float):
        super().__init__()
        self.write, self.keep, self.read = nn.Linear(1, width), nn.Linear(width, width, bias=False), nn.Linear(width, 1)
        nn.init.orthogonal_(self.keep.weight, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.keep.in_features)
        for now in x.unbind(1):
            h = self.keep(h) + self.write(now)
        return self.read(h)


@faulty("exploding-gradient")
def means_through_a_recurrence_that_grows():
    """The recurrent matrix makes every state half as large again, 24 times: the gradient is in the thousands."""
    x, _ = waves()
    y = x[:, -4:].mean(1)
    torch.manual_seed(0)
    model = Doubling(16, gain=1.5)
    return dict(
        model=model, train=(x, y / y.std()), val=0.2, loss="mse", epochs=4,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    )  # fmt: skip


@faulty("exploding-gradient", "init-scale")
def digits_through_layers_that_double():
    """Twelve ReLU layers whose weights are drawn with four times the variance of He: every layer doubles."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (64, *[48] * 11):
        layer = nn.Linear(inputs, 48)
        nn.init.normal_(layer.weight, std=2 * (2 / inputs) ** 0.5)
        layers += [layer, nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(48, 10))
    return dict(
        model=model, train=digits(), val=0.2, loss="cross_entropy", metrics=["accuracy"], epochs=5,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    )  # fmt: skip


# 76: divergence, and chance


@faulty("divergence")
def table_with_a_momentum_of_one():
    """The momentum is 1.0, so that nothing ever slows down, and the weights swing wider and wider."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    return dict(
        model=model, train=line(), val=0.2, loss="mse", epochs=10,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=1.0),
    )  # fmt: skip


@faulty("divergence")
def values_that_chase_themselves():
    """The value of a state is trained towards the reward and 1.3 times the next value: values grow without end."""
    draw = generator(5)
    states = torch.randn(601, 4, generator=draw)
    for i in range(1, 601):
        states[i] = 0.7 * states[i - 1] + 0.7 * states[i]
    rewards = states[:-1].mean(1, keepdim=True)
    discount = 1.3

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        now, later, reward = batch
        with torch.no_grad():
            aim = reward + 0.5 + discount * model(later)
        return F.mse_loss(model(now), aim)

    train = (states[:-1].clone(), states[1:].clone(), rewards)
    return dict(model=mlp(4, 1), train=train, val=0.2, objective=objective, lr=1e-2, epochs=10)


class Unordered(nn.Module):
    """Words (n, t) to two scores: attention over words, without their places, and the mean over all."""

    def __init__(self, words: int = 8, width: int = 32):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.scores = nn.Linear(width, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.scores(self.block(self.words(words)).mean(1))


@faulty("stuck-at-chance", "cannot-fit")
def orders_without_places():
    """Which of two words comes first is asked of a transformer that has no places: it sees a bag of words."""
    draw = generator(7)
    x = torch.randint(2, 8, (800, 6), generator=draw)
    y = torch.randint(2, (800,), generator=draw)
    x[:, 1], x[:, 4] = y, 1 - y
    torch.manual_seed(0)
    return dict(model=Unordered(), train=(x, y), val=0.2, loss="cross_entropy", lr=2e-3, metrics=["accuracy"], epochs=8)


@faulty("stuck-at-chance", "cannot-fit")
def slopes_in_a_bag():
    """Whether a row of levels rises or falls is asked of the mean of their embeddings, which is the same both ways."""
    draw = generator(8)
    x = torch.randint(50, (800, 8), generator=draw).sort(1).values
    y = torch.randint(2, (800,), generator=draw)
    x = torch.where(y[:, None] == 1, x, x.flip(1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(50, 16, mode="mean"), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    return dict(model=model, train=(x, y), val=0.2, loss="cross_entropy", lr=3e-3, metrics=["accuracy"], epochs=6)


# 77: rows that see each other, words that see the future, inputs that nobody sees, models that cannot


class Reader(nn.Module):
    """Waves (n, t, 1) to scores of three speeds."""

    def __init__(self):
        super().__init__()
        self.reader = nn.GRU(1, 32)
        self.scores = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.reader(x)[0][:, -1])


@faulty("batch-mixing")
def waves_read_across_the_batch():
    """batch_first is missing: the GRU takes the batch for time, and reads from one sample to the next."""
    torch.manual_seed(0)
    return dict(model=Reader(), train=waves(), val=0.2, loss="cross_entropy", lr=5e-3, metrics=["accuracy"], epochs=8)


class Attending(nn.Module):
    """Digits as 8 rows of 8 pixels, with attention by hand between the rows."""

    def __init__(self, width: int = 24, dim: int = 0):
        super().__init__()
        self.dim = dim
        self.lift, self.asks, self.keys = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, width)
        self.places = nn.Parameter(0.1 * torch.randn(8, width))
        self.scores = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(self.lift(x.unflatten(1, (8, 8))) + self.places)
        alike = self.asks(rows) @ self.keys(rows).transpose(1, 2) / rows.shape[-1] ** 0.5
        return self.scores((alike.softmax(self.dim) @ rows).flatten(1))


@faulty("batch-mixing", "softmax-dim")
def digits_with_attention_over_the_batch():
    """The softmax of the attention goes over dimension 0, which is the batch: a prediction depends on its company."""
    x, y = digits()
    torch.manual_seed(0)
    return dict(
        model=Attending(), train=(3 * x - 1, y), val=0.2, loss="cross_entropy", lr=3e-3, metrics=["accuracy"],
        batch_size=16, epochs=6,
    )  # fmt: skip


class Scaled(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.body = mlp(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x - x.mean(0)) / (x.std(0) + 1e-5))


@faulty("batch-mixing")
def progression_normalised_by_its_batch():
    """The model normalises its inputs by the mean and the deviation of the batch at hand, in prediction too."""
    return dict(
        model=Scaled(10, 1), train=diabetes(), val=0.2, loss="mse", lr=3e-3, batch_size=4, metrics=["r2"], epochs=8
    )


class Speaker(nn.Module):
    """Words (n, t) to scores of the next word, (n, words, t)."""

    def __init__(self, words: int = 20, width: int = 32, length: int = 12):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.scores = nn.Linear(width, words)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.words(words) + self.places[: words.shape[1]]
        return self.scores(self.blocks(hidden)).transpose(1, 2)


@faulty("causal-leak")
def words_without_a_mask():
    """A transformer that shall give the next word has no mask, and finds it among its inputs."""
    torch.manual_seed(0)
    return dict(
        model=Speaker(), train=sentences(), val=0.2, loss="cross_entropy", optimizer="adamw", lr=3e-3, epochs=10
    )


class BothWays(nn.Module):
    def __init__(self, words: int = 20, width: int = 32):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.reader = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.scores = nn.Linear(2 * width, words)

    def forward(self, words: Tensor) -> Tensor:
        return self.scores(self.reader(self.words(words))[0]).transpose(1, 2)


@faulty("causal-leak")
def words_read_from_both_ends():
    """The LSTM that gives the next word reads backwards as well, and has seen it."""
    torch.manual_seed(0)
    return dict(model=BothWays(), train=sentences(), val=0.2, loss="cross_entropy", lr=1e-2, epochs=8)


@faulty("causal-leak")
def series_with_padding_on_both_sides():
    """The next value of a series is forecast by convolutions whose padding lets them look ahead."""
    x, _ = waves(500, 25)
    x = x.transpose(1, 2) + 0.5 * torch.randn(500, 1, 25, generator=generator(4))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(1, 24, 5, padding=2), nn.ReLU(), nn.Conv1d(24, 24, 5, padding=2), nn.ReLU(), nn.Conv1d(24, 1, 1)
    )
    series = (x[..., :-1].contiguous(), x[..., 1:].contiguous())
    return dict(model=model, train=series, val=0.2, loss="mse", lr=3e-3, epochs=8)


@faulty("inputs-ignored")
def table_normalised_to_nothing():
    """A single number goes through a LayerNorm of one feature, which makes it 0 whatever it was."""
    x = torch.rand(600, 1, generator=generator(1)) * 4 - 2
    y = torch.sin(2 * x) + 0.1 * torch.randn(600, 1, generator=generator(2))
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(1), nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    return dict(model=model, train=(x, y), val=0.2, loss="mse", lr=1e-2, metrics=["r2"], epochs=8)


class Starting(nn.Module):
    """Images to scores: the convolutions of ``x``, and a head."""

    def __init__(self):
        super().__init__()
        self.body = cnn(32)
        self.empty = nn.Buffer(torch.zeros(1, 1, 8, 8))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(self.empty.expand_as(x))
        return self.head(torch.relu(hidden))


@faulty("inputs-ignored")
def images_of_which_an_empty_one_is_taken():
    """An empty image that served to try out the shapes is what goes through the network, instead of the batch."""
    torch.manual_seed(0)
    return dict(
        model=Starting(), train=images(), val=0.2, loss="cross_entropy", lr=3e-3, metrics=["accuracy"], epochs=3
    )


class Chooser(nn.Module):
    """Words (n, t) to scores: an LSTM by hand, and its state at the end."""

    def __init__(self, words: int = 20, width: int = 32):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.cell = nn.LSTMCell(width, width)
        self.scores = nn.Linear(width, 4)

    def forward(self, words: Tensor) -> Tensor:
        h = c = torch.zeros(len(words), self.cell.hidden_size)
        states = [(h, c)]
        for word in self.words(words).unbind(1):
            states.append(self.cell(word, states[-1]))
        return self.scores(h)


@faulty("inputs-ignored")
def openings_scored_by_the_first_state():
    """The scores are made of the state that the LSTM starts with, and not of the one it ends with."""
    torch.manual_seed(0)
    return dict(
        model=Chooser(),
        train=openings(800, 8, others=16),
        val=0.2,
        loss="cross_entropy",
        lr=1e-2,
        metrics=["accuracy"],
        epochs=6,
    )


@faulty("cannot-fit")
def digits_through_a_neck_of_one():
    """One tanh unit stands between the pixels and the scores of ten classes: too little goes through it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Tanh(), nn.Linear(1, 10))
    return dict(model=model, train=digits(), val=0.2, loss="cross_entropy", lr=5e-3, metrics=["accuracy"], epochs=10)


@faulty("cannot-fit")
def table_of_which_the_product_is_missing():
    """The target is the product of two numbers, and the model is one linear layer over both."""
    x = torch.randn(600, 2, generator=generator(3))
    torch.manual_seed(0)
    return dict(
        model=nn.Linear(2, 1), train=(x, x.prod(1, keepdim=True)), val=0.2, loss="mse", optimizer="sgd", lr=0.05,
        metrics=["r2"], epochs=10,
    )  # fmt: skip


# 81: overfitting


@faulty("overfitting")
def progression_learned_by_heart():
    """A network of 60,000 weights for the records of 120 patients: the error of the others rises."""
    x, y = diabetes()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    return dict(
        model=model, train=(x[:120], y[:120]), val=(x[120:], y[120:]), loss="mse", lr=3e-3, batch_size=8,
        restore_best=False, metrics=["r2"], epochs=10,
    )  # fmt: skip


@faulty("overfitting")
def words_learned_by_heart():
    """Twenty sentences are all there is to train on, over and over, by an LSTM with 100 units."""
    x, y = sentences(400, words=12)

    class Writer(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(12, 100)
            self.reader = nn.LSTM(100, 100, batch_first=True)
            self.scores = nn.Linear(100, 12)

        def forward(self, words: Tensor) -> Tensor:
            return self.scores(self.reader(self.words(words))[0]).transpose(1, 2)

    torch.manual_seed(0)
    return dict(
        model=Writer(), train=(x[:20], y[:20]), val=(x[20:], y[20:]), loss="cross_entropy", lr=2e-2, batch_size=2,
        restore_best=False, epochs=10,
    )  # fmt: skip
