"""A DataLoader over a TensorDataset is read batch by batch: the same batches, order and draws."""

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from epochal.data import given
from epochal.data.given import GivenLoader
from epochal.data.sources import Arrays


class Backwards(Sampler):
    def __iter__(self):
        return iter(range(-1, -24, -1))

    def __len__(self):
        return 23


class Numpys(Sampler):
    def __iter__(self):
        return iter(np.arange(23, dtype=np.int16))

    def __len__(self):
        return 23


def dataset():
    torch.manual_seed(0)
    images = torch.randn(23, 3, 4, 4).to(memory_format=torch.channels_last)
    return TensorDataset(torch.randn(23, 3, 2).transpose(1, 2), torch.arange(23), torch.rand(23) > 0.5, images)


LOADERS = {
    "in_order": lambda data: DataLoader(data, batch_size=4),
    "shuffled": lambda data: DataLoader(data, batch_size=4, shuffle=True),
    "drop_last": lambda data: DataLoader(data, batch_size=4, shuffle=True, drop_last=True),
    "own_generator": lambda data: DataLoader(
        data, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "weighted": lambda data: DataLoader(data, batch_size=4, sampler=WeightedRandomSampler([1.0] * 23, 40)),
    "replaced": lambda data: DataLoader(
        data, batch_size=4, sampler=RandomSampler(data, replacement=True, num_samples=9)
    ),
    "backwards": lambda data: DataLoader(data, batch_size=4, sampler=Backwards()),
    "numpys": lambda data: DataLoader(data, batch_size=4, sampler=Numpys()),
    "batch_sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(Backwards(), 3, False)),
}
LEFT = {
    "collated": lambda data: DataLoader(data, batch_size=4, collate_fn=lambda samples: samples),
    "subset": lambda data: DataLoader(Subset(data, range(9)), batch_size=4),
    "no_batches": lambda data: DataLoader(data, batch_size=None),
    "own_batches": lambda data: DataLoader(data, batch_sampler=[[0, 1], [5]]),
    "in_workers": lambda data: DataLoader(data, batch_size=9, num_workers=1),
    "with_graph": lambda data: DataLoader(TensorDataset(torch.ones(3, requires_grad=True)), batch_size=2),
}


def read(batches):
    found = [list(batch) if isinstance(batch, list | tuple) else batch for batch in batches]
    return found, torch.get_rng_state()


@pytest.mark.parametrize("name", LOADERS)
def test_the_same_batches_and_draws(name):
    loaders = [LOADERS[name](dataset()) for _ in range(2)]
    torch.manual_seed(5)
    plain, after = read(list(loaders[0]) + list(loaders[0]))
    torch.manual_seed(5)
    loader = GivenLoader(loaders[1])
    ours, after_ours = read([*loader.batches(0), *loader.batches(1)])
    assert torch.equal(after, after_ours) and len(plain) == len(ours) > 2
    for one, other in zip(plain, ours):
        assert type(other) is list
        for part, theirs in zip(one, other, strict=True):
            assert torch.equal(part, theirs) and part.dtype == theirs.dtype and part.stride() == theirs.stride()


@pytest.mark.parametrize("name", LOADERS)
def test_it_is_one_operation_for_each_part(name, monkeypatch):
    fetched = []
    fetch = given._Rows.fetch
    monkeypatch.setattr(given._Rows, "fetch", lambda self, index: fetched.append(index) or fetch(self, index))
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda self, index: pytest.fail("a sample was fetched"))
    assert len(list(GivenLoader(LOADERS[name](dataset())).batches(0))) == len(fetched) > 1


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_torchs_own_is_left_alone(name, monkeypatch):
    monkeypatch.setattr(given._Rows, "fetch", lambda self, index: pytest.fail("fetched at once"))
    plain, ours = list(LEFT[name](dataset())), list(GivenLoader(LEFT[name](dataset())).batches(0))
    assert len(plain) == len(ours) > 0


def test_an_index_that_is_not_there_is_told_as_ever():
    loader = DataLoader(dataset(), batch_size=2, sampler=[0, 99])
    with pytest.raises(IndexError, match="out of bounds"):
        list(GivenLoader(loader).batches(0))


def test_a_batch_can_be_changed_and_the_data_stay():
    data = dataset()
    before = data.tensors[0].clone()
    for batch in GivenLoader(DataLoader(data, batch_size=4)).batches(0):
        batch[0].zero_()
    assert torch.equal(data.tensors[0], before)


@pytest.mark.parametrize(
    "part",
    [
        torch.arange(10),
        torch.rand(10) > 0.5,
        torch.randn(10, 3),
        torch.randn(3, 10).t(),
        torch.randn(10, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(10, 2, dtype=torch.complex64).conj(),
        torch.randn(10, 2).bfloat16(),
    ],
    ids=lambda part: f"{part.dtype}-{tuple(part.stride())}",
)
def test_rows_in_order_are_contiguous_copies(part):
    """So that a model that works in place cannot change the data."""
    arrays, before = Arrays((part, torch.arange(10))), part.clone()
    for start, stop in ((0, 4), (4, 8), (8, 12)):
        rows, numbers = arrays.between(start, stop)
        assert torch.equal(rows, part[start:stop]) and rows.is_contiguous()
        assert numbers.tolist() == list(range(start, min(stop, 10)))
        rows.zero_()
    assert torch.equal(part, before)
