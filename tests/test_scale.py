"""What must stay small however many processes there are: who writes what, who hears what, what a manifest holds."""

import json
from pathlib import Path

import group
import pytest
import torch
from torch import nn

import epochal
from epochal.checkpoint import files, manifest, tensors
from epochal.checkpoint.manifest import MANIFEST, ROWS
from epochal.checkpoint.sharded import shared_out, writers
from epochal.checkpoint.store import Checkpoints
from epochal.data.order import batch_indices
from epochal.errors import CheckpointError, ModelError
from epochal.runtime import parallel, processes

pytestmark = pytest.mark.distributed


def greedy(named, rank, size):
    """The rule of shared_out, said without a heap: the largest first, each to whoever has least, and is first."""
    mine, loads = [], [0] * size
    for name in sorted(named, key=lambda name: (-named[name].nbytes, name)):
        writer = loads.index(min(loads))
        loads[writer] += max(1, named[name].nbytes)
        mine += [name] if writer == rank else []
    return sorted(mine)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_weights_are_shared_out_by_their_size(size):
    named = {f"state.model.{i}": torch.zeros(i * 37 % 23, i % 3) for i in range(40)}
    shares = [list(shared_out(named, rank, writers(named, size))) for rank in range(size)]
    assert shares == [greedy(named, rank, size) for rank in range(size)]
    assert sorted(name for share in shares for name in share) == sorted(named)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_the_batches_of_an_order_are_cut_when_they_are_asked_for(start):
    order = torch.randperm(10)
    cut = batch_indices(order, 3, start)
    assert not isinstance(cut, list | tuple)
    assert [batch.tolist() for batch in cut] == [batch.tolist() for batch in order.split(3)][start:]


def network(width=6):
    torch.manual_seed(7)
    blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(nn.Linear(5, width), *blocks, nn.Linear(width, 1))


def tells(rank):
    """What each hears of the others' values, and of models and weights that are not alike."""
    processes.join(torch.device("cpu"), epochal.Strategy().patience)
    heard = processes.to_first(rank), processes.unlike([1, 2, 3]), processes.unlike([1, rank, 3][: 3 - rank // 2])
    parallel.refuse_drift([network()])
    model, errors = network(), []
    if rank:
        model[1][0].bias.data[rank] += 1
    for refuse in (parallel.refuse_drift, parallel.begin_alike):
        try:
            refuse([model if refuse is parallel.refuse_drift else network(6 + rank // 2)])
        except ModelError as error:
            errors.append((error.what, error.where))
    return heard, errors


def test_the_first_hears_all_and_nobody_else_gets_everybodys_list():
    answers = group.run(tells, 3)
    assert [heard[0] for heard, _ in answers] == [[0, 1, 2], [1], [2]]
    apart = [None, (1, 0, 1), (1, 0, 2)]
    assert all(heard[1:] == ([None, None, None], apart) for heard, _ in answers)
    drifted = "the processes have drifted apart: the weight '1.0.bias' is not the same in all of them."
    another = "rank 0 has ('0.weight', (6, 5), 'torch.float32'), rank 2 has ('0.weight', (7, 5), 'torch.float32')"
    told = [(drifted, "rank 1, 2 against rank 0"), ("the processes have different models.", another)]
    assert all(errors == told for _, errors in answers)


def train(rank, epochs, **options):
    torch.manual_seed(1)
    X = torch.randn(64, 5)
    result = epochal.fit(
        network(), (X, X.sum(1, keepdim=True)), val=0.25, loss="mse", optimizer="adamw", lr=0.01, epochs=epochs,
        batch_size=16, seed=3, strategy="fsdp", observers=(), run="run", save=epochal.Saving(share=None), **options,
    )  # fmt: skip
    return [{name: value for name, value in row.items() if name != "time"} for row in result.history.rows]


def go_on(rank, epochs):
    return train(rank, epochs, resume=True)


def newest():
    return max(Path("run/checkpoints").glob("step-*"))


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_manifest_says_nothing_of_each_tensor_of_each_process(in_a_folder):
    rows = group.run(train, 3, 2)[0]
    told = json.loads((newest() / MANIFEST).read_text())
    assert set(told) == {"format", "step", "files", "tensors"} and told["format"] == manifest.WITH_PIECES
    files_of = [name for name in told["files"] if name.startswith("tensors-")]
    begins = [json.loads(tensors.metadata((newest() / name).read_bytes())[ROWS]) for name in files_of]
    assert [part["state.model.0.weight"] for part in begins] == [0, 2, 4]
    assert told["tensors"]["state.model.0.weight"] == ["F32", [6, 5]]
    assert len(Checkpoints("run/checkpoints").newest_whole().state["processes"]) == 3
    longer = group.run(go_on, 3, 3)[0]
    assert longer[:2] == rows and len(longer) == 3
    assert len(group.run(go_on, 2, 4)[0]) == 4  # by fewer


def test_rows_that_cannot_be_read_are_damage(in_a_folder):
    group.run(train, 2, 1)
    folder = newest()
    told = json.loads((folder / MANIFEST).read_text())
    name = min(name for name in told["files"] if name.startswith("tensors-"))
    part = tensors.parse((folder / name).read_bytes(), name)
    for rows, why in (
        ("[]", "the rows in"),
        ('{"state.model.0.weight":-1}', "the rows in"),
        ("{}", "as a whole and in pieces"),
    ):
        chunks = tensors.chunks(part, {ROWS: rows})
        (folder / name).write_bytes(b"".join(chunks))
        told["files"][name] = {"size": manifest.facts(chunks).size, "sha256": manifest.facts(chunks).sha256}
        (folder / MANIFEST).write_bytes(json.dumps(told, separators=(",", ":")).encode())
        with pytest.raises(CheckpointError, match=why):
            Checkpoints("run/checkpoints").load(folder)
    assert files.read(folder / MANIFEST)
