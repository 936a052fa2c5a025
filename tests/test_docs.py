"""What the docs say is run: the examples in docstrings, and the Python of every page."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import epochal

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(epochal.__path__, "epochal.") if module.name != "epochal.__main__"
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page(page, capsys):
    namespace = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), namespace)
    assert "__builtins__" in namespace or "```python" not in page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_files_named_on_a_page_exist():
    for page in PAGES:
        named = re.findall(r"`((?:src|tests|docs|examples|benchmarks)/[\w./-]+\.\w+)`", page.read_text())
        assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_begins_with_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert text.index("make demo") < text.index("make test") < text.index("pip install") < text.index("epochal.fit(")
