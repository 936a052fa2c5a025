"""Programs whose mistake is in the loss, the output or a metric: numbers 24 to 44 of the catalogue."""

# ruff: noqa: C408

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from benchmarks.faults.material import binary, blobs, cnn, diabetes, digits, generator, images, line, mlp, text
from benchmarks.faults.program import faulty
from sklearn.datasets import load_diabetes, load_wine
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import epochal


def sgd(lr: float, momentum: float = 0.9) -> Callable:
    """What makes an SGD of a model's weights."""
    return lambda weights: torch.optim.SGD(weights, lr=lr, momentum=momentum)


def wine() -> tuple[Tensor, Tensor]:
    """178 wines, (178, 13) of mean 0 and deviation 1, and their vineyards 0..2."""
    bunch = load_wine()
    x = torch.from_numpy(bunch.data).float()
    return (x - x.mean(0)) / x.std(0), torch.from_numpy(bunch.target).long()


def labels(count: int = 600, features: int = 8, kinds: int = 5) -> tuple[Tensor, Tensor]:
    """(count, features), and for each of several labels whether the sample has it, 0.0 or 1.0, (count, kinds)."""
    draw = generator(7)
    x = torch.randn(count, features, generator=draw)
    return x, (x @ torch.randn(features, kinds, generator=draw) > 0.8).float()


def waves(count: int = 500, length: int = 16) -> tuple[Tensor, Tensor]:
    """Noisy waves of deviation about 1, (count, length, 1), and the value that comes next, (count,)."""
    draw = generator(0)
    pace = 0.2 + 0.4 * torch.rand(count, 1, generator=draw)
    wave = 1.4 * torch.sin(6.3 * torch.rand(count, 1, generator=draw) + pace * torch.arange(length + 1))
    wave = wave + 0.05 * torch.randn(wave.shape, generator=draw)
    return wave[:, :-1, None], wave[:, -1]


def sentences(count: int = 500) -> tuple[Tensor, Tensor]:
    """Sequences of 12 word numbers below 20, and whether more than six are below 10, (count, 1)."""
    draw = generator(1)
    likely = torch.rand(count, 1, generator=draw)
    low = torch.rand(count, 12, generator=draw) < likely
    words = torch.randint(10, (count, 12), generator=draw) + 10 * (~low).long()
    return words, (low.sum(1, keepdim=True) > 6).float()


class Forecast(nn.Module):
    """An LSTM, and a line from its last state to the value that comes next, (n, 1)."""

    def __init__(self, hidden: int = 24):
        super().__init__()
        self.rnn = nn.LSTM(1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class NextWord(nn.Module):
    """A small transformer with a causal mask: a score for each word at each place."""

    def __init__(self, words: int = 20, width: int = 32, length: int = 12):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.layer(self.embedding(x) + self.place, src_mask=mask, is_causal=True))


class Bag(nn.Module):
    """The mean of word vectors, and one number of it, (n, 1)."""

    def __init__(self, words: int = 20, width: int = 16):
        super().__init__()
        self.bag = nn.EmbeddingBag(words, width)
        self.head = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x))


# 24 softmax-before-loss


@faulty("softmax-before-loss")
def a_convolutional_network_that_gives_probabilities():
    """The forward of a CNN ends in F.softmax, and nn.CrossEntropyLoss takes the softmax of it once more."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = cnn()

        def forward(self, x):
            return functional.softmax(self.body(x), dim=1)

    return dict(
        model=Net(), train=images(), val=0.2, loss=nn.CrossEntropyLoss(), metrics=["accuracy"],
        lr=1e-3, epochs=5, seed=0,
    )  # fmt: skip


@faulty("softmax-before-loss")
def probabilities_made_in_the_objective():
    """The model gives scores for the next word, and the objective gives their softmax to F.cross_entropy."""
    torch.manual_seed(0)

    def objective(model, batch):
        words, following = batch
        probabilities = model(words).softmax(-1)
        return functional.cross_entropy(probabilities.flatten(0, 1), following.flatten())

    return dict(model=NextWord(), train=text(), val=0.2, objective=objective, lr=3e-3, epochs=5, seed=0)


@faulty("softmax-before-loss")
def a_table_classifier_with_a_softmax_layer():
    """A Sequential for three vineyards ends in nn.Softmax(dim=-1), trained by the loss named cross_entropy with SGD."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 24), nn.Tanh(), nn.Linear(24, 3), nn.Softmax(dim=-1))
    return dict(model=model, train=wine(), val=0.2, loss="cross_entropy", optimizer=sgd(0.05), epochs=8, seed=0)


# 25 nll-without-log-softmax


@faulty("nll-without-log-softmax")
def scores_given_to_nll():
    """A CNN ends in a linear layer, and nn.NLLLoss takes its scores for logarithms of probabilities."""
    return dict(
        model=cnn(), train=images(), val=0.2, loss=nn.NLLLoss(), metrics=["accuracy"], lr=1e-3, epochs=4, seed=0
    )


@faulty("nll-without-log-softmax")
def probabilities_given_to_nll():
    """The forward of a recurrent classifier ends in a softmax, and F.nll_loss wants its logarithm."""
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 16)
            self.rnn = nn.GRU(16, 32, batch_first=True)
            self.head = nn.Linear(32, 2)

        def forward(self, x):
            return torch.softmax(self.head(self.rnn(self.embedding(x))[1][0]), 1)

    def objective(model, batch):
        words, label = batch
        return functional.nll_loss(model(words), label[:, 0].long())

    return dict(model=Reader(), train=sentences(), val=0.2, objective=objective, lr=3e-3, epochs=5, seed=0)


# 26 bce-on-logits


@faulty("bce-on-logits")
def a_linear_layer_before_bce():
    """An autoencoder of binary images ends in a linear layer, and nn.BCELoss wants probabilities."""
    torch.manual_seed(0)
    x = (digits()[0] > 0.5).float()
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 64))

    def objective(model, batch):
        return nn.BCELoss()(model(batch), batch)

    return dict(model=model, train=x, val=0.2, objective=objective, lr=1e-3, epochs=3, seed=0)


@faulty("bce-on-logits")
def a_clamp_that_stands_for_a_sigmoid():
    """A binary cross-entropy written by hand clamps the scores of the model into 0 to 1 instead of taking a sigmoid."""

    def cross_entropy(scores, truth):
        p = scores.clamp(1e-6, 1 - 1e-6)
        return -(truth * p.log() + (1 - truth) * (1 - p).log()).mean()

    x, y = labels(features=8, kinds=1)
    return dict(model=mlp(8, 1), train=(x, y), val=0.2, loss=cross_entropy, lr=1e-3, epochs=6, seed=0)


# 27 sigmoid-before-logits-loss


@faulty("sigmoid-before-logits-loss")
def labels_as_probabilities():
    """A multi-label model ends in nn.Sigmoid, and bce_with_logits takes the sigmoid once more."""
    model = nn.Sequential(*mlp(8, 5), nn.Sigmoid())
    return dict(model=model, train=labels(), val=0.2, loss="bce_with_logits", lr=3e-3, epochs=8, seed=0)


@faulty("sigmoid-before-logits-loss")
def a_text_classifier_that_gives_a_probability():
    """The forward of a text classifier returns torch.sigmoid of its score, and the loss is nn.BCEWithLogitsLoss."""
    torch.manual_seed(0)

    class Classifier(Bag):
        def forward(self, x):
            return torch.sigmoid(super().forward(x))

    return dict(model=Classifier(), train=sentences(), val=0.2, loss=nn.BCEWithLogitsLoss(), lr=1e-2, epochs=6, seed=0)


@faulty("sigmoid-before-logits-loss")
def masks_as_probabilities():
    """An objective for masks of images takes the sigmoid of the scores and gives it to the loss that takes logits."""
    torch.manual_seed(0)
    x, _ = images(300)
    masks = (functional.avg_pool2d(x, 3, 1, 1) > 0.6).float()
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1))

    def objective(model, batch):
        picture, mask = batch
        found = model(picture).sigmoid()
        loss = functional.binary_cross_entropy_with_logits(found, mask)
        return epochal.Loss(loss, outputs=found, targets=mask)

    return dict(model=model, train=(x, masks), val=0.2, objective=objective, lr=1e-2, epochs=5, seed=0)


# 28 softmax-over-one


@faulty("softmax-over-one")
def a_softmax_of_a_single_unit():
    """A binary classifier has one output with a softmax over it, which is 1 for every sample."""
    model = nn.Sequential(*mlp(8, 1), nn.Softmax(dim=1))
    return dict(model=model, train=binary(), val=0.2, loss="bce", metrics=["accuracy"], lr=1e-3, epochs=4, seed=0)


# 29 softmax-dim


@faulty("softmax-dim")
def log_softmax_over_the_batch():
    """nn.LogSoftmax(dim=0) compares the samples of a batch with each other instead of the classes."""
    model = nn.Sequential(*mlp(64, 10), nn.LogSoftmax(dim=0))
    return dict(
        model=model, train=digits(), val=0.2, loss=nn.NLLLoss(), metrics=["accuracy"], lr=3e-3, epochs=8, seed=0
    )


@faulty("softmax-dim")
def log_softmax_over_the_places():
    """Scores of words lie as (n, place, word), and log_softmax over dim 1 is over the places of a sentence."""
    torch.manual_seed(0)

    def objective(model, batch):
        words, following = batch
        logs = functional.log_softmax(model(words), dim=1)
        return functional.nll_loss(logs.transpose(1, 2), following)

    return dict(model=NextWord(), train=text(), val=0.2, objective=objective, lr=3e-3, epochs=5, seed=0)


# 30 broadcast-loss


@faulty("broadcast-loss")
def a_mean_square_over_a_square():
    """Outputs (n, 1) minus targets (n,) give (n, n): a loss of one's own averages over all pairs."""

    def mean_square(outputs, targets):
        return ((outputs - targets) ** 2).mean()

    x, y = diabetes()
    return dict(model=mlp(10, 1), train=(x, y[:, 0]), val=0.2, loss=mean_square, lr=3e-3, epochs=8, seed=0)


@faulty("broadcast-loss")
def a_forecast_compared_with_all_others():
    """An objective subtracts the next values, (n,), from forecasts, (n, 1), and takes the mean of |.|."""
    torch.manual_seed(0)

    def objective(model, batch):
        wave, following = batch
        return (model(wave) - following).abs().mean()

    loader = DataLoader(TensorDataset(*waves()), batch_size=25, shuffle=True, generator=generator(0))
    return dict(model=Forecast(), train=loader, objective=objective, lr=5e-3, epochs=6)


@faulty("broadcast-loss")
def a_forecast_and_a_named_loss():
    """Outputs are (n, 1) and targets (n,), and the loss is the one named mse."""
    torch.manual_seed(0)
    return dict(model=Forecast(), train=waves(), val=0.2, loss="mse", lr=5e-3, epochs=2, seed=0)


@faulty("broadcast-loss")
def a_squeezed_output_and_a_column_of_answers():
    """A step squeezes the scores to (n,) and writes the cross-entropy by hand with answers (n, 1)."""
    torch.manual_seed(0)

    def step(state, window):
        words, answers = window.batches[0]
        scores = state.model(words).squeeze(1)
        loss = (functional.softplus(scores) - scores * answers).mean()
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        return epochal.StepResult(loss.detach(), weight=window.samples)

    return dict(model=Bag(), train=sentences(), step=step, optimizer="adam", lr=1e-2, epochs=5, seed=0)


# 31 sum-loss


@faulty("sum-loss")
def the_sum_of_squared_errors():
    """An objective takes the sum over a batch of 64, so that the steps of SGD are 64 times as long as its lr says."""

    def objective(model, batch):
        x, y = batch
        return functional.mse_loss(model(x), y, reduction="sum")

    return dict(
        model=mlp(10, 1), train=diabetes(), val=0.2, objective=objective, batch_size=64,
        optimizer=sgd(0.01), epochs=6, seed=0,
    )  # fmt: skip


# 32 initial-loss


@faulty("initial-loss", "init-scale")
def a_head_drawn_from_the_standard_normal():
    """The weights of the last layer are torch.randn without a scale, so that training starts sure and wrong."""
    torch.manual_seed(0)

    class Head(nn.Module):
        def __init__(self, inputs, classes):
            super().__init__()
            self.weight = nn.Parameter(3 * torch.randn(inputs, classes))

        def forward(self, h):
            return h @ self.weight

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), Head(128, 10))
    return dict(model=model, train=digits(), val=0.2, loss="cross_entropy", optimizer=sgd(0.05), epochs=4, seed=0)


# 33 negative-loss


@faulty("negative-loss", "target-format")
def answers_of_minus_one_and_one():
    """The answers of a binary classifier are -1 and 1, and the cross-entropy falls below 0 without end."""
    x, y = binary()
    return dict(model=mlp(8, 1), train=(x, 2 * y - 1), val=0.2, loss="bce_with_logits", lr=3e-3, epochs=6, seed=0)


# 34 gradient-ascent


@faulty("gradient-ascent")
def an_optimizer_that_maximises():
    """The optimizer is made with maximize=True, and the loss is an error."""
    return dict(
        model=mlp(8, 3), train=blobs(), val=0.2, loss="cross_entropy",
        optimizer=lambda weights: torch.optim.SGD(weights, lr=0.01, maximize=True), epochs=4, seed=0,
    )  # fmt: skip


@faulty("gradient-ascent")
def a_similarity_that_is_minimised():
    """The objective is the cosine similarity between what a CNN makes of an image and its code, and not 1 minus it."""
    torch.manual_seed(0)
    x, _ = images(500)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 16))
    targets = x.flatten(1) @ torch.randn(64, 16, generator=generator(3)) / 8

    def objective(model, batch):
        picture, target = batch
        return functional.cosine_similarity(model(picture), target).mean()

    return dict(model=model, train=(x, targets), val=0.2, objective=objective, lr=1e-3, epochs=4, seed=0)


@faulty("gradient-ascent")
def a_step_up_the_gradient():
    """A hand-written update adds the gradient to the weights."""
    torch.manual_seed(0)
    x, y = line(400)

    def step(state, window):
        inputs, targets = window.batches[0]
        loss = functional.mse_loss(state.model(inputs), targets)
        weights = list(state.model.parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights)):
            weight.data += 3e-3 * gradient
        return epochal.StepResult(loss.detach(), weight=window.samples)

    return dict(model=nn.Linear(4, 1), train=(x, y), step=step, epochs=4, seed=0)


# 35 detached-loss


@faulty("detached-loss")
def a_loss_wrapped_in_a_new_tensor():
    """An objective makes a new tensor of the number of the loss, with requires_grad=True, and no weight hears of it."""

    def objective(model, batch):
        x, y = batch
        loss = functional.cross_entropy(model(x), y)
        return torch.tensor(loss.item(), requires_grad=True)

    return dict(model=cnn(), train=images(400), val=0.2, objective=objective, lr=1e-3, epochs=3, seed=0)


@faulty("detached-loss")
def an_error_computed_with_numpy():
    """A loss of one's own turns outputs and targets into NumPy arrays and its result into a tensor."""

    def absolute_percentage(outputs, targets):
        found, wanted = outputs.detach().numpy(), targets.numpy()
        return torch.tensor(np.mean(np.abs(found - wanted) / (1 + np.abs(wanted))))

    return dict(model=mlp(10, 1), train=diabetes(), val=0.2, loss=absolute_percentage, lr=1e-3, epochs=2, seed=0)


@faulty("detached-loss")
def the_share_of_errors_as_the_loss():
    """The objective is the share of wrong answers, of which argmax leaves nothing to differentiate."""

    def objective(model, batch):
        x, y = batch
        wrong = (model(x).argmax(1) != y).float()
        return wrong.mean().requires_grad_()

    loader = DataLoader(TensorDataset(*blobs()), batch_size=50, shuffle=True, generator=generator(0))
    return dict(model=mlp(8, 3), train=loader, objective=objective, lr=1e-3, epochs=4)


# 35 no-gradient


@faulty("no-gradient")
def an_encoder_cut_off():
    """The forward detaches what the encoder gives, and only the head is trained; it was all meant to be trained."""
    torch.manual_seed(0)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            )  # fmt: skip
            self.head = nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.encoder(x).detach())

    return dict(
        model=Classifier(), train=images(), val=0.2, loss="cross_entropy", metrics=["accuracy"],
        lr=3e-3, epochs=6, seed=0,
    )  # fmt: skip


@faulty("no-gradient")
def features_under_no_grad():
    """A recurrent layer is called under torch.no_grad, which was left there from an experiment."""
    torch.manual_seed(0)

    class Model(Forecast):
        def forward(self, x):
            with torch.no_grad():
                states, _ = self.rnn(x)
            return self.head(states[:, -1]).squeeze(1)

    return dict(model=Model(), train=waves(), val=0.2, loss="mse", lr=1e-2, epochs=6, seed=0)


@faulty("no-gradient", "inputs-ignored")
def a_branch_that_is_never_called():
    """Of two branches of a model, for numbers and for words, forward calls one twice and never the other."""
    torch.manual_seed(0)
    words, _ = sentences()
    draw = generator(4)
    numbers = torch.randn(500, 4, generator=draw)
    share = (words < 10).float().mean(1, keepdim=True)
    answer = numbers @ torch.tensor([[0.4], [-0.3], [0.2], [0.0]]) + 3 * share - 1.5

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.of_numbers = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
            self.of_words = nn.EmbeddingBag(20, 16)
            self.head = nn.Linear(32, 1)

        def forward(self, numbers, words):
            return self.head(torch.cat([self.of_numbers(numbers), self.of_numbers(numbers)], 1))

    data = {"numbers": numbers, "words": words, "target": answer}
    return dict(model=Both(), train=data, val=0.2, loss="mse", metrics=["r2"], lr=5e-3, epochs=6, seed=0)


# 36 zero-gradient


@faulty("zero-gradient")
def a_code_of_signs():
    """An autoencoder takes the sign of its code, whose gradient is 0, so that the encoder never moves."""
    torch.manual_seed(0)

    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
            self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))

        def forward(self, x):
            return self.decoder(torch.sign(self.encoder(x)))

    x, _ = images(800)
    x = x.flatten(1)
    return dict(model=Coder(), train=(x, x), val=0.2, loss="mse", lr=3e-3, epochs=8, seed=0)


# 37 unreachable-targets


@faulty("unreachable-targets")
def a_progression_between_zero_and_one():
    """A regression ends in a sigmoid, and half of its targets, of mean 0 and deviation 1, are negative."""
    model = nn.Sequential(*mlp(10, 1), nn.Sigmoid())
    return dict(model=model, train=diabetes(), val=0.2, loss="mse", metrics=["r2"], lr=3e-3, epochs=8, seed=0)


@faulty("unreachable-targets")
def standardised_images_behind_a_sigmoid():
    """The decoder of an autoencoder ends in torch.sigmoid, and the pixels were standardised: they reach from -0.8 to
    1.8."""
    torch.manual_seed(0)

    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Conv2d(1, 8, 4, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1)

        def forward(self, x):
            return torch.sigmoid(self.up(torch.relu(self.down(x))))

    def objective(model, x):
        return functional.mse_loss(model(x), x)

    return dict(model=Coder(), train=images()[0], val=0.2, objective=objective, lr=5e-3, epochs=6, seed=0)


@faulty("unreachable-targets")
def hours_behind_a_tanh():
    """A recurrent network gives tanh of its last line, and the targets are hours from 0 to 10."""
    torch.manual_seed(0)

    class Model(Forecast):
        def forward(self, x):
            return torch.tanh(super().forward(x)).squeeze(1)

    x, following = waves()
    hours = (following - following.min()) * 3
    return dict(model=Model(), train=(x, hours), val=0.2, loss=nn.HuberLoss(), lr=5e-3, epochs=5, seed=0)


# 38 activation-before-loss


@faulty("activation-before-loss")
def a_relu_after_every_layer():
    """A loop in forward puts a ReLU after every layer, after the last one too, and cross_entropy gets no score below
    0."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self, sizes):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

        def forward(self, x):
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x

    return dict(
        model=Net([64, 32, 32, 10]), train=digits(), val=0.2, loss="cross_entropy", metrics=["accuracy"],
        lr=3e-3, epochs=6, seed=0,
    )  # fmt: skip


@faulty("activation-before-loss")
def scores_behind_a_tanh():
    """A CNN ends in nn.Tanh, so that its scores differ by 2 at most and no class can be likelier than 0.45."""
    model = nn.Sequential(*cnn(), nn.Tanh())
    return dict(
        model=model, train=images(), val=0.2, loss=nn.CrossEntropyLoss(), metrics=["accuracy"],
        lr=5e-3, epochs=8, seed=0,
    )  # fmt: skip


# 39 too-few-outputs


@faulty("too-few-outputs", "label-out-of-range")
def eight_outputs_for_ten_digits():
    """A model for eight classes is trained on data with ten, through a DataLoader."""
    loader = DataLoader(TensorDataset(*images()), batch_size=30, shuffle=True, generator=generator(0))
    return dict(model=cnn(classes=8), train=loader, loss=nn.CrossEntropyLoss(), lr=1e-3, epochs=2)


@faulty("too-few-outputs", "label-out-of-range")
def a_vocabulary_one_word_short():
    """The model was made for 20 words, and an end-of-sentence word with the number 20 was added to what comes next."""
    torch.manual_seed(0)
    words, following = text(300)
    following = following.clone()
    following[torch.rand(300, generator=generator(1)) < 0.02, -1] = 20

    def objective(model, batch):
        x, y = batch
        return functional.cross_entropy(model(x).transpose(1, 2), y)

    return dict(model=NextWord(20), train=(words, following), val=0.2, objective=objective, lr=1e-3, epochs=3, seed=0)


# 40 unscaled-targets


@faulty("unscaled-targets")
def prices_in_full():
    """Prices of about 250,000 are the targets of an MSE, and the weights would have to grow for them for ever."""
    x, y = line(600)
    return dict(
        model=mlp(4, 1), train=(x, 250_000 + 80_000 * y), val=0.2, loss="mse", metrics=["r2"], lr=1e-3, epochs=6, seed=0
    )


@faulty("unscaled-targets")
def the_progression_as_it_was_measured():
    """A data set gives the progression of a disease as measured, 25 to 346, to a model that starts around 0."""
    x, _ = diabetes()
    measured = torch.from_numpy(load_diabetes().target).float()[:, None]

    class Patients(Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            return {"x": x[i], "y": measured[i]}

    return dict(
        model=mlp(10, 1), train=Patients(), val=0.2, loss=nn.MSELoss(), metrics=["r2"], lr=1e-3, epochs=8, seed=0
    )


# 41 impossible-metric


@faulty("impossible-metric")
def an_accuracy_above_one():
    """The accuracy is the number of right answers in a batch, and is averaged as if it were a share."""

    def accuracy(outputs, targets):
        return (outputs.argmax(1) == targets).sum()

    return dict(
        model=cnn(), train=images(), val=0.2, loss="cross_entropy", metrics=[accuracy], lr=1e-3, epochs=4, seed=0
    )


# 42 wrong-average


@faulty("wrong-average")
def a_recall_of_each_batch():
    """Recall is computed in each batch and averaged; most batches hold none of the rare class and count as 0."""
    draw = generator(0)
    y = (torch.rand(1600, 1, generator=draw) < 0.1).float()
    x = torch.randn(1600, 6, generator=draw) + 1.5 * y

    def recall(outputs, targets):
        found = ((outputs > 0) & (targets > 0.5)).sum()
        return found / (targets > 0.5).sum().clamp(min=1)

    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]))
    return dict(
        model=mlp(6, 1), train=(x, y), val=0.2, loss=loss, metrics=[recall], lr=2e-3, batch_size=8, epochs=4, seed=0
    )


# 43 loss-metric-disagree


@faulty("loss-metric-disagree")
def the_best_place_instead_of_the_best_word():
    """Scores lie as (n, word, place), and the accuracy takes the argmax of the last dimension, over the places."""
    torch.manual_seed(0)

    class Model(NextWord):
        def forward(self, x):
            return super().forward(x).transpose(1, 2)

    def accuracy(outputs, targets):
        best = outputs.argmax(-1)[:, : targets.shape[1]]
        return (best == targets).float().mean()

    return dict(
        model=Model(), train=text(), val=0.2, loss="cross_entropy", metrics=[accuracy], lr=3e-3, epochs=10, seed=0
    )


# 44 logit-threshold


@faulty("logit-threshold")
def one_half_on_the_scale_of_logits():
    """The metric calls a logit above 0.5 a yes, which is a probability of 0.62."""
    draw = generator(0)
    x = torch.randn(1500, 4, generator=draw)
    chance = torch.sigmoid(x @ torch.tensor([[0.7], [-0.5], [0.3], [0.4]]) + 0.3)
    y = (torch.rand(1500, 1, generator=draw) < chance).float()

    def accuracy(outputs, targets):
        return ((outputs > 0.5).float() == targets).float().mean()

    return dict(
        model=mlp(4, 1), train=(x, y), val=0.2, loss="bce_with_logits", metrics=[accuracy], lr=1e-3, epochs=5, seed=0
    )


@faulty("logit-threshold")
def the_argmax_of_a_single_logit():
    """The metric takes the argmax over the one output of a binary classifier, which is always 0."""
    torch.manual_seed(0)

    def accuracy(outputs, targets):
        return (outputs.argmax(1) == targets[:, 0]).float().mean()

    return dict(
        model=Bag(), train=sentences(), val=0.2, loss=nn.BCEWithLogitsLoss(), metrics={"accuracy": accuracy},
        lr=1e-2, epochs=5, seed=0,
    )  # fmt: skip
