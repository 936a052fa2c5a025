"""R15 in small: processes that are killed, stopped or raise, and the launcher that begins anew."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from campaigns import r15_processes  # noqa: E402

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def test_it_finds_nothing():
    outcome = r15_processes.run("small")
    assert outcome.failures == [] and outcome.tried == 3


def test_it_bites():
    failures = r15_processes.bites().failures
    assert any("differ" in failure for failure in failures), failures
