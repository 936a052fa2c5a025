"""What a hostile reading found in several processes, each kept from coming back."""

import itertools
from pathlib import Path

import group
import pytest
import torch
from test_processes import Numbers, alone
from torch import nn
from torch.utils.data import DataLoader, Dataset

import epochal

pytestmark = pytest.mark.distributed


class InPlace(nn.Linear):
    def forward(self, x):
        return super().forward(x.mul_(0.5))


def in_place(rank):
    torch.manual_seed(0)
    X = torch.linspace(-1, 1, 48).reshape(16, 3)
    result = epochal.fit(
        InPlace(3, 1), (X, X[:, :1]), loss="mse", optimizer="sgd", lr=0.1, epochs=2, batch_size=8, seed=0, observers=()
    )
    return result.history.train_loss


def test_a_model_that_works_in_place():
    for losses in group.run(in_place, 2):
        assert losses == pytest.approx(alone(in_place), rel=1e-5)


class Drawing(Dataset):
    """Draws from the generator that its loader draws the order from."""

    def __init__(self, generator):
        self.generator = generator

    def __len__(self):
        return 11

    def __getitem__(self, number):
        torch.rand(1, generator=self.generator)
        return torch.tensor([float(number)])


def from_one_generator(rank):
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(Drawing(generator), batch_size=11, shuffle=True, generator=generator)
    return seen_by(loader, 3)


def seen_by(data, epochs, **options):
    found = []

    def step(state, window):
        for batch, counted in zip(window.batches, window.sizes):
            found.append((batch[0] if isinstance(batch, list) else batch)[:counted].flatten().tolist())
        return epochal.StepResult(torch.tensor(1.0), float(sum(window.sizes)))

    epochal.fit(nn.Linear(1, 1), data, step=step, epochs=epochs, observers=(), **options)
    return found


def test_an_order_stays_one_though_the_data_set_draws_from_its_generator():
    for batch in zip(*group.run(from_one_generator, 2)):
        assert sorted(itertools.chain(*batch)) == list(range(11))


class Pairs(Numbers):
    """The stream of numbers, one part of which is shorter than the other."""

    def __iter__(self):
        import os

        rank = int(os.environ.get("RANK", 0))
        return iter([torch.tensor([float(number)]) for number in range(rank * 2, 2 if rank == 0 else 10)])


def divided(rank, options):
    return seen_by(Pairs(10, split=True), 1, batch_size=1, **options)


def test_a_stream_that_divides_itself_counts_as_a_whole_and_is_resumed_after_its_first_end():
    options = {"run": "run", "save": epochal.Saving("1 step", share=None), "seed": 0}
    first, second = group.run(divided, 2, {**options, "max_steps": 4})
    assert (list(itertools.chain(*first)), list(itertools.chain(*second))) == ([0, 1], [2, 3, 4, 5])
    first, second = group.run(divided, 2, {**options, "resume": True})
    assert (list(itertools.chain(*first)), list(itertools.chain(*second))) == ([], [6, 7, 8, 9])


def unlike(rank):
    X = torch.full((10, 3), float(rank))
    try:
        epochal.fit(nn.Linear(3, 1), (X, X[:, :1]), loss="mse", epochs=1, observers=())
    except epochal.DataError as error:
        return str(error)
    return None


def test_different_data_are_refused():
    for told in group.run(unlike, 2):
        assert told.startswith("the processes have different data in train.\n  where: process 1 against process 0")


def ignored(rank):
    torch.manual_seed(0)
    X, y = torch.randn(3, 4), torch.tensor([-100, -100, 1])
    result = epochal.fit(nn.Linear(4, 2), (X, y), loss="cross_entropy", epochs=1, shuffle=False, seed=0, observers=())
    return result.history.train_loss[0]


def test_a_stand_in_whose_targets_are_all_ignored():
    assert group.run(ignored, 4) == pytest.approx([alone(ignored)] * 4, rel=1e-5)


class Holds:
    """An observer whose state is the model's own memory."""

    def __init__(self, model):
        self.model = model

    def __call__(self, event):
        pass

    def state_dict(self):
        return {"w": self.model.state_dict()}

    def load_state_dict(self, state):
        pass


def held(rank):
    torch.manual_seed(0)
    X = torch.linspace(-1, 1, 96).reshape(32, 3)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    epochal.fit(
        model, (X, X[:, :1]), loss="mse", epochs=2, seed=0, run="run", observers=[Holds(model)],
        save=epochal.Saving("1 step", share=None),
    )  # fmt: skip


def test_checkpoints_are_whole_though_an_observer_holds_weights():
    group.run(held, 2)
    paths = sorted(Path("run/checkpoints").iterdir())
    assert len(paths) > 1
    for path in paths:
        assert len(epochal.Checkpoints("run/checkpoints").load(path)["model"]) == 4


def timed_out(rank):
    X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def objective(model, batch):
        if rank == 1:
            raise RuntimeError("the request to the server timed out")
        return model(batch[0]).mean()

    try:
        epochal.fit(nn.Linear(3, 1), (X, X), objective=objective, epochs=1, observers=())
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_an_error_of_the_users_own_is_not_taken_for_a_lost_process():
    assert group.run(timed_out, 2)[1] == ("RuntimeError", "the request to the server timed out")


def draws_afterwards(rank):
    X = torch.linspace(-1, 1, 96).reshape(32, 3)
    epochal.fit(nn.Linear(3, 1), (X, X[:, :1]), loss="mse", epochs=1, seed=0, observers=())
    return torch.randperm(20).tolist()


def test_what_a_program_draws_after_a_run_is_alike():
    first, second = group.run(draws_afterwards, 2)
    assert first == second
