"""Every finding in words: findings.toml holds its text, with # for what is measured, of a program that shows it."""

import re
import tomllib
from pathlib import Path

import faulty
import pytest
import torch
from benchmarks.faults.__main__ import PROGRAMS
from benchmarks.faults.judging import by_epochal
from benchmarks.faults.program import Program, halves

from epochal.doctor import finding

EXPECTED = tomllib.loads(Path(__file__).with_name("findings.toml").read_text())
TUNED = {one.name for one in halves(PROGRAMS)[0]}  # the other half is only scored


def masked(text):
    return re.sub(r"-?\d[\d.,]*(e[+-]\d+)?", "#", text)


@pytest.fixture(autouse=True)
def _rules_may_not_fail(monkeypatch):
    monkeypatch.setattr(finding, "RAISES", True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", EXPECTED)
def test_what_is_told(code):
    name, text = EXPECTED[code]["program"], EXPECTED[code]["text"]
    assert name in TUNED or hasattr(faulty, name)
    torch.manual_seed(0)
    program = PROGRAMS[name] if name in PROGRAMS else Program(getattr(faulty, name), code)
    found = {one.code: one for one in by_epochal(program).findings}
    assert masked(str(found[code])) == text


def test_every_code_is_told_somewhere():
    assert set(EXPECTED) == set(finding.known())
