"""The campaigns that try to break what lies on disk: their small versions find nothing, and each is shown to bite."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="they fork, and ask the kernel")

PROGRAMS = (
    "r01_kill r02_every_io r03_power r04_errors r05_flips r06_damaged r07_machine r09_hostile r10_mutations "
    "r17_two_starts r19_formats"
)


@pytest.mark.parametrize("name", PROGRAMS.split(" "))
def test_it_finds_nothing(name):
    outcome = importlib.import_module(f"campaigns.{name}").run("small")
    assert outcome.failures == []
    assert outcome.tried > 0


@pytest.mark.parametrize("name", PROGRAMS.split(" "))
def test_it_bites(name):
    assert importlib.import_module(f"campaigns.{name}").bites().failures != []


def test_it_is_a_program(tmp_path):
    """It ends with 1 where there are failures, and tells them; what it found can be had as JSON."""
    broken = "import campaigns.r19_formats as r; r.run = lambda scale: r.bites()"
    words = ["campaigns", "r19", "--small", "--json", str(tmp_path / "found.json")]
    code = f"import sys; sys.argv = {words!r}; {broken}; from campaigns.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode == 1 and "failed: format 1" in done.stderr
    assert done.stdout.splitlines()[1].split()[0] == found["id"] == "R19"
    assert found["failures"]
