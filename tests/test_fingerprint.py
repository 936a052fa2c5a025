"""Fingerprints tell data apart, and read nothing that could be slow or random."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import epochal
from epochal.data import fingerprint as prints
from epochal.data.fingerprint import fingerprint
from epochal.data.given import GivenLoader
from epochal.data.sources import open_source

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20)


def of(*parts):
    return fingerprint(open_source(parts, where="train"))


class Unread(Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, i):
        raise AssertionError("a sample was fetched")


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError("the stream was read")


def test_arrays_are_known_by_their_bytes():
    known = of(X, Y)
    assert known == of(X.clone(), Y.clone()) == of(X.numpy(), Y.numpy()) == fingerprint(epochal.Loader((X, Y)))
    assert known == {
        "data": "arrays", "samples": 20, "part 0": "(20, 3) float32", "part 1": "(20,) int64", "hashed": "all rows",
        "sha256": known["sha256"],
    }  # fmt: skip
    assert all(isinstance(value, str | int) for value in known.values())


@pytest.mark.parametrize("row", [0, 7, 19])
def test_every_bit_counts(row):
    changed = X.clone()
    changed[row, 1] = torch.nextafter(changed[row, 1], torch.tensor(9.0))
    assert of(changed, Y) != of(X, Y)


def test_form_and_order_count():
    every = [of(X, Y), of(Y, X), of(X.double(), Y), of(X[:19], Y[:19]), of(X.view(20, 3, 1), Y), of(X.flip(0), Y)]
    every += [fingerprint(open_source({"x": X, "y": Y}, where="train"))]
    assert len({str(one) for one in every}) == len(every)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.complex64])
def test_every_dtype_and_layout(dtype):
    part = (torch.arange(24).view(4, 6) % 5).to(dtype)
    assert of(part.t()) == of(part.t().contiguous())
    assert of(part) != of(part.t().contiguous().view(4, 6))
    assert of(part[:, :0])["samples"] == 4


def test_conjugates_are_what_they_mean():
    part = torch.randn(5, 2, dtype=torch.complex64)
    assert of(part.conj()) == of(part.conj().resolve_conj()) != of(part)


def test_of_large_arrays_evenly_spaced_rows_are_hashed(monkeypatch):
    monkeypatch.setattr(prints, "WHOLE", 400)
    monkeypatch.setattr(prints, "PART", 100)
    x = torch.zeros(101, 1)
    known = of(x)
    assert known["hashed"] == "25 evenly spaced rows"
    rows = prints._rows_to_hash(open_source(x, where="train")).tolist()
    assert rows[0] == 0 and rows[-1] == 100 and len(set(rows)) == 25 and max(np.diff(rows)) <= 5
    for row in rows:
        changed = x.clone()
        changed[row] = 1
        assert of(changed) != known
    assert of(torch.zeros(1, 500))["hashed"] == "all rows"


def test_chunks_change_nothing(monkeypatch):
    known = of(X, Y)
    monkeypatch.setattr(prints, "_CHUNK", 13)
    assert of(X, Y) == known


def test_data_sets_and_streams_are_known_by_name():
    assert fingerprint(epochal.Loader(Unread())) == {"data": "Unread", "samples": 7}
    assert fingerprint(epochal.Loader(Stream())) == {"data": "Stream"}
    assert fingerprint(DataLoader(Stream(), 4)) == {
        "data": "Stream", "batch_size": "4", "sampler": "_InfiniteConstantSampler",
        "drop_last": "False", "num_workers": 0,
    }  # fmt: skip


def test_a_data_loader_is_known_by_how_it_makes_batches():
    data = TensorDataset(X, Y)
    known = fingerprint(GivenLoader(DataLoader(data, 4, shuffle=True)))
    made = {"batch_size": "4", "sampler": "RandomSampler", "drop_last": "False"}
    assert known == {**of(X, Y), **made, "num_workers": 0}
    others = [DataLoader(data, 5, shuffle=True), DataLoader(data, 4), DataLoader(data, 4, shuffle=True, drop_last=True)]
    assert all(fingerprint(other) != known for other in others)
    assert fingerprint(DataLoader(Unread(), batch_sampler=[[1, 2]]))["sampler"] == "list"


def test_no_generator_is_touched():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    own = torch.Generator().manual_seed(3)
    fingerprint(DataLoader(TensorDataset(X, Y), 4, shuffle=True, generator=own))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(own.get_state(), torch.Generator().manual_seed(3).get_state())
