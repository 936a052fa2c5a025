"""Faulty programs of the optimizer, the schedule and the loop: numbers 45 to 64 of the catalogue."""

# ruff: noqa: C408
from __future__ import annotations

import copy
from itertools import chain

import torch
from benchmarks.faults.material import blobs, cnn, diabetes, digits, generator, images, line, mlp, text
from benchmarks.faults.program import faulty
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR

import epochal


def sentences(count: int = 400, words: int = 20) -> tuple[Tensor, Tensor]:
    """As ``text``, but no sentence is there twice."""
    x, y = text(4 * count, words=words)
    kept = list({tuple(row): i for i, row in enumerate(x.tolist())}.values())[:count]
    return x[kept], y[kept]


class Ratings(nn.Module):
    """Numbers of users and of items, (n,) both, to ratings (n,)."""

    def __init__(self, users: int, items: int, width: int):
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        nn.init.normal_(self.users.weight, std=0.1)
        nn.init.normal_(self.items.weight, std=0.1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(1)


def ratings(users: int = 40, items: int = 30, count: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """Users, items and ratings of mean 0 and deviation about 1, from factors of width 3."""
    draw = generator()
    of_users, of_items = torch.randn(users, 3, generator=draw), torch.randn(items, 3, generator=draw)
    pairs = torch.randperm(users * items, generator=draw)[:count]
    user, item = pairs // items, pairs % items
    rating = (of_users[user] * of_items[item]).sum(1) / 3**0.5
    return user, item, rating + 0.1 * torch.randn(count, generator=draw)


class Tagger(nn.Module):
    """Words (n, t) to scores of the next word, (n, words, t)."""

    def __init__(self, words: int = 20, width: int = 32):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.reader = nn.GRU(width, width, batch_first=True)
        self.scores = nn.Linear(width, words)

    def forward(self, words: Tensor) -> Tensor:
        return self.scores(self.reader(self.words(words))[0]).transpose(1, 2)


class Recogniser(nn.Module):
    """Images (n, 1, 8, 8) to scores of ten classes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Encoder(nn.Module):
    """Words (n, t) to scores of the next word, (n, words, t): one causal transformer block, with norms behind."""

    def __init__(self, words: int = 20, width: int = 32, length: int = 12):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.scores = nn.Linear(width, words)

    def forward(self, words: Tensor) -> Tensor:
        length = words.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.scores(self.block(self.words(words) + self.places[:length], src_mask=mask)).transpose(1, 2)


# 45: trainable, but not in the optimizer


@faulty("not-in-optimizer")
def images_of_which_only_the_head_is_optimised():
    """The optimizer is made over the head; the convolutions before it require gradients and never move."""
    torch.manual_seed(0)
    model = Recogniser()
    optimizer = torch.optim.Adam(model.head.parameters(), lr=1e-2)
    return dict(model=model, train=images(), val=0.2, loss="cross_entropy", optimizer=optimizer, epochs=6)


@faulty("not-in-optimizer")
def ratings_with_a_table_left_out():
    """The user wrote down the tables to train by hand, and left out the one of the items."""
    torch.manual_seed(0)
    model = Ratings(40, 30, 4)
    optimizer = torch.optim.AdamW([{"params": model.users.parameters(), "lr": 3e-2}], weight_decay=0.0)
    return dict(model=model, train=ratings(), val=0.2, loss=nn.MSELoss(), optimizer=optimizer, epochs=10)


@faulty("not-in-optimizer")
def autoencoder_with_layers_chosen_by_name():
    """The optimizer takes what is called "encode..."; the decoder and its bias stay as they were drawn."""
    x, _ = digits()
    torch.manual_seed(1)
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 12)))
    model.add_module("decoder", nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 64)))
    chosen = [p for name, p in model.named_parameters() if name.startswith("encode")]
    optimizer = torch.optim.Adam(chosen, lr=3e-3)

    def update(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        state.model.zero_grad()
        images = window.batches[0]
        loss = F.mse_loss(state.model(images), images)
        loss.backward()
        optimizer.step()
        return epochal.StepResult(loss.detach(), window.samples)

    return dict(model=model, train=x, step=update, epochs=8)


# 46: in the optimizer, but not in the model


@faulty("foreign-parameters", "not-in-optimizer")
def images_with_a_head_put_on_later():
    """The head is replaced for ten classes after the optimizer was made: it holds the old head's weights."""
    model = cnn(classes=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    model[-1] = nn.Linear(32, 10)
    nn.init.normal_(model[-1].weight, std=0.01)
    return dict(model=model, train=images(), val=0.2, loss="cross_entropy", optimizer=optimizer, epochs=4)


@faulty("foreign-parameters", "step-without-effect")
def table_with_the_optimizer_of_a_copy():
    """The step's optimizer is made over a copy of the model that was kept for later."""
    torch.manual_seed(0)
    model = mlp(10, 1)
    kept = copy.deepcopy(model)
    optimizer = torch.optim.Adam(kept.parameters(), lr=3e-3)

    def update(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        x, y = window.batches[0]
        loss = F.mse_loss(state.model(x), y)
        state.model.zero_grad()
        loss.backward()
        optimizer.step()
        return epochal.StepResult(loss.detach(), window.samples)

    return dict(model=model, train=diabetes(), val=0.2, loss="mse", step=update, epochs=5)


@faulty("foreign-parameters", "not-in-optimizer")
def words_with_a_model_made_twice():
    """The model is made once for the optimizer and once more for the training."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(Tagger().parameters(), lr=3e-3)
    return dict(model=Tagger(), train=sentences(), val=0.2, loss="cross_entropy", optimizer=optimizer, epochs=4)


@faulty("foreign-parameters", "not-in-optimizer")
def words_with_a_table_made_anew():
    """The table of the words is made anew, larger, when the optimizer is there already."""
    x, y = sentences(words=24)
    torch.manual_seed(0)
    model = Tagger(words=20)
    model.scores = nn.Linear(32, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.words = nn.Embedding.from_pretrained(0.02 * torch.randn(24, 32), freeze=False)
    return dict(model=model, train=(x, y), val=0.2, loss="cross_entropy", optimizer=optimizer, epochs=4)


# 47: frozen


@faulty("all-frozen")
def images_frozen_with_their_new_head():
    """Everything is frozen for transfer, and so is the new head, which was put on before."""
    model = cnn()
    model[-1] = nn.Linear(32, 10)
    for parameter in model.parameters():
        parameter.requires_grad = False
    return dict(model=model, train=images(), val=0.2, loss="cross_entropy", lr=1e-3, epochs=3)


@faulty("all-frozen", "detached-loss")
def table_frozen_before_a_step_of_its_own():
    """The model is made with requires_grad_(False), and then trained by a step with an optimizer of its own."""
    x, y = line()
    model = mlp(4, 1).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def update(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        features, targets = window.batches[0]
        optimizer.zero_grad()
        loss = F.mse_loss(state.model(features), targets)
        loss.backward()
        optimizer.step()
        return epochal.StepResult(loss.detach(), window.samples)

    return dict(model=model, train=(x, y), val=0.2, loss="mse", step=update, epochs=3)


@faulty("frozen-in-optimizer")
def images_with_a_frozen_group_to_tune():
    """The body gets a group with a rate of its own, to be trained, but it was frozen and nobody thawed it."""
    torch.manual_seed(0)
    model = Recogniser()
    model.body.requires_grad_(False)
    groups = [{"params": model.body.parameters(), "lr": 3e-3}, {"params": model.head.parameters(), "lr": 1e-2}]
    return dict(
        model=model, train=images(), val=0.2, loss="cross_entropy", optimizer=torch.optim.Adam(groups), epochs=8
    )


@faulty("frozen-in-optimizer")
def words_with_a_frozen_table():
    """from_pretrained freezes the random table that it is given; the optimizer has a group for it all the same."""
    x, y = sentences(600, words=60)
    torch.manual_seed(0)
    model = Tagger(words=60, width=16)
    model.words = nn.Embedding.from_pretrained(0.01 * torch.randn(60, 16))
    groups = [
        {"params": model.words.parameters(), "lr": 2e-2},
        {"params": chain(model.reader.parameters(), model.scores.parameters())},
    ]
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    return dict(model=model, train=(x, y), val=0.2, loss="cross_entropy", optimizer=optimizer, epochs=4)


# 48: modules that the model does not know of


class Stack(nn.Module):
    def __init__(self, inputs: int, outputs: int, width: int = 48, depth: int = 3):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@faulty("hidden-modules", "not-in-optimizer")
def digits_with_blocks_in_a_list():
    """The hidden layers stand in a plain list, so that neither the optimizer nor a state dict has them."""
    torch.manual_seed(0)
    return dict(model=Stack(64, 10), train=digits(), val=0.2, loss="cross_entropy", lr=1e-3, epochs=4)


class Columns(nn.Module):
    """Numbers of categories (n, 3) to an output: a table for each column."""

    def __init__(self, many: int, width: int = 8):
        super().__init__()
        self.tables = {name: nn.Embedding(many, width) for name in ("make", "town", "month")}
        self.out = nn.Linear(3 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([table(x[:, i]) for i, table in enumerate(self.tables.values())], 1))


@faulty("hidden-modules", "not-in-optimizer")
def categories_with_tables_in_a_dict():
    """A plain dict holds the embeddings of the columns; only the last layer is trained."""
    draw = generator(1)
    x = torch.randint(50, (800, 3), generator=draw)
    effect = torch.randn(3, 50, generator=draw)
    y = (effect[range(3), x].sum(1, keepdim=True) / 3**0.5) + 0.1 * torch.randn(800, 1, generator=draw)
    torch.manual_seed(0)
    return dict(model=Columns(50), train=(x, y), val=0.2, loss="mse", lr=1e-2, metrics=["r2"], epochs=8)


class Heads(nn.Module):
    """A shared body, and for each of three labels a score (n, 3)."""

    def __init__(self, inputs: int, labels: int = 3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 32), nn.ReLU())
        self.scores = tuple(nn.Parameter(0.2 * torch.randn(32)) for _ in range(labels))
        self.offset = nn.Parameter(torch.zeros(labels))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) @ torch.stack(self.scores, 1) + self.offset


@faulty("hidden-modules", "not-in-optimizer")
def labels_with_parameters_in_a_tuple():
    """The weights of each label's score are parameters in a tuple, and a saved model comes without them."""
    x, classes = blobs(600, classes=4)
    y = torch.stack([classes == 0, classes <= 1, classes % 2 == 0], 1).float()
    torch.manual_seed(0)
    model = Heads(8)
    return dict(model=model, train=(x, y), val=0.2, loss="bce_with_logits", optimizer="sgd", lr=0.05, epochs=6)


# 49: gradients that are not cleared


@faulty("missing-zero-grad")
def images_with_gradients_that_add_up():
    """The step calls backward and step, and nobody clears the gradients."""

    def update(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        x, y = window.batches[0]
        outputs = state.model(x)
        loss = F.cross_entropy(outputs, y)
        loss.backward()
        state.optimizer.step()
        return epochal.StepResult(loss.detach(), window.samples, seen=[(outputs.detach(), y)])

    return dict(
        model=cnn(), train=images(), val=0.2, loss="cross_entropy", step=update,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.2), metrics=["accuracy"], epochs=5,
    )  # fmt: skip


@faulty("missing-zero-grad")
def table_cleared_once_an_epoch():
    """zero_grad stands before the loop over the batches instead of in it."""

    def update(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        if state.progress.windows == 0:
            state.optimizer.zero_grad()
        x, y = window.batches[0]
        loss = F.mse_loss(state.model(x), y)
        loss.backward()
        state.optimizer.step()
        return epochal.StepResult(loss.detach(), window.samples)

    return dict(
        model=mlp(4, 1), train=line(), val=0.2, loss="mse", step=update, batch_size=16,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.8), epochs=5,
    )  # fmt: skip


class TwoOptimizers:
    """The table of the words and all the rest are moved by an optimizer each."""

    def __init__(self, model: Tagger):
        rest = [p for name, p in model.named_parameters() if not name.startswith("words")]
        self.of_words = torch.optim.SGD(model.words.parameters(), lr=1.0)
        self.of_rest = torch.optim.SGD(rest, lr=0.5, momentum=0.5)

    def __call__(self, state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        x, y = window.batches[0]
        self.of_words.zero_grad()
        loss = F.cross_entropy(state.model(x), y)
        loss.backward()
        self.of_words.step()
        self.of_rest.step()
        return epochal.StepResult(loss.detach(), window.samples)


@faulty("missing-zero-grad")
def words_with_two_optimizers():
    """Of the two optimizers of the step only one clears its gradients."""
    torch.manual_seed(0)
    model = Tagger()
    return dict(model=model, train=sentences(), val=0.2, loss="cross_entropy", step=TwoOptimizers(model), epochs=5)


# 50: a step that moves nothing


@faulty("step-without-effect")
def digits_cleared_before_the_step():
    """zero_grad stands between backward and step."""

    def update(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        x, y = window.batches[0]
        loss = F.cross_entropy(state.model(x), y)
        loss.backward()
        state.optimizer.zero_grad()
        state.optimizer.step()
        return epochal.StepResult(loss.detach(), window.samples)

    optimizer = torch.optim.AdamW
    return dict(
        model=mlp(64, 10), train=digits(), val=0.2, loss="cross_entropy", step=update, optimizer=optimizer, epochs=4
    )


@faulty("step-without-effect")
def table_moved_in_a_name_only():
    """Gradient descent by hand makes new tensors, and binds the loop's own name to them."""

    def descend(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        x, y = window.batches[0]
        loss = F.mse_loss(state.model(x), y)
        parameters = list(state.model.parameters())
        with torch.no_grad():
            for weight, slope in zip(parameters, torch.autograd.grad(loss, parameters)):
                weight = weight - 0.05 * slope
        return epochal.StepResult(loss.detach(), window.samples)

    return dict(model=mlp(10, 1), train=diabetes(), val=0.2, loss="mse", step=descend, epochs=5)


@faulty("step-without-effect")
def words_learned_by_a_copy():
    """The step copies the model for its forward pass, so that the gradients lie at the copy's weights."""

    def update(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        x, y = window.batches[0]
        model = copy.deepcopy(state.model)
        state.optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        state.optimizer.step()
        return epochal.StepResult(loss.detach(), window.samples)

    torch.manual_seed(0)
    return dict(
        model=Tagger(), train=sentences(), val=0.2, loss="cross_entropy", step=update,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3), epochs=3,
    )  # fmt: skip


# 51 and 52: the learning rate


@faulty("absurd-lr", "step-without-effect")
def images_with_a_rate_rounded_away():
    """The rate is a whole-number division of the batch size, 64 // 256 of 0.1, and so it is 0."""
    batch_size = 64
    rate = 0.1 * (batch_size // 256)
    return dict(
        model=cnn(), train=images(), val=0.2, loss="cross_entropy", batch_size=batch_size,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9), epochs=3,
    )  # fmt: skip


@faulty("absurd-lr", "lr-too-high")
def table_with_adam_at_ten():
    """Adam moves every weight by about its rate, which is 10 here."""
    x, y = diabetes()
    y = (y > 0).float()
    return dict(model=mlp(10, 1), train=(x, y), val=0.2, loss="bce_with_logits", optimizer="adam", lr=10.0, epochs=4)


@faulty("lr-too-high")
def images_with_a_rate_of_one():
    """SGD with momentum 0.95 has a rate of 1 for a small convolutional network."""
    torch.manual_seed(0)
    return dict(
        model=Recogniser(), train=images(), val=0.2, loss="cross_entropy", metrics=["accuracy"],
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.95), epochs=6,
    )  # fmt: skip


@faulty("lr-too-high")
def words_with_adam_at_a_third():
    """A transformer block under AdamW with a rate of 0.3, a hundred times too much."""
    torch.manual_seed(0)
    return dict(
        model=Encoder(), train=sentences(), val=0.2, loss="cross_entropy", optimizer="adamw", lr=0.3, clip=1.0, epochs=4
    )


@faulty("lr-too-high")
def progression_with_a_rate_for_the_head():
    """The group of the last layer has a rate of 1.0 with Adam, all the others 1e-3."""
    model = mlp(10, 1)
    groups = [{"params": model[:4].parameters()}, {"params": model[4].parameters(), "lr": 1.0}]
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    return dict(model=model, train=diabetes(), val=0.2, loss="mse", optimizer=optimizer, metrics=["r2"], epochs=8)


@faulty("lr-too-low")
def digits_with_a_rate_for_tuning():
    """The rate of 1e-7 would do for the last touch of a trained model; this one has just been drawn."""
    return dict(model=mlp(64, 10), train=digits(), val=0.2, loss="cross_entropy", optimizer="adam", lr=1e-7, epochs=10)


@faulty("lr-too-low")
def table_with_plain_descent_at_a_millionth():
    """SGD without momentum at 1e-5 moves a weight by less than a ten-thousandth in the whole run."""
    return dict(
        model=mlp(4, 1), train=line(), val=0.2, loss=nn.HuberLoss(), metrics=["r2"],
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-5), epochs=10,
    )  # fmt: skip


@faulty("lr-too-low")
def words_with_a_rate_divided_twice():
    """The rate is divided by the number of words in a batch, which the mean of the loss has done already."""
    x, y = sentences()
    rate = 3e-3 / (32 * 12)
    torch.manual_seed(0)
    return dict(model=Tagger(), train=(x, y), val=0.2, loss="cross_entropy", optimizer="adamw", lr=rate, epochs=6)


# 53: Adam's own numbers


@faulty("odd-betas")
def words_with_betas_in_the_wrong_order():
    """The betas of Adam are given as (0.999, 0.9): the squares are forgotten sooner than the slopes."""
    torch.manual_seed(0)
    return dict(
        model=Encoder(), train=sentences(), val=0.2, loss="cross_entropy", epochs=5,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=8e-3, betas=(0.999, 0.9)),
    )  # fmt: skip


@faulty("odd-betas")
def digits_with_an_epsilon_of_nothing():
    """Adam's eps is 0; the corner pixels are always 0, so are their gradients, and 0 / 0 is no number."""
    return dict(
        model=mlp(64, 10), train=digits(), val=0.2, loss="cross_entropy", epochs=3,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3, eps=0.0),
    )  # fmt: skip


# 54 to 56: schedules


class Decaying:
    """One update with a rate that falls to a tenth each epoch."""

    def __init__(self, model: nn.Module):
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        self.schedule = ExponentialLR(self.optimizer, gamma=0.1)

    def __call__(self, state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        if state.progress.windows == 0:
            self.schedule.step()
        x, y = window.batches[0]
        self.optimizer.zero_grad()
        loss = F.cross_entropy(state.model(x), y)
        loss.backward()
        self.optimizer.step()
        return epochal.StepResult(loss.detach(), window.samples)


@faulty("schedule-before-step")
def digits_with_a_rate_that_falls_first():
    """The schedule moves at the start of each epoch, so that the first value of the rate is never used."""
    model = mlp(64, 10)
    return dict(model=model, train=digits(), val=0.2, loss="cross_entropy", step=Decaying(model), epochs=3)


@faulty("schedule-horizon")
def images_with_a_cosine_of_epochs_in_steps():
    """T_max is the number of epochs, but the schedule moves at every step: the rate goes up and down all the time."""
    epochs = 5
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    schedule = epochal.Schedule(CosineAnnealingLR(optimizer, T_max=epochs), per="step")
    return dict(
        model=model, train=images(), val=0.2, loss="cross_entropy", optimizer=optimizer, schedule=schedule,
        epochs=epochs,
    )  # fmt: skip


@faulty("schedule-horizon")
def digits_with_a_cycle_of_another_run():
    """The one cycle is laid out for 100 epochs, the run ends after 4, while the rate is still in its warm-up."""
    x, y = digits(800)
    return dict(
        model=mlp(64, 10), train=(x, y), val=0.2, loss="cross_entropy", epochs=4,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        schedule=lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, epochs=100, steps_per_epoch=20, div_factor=1e3),
    )  # fmt: skip


@faulty("schedule-horizon")
def words_with_a_decay_of_epochs_in_steps():
    """gamma 0.7 was meant for epochs, but the rate shrinks with it at every step, and is gone within the first."""
    torch.manual_seed(0)
    return dict(
        model=Tagger(), train=sentences(), val=0.2, loss="cross_entropy", optimizer="adam", lr=5e-3, epochs=6,
        schedule=epochal.Schedule("exponential", per="step", gamma=0.7),
    )  # fmt: skip


@faulty("schedule-horizon")
def progression_with_a_line_that_ends_early():
    """The rate falls to 0 within 10 steps of about 90, and stays there."""
    return dict(
        model=mlp(10, 1), train=diabetes(), val=0.2, loss="mse", optimizer="adamw", lr=3e-3, epochs=8,
        schedule=epochal.Schedule(lambda optimizer: LinearLR(optimizer, 1.0, 0.0, total_iters=10), per="step"),
    )  # fmt: skip


@faulty("warmup-order")
def words_with_a_warmup_of_whole_numbers():
    """The warm-up is divided as whole numbers: the rate is 0 for 30 steps, and then jumps to its peak."""
    warmup = 30
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = epochal.Schedule(LambdaLR(optimizer, lambda step: min(1, (step + 1) // warmup)), per="step")
    return dict(
        model=model, train=sentences(), val=0.2, loss="cross_entropy", optimizer=optimizer, schedule=schedule, epochs=4
    )


@faulty("warmup-order")
def images_that_warm_up_at_the_end():
    """The warm-up and the cosine are given in the wrong order: the rate is highest at the first step, and rises again
    from 0 at the end."""

    def schedule(optimizer: torch.optim.Optimizer) -> SequentialLR:
        cosine = CosineAnnealingLR(optimizer, T_max=65)
        warmup = LinearLR(optimizer, start_factor=0.01, total_iters=10)
        return SequentialLR(optimizer, [cosine, warmup], milestones=[65])

    torch.manual_seed(0)
    return dict(
        model=Recogniser(), train=images(), val=0.2, loss="cross_entropy", epochs=5,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
        schedule=epochal.Schedule(schedule, per="step"),
    )  # fmt: skip


# 57 and 58: decay and penalties


@faulty("decayed-norms")
def words_with_the_groups_of_decay_swapped():
    """The strong decay falls on norms and biases, and the matrices, for which it was meant, have none."""
    torch.manual_seed(0)
    model = Encoder()
    norms = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    groups = [{"params": norms, "weight_decay": 5.0}, {"params": matrices, "weight_decay": 0.0}]
    return dict(
        model=model,
        train=sentences(),
        val=0.2,
        loss="cross_entropy",
        optimizer=torch.optim.AdamW(groups, lr=3e-3),
        epochs=8,
    )


@faulty("penalty-dominates")
def digits_with_a_penalty_on_all_weights():
    """The sum of all squared weights is added with the factor 0.1: keeping it small is all that is learned."""

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> epochal.Loss:
        x, y = batch
        outputs = model(x)
        penalty = sum(p.square().sum() for p in model.parameters())
        return epochal.Loss(F.cross_entropy(outputs, y) + 0.1 * penalty, outputs=outputs, targets=y)

    return dict(
        model=mlp(64, 10), train=digits(), val=0.2, objective=objective, lr=3e-3, metrics=["accuracy"], epochs=6
    )


class Variational(nn.Module):
    """Images (n, 64) to the mean and the log-variance of a code (n, 8), and codes to images."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decode = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, 1)
        noise = torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else 0.0
        return self.decode(mean + noise), mean, log_variance


@faulty("penalty-dominates")
def codes_that_are_held_at_their_prior():
    """The divergence of the codes is summed and the error of the images is a mean: no code says anything."""
    x, _ = digits()

    def objective(model: nn.Module, images: Tensor) -> Tensor:
        written, mean, log_variance = model(images)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return F.mse_loss(written, images) + divergence

    torch.manual_seed(0)
    return dict(model=Variational(), train=x, val=0.2, objective=objective, lr=2e-3, epochs=10)


# 59 to 61: accumulation, clipping, scaling


@faulty("unscaled-accumulation")
def images_with_a_sum_of_micro_batches():
    """The gradients of eight micro-batches are added up, and not divided by eight."""

    def update(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        state.optimizer.zero_grad()
        total = torch.zeros(())
        for x, y in window.batches:
            loss = F.cross_entropy(state.model(x), y)
            loss.backward()
            total += loss.detach()
        state.optimizer.step()
        return epochal.StepResult(total / len(window.batches), window.samples)

    torch.manual_seed(0)
    return dict(
        model=Recogniser(), train=images(), val=0.2, loss="cross_entropy", step=update, accumulate=8, batch_size=8,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9), epochs=8,
    )  # fmt: skip


@faulty("unscaled-accumulation")
def words_weighted_by_micro_batch():
    """Each micro-batch counts the same, whether 6 words of it are no padding or 60: the mean is not over words."""
    x, y = sentences(400)
    short = torch.rand(400, generator=generator(3)) < 0.7
    y[short, 0] = (x[short, 0] + 7) % 20  # short sentences go on in another way, and end there
    y[short, 1:] = -100

    def update(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        state.optimizer.zero_grad()
        total, words = torch.zeros(()), torch.zeros(())
        for inputs, targets in window.batches:
            loss = F.cross_entropy(state.model(inputs), targets)
            (loss / len(window.batches)).backward()
            counted = (targets != -100).sum()
            total, words = total + loss.detach() * counted, words + counted
        state.optimizer.step()
        return epochal.StepResult(total / words, words)

    torch.manual_seed(0)
    return dict(
        model=Tagger(), train=(x, y), val=0.2, loss="cross_entropy", step=update, accumulate=6, batch_size=6,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2), epochs=8,
    )  # fmt: skip


@faulty("unscaled-accumulation")
def table_with_a_mean_of_means_added():
    """The step adds up the losses of four micro-batches and calls backward once; a rate for their mean is used."""

    def update(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        state.optimizer.zero_grad()
        loss = sum(F.mse_loss(state.model(x), y) for x, y in window.batches)
        loss.backward()
        state.optimizer.step()
        return epochal.StepResult(loss.detach() / len(window.batches), window.samples)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    return dict(
        model=model, train=line(640), val=0.2, loss="mse", step=update, accumulate=4, batch_size=8,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), epochs=6,
    )  # fmt: skip


@faulty("clipping")
def digits_with_scaled_gradients_clipped():
    """The gradients are clipped while they are still 65536 times too large, so that little is left of each."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def update(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        x, y = window.batches[0]
        state.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(state.model(x), y)
        scaler.scale(loss).backward()
        nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        scaler.step(state.optimizer)
        scaler.update()
        return epochal.StepResult(loss.detach().float(), window.samples)

    return dict(
        model=mlp(64, 10), train=digits(), val=0.2, loss="cross_entropy", step=update, epochs=3,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )  # fmt: skip


@faulty("clipping")
def images_that_are_always_clipped():
    """The largest norm of a gradient is 1e-3, and that of every gradient is far above it."""
    return dict(
        model=cnn(), train=images(), val=0.2, loss="cross_entropy", clip=1e-3, epochs=6,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    )  # fmt: skip


class Both(nn.Module):
    """Images (n, 64) to scores of ten classes, and to the images once more."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 48), nn.ReLU())
        self.scores = nn.Linear(48, 10)
        self.images = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.body(x)
        return self.scores(code), self.images(code)


@faulty("fp16-unscaled")
def digits_in_halves_without_a_scaler():
    """The passes run in fp16 without a scaler: the gradients of the second task, whose weight is small, are 0 there."""

    def both(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        scores, written = model(x)
        return F.cross_entropy(scores, y), F.mse_loss(written, x)

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        named, drawn = both(model, batch)
        return named + 1e-4 * drawn

    def update(state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        state.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            named, drawn = both(state.model, window.batches[0])
            loss = named + 1e-4 * drawn
        loss.backward()
        state.optimizer.step()
        return epochal.StepResult(loss.detach(), window.samples, values={"drawn": drawn.detach()})

    torch.manual_seed(0)
    return dict(
        model=Both(), train=digits(), val=0.2, objective=objective, step=update, batch_size=64, epochs=10,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    )  # fmt: skip


# 62 and 64: lost updates, and an end that comes too early


@faulty("lost-updates")
def digits_with_weights_in_bf16():
    """The weights are bf16, with 8 bits: most of SGD's moves are less than half of the last one."""
    x, y = digits()
    model = mlp(64, 10).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    return dict(
        model=model, train=(x.to(torch.bfloat16), y), val=0.2, loss="cross_entropy", optimizer=optimizer, batch_size=8,
        epochs=10,
    )  # fmt: skip


@faulty("lost-updates")
def words_with_adam_in_bf16():
    """A model in bf16 under Adam with 1e-4: a weight of 0.1 has steps of 5e-4, so that most moves are lost."""
    torch.manual_seed(0)
    model = Tagger(width=64).bfloat16()
    return dict(
        model=model,
        train=sentences(),
        val=0.2,
        loss="cross_entropy",
        optimizer="adam",
        lr=1e-4,
        epochs=6,
        batch_size=16,
    )


@faulty("too-few-epochs")
def words_stopped_while_they_learn():
    """Three epochs, and the loss falls by a fifth and more in each: the run ends long before it has learned."""
    torch.manual_seed(0)
    return dict(model=Tagger(), train=sentences(800), val=0.2, loss="cross_entropy", lr=2e-3, epochs=3)


@faulty("too-few-epochs")
def digits_stopped_by_a_large_delta():
    """Early stopping only counts a gain of 1.0 and more in the loss, so that it ends a run that improves all along."""
    stopping = epochal.EarlyStopping(patience=3, min_delta=1.0)
    return dict(
        model=mlp(64, 10), train=digits(), val=0.2, loss="cross_entropy", lr=5e-4, early_stopping=stopping, epochs=10
    )
