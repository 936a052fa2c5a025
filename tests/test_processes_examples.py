"""Every example runs in two processes, as under torchrun, and leaves one run folder with finite results."""

import contextlib
import io
import json
import math
from pathlib import Path

import group
import pytest
from test_examples import EXAMPLES, REACHED, commands

from epochal.__main__ import main

pytestmark = pytest.mark.distributed


def train(rank, words):
    told, progress = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(progress):
        code = main(words)
    return code, told.getvalue(), progress.getvalue()


@pytest.mark.parametrize("name", sorted(REACHED))
def test_it_trains_in_two_processes(name):
    words = commands(name)[1]
    words = ["train", str(EXAMPLES / f"{name}.py"), *words, "--run", "run"]
    (code, told, progress), others = group.run(train, 2, words, seconds=110)
    assert code == 0, progress
    assert others == (0, "", "")
    assert "results" in told and Path("run/model.safetensors").exists()
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rows and math.isfinite(rows[-1]["val_loss"])
