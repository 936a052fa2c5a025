"""Checkpoints whose tensors stand in pieces: read as they were written, and refused where they are not whole."""

from pathlib import Path

import msgspec
import pytest
import torch

from epochal.checkpoint import tensors
from epochal.checkpoint.manifest import ROWS, Manifest, facts
from epochal.checkpoint.sharded import put_together
from epochal.checkpoint.store import Checkpoints
from epochal.errors import CheckpointError

FIXTURE = Path(__file__).parents[1] / "campaigns" / "fixtures" / "format-2" / "step-00000007"
NAME = "state.rows.int64"


class Forged:
    """The checkpoint of three processes, taken apart: the manifest, and of each file its tensors and its rows."""

    def __init__(self):
        self.manifest = msgspec.json.decode((FIXTURE / "manifest.json").read_bytes())
        self.state = (FIXTURE / "state.json").read_bytes()
        self.files, self.rows = [], []
        for number in range(3):
            data = (FIXTURE / f"tensors-0000{number}.safetensors").read_bytes()
            self.files.append(tensors.parse(data, "fixture"))
            self.rows.append(msgspec.json.decode(tensors.metadata(data)[ROWS]))

    def read(self, folder):
        """Puts it together again, with hashes that are right, and reads it."""
        path = folder / "step-00000007"
        path.mkdir()
        contents = {"state.json": [self.state]}
        for number, (held, rows) in enumerate(zip(self.files, self.rows)):
            metadata = {ROWS: rows if isinstance(rows, str) else msgspec.json.encode(rows).decode()}
            contents[f"tensors-0000{number}.safetensors"] = tensors.chunks(held, metadata)
        for name, chunks in contents.items():
            (path / name).write_bytes(b"".join(chunks))
        described = {name: msgspec.to_builtins(facts(chunks)) for name, chunks in contents.items()}
        manifest = msgspec.convert({**self.manifest, "files": described}, Manifest)
        (path / "manifest.json").write_bytes(msgspec.json.encode(manifest))
        return Checkpoints(folder).load(path)


def test_it_is_read_as_it_was_written(tmp_path):
    state = Forged().read(tmp_path)
    assert torch.equal(state["rows"]["int64"], torch.arange(15).reshape(5, 3)) and state["one"].tolist() == [2.5]


def shape(*wrong):
    return lambda forged: forged.manifest["tensors"].update({NAME: list(wrong)})


CHANGES = {
    "another row": lambda forged: forged.rows[1].update({NAME: 3}),
    "a row twice": lambda forged: forged.rows[1].update({NAME: 0}),
    "a negative row": lambda forged: forged.rows[1].update({NAME: -1}),
    "rows that are none": lambda forged: forged.rows.__setitem__(1, "[1]"),
    "a gap at the end": shape("I64", [6, 3]),
    "another width": shape("I64", [5, 4]),
    "another type": shape("F64", [5, 3]),
    "a scalar": shape("I64", []),
    "huge": shape("I64", [2**40, 3]),
    "a piece that is not there": lambda forged: forged.rows[1].update({"state.other": 0}),
    "a piece that is called whole": lambda forged: forged.rows[2].pop(NAME),
    "a tensor that nobody knows": lambda forged: forged.manifest["tensors"].pop(NAME),
    "a piece less": lambda forged: (forged.files[2].pop(NAME), forged.rows[2].pop(NAME)),
    "no pieces": lambda forged: [rows.clear() for rows in forged.rows],
    "the older format": lambda forged: forged.manifest.update(format=1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_not_whole_is_refused(tmp_path, what):
    forged = Forged()
    CHANGES[what](forged)
    with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
        forged.read(tmp_path)


@pytest.mark.parametrize("pieces", [{}, {1: torch.ones(2)}, {0: torch.ones(3)}, {0: torch.ones(1), 2: torch.ones(1)}])
def test_pieces_have_to_fill_the_whole(pieces):
    with pytest.raises(ValueError, match="is not filled"):
        put_together([2], pieces)
