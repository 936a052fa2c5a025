"""Checkpoints whose tensors stand in pieces: read as they were written, and refused where they are not whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from epochal.checkpoint.manifest import Manifest
from epochal.checkpoint.sharded import put_together
from epochal.checkpoint.store import Checkpoints
from epochal.errors import CheckpointError

FIXTURE = Path(__file__).parents[1] / "campaigns" / "fixtures" / "format-2" / "step-00000007"
FIRST, SECOND, THIRD = (f"tensors-0000{number}.safetensors" for number in range(3))


@pytest.fixture
def forged(tmp_path):
    """Changes the manifest of a checkpoint of three processes, and reads it."""

    def read(change):
        folder = tmp_path / "step-00000007"
        shutil.copytree(FIXTURE, folder)
        facts = json.loads((folder / "manifest.json").read_text())
        change(facts)
        ordered = {name: facts[name] for name in Manifest.__struct_fields__ if name in facts}
        (folder / "manifest.json").write_text(json.dumps(ordered, separators=(",", ":")))
        return Checkpoints(tmp_path).load(folder)

    return read


def test_it_is_read_as_it_was_written(forged):
    state = forged(lambda facts: None)
    assert torch.equal(state["rows"]["int64"], torch.arange(15).reshape(5, 3)) and state["one"].tolist() == [2.5]


CHANGES = {
    "another row": lambda facts: facts["pieces"][SECOND].update({"state.rows.int64": 3}),
    "a row twice": lambda facts: facts["pieces"][SECOND].update({"state.rows.int64": 0}),
    "a gap at the end": lambda facts: facts["tensors"].update({"state.rows.int64": ["I64", [6, 3]]}),
    "another width": lambda facts: facts["tensors"].update({"state.rows.int64": ["I64", [5, 4]]}),
    "another type": lambda facts: facts["tensors"].update({"state.rows.int64": ["F64", [5, 3]]}),
    "a scalar": lambda facts: facts["tensors"].update({"state.rows.int64": ["I64", []]}),
    "huge": lambda facts: facts["tensors"].update({"state.rows.int64": ["I64", [2**40, 3]]}),
    "a piece that is not there": lambda facts: facts["pieces"][SECOND].update({"state.other": 0}),
    "a piece that is called whole": lambda facts: facts["pieces"][THIRD].pop("state.rows.int64"),
    "a tensor that nobody knows": lambda facts: facts["tensors"].pop("state.rows.int64"),
    "a file that is not there": lambda facts: facts["pieces"].update({"tensors-00009.safetensors": {"a": 0}}),
    "a file less": lambda facts: (facts["files"].pop(THIRD), facts["pieces"].pop(THIRD)),
    "no pieces": lambda facts: facts.pop("pieces"),
    "the older format": lambda facts: facts.update(format=1),
    "a negative row": lambda facts: facts["pieces"][SECOND].update({"state.rows.int64": -1}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_not_whole_is_refused(forged, what):
    with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
        forged(CHANGES[what])


@pytest.mark.parametrize("pieces", [{}, {1: torch.ones(2)}, {0: torch.ones(3)}, {0: torch.ones(1), 2: torch.ones(1)}])
def test_pieces_have_to_fill_the_whole(pieces):
    with pytest.raises(ValueError, match="is not filled"):
        put_together([2], pieces)
