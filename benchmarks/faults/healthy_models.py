"""Healthy programs whose models, data or settings look wrong to a naive rule, and are right."""

# ruff: noqa: C408

from __future__ import annotations

import math

import torch
from benchmarks.faults.material import blobs, cnn, diabetes, digits, generator, images, line, mlp, text
from benchmarks.faults.program import healthy
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import epochal


def shuffled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """In a random order: neighbours among the digits are of one hand."""
    order = torch.randperm(len(y), generator=generator(4))
    return x[order], y[order]


def fitted(model: nn.Module, x: Tensor, y: Tensor, steps: int = 200, lr: float = 1e-2) -> nn.Module:
    """The model after some updates over random batches: what a user loads from a file."""
    draw, optimizer = generator(1), torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=draw)
        optimizer.zero_grad()
        functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


class Taught(nn.Module):
    """A small network, and the large one it learns from."""

    def __init__(self, teacher: nn.Module):
        super().__init__()
        self.teacher = teacher.requires_grad_(False).eval()
        self.student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)


@healthy
def distilled_from_a_frozen_teacher():
    """More than half of the parameters get no gradient and stay in eval mode: they are the teacher's."""
    torch.manual_seed(0)
    x, y = digits()
    large = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.3), nn.Linear(96, 10))
    model = Taught(fitted(large, x, y))

    def imitate(model, batch):
        x, y = batch
        scores, temperature = model(x), 3.0
        with torch.no_grad():
            wisdom = model.teacher(x)
        soft = functional.kl_div(
            functional.log_softmax(scores / temperature, 1), functional.softmax(wisdom / temperature, 1),
            reduction="batchmean",
        )  # fmt: skip
        value = 0.7 * temperature**2 * soft + 0.3 * functional.cross_entropy(scores, y)
        return epochal.Loss(value, outputs=scores, targets=y)

    return dict(model=model, train=(x, y), val=0.2, objective=imitate, lr=5e-3, metrics=["accuracy"], epochs=8)


class Adapted(nn.Module):
    """A frozen layer with a low-rank change beside it, which is zero at first."""

    def __init__(self, layer: nn.Linear, rank: int = 4):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


@healthy
def low_rank_adapters_that_start_at_zero():
    """LoRA: one matrix of each adapter is zero, so the other gets no gradient at first; the rest is frozen."""
    x, y = digits()
    base = fitted(mlp(64, 10, hidden=64), x[:400], y[:400])
    for index in (0, 2, 4):
        base[index] = Adapted(base[index], rank=8)
    moved = x.reshape(-1, 8, 8).roll(1, 2).flatten(1)
    return dict(
        model=base, train=(moved[400:], y[400:]), val=0.2, loss="cross_entropy", optimizer="adamw", lr=1e-2,
        metrics=["accuracy"], epochs=12,
    )  # fmt: skip


@healthy
def frozen_backbone_in_eval_mode():
    """The backbone with its batch norm is frozen and stays in eval mode during training, and a new head is trained."""
    x, y = images(1000)
    low, high = y < 5, y >= 5
    backbone = fitted(cnn(5), x[low], y[low], steps=120)[:-1]
    backbone.requires_grad_(False).eval()
    torch.manual_seed(1)
    model = nn.Sequential(backbone, nn.Linear(32, 5))
    return dict(
        model=model, train=(x[high], y[high] - 5), val=0.2, loss="cross_entropy", lr=2e-2, metrics=["accuracy"],
        epochs=10,
    )  # fmt: skip


class Probe(nn.Module):
    """A linear layer on the features of an encoder, which are not trained."""

    def __init__(self, encoder: nn.Module, features: int, classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.encoder(x)
        return self.head(features)


@healthy
def linear_probe():
    """The encoder runs without a graph, so its weights never get a gradient: the probe alone is trained."""
    x, y = digits()
    encoder = fitted(mlp(64, 10, hidden=64), x[:300], y[:300])[:4].eval().requires_grad_(False)
    torch.manual_seed(2)
    probe = Probe(encoder, 64, 2)
    even = (y % 2)[300:]
    return dict(
        model=probe, train=(x[300:], even), val=0.2, loss="cross_entropy",
        optimizer=torch.optim.Adam(probe.head.parameters(), lr=1e-2), metrics=["accuracy"], epochs=12,
    )  # fmt: skip


class Experts(nn.Module):
    """Each sample goes to the one expert that the router prefers; also how evenly the samples are spread."""

    def __init__(self, inputs: int, outputs: int, experts: int = 4):
        super().__init__()
        self.router = nn.Linear(inputs, experts)
        nn.init.normal_(self.router.weight, std=0.02)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, outputs)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chances = self.router(x).softmax(1)
        weight, chosen = chances.max(1)
        rows = [torch.nonzero(chosen == number).flatten() for number in range(len(self.experts))]
        parts = [expert(x[own]) for expert, own in zip(self.experts, rows) if len(own)]
        order = torch.cat(rows).argsort()
        share = functional.one_hot(chosen, len(self.experts)).float().mean(0)
        return torch.cat(parts)[order] * weight[:, None], len(self.experts) * (share * chances.mean(0)).sum()


@healthy
def experts_that_some_batches_skip():
    """A mixture of experts: in a small batch some of the experts have no sample, and then no gradient."""
    torch.manual_seed(0)

    def balanced(model, batch):
        x, y = batch
        scores, crowding = model(x)
        return epochal.Loss(functional.cross_entropy(scores, y) + 0.2 * crowding, outputs=scores, targets=y)

    return dict(
        model=Experts(8, 6), train=blobs(800, 6, 8, seed=4), val=0.2, objective=balanced, lr=3e-3, batch_size=8,
        metrics=["accuracy"], epochs=8,
    )  # fmt: skip


class Block(nn.Module):
    """A residual block, whose last layer is zero at first, and which training may pass by (``skip``)."""

    def __init__(self, width: int, skip: float = 0.0):
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.skip = skip
        if not skip:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.skip and torch.rand(()) < self.skip:
            return x
        change = self.last(functional.gelu(self.first(self.norm(x))))
        return x + (change if self.training or not self.skip else (1 - self.skip) * change)


@healthy
def residuals_that_start_at_zero():
    """The last layer of every residual block is all zeros at the start, as in GPT-2 and in ResNets that work."""
    torch.manual_seed(0)
    blocks = [Block(32) for _ in range(6)]
    model = nn.Sequential(nn.Linear(64, 32), *blocks, nn.LayerNorm(32), nn.Linear(32, 10))
    return dict(
        model=model, train=digits(), val=0.2, loss="cross_entropy", optimizer="adamw", lr=2e-3, schedule="cosine",
        metrics=["accuracy"], epochs=8,
    )  # fmt: skip


@healthy
def blocks_that_are_skipped_at_random():
    """Stochastic depth: in most updates the weights of some blocks get no gradient at all."""
    torch.manual_seed(1)
    blocks = [Block(32, skip=rate) for rate in (0.1, 0.2, 0.3, 0.4)]
    model = nn.Sequential(nn.Linear(64, 32), *blocks, nn.LayerNorm(32), nn.Linear(32, 10))
    return dict(model=model, train=digits(), val=0.2, loss="cross_entropy", lr=3e-3, metrics=["accuracy"], epochs=8)


def series(count: int, start: int = 0) -> Tensor:
    """Two waves and some noise, of mean 0 and deviation about 1."""
    when = torch.arange(start, start + count, dtype=torch.float32)
    return (when / 5).sin() + 0.5 * (when / 13).cos() + 0.1 * torch.randn(count, generator=generator(start))


@healthy
def forecast_in_the_order_of_time():
    """A time series: batches come in the order of time (shuffle=False), and what is validated on is the end of it."""
    wave = series(1024)
    windows = wave.unfold(0, 25, 1)
    x, y = windows[:, :24], windows[:, 24:]
    return dict(
        model=mlp(24, 1), train=(x[:800], y[:800]), val=(x[824:], y[824:]), loss="mse", lr=3e-3, shuffle=False,
        metrics=["r2"], epochs=8,
    )  # fmt: skip


class Remembering(nn.Module):
    """A GRU that goes on where the batch before has ended; ``forget`` begins anew."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.reader, self.head = nn.GRU(1, width, batch_first=True), nn.Linear(width, 1)
        self.register_buffer("memory", torch.zeros(1, 8, width))

    def forward(self, x: Tensor, is_first: Tensor) -> Tensor:
        start = torch.where(is_first[None, :, None], torch.zeros_like(self.memory), self.memory)
        read, memory = self.reader(x, start)
        self.memory = memory.detach()
        return self.head(read)


@healthy
def recurrent_memory_across_batches():
    """A stateful RNN: eight long series are cut into pieces that must come in order, and the memory is detached."""
    torch.manual_seed(0)
    wave = torch.stack([series(1001, start=1300 * row) for row in range(8)])
    x, y = (part.reshape(8, 50, 20, 1).transpose(0, 1).reshape(400, 20, 1) for part in (wave[:, :-1], wave[:, 1:]))
    is_first = torch.zeros(50, 8, dtype=torch.bool)
    is_first[0] = True
    return dict(
        model=Remembering(), train=(x, is_first.flatten(), y), loss="mse", lr=5e-3, batch_size=8,
        shuffle=False, epochs=10,
    )  # fmt: skip


@healthy
def twenty_samples():
    """There are only twenty samples, in five batches, and no validation set can be held back from so few."""
    x, y = line(count=20, features=2, noise=0.05, seed=2)
    torch.manual_seed(1)
    return dict(model=nn.Linear(2, 1), train=(x, y), loss="mse", optimizer="sgd", lr=0.05, batch_size=4, epochs=20)


@healthy
def one_batch_learned_by_heart():
    """A single batch is overfitted on purpose, without validation: the usual test that a model can learn at all."""
    x, y = images(16)
    return dict(
        model=cnn(seed=2), train=(x, y), loss="cross_entropy", lr=1e-2, batch_size=16, metrics=["accuracy"], epochs=40
    )


@healthy
def large_inputs_with_batch_norm_first():
    """The features are salaries and areas in the thousands, and a batch norm is the first layer of the model."""
    torch.manual_seed(0)
    z, y = line(features=4, seed=7)
    x = z * torch.tensor([12_000.0, 300.0, 15.0, 4_000.0]) + torch.tensor([45_000.0, 900.0, 40.0, 20_000.0])
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
    return dict(model=model, train=(x, y), val=0.2, loss="mse", lr=3e-3, metrics=["r2"], epochs=12)


class Camera(nn.Module):
    """Bytes (n, height, width, 1) to scores: scaled and permuted here, so that data stay small."""

    def __init__(self):
        super().__init__()
        self.body = cnn(10, seed=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x.permute(0, 3, 1, 2).float() / 255 - 0.3) / 0.37)


@healthy
def bytes_scaled_and_permuted_within_the_model():
    """The inputs are bytes with the channel last: the model itself scales them and puts the channel first."""
    x, y = digits(800)
    x = (x * 255).to(torch.uint8).reshape(-1, 8, 8, 1)
    return dict(model=Camera(), train=(x, y), val=0.2, loss="cross_entropy", lr=5e-3, metrics=["accuracy"], epochs=4)


@healthy
def bytes_scaled_by_the_data_set():
    """A Dataset keeps bytes and gives floats; the training loader shuffles, and the one for validation does not."""
    x, y = shuffled(*digits(800))

    class Scans(Dataset):
        def __init__(self, rows: slice):
            self.x, self.y = (x[rows] * 255).to(torch.uint8), y[rows]

        def __len__(self) -> int:
            return len(self.y)

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return self.x[i].float() / 127.5 - 1, self.y[i]

    train = DataLoader(Scans(slice(640)), batch_size=32, shuffle=True, generator=generator(2))
    val = DataLoader(Scans(slice(640, None)), batch_size=80)
    return dict(
        model=mlp(64, 10, hidden=64), train=train, val=val, loss="cross_entropy", lr=3e-3, metrics=["accuracy"],
        epochs=6,
    )  # fmt: skip


@healthy
def pretrained_on_the_same_task():
    """The weights come from an earlier training, so the first loss is far below ln 10: more data make them better."""
    x, y = digits(1400)
    x = (x - 0.305) / 0.376
    model = fitted(mlp(64, 10, hidden=64, seed=3), x[:300], y[:300], steps=60)
    return dict(
        model=model, train=(x[300:], y[300:]), val=0.2, loss="cross_entropy", lr=5e-4, metrics=["accuracy"], epochs=6
    )


@healthy
def finetuned_with_a_tiny_rate():
    """A trained network is only nudged: Adam with a rate of 2e-5 on data that differ a little."""
    x, y = digits(1400)
    model = fitted(mlp(64, 10, hidden=128, seed=4), x[:700], y[:700], steps=300)
    shifted = 0.75 * x[700:] + 0.2
    return dict(
        model=model, train=(shifted, y[700:]), val=0.2, loss="cross_entropy", optimizer="adamw", lr=2e-5,
        weight_decay=0.01, metrics=["accuracy"], batch_size=16, epochs=10,
    )  # fmt: skip


class WordModel(nn.Module):
    """Words (n, t) to the words that come next, (n, words, t); it looks back only, and shares its embedding."""

    def __init__(self, words: int, width: int = 32, length: int = 12):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(length, width))
        nn.init.normal_(self.words.weight, std=0.1)
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.norm, self.scores = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.scores.weight = self.words.weight
        self.register_buffer("later", torch.ones(length, length, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.words(x) + self.places, src_mask=self.later)
        return self.scores(self.norm(h)).transpose(1, 2)


@healthy
def causal_transformer_with_tied_weights():
    """A language model with a causal mask, whose output layer is its embedding: one parameter under two names."""
    torch.manual_seed(0)
    return dict(
        model=WordModel(20), train=text(500), val=0.2, loss="cross_entropy", optimizer="adamw", lr=5e-3, clip=1.0,
        schedule=epochal.Schedule("cosine", warmup=15), metrics=["accuracy"], epochs=6,
    )  # fmt: skip


class Tagger(nn.Module):
    def __init__(self, words: int, tags: int, width: int = 32):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(12, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.1, batch_first=True)
        self.scores = nn.Linear(width, tags)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.words(x) + self.places(torch.arange(x.shape[1], device=x.device)))
        return self.scores(h).transpose(1, 2)


@healthy
def tagger_that_looks_both_ways():
    """Each word gets a tag that depends on the word after it: the transformer has no causal mask, on purpose."""
    torch.manual_seed(0)
    x = torch.randint(12, (600, 12), generator=generator(5))
    following = torch.cat([x[:, 1:], x.new_zeros(600, 1)], 1)
    tags = (following > x).long() + (following > 8).long()
    return dict(
        model=Tagger(12, 3), train=(x, tags), val=0.2, loss="cross_entropy", lr=3e-3, metrics=["accuracy"], epochs=10
    )


@healthy
def deep_linear_network():
    """Five linear layers without any non-linearity: how such a network learns is what is studied."""
    torch.manual_seed(0)
    layers = [nn.Linear(10, 10, bias=False) for _ in range(5)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    draw = generator(6)
    x = torch.randn(640, 10, generator=draw)
    y = x @ torch.randn(10, 10, generator=draw) / math.sqrt(10)
    return dict(model=nn.Sequential(*layers), train=(x, y), val=0.2, loss="mse", optimizer="sgd", lr=0.1, epochs=20)


@healthy
def logistic_regression():
    """A single linear layer: no hidden units and no non-linearity, and none is needed."""
    torch.manual_seed(0)
    x, y = digits()
    return dict(
        model=nn.Linear(64, 10), train=(x, y), val=0.2, loss="cross_entropy", optimizer="sgd", lr=0.5,
        metrics=["accuracy"], epochs=8,
    )  # fmt: skip


@healthy
def linear_regression_with_a_large_rate():
    """SGD with a rate of 0.3 and all data in one batch: right for a quadratic whose curvature is about 2."""
    torch.manual_seed(0)
    x, y = line(count=400, features=6, seed=8)
    return dict(
        model=nn.Linear(6, 1), train=(x, y), val=0.2, loss="mse", optimizer="sgd", lr=0.3, batch_size=320,
        metrics=["r2"], epochs=15,
    )  # fmt: skip


@healthy
def sgd_with_a_rate_of_one_half():
    """SGD with lr=0.5 and momentum is much for most networks, and right for this one with batch norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    return dict(
        model=model, train=digits(), val=0.2, loss="cross_entropy", schedule="cosine", metrics=["accuracy"], epochs=8,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.5, nesterov=True),
    )  # fmt: skip


class Factors(nn.Module):
    """Ratings as products of the factors of users and items, plus what each of them has by itself."""

    def __init__(self, users: int, items: int, width: int = 6):
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        for part, std in ((self.users, 0.3), (self.items, 0.3), (self.user_bias, 0.0), (self.item_bias, 0.0)):
            nn.init.normal_(part.weight, std=std)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        product = (self.users(user) * self.items(item)).sum(1)
        return product + self.user_bias(user)[:, 0] + self.item_bias(item)[:, 0]


@healthy
def ratings_by_factors():
    """Integers go into embeddings, the biases are all zero at first, and many rows get no gradient in a batch."""
    torch.manual_seed(0)
    draw = generator(7)
    user, item = torch.randint(40, (3000,), generator=draw), torch.randint(30, (3000,), generator=draw)
    u, v = torch.randn(40, 3, generator=draw), torch.randn(30, 3, generator=draw)
    rating = (u[user] * v[item]).sum(1) / math.sqrt(3) + 0.1 * torch.randn(3000, generator=draw)
    return dict(
        model=Factors(40, 30), train=(user, item, rating), val=0.2, loss="mse", lr=1e-2, batch_size=64, metrics=["r2"],
        epochs=15,
    )  # fmt: skip


@healthy
def one_hot_table_with_an_empty_column():
    """Two of the one-hot columns are zero in every row: there are towns from which nobody came this year."""
    torch.manual_seed(0)
    draw = generator(8)
    town = torch.randint(10, (700,), generator=draw)
    numbers = torch.randn(700, 3, generator=draw)
    worth = torch.randn(12, generator=draw)
    y = (worth[town] + 0.5 * numbers[:, 0])[:, None]
    x = torch.cat([functional.one_hot(town, 12).float(), numbers], 1)
    return dict(
        model=mlp(15, 1), train=(x, (y - y.mean()) / y.std()), val=0.2, loss="huber", lr=3e-3, metrics=["r2"], epochs=10
    )


@healthy
def dropout_of_three_fifths():
    """Dropout of 0.6 on a wide layer: the training loss stays above that of validation."""
    torch.manual_seed(0)
    x, y = digits(600)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.6), nn.Linear(256, 10))
    return dict(model=model, train=(x, y), val=0.2, loss="cross_entropy", lr=3e-3, metrics=["accuracy"], epochs=10)


@healthy
def one_cycle_to_its_very_end():
    """The rate starts at a 25th of its peak and ends at nearly nothing, so that the last steps move nothing."""
    torch.manual_seed(0)
    return dict(
        model=cnn(seed=4), train=images(800), val=0.2, loss="cross_entropy", optimizer="adamw", lr=1e-2,
        schedule="onecycle", metrics=["accuracy"], epochs=5,
    )  # fmt: skip


@healthy
def adamw_without_decay_for_norms():
    """Two parameter groups: weights with decay, norms and biases without it; and a warm-up before a cosine."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(10, 48), nn.LayerNorm(48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 4)
    )
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return dict(
        model=model, train=blobs(800, 4, 10, seed=5), val=0.2, loss="cross_entropy",
        optimizer=torch.optim.AdamW(groups, lr=3e-3), schedule=epochal.Schedule("cosine", warmup=20),
        metrics=["accuracy"], epochs=8,
    )  # fmt: skip


@healthy
def lower_layers_with_lower_rates():
    """Fine-tuning with a rate for each layer: the lowest moves a hundred times more slowly than the new head."""
    x, y = digits(1200)
    model = fitted(mlp(64, 10, hidden=64, seed=5), x[:500], y[:500])
    torch.manual_seed(3)
    model[4] = nn.Linear(64, 2)
    groups = [{"params": model[i].parameters(), "lr": rate} for i, rate in ((0, 5e-5), (2, 5e-4), (4, 5e-3))]
    return dict(
        model=model, train=(x[500:], (y[500:] > 4).long()), val=0.2, loss="cross_entropy",
        optimizer=torch.optim.Adam(groups), metrics=["accuracy"], epochs=8,
    )  # fmt: skip


@healthy
def early_layers_frozen():
    """The first convolution comes from an earlier training and is frozen; the optimizer holds the other layers."""
    x, y = images(900)
    model = fitted(cnn(seed=5), x[:300], y[:300], steps=60, lr=5e-3)
    model[0].requires_grad_(False)
    model[1].requires_grad_(False).eval()
    return dict(
        model=model, train=(x[300:], y[300:]), val=0.2, loss="cross_entropy", lr=5e-3, metrics=["accuracy"],
        epochs=6,
    )  # fmt: skip


class Reviews(nn.Module):
    """Words (n, t) to two scores; the vectors of the words are given and stay as they are."""

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.vectors = nn.Embedding.from_pretrained(vectors, freeze=True, padding_idx=0)
        self.attention, self.head = nn.Linear(16, 1), nn.Linear(16, 2)
        self.other_head = nn.Linear(16, 5).requires_grad_(False)  # of another task; kept for its checkpoint

    def forward(self, words: Tensor) -> Tensor:
        h = self.vectors(words)
        weights = self.attention(h).masked_fill((words == 0)[..., None], -math.inf).softmax(dim=1)
        return self.head((weights * h).sum(1))


@healthy
def frozen_word_vectors_and_an_unused_head():
    """Embeddings and a second head are frozen, attention is a softmax over dim 1, half of the words is padding."""
    torch.manual_seed(0)
    draw = generator(9)
    vectors = torch.randn(50, 16, generator=draw)
    vectors[0] = 0
    words = torch.randint(1, 50, (800, 14), generator=draw)
    words[torch.arange(14) >= torch.randint(3, 14, (800, 1), generator=draw)] = 0
    mood = (vectors @ torch.randn(16, generator=draw))[words].sum(1) > 0
    return dict(
        model=Reviews(vectors), train=(words, mood.long()), val=0.2, loss="cross_entropy", lr=1e-2,
        metrics=["accuracy"], epochs=12,
    )  # fmt: skip


class Highway(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.change, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        return gate * torch.tanh(self.change(x)) + (1 - gate) * x


@healthy
def gates_that_start_nearly_closed():
    """Highway layers: sigmoids whose biases start at -2, so that each gate is nearly closed at first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), *[Highway(32) for _ in range(8)], nn.Linear(32, 1))
    return dict(
        model=model, train=diabetes(), val=0.2, loss="mse", lr=1e-3, weight_decay=1e-2, optimizer="adamw",
        metrics=["r2"], epochs=10,
    )  # fmt: skip


class LastWord(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.reader = nn.GRU(8, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.reader(rows)[0][:, -1])


@healthy
def rows_of_digits_with_a_gru():
    """Images are read row by row and only the last state counts; gradients are clipped in nearly every update."""
    torch.manual_seed(0)
    x, y = images(1000)
    return dict(
        model=LastWord(), train=(x[:, 0], y), val=0.2, loss="cross_entropy", lr=5e-3, clip=0.5, metrics=["accuracy"],
        epochs=8,
    )  # fmt: skip


@healthy
def bfloat16_arithmetic():
    """The arithmetic is done in bfloat16 and the weights stay in float32, so that no update is lost."""
    return dict(
        model=mlp(64, 10, hidden=64, seed=6), train=digits(), val=0.2, loss="cross_entropy", optimizer="adamw", lr=3e-3,
        precision="bf16", metrics=["accuracy"], epochs=6,
    )  # fmt: skip


class Signs(nn.Linear):
    """Its weights are used as signs, and the gradient passes as if they were not."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.abs().mean(1, keepdim=True)
        coarse = size * self.weight.sign()
        return functional.linear(x, self.weight + (coarse - self.weight).detach(), self.bias)


@healthy
def weights_of_one_bit():
    """Only the signs of the weights are used, and the gradient goes straight through what has none."""
    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(Signs(64, 96), nn.BatchNorm1d(96), nn.ReLU(), Signs(96, 10))
    return dict(
        model=model, train=((x - 0.305) / 0.376, y), val=0.2, loss="cross_entropy", lr=3e-3, metrics=["accuracy"],
        epochs=8,
    )  # fmt: skip


class Twins(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return functional.pairwise_distance(self.encoder(a), self.encoder(b))


@healthy
def twins_with_a_contrastive_loss():
    """A Siamese network: one encoder runs on both inputs, and its last bias cancels out of their distance."""
    torch.manual_seed(0)
    x, y = shuffled(*digits(1200))

    def pairs(x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        draw = generator(10)
        first = torch.randint(len(x), (count,), generator=draw)
        alike = torch.rand(count, generator=draw) < 0.5
        partners = torch.where(alike[:, None], y[first][:, None] == y, y[first][:, None] != y)
        second = torch.multinomial(partners.float(), 1, generator=draw).flatten()
        return x[first], x[second], alike.float()

    def contrastive(distance, alike):
        return (alike * distance**2 + (1 - alike) * functional.relu(1 - distance) ** 2).mean()

    return dict(
        model=Twins(), train=pairs(x[:900], y[:900], 1200), val=pairs(x[900:], y[900:], 300), loss=contrastive, lr=2e-3,
        epochs=8,
    )  # fmt: skip


@healthy
def group_norm_and_pairs():
    """Batches of two samples, which batch norm could not bear: the norms are over groups of channels."""
    torch.manual_seed(0)
    x, y = images(300)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(96, 10),
    )  # fmt: skip
    return dict(
        model=model, train=(x, y), val=0.2, loss="cross_entropy", lr=2e-3, batch_size=2, metrics=["accuracy"], epochs=5
    )


@healthy
def spectral_and_weight_norms():
    """One layer has its spectral norm fixed, another one its length apart: the optimizer holds no ``weight``."""
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(64, 64)), nn.LeakyReLU(0.1),
        parametrizations.weight_norm(nn.Linear(64, 64)), nn.LeakyReLU(0.1), nn.Linear(64, 10),
    )  # fmt: skip
    return dict(model=model, train=digits(), val=0.2, loss="cross_entropy", lr=3e-3, metrics=["accuracy"], epochs=8)


class Endless(IterableDataset):
    """Samples made as they are asked for, others in each epoch."""

    def __init__(self, count: int):
        self.count, self.draw = count, generator(12)

    def __iter__(self):
        for _ in range(self.count):
            x = torch.rand(2, generator=self.draw) * 2 - 1
            yield x, (3 * x[:1]).sin() * x[1:]


@healthy
def stream_of_made_up_samples():
    """An iterable data set without a length, in its own order, that never gives the same sample twice."""
    x = torch.rand(200, 2, generator=generator(13)) * 2 - 1
    val = (x, (3 * x[:, :1]).sin() * x[:, 1:])
    return dict(
        model=mlp(2, 1, seed=7), train=DataLoader(Endless(800), batch_size=32), val=val, loss="mse", lr=5e-3,
        metrics=["r2"], epochs=10,
    )  # fmt: skip


@healthy
def rare_class_drawn_more_often():
    """One class in ten samples, and a sampler with replacement that draws it as often as the other: rows come twice."""
    torch.manual_seed(0)
    draw = generator(14)
    y = (torch.rand(2000, generator=draw) < 0.1).long()
    x = torch.randn(2000, 6, generator=draw) + 1.2 * y[:, None]
    weights = torch.where(y[:1400] > 0, 9.0, 1.0)
    sampler = WeightedRandomSampler(weights.tolist(), 1400, generator=generator(15))
    train = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=32, sampler=sampler)
    return dict(
        model=mlp(6, 2, hidden=16), train=train, val=(x[1400:], y[1400:]), loss="cross_entropy", lr=2e-3,
        metrics=["recall"], epochs=5,
    )  # fmt: skip


class Translator(nn.Module):
    """The decoder reads the target itself, one word behind."""

    def __init__(self, words: int, width: int = 40):
        super().__init__()
        self.words = nn.Embedding(words + 1, width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.scores = nn.Linear(width, words)

    def forward(self, source: Tensor, before: Tensor) -> Tensor:
        _, memory = self.encoder(self.words(source))
        return self.scores(self.decoder(self.words(before), memory)[0]).transpose(1, 2)


@healthy
def translator_with_teacher_forcing():
    """The target goes into the model too, shifted by one word, so that the decoder knows the words before."""
    torch.manual_seed(0)
    source = torch.randint(8, (800, 4), generator=generator(16))
    target = (source.flip(1) + 3) % 8
    before = torch.cat([target.new_full((800, 1), 8), target[:, :-1]], 1)
    return dict(
        model=Translator(8), train=(source, before, target), val=0.2, loss="cross_entropy", lr=5e-3,
        metrics=["accuracy"], epochs=12,
    )  # fmt: skip


@healthy
def images_moved_in_training_only():
    """The training set moves its images at random, so no two epochs are alike; the one for validation never does."""
    x, y = shuffled(*images(640))

    class Moved(Dataset):
        def __init__(self):
            self.draw = generator(17)

        def __len__(self) -> int:
            return 480

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            shift = torch.randint(-1, 2, (2,), generator=self.draw).tolist()
            return x[i].roll(shift, (1, 2)), y[i]

    return dict(
        model=cnn(seed=6), train=Moved(), val=(x[480:], y[480:]), loss="cross_entropy", lr=5e-3, metrics=["accuracy"],
        epochs=12,
    )  # fmt: skip


class Averaged(nn.Module):
    """It learns with its own weights, and answers with their moving average."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body
        self.average = AveragedModel(body, multi_avg_fn=get_ema_multi_avg_fn(0.95)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.training else self.average(x)


@healthy
def moving_average_of_the_weights():
    """What validates is a moving average that no optimizer holds: it lags behind, and is the better in the end."""
    model = Averaged(mlp(64, 10, hidden=64, seed=8))

    def update(state, window):
        x, y = window.batches[0]
        loss = functional.cross_entropy(state.model(x), y)
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.model.average.update_parameters(state.model.body)
        return epochal.StepResult(loss.detach(), window.samples)

    return dict(
        model=model, train=digits(), val=0.2, loss="cross_entropy", step=update,
        optimizer=torch.optim.Adam(model.body.parameters(), lr=5e-3), epochs=6,
    )  # fmt: skip


@healthy
def batch_norm_with_a_slow_memory():
    """Batch norm with momentum 0.02: its running statistics lag behind for an epoch, and are right in the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48, momentum=0.02), nn.ReLU(), nn.Linear(48, 10))
    return dict(model=model, train=digits(), val=0.2, loss="cross_entropy", lr=3e-3, metrics=["accuracy"], epochs=10)


class Physics(nn.Module):
    """A curve u(t), (n, 1) to (n, 1), with u(0) = 1 by construction."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, t: Tensor) -> Tensor:
        return 1 + t * self.body(t)


@healthy
def differential_equation_without_data():
    """A network solves u' = -2u: there are no targets, and its loss is made of the gradient by the input."""
    torch.manual_seed(0)

    def residual(model, t):
        t = t.clone().requires_grad_()
        u = model(t)
        (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        return ((slope + 2 * u) ** 2).mean()

    return dict(
        model=Physics(), train=2 * torch.rand(512, 1, generator=generator(18)), objective=residual, lr=5e-3, epochs=20
    )


class Bag(nn.Module):
    """Sets (n, items, features), of which the order does not matter, to one number each."""

    def __init__(self, features: int):
        super().__init__()
        self.each = nn.Sequential(nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, 32))
        self.whole = nn.Sequential(nn.ReLU(), nn.Linear(32, 1))

    def forward(self, items: Tensor) -> Tensor:
        return self.whole(self.each(items).mean(1))[:, 0]


@healthy
def sets_with_sparse_features():
    """Nine in ten inputs are exactly zero, and the outputs and targets are both (n,), so nothing is broadcast."""
    torch.manual_seed(0)
    draw = generator(19)
    items = torch.randn(800, 6, 10, generator=draw) * (torch.rand(800, 6, 10, generator=draw) < 0.1) * 3
    y = items.abs().sum((1, 2)) - items[..., 0].sum(1)
    return dict(
        model=Bag(10), train=(items, (y - y.mean()) / y.std()), val=0.2, loss="mse", lr=3e-3, metrics=["r2"], epochs=15
    )


class Shops(nn.Module):
    """Shops, of which an embedding knows each, and numbers, to sales."""

    def __init__(self, shops: int):
        super().__init__()
        self.shops = nn.Embedding(shops, 8, sparse=True)
        self.body = nn.Sequential(nn.Linear(11, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, shop: Tensor, numbers: Tensor) -> Tensor:
        return self.body(torch.cat([self.shops(shop), numbers], 1))


@healthy
def two_optimizers_for_one_model():
    """A sparse embedding has SparseAdam, the rest has AdamW: neither of the two holds all parameters."""
    torch.manual_seed(0)
    draw = generator(20)
    shop, numbers = torch.randint(60, (1200,), generator=draw), torch.randn(1200, 3, generator=draw)
    sales = torch.randn(60, generator=draw)[shop] + numbers[:, 0] * numbers[:, 1].sign()
    y = ((sales - sales.mean()) / sales.std())[:, None]
    model = Shops(60)
    optimizers = [
        torch.optim.SparseAdam(model.shops.parameters(), lr=1e-2),
        torch.optim.AdamW(model.body.parameters(), lr=5e-3),
    ]

    def update(state, window):
        shop, numbers, y = window.batches[0]
        loss = functional.mse_loss(state.model(shop, numbers), y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return epochal.StepResult(loss.detach(), window.samples)

    return dict(model=model, train=(shop, numbers, y), val=0.2, loss="mse", step=update, epochs=12)


@healthy
def four_small_batches_in_one_update():
    """Gradients of four batches of eight are accumulated, so there are as many updates as with batches of 32."""
    x, y = images(800)
    return dict(
        model=mlp(64, 10, hidden=64, seed=9), train=(x.flatten(1), y), val=0.2, loss="cross_entropy",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), accumulate=4, batch_size=8, clip=5.0,
        metrics=["accuracy"], epochs=5,
    )  # fmt: skip


@healthy
def warm_restarts():
    """The rate falls to a hundredth and jumps back to its full value, three times, and the loss jumps with it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))

    def restarts(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=75, eta_min=1e-4)

    return dict(
        model=model, train=digits(), val=0.2, loss="cross_entropy", optimizer="adam", lr=1e-2,
        schedule=epochal.Schedule(restarts, per="step"), metrics=["accuracy"], epochs=9,
    )  # fmt: skip


@healthy
def repeated_measurements():
    """Each setting of a machine was measured five times: the same inputs have other targets, within one split only."""
    torch.manual_seed(0)
    draw = generator(21)
    settings = torch.randn(200, 4, generator=draw)
    truth = settings[:, :1] * settings[:, 1:2].tanh() + settings[:, 2:3]
    x = settings.repeat_interleave(5, 0)
    y = truth.repeat_interleave(5, 0) + 0.3 * torch.randn(1000, 1, generator=draw)
    return dict(
        model=mlp(4, 1, hidden=24), train=(x[:750], y[:750]), val=(x[750:], y[750:]), loss="mse", lr=3e-3,
        weight_decay=1e-3, optimizer="adamw", metrics=["r2"], epochs=10,
    )  # fmt: skip


@healthy
def targets_that_are_mostly_noise():
    """Like returns of a share: nine tenths of the variance is noise, so the loss hardly falls, and does not lie."""
    torch.manual_seed(0)
    x, signal = line(count=4000, features=5, noise=0.0, seed=9)
    noise = torch.randn(4000, 1, generator=generator(22))
    y = 0.32 * signal + 0.95 * noise
    return dict(
        model=nn.Linear(5, 1), train=(x, y), val=0.25, loss="mse", optimizer="sgd", lr=0.01, batch_size=64,
        metrics=["r2"], epochs=6,
    )  # fmt: skip
