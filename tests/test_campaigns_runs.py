"""The campaigns that disturb runs: their small versions find nothing, and each is shown to bite."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="they fork, and ask the kernel")

PROGRAMS = (
    "r08_resume r11_signals r12_nonfinite r13_memory r14_workers r16_background r20_million r21_watching cli_kills"
)


@pytest.mark.parametrize("name", PROGRAMS.split(" "))
def test_it_finds_nothing(name):
    outcome = importlib.import_module(f"campaigns.{name}").run("small")
    assert outcome.failures == []
    assert outcome.tried > 0


@pytest.mark.parametrize("name", PROGRAMS.split(" "))
def test_it_bites(name):
    assert importlib.import_module(f"campaigns.{name}").bites().failures != []
