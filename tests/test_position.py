"""Where the data stand: over any loader, every event can be resumed from, and every state after it is the same.

Each resumed run is compared with the undisturbed one at all of its events: weights, generators, place. So a second
resume in the same epoch is covered by the first; one test does it all the same.
"""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)  # fmt: skip
from torch.utils.data.distributed import DistributedSampler

import epochal
from epochal.checkpoint import codec
from epochal.data.given import GivenLoader

SAMPLES = 11
X = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)

DRAWS = {
    "torch": lambda self: float(torch.rand(())),
    "numpy": lambda self: np.random.rand(),
    "python": lambda self: random.random(),
    "own torch": lambda self: float(torch.rand((), generator=self.torch)),
    "own numpy": lambda self: self.numpy.random(),
    "own numpy of old": lambda self: self.old.rand(),
    "own python": lambda self: self.python.random(),
}


class Augmented(Dataset):
    """Samples that are changed by random numbers of these kinds, from generators of all sorts."""

    def __init__(self, kinds=tuple(DRAWS)):
        self.kinds, self.loaded = kinds, 0
        self.torch, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.old, self.python = np.random.RandomState(1), random.Random(1)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        self.loaded += 1
        return X[i] + sum(DRAWS[kind](self) for kind in self.kinds), Y[i]


class Shuffled(IterableDataset):
    """A stream without a state: a shuffle buffer with a generator of its own, samples that are changed, split."""

    def __init__(self):
        self.buffer, self.samples, self.read = random.Random(2), Augmented(), 0
        self.transform = self.samples  # where its generators are found

    def __iter__(self):
        worker = get_worker_info()
        mine = list(range(SAMPLES))[worker.id if worker else 0 :: worker.num_workers if worker else 1]
        held = mine[:3]
        for i in [*mine[3:], None, None, None]:
            if held:
                self.read += 1
                yield self.samples[held.pop(self.buffer.randrange(len(held)))]
            if i is not None:
                held.append(i)


class Placed(IterableDataset):
    """A stream that knows its place. ``rewinds``: at its end, or when it is read again."""

    def __init__(self, rewinds="at the end"):
        self.rewinds, self.position, self.is_put, self.samples, self.read = rewinds, 0, False, Augmented(), 0
        self.transform = self.samples

    def __iter__(self):
        if self.rewinds == "when read again" and not self.is_put:
            self.position = 0
        self.is_put = False
        while self.position < SAMPLES:
            self.position += 1
            self.read += 1
            yield self.samples[self.position - 1]
        if self.rewinds == "at the end":
            self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position, self.is_put = state["position"], True


class Resumable(DataLoader):
    """A loader that keeps its place itself, as torchdata's StatefulDataLoader does; asked too early, it draws."""

    order, position, is_put = None, 0, False

    def __iter__(self):
        if not self.is_put:
            self._draw()
        self.is_put = False
        return self._rest()

    def _draw(self):
        self.order, self.position = [[int(i) for i in batch] for batch in self.batch_sampler], 0

    def _rest(self):
        while self.position < len(self.order):
            self.position += 1
            yield self.collate_fn([self.dataset[i] for i in self.order[self.position - 1]])

    def state_dict(self):
        if self.order is None:
            self._draw()
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state):
        self.order, self.position, self.is_put = state["order"], state["position"], True


class Reversed(Sampler):
    """A sampler of one's own, which draws with numpy when an epoch begins."""

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        return iter(np.random.permutation(SAMPLES)[::-1].tolist())


class Twice(Sampler):
    """A batch sampler with a generator of its own, which draws as it goes."""

    def __init__(self):
        self.rng = np.random.default_rng(4)

    def __iter__(self):
        for _ in range(3):
            yield self.rng.integers(SAMPLES, size=4).tolist()


def generator():
    return torch.Generator().manual_seed(5)


def weights():
    return torch.arange(1.0, SAMPLES + 1)


def concatenated():
    return ConcatDataset([Augmented(("own numpy",)), Augmented(("own python", "torch"))])


ORDERS = {
    "in order": lambda data: DataLoader(data, 4),
    "shuffled": lambda data: DataLoader(data, 4, shuffle=True),
    "shuffled, own generator": lambda data: DataLoader(data, 4, shuffle=True, generator=generator()),
    "shuffled, drop_last": lambda data: DataLoader(data, 4, shuffle=True, drop_last=True),
    "drawn again and again": lambda data: DataLoader(
        data, 10, sampler=RandomSampler(data, replacement=True, num_samples=40, generator=generator())
    ),
    "subset": lambda data: DataLoader(data, 4, sampler=SubsetRandomSampler(range(9))),
    "subset, own generator": lambda data: DataLoader(data, 4, sampler=SubsetRandomSampler(range(9), generator())),
    "weighted": lambda data: DataLoader(data, 4, sampler=WeightedRandomSampler(weights(), SAMPLES)),
    "weighted, own generator": lambda data: DataLoader(
        data, 4, sampler=WeightedRandomSampler(weights(), SAMPLES, generator=generator())
    ),
    "a batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False)),
    "a batch sampler of one's own": lambda data: DataLoader(data, batch_sampler=Twice()),
    "a sampler of one's own": lambda data: DataLoader(data, 4, sampler=Reversed()),
    "distributed": lambda data: DataLoader(data, 4, sampler=DistributedSampler(data, num_replicas=1, rank=0)),
    "one by one": lambda data: DataLoader(
        [(x[None], y[None]) for x, y in zip(X[:4], Y[:4])], batch_size=None, shuffle=True
    ),
}
LOADERS = {
    **{f"{name}": lambda make=make: make(Augmented()) for name, make in ORDERS.items()},
    **{f"shuffled, {kind} only": lambda kind=kind: ORDERS["shuffled"](Augmented((kind,))) for kind in DRAWS},
    "several data sets": lambda: DataLoader(concatenated(), 4, shuffle=True),
    "a stream": lambda: DataLoader(Shuffled(), 4),
    "a stream that knows its place": lambda: DataLoader(Placed(), 4),
    "a stream without a rest": lambda: DataLoader(Placed(), SAMPLES),
    "a stream that rewinds late": lambda: DataLoader(Placed("when read again"), 4),
    "a loader that knows its place": lambda: Resumable(Augmented(), 4, shuffle=True),
    "a loader that knows its place, own generator": lambda: Resumable(
        Augmented(), 4, shuffle=True, generator=generator()
    ),
}
WORKERS = {"num_workers": 2}
WITH_WORKERS = {
    "shuffled": lambda: DataLoader(Augmented(), 4, shuffle=True, **WORKERS),
    "own generator": lambda: DataLoader(Augmented(), 4, shuffle=True, generator=generator(), **WORKERS),
    "drawn again and again": lambda: DataLoader(
        Augmented(), 10, sampler=RandomSampler(X, replacement=True, num_samples=40, generator=generator()), **WORKERS
    ),
    "weighted": lambda: DataLoader(
        Augmented(), 4, sampler=WeightedRandomSampler(weights(), SAMPLES), prefetch_factor=1, **WORKERS
    ),
    "a batch sampler": lambda: DataLoader(
        Augmented(), batch_sampler=BatchSampler(RandomSampler(X), 4, False), **WORKERS
    ),
    "a stream": lambda: DataLoader(Shuffled(), 4, **WORKERS),
}
OWN = {
    "samples": lambda: epochal.Loader(Augmented(), 4, shuffle=True, seed=3),
    "samples, workers": lambda: epochal.Loader(Augmented(("torch", "numpy", "python")), 4, shuffle=True, workers=2),
    "a stream": lambda: epochal.Loader(Shuffled(), 4, seed=3),
    "a stream in a worker": lambda: epochal.Loader(Shuffled(), 4, seed=3, workers=1),
    "a stream that knows its place": lambda: epochal.Loader(Placed(), 4, seed=3),
    "a stream that rewinds late": lambda: epochal.Loader(Placed("when read again"), 4, seed=3),
    "a stream that knows its place, in a worker": lambda: epochal.Loader(Placed(), 4, seed=3, workers=1),
}


def prepared(make, make_val=None, **options):
    """A run over this loader; a DataLoader is given to it, epochal's own is put in its place."""
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4), nn.Linear(4, 1))
    train = make()
    val = make_val() if make_val else DataLoader(Augmented(), 6)
    own = isinstance(train, epochal.Loader)
    usual = {"loss": "mse", "epochs": 2, "lr": 0.1, "observers": (), "evaluate_every": "2 steps"}
    run = epochal.Plan(model, (X, Y) if own else train, val=val, **{**usual, **options}).prepare()
    if own:
        run.train = train
    run.state.extras["data.train"], run.state.extras["data.val"] = run.train, run.validation.loader
    return run


def plain(value):
    """A state without what the clock says."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key not in ("seconds", "time")}
    return [plain(part) for part in value] if isinstance(value, list) else value


def taken(run):
    for row in run.state.rows:
        row["time"] = 0.0
    tree, tensors = codec.encode(copy.deepcopy(run.state.state_dict()))
    p = run.state.progress
    return (p.step, p.epoch, p.windows, p.evaluated), json.dumps(tree), {k: v.clone() for k, v in tensors.items()}


def states_of(run, start=None):
    """The states at all events of the run, its end too, by where it stands; ``start``: the one that it begins from."""
    if start is not None:
        _, tree, tensors = start
        random.seed(1)  # a new process has other generators
        torch.manual_seed(1)
        np.random.seed(1)
        run.state.load_state_dict(codec.decode(json.loads(tree), {k: v.clone() for k, v in tensors.items()}))
    with run:
        states = [taken(run) for _ in run]
    return {place: (place, tree, tensors) for place, tree, tensors in states}


def differences(straight, resumed):
    """The first entry that is not the same, or None."""
    for place, tree, tensors in resumed.values():
        _, expected_tree, expected = straight[place]
        if plain(json.loads(tree)) != plain(json.loads(expected_tree)):
            return place, "tree"
        for name, tensor in expected.items():
            if not torch.equal(tensor, tensors[name]):
                return place, name
    return None


def check(make, make_val=None, **options):
    straight = states_of(prepared(make, make_val, **options))
    assert len(straight) >= 5
    for place, start in list(straight.items())[:-1]:
        resumed = states_of(prepared(make, make_val, **options), start)
        assert list(resumed) == [later for later in straight if later >= place]
        assert differences(straight, resumed) is None, place


@pytest.mark.parametrize("name", LOADERS)
def test_a_data_loader_is_resumed_at_every_event(name):
    check(LOADERS[name])


@pytest.mark.parametrize("name", WITH_WORKERS)
def test_with_workers_too(name):
    check(WITH_WORKERS[name])


@pytest.mark.parametrize("name", OWN)
def test_epochals_own_loader_keeps_its_place(name):
    check(OWN[name])


def persistent(kinds, **options):
    return lambda: DataLoader(Augmented(kinds), 4, num_workers=1, persistent_workers=True, **options)


def test_workers_that_persist_draw_their_seed_once():
    check(persistent((), shuffle=True), persistent(()), epochs=2)


def test_in_its_first_epoch_what_persisting_workers_draw_is_repeated_too():
    check(persistent(("torch", "numpy", "python", "own numpy"), shuffle=True), epochs=1, evaluate_every="1 epoch")


def test_accumulated_batches_are_one_step():
    check(LOADERS["drawn again and again"], accumulate=3)


def test_two_and_three_resumes_in_one_epoch():
    make = LOADERS["shuffled"]
    straight = states_of(prepared(make))
    state = straight[(1, 0, 1, 0)]
    for _ in range(2):
        with prepared(make) as run:
            run.state.load_state_dict(codec.decode(json.loads(state[1]), state[2]))
            for event in run:
                if isinstance(event, epochal.StepDone):
                    break
            state = taken(run)
    assert state[0][:3] == (3, 0, 3)
    assert differences(straight, states_of(prepared(make), state)) is None


def test_the_comparison_bites(monkeypatch):
    straight = states_of(prepared(LOADERS["shuffled"]))
    start = straight[(4, 1, 1, 4)]
    assert differences(straight, states_of(prepared(LOADERS["shuffled"]), start)) is None
    monkeypatch.setattr(GivenLoader, "load_state_dict", lambda self, state: None)
    assert differences(straight, states_of(prepared(LOADERS["shuffled"]), start)) is not None


@pytest.mark.parametrize("name", ["own generator", "a stream"])
def test_the_comparison_bites_with_workers(name, monkeypatch):
    straight = states_of(prepared(WITH_WORKERS[name], evaluate_every="1 epoch"))
    start = straight[(4, 1, 1, 3)] if (4, 1, 1, 3) in straight else straight[(5, 1, 1, 4)]
    monkeypatch.setattr(GivenLoader, "_put", lambda self, states: None)
    assert differences(straight, states_of(prepared(WITH_WORKERS[name], evaluate_every="1 epoch"), start)) is not None


@pytest.mark.parametrize("name", ["shuffled", "a loader that knows its place", "a stream that knows its place"])
def test_asking_for_the_state_changes_nothing(name):
    asked = states_of(prepared(LOADERS[name]))
    with prepared(LOADERS[name]) as run:
        for _ in run:
            pass
    end = taken(run)
    assert differences(asked, {end[0]: end}) is None


def test_on_the_way_no_data_are_loaded():
    loader = LOADERS["shuffled"]()
    straight = states_of(prepared(lambda: loader))
    assert loader.dataset.loaded == 2 * SAMPLES
    loader = LOADERS["shuffled"]()
    states_of(prepared(lambda: loader), straight[(5, 1, 2, 4)])
    assert loader.dataset.loaded == SAMPLES - 8
    loader.dataset.loaded = 0
    given = GivenLoader(loader)
    assert len(list(given.batches(0, start=2))) == 1 and loader.dataset.loaded == SAMPLES - 8


@pytest.mark.parametrize("make", [LOADERS["a stream that knows its place"], OWN["a stream that knows its place"]])
def test_a_stream_that_knows_its_place_is_not_read_twice(make):
    straight = states_of(prepared(make))
    loader = make()
    states_of(prepared(lambda: loader), straight[(5, 1, 2, 4)])
    assert (loader.dataset if isinstance(loader, DataLoader) else loader.source.dataset).read == SAMPLES - 8


def test_a_loader_whose_iterator_hides_its_indices_is_read_forward():
    class Wrapped(DataLoader):
        def __iter__(self):
            yield from super().__iter__()

    made = []
    check(lambda: made.append(Wrapped(Augmented(), 4, shuffle=True)) or made[-1])
    assert made[-1].dataset.loaded >= 3


def test_a_place_is_found_without_a_state_too():
    loader = DataLoader(TensorDataset(X, Y), 4)
    batches = [x.tolist() for x, _ in GivenLoader(loader).batches(0, start=1)]
    assert batches == [X[4:8].tolist(), X[8:].tolist()]
    assert list(GivenLoader(loader).batches(0, start=3)) == list(GivenLoader(loader).batches(0, start=9)) == []


def test_what_cannot_be_exact_is_told_before():
    told = {name: GivenLoader(make()).exactness for name, make in LOADERS.items()}
    assert {name: words for name, words in told.items() if words} == {
        "a batch sampler of one's own": "Twice is not torch's own: a resumed run repeats what it draws when an epoch "
        "begins, which may not be all",
        "a sampler of one's own": "Reversed is not torch's own: a resumed run repeats what it draws when an epoch "
        "begins, which may not be all",
        "a stream": "a stream that cannot be asked for its place: a resumed run reads it forward to there",
    }
    assert GivenLoader(WITH_WORKERS["shuffled"]()).exactness is None
    assert GivenLoader(DataLoader(X, sampler=[2, 1])).exactness is None
    assert GivenLoader(DataLoader(X, num_workers=1, in_order=False)).exactness.startswith("batches come as they are")
    assert GivenLoader(DataLoader(X, num_workers=1, persistent_workers=True)).exactness == (
        "generators that persist in workers run on: a resumed run repeats the order of the samples, not what these draw"
    )
    assert GivenLoader(Resumable(TensorDataset(X, Y), 4)).exactness is None
    assert GivenLoader(Resumable(TensorDataset(X, Y), 4, num_workers=1)).exactness == (
        "the loader keeps its place itself: a resumed run repeats the order, not what is drawn in its workers"
    )
    stream = LOADERS["a stream"]().dataset
    assert GivenLoader(Resumable(stream, 4)).exactness.startswith("the loader keeps its place in a stream itself: ")
    persistent = DataLoader(stream, 4, num_workers=1, persistent_workers=True)
    assert GivenLoader(persistent).exactness.startswith("a stream in workers that persist runs on: ")
    told = {name: make().exactness for name, make in OWN.items()}
    assert [name for name, words in told.items() if words] == [
        "samples, workers", "a stream", "a stream in a worker", "a stream that knows its place, in a worker",
    ]  # fmt: skip
    assert epochal.Loader((X, Y)).exactness is None
