"""Programs whose mistake is in the data or the labels: numbers 1 to 23 of the catalogue."""

# ruff: noqa: C408

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from benchmarks.faults.material import blobs, cnn, diabetes, digits, generator, images, line, mlp, text
from benchmarks.faults.program import faulty
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler, Subset, TensorDataset


def sgd(lr: float, momentum: float = 0.9) -> Callable:
    """What makes an SGD of a model's weights."""
    return lambda weights: torch.optim.SGD(weights, lr=lr, momentum=momentum)


def wine() -> tuple[np.ndarray, np.ndarray]:
    """178 wines as they are measured, (178, 13), and their vineyards 0..2; in a random order."""
    bunch = load_wine()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    return bunch.data[order].astype(np.float32), bunch.target[order].astype(np.int64)


def tumours() -> tuple[np.ndarray, np.ndarray]:
    """569 tumours as they are measured, (569, 30), and whether they are benign, 0.0 or 1.0, (569, 1)."""
    bunch = load_breast_cancer()
    return bunch.data.astype(np.float32), bunch.target.astype(np.float32)[:, None]


def colours(count: int = 600) -> tuple[Tensor, Tensor]:
    """Digits drawn in one of three colours, (count, 8, 8, 3) in 0..1, as an image library reads them; the class is the
    colour and whether the digit is above 4, 0..5."""
    x, y = digits(count)
    colour = torch.randint(3, (count,), generator=generator(1))
    strength = functional.one_hot(colour, 3) * 0.6 + 0.4
    return x.reshape(-1, 8, 8, 1) * strength[:, None, None], colour * 2 + (y > 4).long()


def sines(count: int = 500, length: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pieces of noisy waves of several frequencies, (count, length, 1), and the value that comes next, (count, 1)."""
    draw = generator(seed)
    phase = 6.3 * torch.rand(count, 1, generator=draw)
    pace = 0.2 + 0.4 * torch.rand(count, 1, generator=draw)
    wave = torch.sin(phase + pace * torch.arange(length + 1)) * 1.4 + 0.05 * torch.randn(
        count, length + 1, generator=draw
    )
    return wave[:, :-1, None], wave[:, -1:]


class Forecast(nn.Module):
    """A GRU, and a line from its last state to the value that comes next."""

    def __init__(self, inputs: int = 1, hidden: int = 24):
        super().__init__()
        self.rnn = nn.GRU(inputs, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        return self.head(states[:, -1])


class Pictures(Dataset):
    """Images and their classes, one at a time, through a transform."""

    def __init__(self, x: Tensor, y: Tensor, transform=None):
        self.x, self.y, self.transform = x, y, transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = self.x[index]
        return (self.transform(picture) if self.transform else picture), self.y[index]


class NextWord(nn.Module):
    """Word vectors, a GRU, and a score for each word at each place."""

    def __init__(self, words: int, width: int = 32):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0])


# 1 nonfinite-inputs


@faulty("nonfinite-inputs")
def pixels_divided_by_a_deviation_of_zero():
    """Each pixel is standardised by itself, and pixels that are always black give 0 / 0."""
    x, y = digits()
    x = (x - x.mean(0)) / x.std(0)
    return dict(model=mlp(64, 10), train=(x, y), val=0.2, loss="cross_entropy", lr=1e-3, epochs=3, seed=0)


@faulty("nonfinite-inputs")
def logarithm_of_measurements_that_can_be_zero():
    """A data set takes the logarithm of what was measured, and some of it is 0."""
    table, benign = tumours()
    log = np.log(table.clip(min=1e-3))
    mean, deviation = torch.from_numpy(log.mean(0)), torch.from_numpy(log.std(0))

    class Logs(Dataset):
        def __len__(self):
            return len(table)

        def __getitem__(self, i):
            return (torch.from_numpy(table[i]).log() - mean) / deviation, torch.from_numpy(benign[i])

    loader = DataLoader(Logs(), batch_size=32, shuffle=True, generator=generator(0), drop_last=True)
    return dict(model=mlp(30, 1), train=loader, loss="bce_with_logits", lr=1e-3, epochs=3, seed=0)


@faulty("nonfinite-inputs")
def wine_table_with_gaps():
    """Values that are missing in the table are left as NaN, and an objective of one's own trains on them."""
    x, y = wine()
    x[np.random.default_rng(1).random(x.shape) < 0.01] = np.nan
    x = (x - np.nanmean(x, 0)) / np.nanstd(x, 0)

    def objective(model, batch):
        inputs, labels = batch
        return functional.cross_entropy(model(inputs), labels, label_smoothing=0.1)

    return dict(model=mlp(13, 3), train=(x, y), val=0.2, objective=objective, lr=3e-3, epochs=5, seed=0)


# 2 nonfinite-targets


@faulty("nonfinite-targets")
def patients_without_a_second_visit():
    """Where a patient did not come again, the progression of the disease is NaN."""
    x, y = diabetes()
    y = y.clone()
    y[torch.randperm(len(y), generator=generator(3))[:12]] = torch.nan
    return dict(model=mlp(10, 1), train=(x, y), val=0.2, loss="mse", lr=1e-3, epochs=3, seed=0)


@faulty("nonfinite-targets")
def growth_relative_to_nothing():
    """The target is the growth relative to the value before, which is 0 in a few rows; the step is hand-written."""
    torch.manual_seed(0)
    draw = generator(0)
    before = torch.randint(0, 60, (600, 1), generator=draw).float()
    x = torch.randn(600, 4, generator=draw)
    after = before + x[:, :1] * before.clamp(min=1.0) * 0.3 + 1
    y = (after - before) / before
    x = torch.cat([x, (before - 30) / 17], 1)
    return dict(
        model=nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1)),
        train=DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True, generator=generator(1)),
        loss=nn.SmoothL1Loss(), optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3), epochs=3,
    )  # fmt: skip


# 3 unnormalised-inputs


@faulty("unnormalised-inputs")
def tumours_in_their_own_units():
    """A table of areas in the thousands and fractions of hundredths goes into the network as it is."""
    x, y = tumours()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 32), nn.Tanh(), nn.Linear(32, 1))
    return dict(model=model, train=(x, y), val=0.2, loss="bce_with_logits", lr=1e-3, epochs=8, seed=0)


@faulty("unnormalised-inputs")
def bytes_of_images_as_floats():
    """Grey values of 0 to 255 are turned into floats and not scaled."""
    x, y = digits()
    pixels = (x * 255).round().reshape(-1, 1, 8, 8)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    return dict(model=model, train=(pixels, y), val=0.2, loss="cross_entropy", optimizer=sgd(0.05), epochs=5, seed=0)


@faulty("unnormalised-inputs")
def pressure_of_the_air_in_hectopascal():
    """A GRU gets the pressure as about 1013, of which only the last digits change, and its gates are full."""
    torch.manual_seed(0)
    x, y = sines()
    return dict(
        model=Forecast(), train=DataLoader(TensorDataset(1013 + 8 * x, y), 32, shuffle=True, generator=generator(0)),
        loss=nn.MSELoss(), lr=3e-3, epochs=8,
    )  # fmt: skip


# 4 normalised-twice


@faulty("normalised-twice")
def pixels_divided_by_255_once_more():
    """The pixels lie in 0 to 1 already, and the transform of the data set divides them by 255 again."""
    torch.manual_seed(0)
    x, y = digits()
    data = Pictures(x.reshape(-1, 1, 8, 8), y, transform=lambda picture: picture / 255)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    return dict(model=model, train=data, val=0.2, loss="cross_entropy", lr=2e-3, epochs=4, seed=0)


@faulty("normalised-twice")
def images_scaled_by_the_loader_and_by_the_model():
    """The loader scales bytes to 0 to 1, and the model that is used with it does the same in its forward."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(64, 10, hidden=64)

        def forward(self, pixels):
            return self.body(pixels.flatten(1) / 255.0)

    x, y = digits()
    loader = DataLoader(TensorDataset(x.reshape(-1, 8, 8), y), batch_size=50, shuffle=True, generator=generator(0))
    return dict(model=Classifier(), train=loader, loss=nn.CrossEntropyLoss(), optimizer=sgd(0.1), epochs=5)


# 5 integer-inputs


@faulty("integer-inputs")
def bytes_into_a_convolution():
    """Images are given as uint8, and the convolution has float weights."""
    x, y = digits(600)
    pixels = (x * 255).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    return dict(model=cnn(), train=(pixels, y), val=0.2, loss="cross_entropy", lr=1e-3, epochs=2, seed=0)


@faulty("integer-inputs")
def counts_as_int64_into_a_linear_layer():
    """How often each word occurs in a text is counted with int64, and a linear layer takes the counts."""
    torch.manual_seed(0)
    words, _ = text(400, length=12)
    counts = functional.one_hot(words, 20).sum(1)
    about = (words < 10).sum(1, keepdim=True).gt(6).float()
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 1))

    def objective(model, batch):
        x, y = batch
        return functional.binary_cross_entropy_with_logits(model(x), y)

    loader = DataLoader(TensorDataset(counts, about), batch_size=40, shuffle=True, generator=generator(0))
    return dict(model=model, train=loader, objective=objective, lr=1e-3, epochs=2)


# 6 constant-feature


@faulty("constant-feature")
def gaps_filled_over_the_whole_column():
    """To fill a gap, the mean is written into the whole column, which was the one that said most."""
    draw = generator(0)
    x = torch.randn(800, 6, generator=draw)
    y = 0.9 * x[:, 2:3] + 0.3 * x[:, 4:5] + 0.1 * torch.randn(800, 1, generator=draw)
    known = x[:, 2].mean()
    x[:, 2] = known  # meant: where it is missing
    return dict(model=mlp(6, 1), train=(x, y), val=0.2, loss="mse", metrics=["r2"], lr=3e-3, epochs=6, seed=0)


# 7 image-layout


@faulty("image-layout")
def channels_last_into_a_convolution():
    """Images lie as (n, height, width, channels), and the convolution was made to fit by taking x.shape[1] channels."""
    torch.manual_seed(0)
    small, _ = colours(900)
    y = digits(900)[1]
    x = torch.zeros(900, 16, 16, 3)
    for picture, digit, (down, right) in zip(x, small, torch.randint(9, (900, 2), generator=generator(2)).tolist()):
        picture[down : down + 8, right : right + 8] = digit
    x = (x - x.mean()) / x.std()
    model = nn.Sequential(
        nn.Conv2d(x.shape[1], 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    return dict(
        model=model, train=(x, y), val=0.2, loss="cross_entropy", metrics=["accuracy"], lr=5e-3, epochs=6, seed=0
    )


@faulty("image-layout")
def channels_last_into_a_convolution_of_colours():
    """A data set gives images as (height, width, channels), and the convolution waits for three channels first."""
    torch.manual_seed(0)
    x, y = colours()
    x = (x - x.mean()) / x.std()
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 6),
    )  # fmt: skip
    return dict(model=model, train=Pictures(x, y), val=0.2, loss="cross_entropy", lr=1e-3, epochs=3, seed=0)


@faulty("image-layout")
def a_reshape_where_axes_are_to_be_swapped():
    """A data set turns (height, width, channels) into (channels, height, width) by reshape, which mixes the pixels."""
    torch.manual_seed(0)
    x, y = colours(900)
    x = (x - x.mean()) / x.std()
    data = Pictures(x, y, transform=lambda picture: picture.reshape(3, 8, 8))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(64, 6),
    )  # fmt: skip
    return dict(model=model, train=data, val=0.2, loss="cross_entropy", metrics=["accuracy"], lr=3e-3, epochs=6, seed=0)


# 8 label-out-of-range


@faulty("label-out-of-range", "missing-class")
def digits_numbered_from_one_to_ten():
    """The classes are numbered 1 to 10, and the model has ten outputs, for 0 to 9."""
    x, y = images()
    return dict(model=cnn(), train=(x, y + 1), val=0.2, loss="cross_entropy", lr=1e-3, epochs=2, seed=0)


@faulty("label-out-of-range")
def masks_whose_border_is_255():
    """The masks of a segmentation mark the border of an object with 255, and the loss is not told to ignore it."""
    torch.manual_seed(0)
    x, _ = images(400)
    masks = (x[:, 0] > 0.2).long() + (x[:, 0] > 1.2).long()
    masks[:, 0, :] = 255
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 1))

    def objective(model, batch):
        picture, mask = batch
        return functional.cross_entropy(model(picture), mask)

    loader = DataLoader(TensorDataset(x, masks), batch_size=20, shuffle=True, generator=generator(0))
    return dict(model=model, train=loader, objective=objective, lr=1e-3, epochs=2)


@faulty("label-out-of-range")
def unknown_classes_as_minus_one():
    """A few samples whose class nobody knew carry the label -1."""
    x, y = blobs(classes=4)
    y[torch.randperm(len(y), generator=generator(5))[:9]] = -1
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=generator(0))
    return dict(model=mlp(8, 4), train=loader, loss=nn.CrossEntropyLoss(), lr=1e-3, epochs=3)


# 9 missing-class


@faulty("missing-class")
def flowers_cut_by_position():
    """The flowers are sorted by species and the last third is held back: training never sees that species."""
    bunch = load_iris()
    x = torch.from_numpy(bunch.data).float()
    x, y = (x - x.mean(0)) / x.std(0), torch.from_numpy(bunch.target).long()
    return dict(
        model=mlp(4, 3), train=(x[:100], y[:100]), val=(x[100:], y[100:]), loss="cross_entropy",
        metrics=["accuracy"], lr=3e-3, epochs=10, batch_size=10, seed=0,
    )  # fmt: skip


@faulty("missing-class")
def vineyards_numbered_from_one():
    """The classes are 1, 2, 3; a fourth output was added until the error went away, and class 0 is nothing."""
    x, y = wine()
    x = (x - x.mean(0)) / x.std(0)
    return dict(model=mlp(13, 4), train=(x, y + 1), val=0.2, loss="cross_entropy", lr=5e-3, epochs=8, seed=0)


@faulty("missing-class")
def a_thousand_outputs_for_ten_digits():
    """The head of a model for a thousand classes is kept for the ten classes of the data."""
    x, y = images()
    return dict(
        model=cnn(classes=1000), train=(x, y), val=0.2, loss=nn.CrossEntropyLoss(), metrics=["accuracy"],
        optimizer=sgd(0.02), epochs=3, seed=0,
    )  # fmt: skip


# 10 target-format


@faulty("target-format")
def one_hot_classes_as_integers():
    """Classes are given to cross_entropy as one-hot rows of int64."""
    x, y = blobs(classes=5)
    return dict(
        model=mlp(8, 5), train=(x, functional.one_hot(y, 5)), val=0.2, loss="cross_entropy", lr=1e-3, epochs=3, seed=0
    )


@faulty("target-format")
def several_labels_as_one_distribution():
    """A sample has none, one or several of four labels; such rows of 0 and 1 are given to cross_entropy."""
    torch.manual_seed(0)
    x = torch.randn(600, 6, generator=generator(0))
    y = (x @ torch.randn(6, 4, generator=generator(1)) > 0.5).float()

    def right(outputs, targets):
        return ((outputs > 0) == (targets > 0.5)).float().mean()

    return dict(
        model=mlp(6, 4), train=(x, y), val=0.2, loss=nn.CrossEntropyLoss(), metrics=[right], lr=3e-3, epochs=6, seed=0
    )


@faulty("target-format")
def classes_as_a_column_of_floats():
    """A table gives the classes as a column of floats, (n, 1), and an objective compares them with cross_entropy."""
    x, y = wine()
    x = (x - x.mean(0)) / x.std(0)

    def objective(model, batch):
        inputs, vineyard = batch
        return functional.cross_entropy(model(inputs), vineyard)

    return dict(
        model=mlp(13, 3), train=(x, y.astype(np.float32)[:, None]), val=0.2, objective=objective, lr=1e-3, epochs=3
    )


# 11 labels-unrelated


@faulty("labels-unrelated")
def files_sorted_as_words():
    """Images are read in the order of their sorted names, 1, 10, 100, ..., and labels in the order of their numbers."""
    x, y = images(600)
    names = sorted(f"{number}.png" for number in range(600))

    class Folder(Dataset):
        def __len__(self):
            return len(names)

        def __getitem__(self, i):
            return x[int(names[i].removesuffix(".png"))], y[i]

    return dict(
        model=cnn(), train=Folder(), val=0.2, loss="cross_entropy", metrics=["accuracy"], lr=1e-3, epochs=4, seed=0
    )


@faulty("labels-unrelated")
def rows_shuffled_apart():
    """Inputs and targets are shuffled one after the other, each into an order of its own."""
    torch.manual_seed(0)
    x, y = line(600)
    x, y = x[torch.randperm(600)], y[torch.randperm(600)]
    return dict(model=mlp(4, 1), train=(x, y), val=0.2, loss="mse", metrics=["r2"], lr=3e-3, epochs=8, seed=0)


@faulty("labels-unrelated")
def two_loaders_that_shuffle():
    """Sentences and their labels come from two loaders, which shuffle each for itself, and are put together."""
    torch.manual_seed(0)
    words, _ = text(480)
    label = (words[:, -1] < 10).long()

    class Pairs(IterableDataset):
        def __iter__(self):
            sentences = DataLoader(words, batch_size=32, shuffle=True)
            labels = DataLoader(label, batch_size=32, shuffle=True)
            yield from zip(sentences, labels)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 16)
            self.rnn = nn.LSTM(16, 32, batch_first=True)
            self.head = nn.Linear(32, 2)

        def forward(self, x):
            return self.head(self.rnn(self.embedding(x))[0][:, -1])

    loader = DataLoader(Pairs(), batch_size=None)
    return dict(model=Reader(), train=loader, loss="cross_entropy", metrics=["accuracy"], lr=5e-3, epochs=6)


# 12 targets-ignored


@faulty("targets-ignored")
def every_word_masked_out():
    """Words that are not to be counted get the label -100, and the comparison that finds them is true for all."""
    torch.manual_seed(0)
    x, y = text()
    y = torch.where(x >= 0, -100, y)  # meant: where x is padding, below 0

    class Model(NextWord):
        def forward(self, x):
            return super().forward(x).transpose(1, 2)

    return dict(model=Model(20), train=(x, y), val=0.2, loss=nn.CrossEntropyLoss(), lr=3e-3, epochs=3, seed=0)


@faulty("targets-ignored")
def only_the_padding_counts():
    """Sentences end with padding, and the mask of an objective is the wrong way round: it counts padding alone."""
    torch.manual_seed(0)
    x, y = text(words=20)
    x, y = x + 1, y + 1  # 0 is padding
    ends = torch.randint(10, 13, (len(x), 1), generator=generator(2))
    place = torch.arange(12)
    x, y = torch.where(place < ends, x, 0), torch.where(place < ends, y, 0)

    def objective(model, batch):
        words, following = batch
        each = functional.cross_entropy(model(words).transpose(1, 2), following, reduction="none")
        counted = (following == 0).float()
        return (each * counted).sum() / counted.sum().clamp(min=1)

    return dict(model=NextWord(21), train=(x, y), val=0.2, objective=objective, lr=5e-3, epochs=6, seed=0)


# 13 unshuffled


@faulty("unshuffled")
def digits_class_by_class():
    """The images are read folder by folder, a folder for each class, and the loader does not shuffle."""
    x, y = images(1300)
    order = y[:1000].argsort(stable=True)
    loader = DataLoader(Pictures(x[order], y[order]), batch_size=32)
    return dict(
        model=cnn(), train=loader, val=(x[1000:], y[1000:]), loss="cross_entropy", metrics=["accuracy"],
        optimizer=sgd(0.05), epochs=4,
    )  # fmt: skip


@faulty("unshuffled")
def a_table_sorted_by_its_target():
    """The rows come sorted by the target from smallest to largest, and shuffle=False keeps them so."""
    x, y = line(1200, noise=0.3)
    order = y[:1000, 0].argsort()
    return dict(
        model=mlp(4, 1), train=(x[order], y[order]), val=(x[1000:], y[1000:]), loss="mse", metrics=["r2"],
        optimizer=sgd(0.05, momentum=0), shuffle=False, epochs=6, seed=0,
    )  # fmt: skip


# 14 same-order


@faulty("same-order")
def a_sampler_seeded_anew_each_epoch():
    """A sampler makes its generator in __iter__ from the same seed, so that all epochs have one order."""

    class Shuffled(Sampler):
        def __init__(self, data, seed=0):
            self.data, self.seed = data, seed

        def __iter__(self) -> Iterator[int]:
            draw = torch.Generator().manual_seed(self.seed)
            return iter(torch.randperm(len(self.data), generator=draw).tolist())

        def __len__(self) -> int:
            return len(self.data)

    data = TensorDataset(*digits(800))
    loader = DataLoader(data, batch_size=32, sampler=Shuffled(data))
    return dict(model=mlp(64, 10), train=loader, loss="cross_entropy", lr=1e-3, epochs=6)


@faulty("same-order")
def a_stream_seeded_anew_each_epoch():
    """An iterable data set shuffles and adds noise with a generator that each __iter__ makes from the same seed."""
    x, y = images(460)

    class Noisy(IterableDataset):
        def __iter__(self):
            draw = torch.Generator().manual_seed(42)
            for i in torch.randperm(160, generator=draw).tolist():
                yield x[i] + 1.5 * torch.randn(x[i].shape, generator=draw), y[i]

    model = nn.Sequential(nn.Flatten(), *mlp(64, 10, hidden=128))
    return dict(
        model=model, train=DataLoader(Noisy(), batch_size=20), val=(x[160:], y[160:]), loss="cross_entropy",
        metrics=["accuracy"], lr=3e-3, epochs=10, seed=0,
    )  # fmt: skip


# 15 class-imbalance


@faulty("class-imbalance")
def one_failure_in_forty():
    """One machine in forty fails, and nothing makes up for it: the model calls all of them sound."""
    torch.manual_seed(0)
    draw = generator(0)
    y = (torch.rand(2000, 1, generator=draw) < 0.025).float()
    x = torch.randn(2000, 6, generator=draw) + 0.7 * y
    return dict(
        model=mlp(6, 1), train=(x, y), val=0.2, loss="bce_with_logits", metrics=["accuracy", "recall"],
        lr=1e-3, epochs=5, seed=0,
    )  # fmt: skip


# 16 val-in-train


@faulty("val-in-train")
def validated_on_what_it_learned():
    """The same arrays are given for training and for validation."""
    x, y = diabetes()
    return dict(
        model=mlp(10, 1, hidden=64), train=(x, y), val=(x, y), loss="mse", metrics=["r2"], lr=3e-3, epochs=10, seed=0
    )


@faulty("val-in-train")
def two_subsets_that_overlap():
    """The indices of the held back part start 100 before the end of the others."""
    x, y = images(300)
    x = x + 0.8 * torch.randn(x.shape, generator=generator(2))
    data = Pictures(x.flatten(1), y)
    train, held = Subset(data, range(200)), Subset(data, range(100, 260))
    return dict(
        model=mlp(64, 10, hidden=64), train=DataLoader(train, batch_size=20, shuffle=True, generator=generator(0)),
        val=DataLoader(held, batch_size=80), loss="cross_entropy", metrics=["accuracy"], lr=3e-3, epochs=10,
    )  # fmt: skip


# 17 duplicates-in-val


@faulty("duplicates-in-val")
def rare_class_copied_before_the_split():
    """To balance the classes, rows of the rare one are copied, and only then a part is held back."""
    torch.manual_seed(0)
    draw = generator(0)
    y = (torch.rand(700, generator=draw) < 0.1).long()
    x = torch.randn(700, 12, generator=draw) + 0.25 * y[:, None]
    rare = (y == 1).nonzero()[:, 0].repeat(8)
    x, y = torch.cat([x, x[rare]]), torch.cat([y, y[rare]])
    return dict(
        model=mlp(12, 2, hidden=64), train=(x, y), val=0.2, loss="cross_entropy", metrics=["accuracy", "recall"],
        lr=3e-3, epochs=10, seed=0,
    )  # fmt: skip


@faulty("duplicates-in-val")
def two_exports_joined():
    """Two exports of a table are joined that share most of their rows, and a part of all rows is held back."""
    x, y = diabetes()
    both = ConcatDataset([TensorDataset(x[:400], y[:400]), TensorDataset(x[60:], y[60:])])
    return dict(
        model=mlp(10, 1, hidden=128), train=both, val=0.25, loss="mse", metrics=["r2"], lr=1e-2, epochs=10, seed=0
    )


# 18 conflicting-labels


@faulty("conflicting-labels")
def two_people_who_labelled_it():
    """Two people labelled the same images, the answers of both are kept, and in a third of cases they differ."""
    x, y = images(500)
    draw = generator(4)
    other = torch.where(torch.rand(500, generator=draw) < 0.35, torch.randint(10, (500,), generator=draw), y)
    x, y = torch.cat([x, x]), torch.cat([y, other])
    order = torch.randperm(1000, generator=draw)
    loader = DataLoader(TensorDataset(x[order], y[order]), batch_size=50, shuffle=True, generator=generator(0))
    return dict(model=cnn(), train=loader, loss="cross_entropy", metrics=["accuracy"], lr=2e-3, epochs=5)


# 19 random-validation


@faulty("random-validation")
def noise_on_the_images_of_the_validation():
    """The noise that is meant for training is in the data set that both parts are cut from."""
    torch.manual_seed(0)
    x, y = images(600)
    noisy = Pictures(x, y, transform=lambda picture: picture + 0.7 * torch.randn_like(picture))
    return dict(
        model=cnn(), train=noisy, val=0.2, loss="cross_entropy", metrics=["accuracy"], lr=2e-3, epochs=5, seed=0
    )


@faulty("random-validation")
def random_crops_in_the_validation():
    """Windows of a long signal are cut out at random places, for the validation too."""
    torch.manual_seed(0)
    place = torch.arange(60)
    draw = generator(0)
    pace = 0.15 + 0.5 * torch.rand(400, 1, generator=draw)
    signals = torch.sin(6.3 * torch.rand(400, 1, generator=draw) + pace * place)
    signals = signals + 0.8 * torch.randn(signals.shape, generator=draw)
    labels = (pace[:, 0] > 0.4).long()

    class Crops(Dataset):
        def __init__(self, signals, labels):
            self.signals, self.labels = signals, labels

        def __len__(self):
            return len(self.signals)

        def __getitem__(self, i):
            start = random.randrange(40)
            return self.signals[i, start : start + 20][None], self.labels[i]

    model = nn.Sequential(
        nn.Conv1d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 16, 5, padding=2), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    return dict(
        model=model, train=DataLoader(Crops(signals[:300], labels[:300]), 25, shuffle=True, generator=generator(0)),
        val=DataLoader(Crops(signals[300:], labels[300:]), 50), loss="cross_entropy", metrics=["accuracy"],
        lr=3e-3, epochs=8, seed=0,
    )  # fmt: skip


# 20 worker-randomness


@faulty("worker-randomness")
def a_stream_that_every_worker_reads():
    """Two workers read the same stream from its beginning, so that every sample comes twice."""
    x, y = blobs(400)

    class Lines(IterableDataset):
        def __iter__(self):
            for i in torch.randperm(len(x)).tolist():
                yield x[i], y[i]

    return dict(
        model=mlp(8, 3), train=DataLoader(Lines(), batch_size=40, num_workers=2), loss="cross_entropy",
        metrics=["accuracy"], lr=3e-3, epochs=3, seed=0,
    )  # fmt: skip


@faulty("worker-randomness")
def a_simulation_that_is_the_same_in_all_workers():
    """A data set simulates samples with a generator of NumPy's that it keeps; every worker gets a copy of it, in every
    epoch, and draws the same samples."""
    weights = np.random.default_rng(1).normal(size=16).astype(np.float32) / 4

    class Simulated(Dataset):
        def __init__(self, count, seed):
            self.count, self.draw = count, np.random.default_rng(seed)

        def __len__(self):
            return self.count

        def __getitem__(self, i):
            x = self.draw.normal(size=16).astype(np.float32)
            y = np.sin(2 * x @ weights) + 0.3 * self.draw.normal()
            return torch.from_numpy(x), torch.tensor([y], dtype=torch.float32)

    held = next(iter(DataLoader(Simulated(300, 2), batch_size=300)))
    loader = DataLoader(Simulated(200, 3), batch_size=25, num_workers=2, generator=generator(0))
    return dict(
        model=mlp(16, 1, hidden=64), train=loader, val=tuple(held), loss="mse", metrics=["r2"], lr=3e-3, epochs=10,
        seed=0,
    )  # fmt: skip


# 21 batch-norm-of-one


@faulty("batch-norm-of-one")
def a_last_batch_of_one_row():
    """There are 321 rows in batches of 32, and batch norm cannot train on the one that is left."""
    torch.manual_seed(0)
    x, y = line(321)
    model = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    return dict(model=model, train=DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True), loss="mse", epochs=2)


# 23 small-val


@faulty("small-val")
def four_patients_to_choose_by():
    """One row in a hundred is held back, so that four patients decide which weights are best."""
    x, y = diabetes()
    return dict(
        model=mlp(10, 1), train=(x, y), val=0.01, loss="mse", metrics=["r2"], lr=1e-3, epochs=10, patience=2, seed=0
    )


@faulty("small-val")
def eight_images_to_judge_by():
    """The last eight images are the validation, and its accuracy moves in steps of an eighth."""
    x, y = images(608)
    return dict(
        model=cnn(), train=TensorDataset(x[:600], y[:600]), val=TensorDataset(x[600:], y[600:]), loss="cross_entropy",
        metrics=["accuracy"], lr=1e-3, epochs=4, seed=0,
    )  # fmt: skip
