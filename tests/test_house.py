"""The house: layers, budgets, names, and what an import may do."""

import ast
import io
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import epochal

SOURCE = Path(epochal.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Imports point down only. Rooms of one rank do not import each other; inside a room they may.
RANKS = {
    "errors": 0, "protocols": 0, "cadence": 1,
    "runtime": 10,
    "data": 20, "losses": 20, "optim": 20, "metrics": 20, "checkpoint": 20,
    "events": 30, "buffers": 30, "agreement": 30, "state": 31, "objective": 31, "nonfinite": 31, "accumulation": 31,
    "clipping": 32, "graph": 32, "step": 33, "loop": 33, "widening": 33,
    "observe": 40, "report": 40,
    "feeding": 50, "copies": 50, "result": 50, "ending": 50, "describe": 51, "doctor": 51, "validation": 51,
    "run": 52, "mistakes": 52,
    "comparison": 53, "resuming": 53, "prepare": 54,
    "plan": 55, "speed": 56,
    "tutorial": 60, "cli": 60, "__init__": 61, "__main__": 61,
}  # fmt: skip


def room_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path):
    """The rooms that a file imports, not counting what only type checkers see."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "epochal":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("epochal.")]


def wrong_imports(room, imported):
    return [
        f"{room} imports {other}"
        for other in imported
        if other != room and (other not in RANKS or RANKS[other] >= RANKS[room])
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path):
    assert room_of(path) in RANKS, "this file has no layer"
    imported = [name for name in imports_of(path) if name != "__version__"]
    assert wrong_imports(room_of(path), imported) == []


def test_the_layer_test_bites():
    assert wrong_imports("step", ["loop"]) == ["step imports loop"]
    assert wrong_imports("data", ["plan"]) == ["data imports plan"]
    assert wrong_imports("metrics", ["data"]) == ["metrics imports data"]
    assert wrong_imports("loop", ["utils"]) == ["loop imports utils"]


def lines_of_code(text):
    """Lines that hold code: no blank lines, no comments, no docstrings, so that none of them is saved on."""
    tree = ast.parse(text)
    documented = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented.update(range(node.lineno, node.end_lineno + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def test_the_package_stays_small():
    assert sum(lines_of_code(path.read_text()) for path in FILES) < 16800


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_fit_the_eye(path):
    text = path.read_text()
    assert len(text.splitlines()) < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node, clean=False)
            length = node.end_lineno - node.lineno + 1 - (len(documented.splitlines()) if documented else 0)
            assert length <= 60, node.name


def test_no_name_says_nothing():
    forbidden = ("util", "helper", "common", "manager", "handler", "connector")
    assert [str(path) for path in FILES if any(word in path.stem for word in forbidden)] == []


def test_only_their_rooms_import_the_heavy_ones():
    for path in FILES:
        text, name = path.read_text(), str(path.relative_to(SOURCE))
        assert "torch.distributed" not in text or name.startswith("runtime/") or name == "checkpoint/sharded.py", name
        assert "import matplotlib" not in text.replace("    from matplotlib", "") or name == "report/plots.py", name
        assert "torchmetrics" not in "".join(line for line in text.splitlines() if "import " in line), name
        assert "pickle" not in "".join(line for line in text.splitlines() if "import " in line), name


def test_public_names_are_sorted_complete_and_documented():
    assert list(epochal.__all__) == sorted(epochal.__all__)
    assert list(epochal._HOMES) == sorted(epochal._HOMES)
    for name in epochal.__all__:
        thing = getattr(epochal, name)
        assert thing.__doc__, name
        assert name in dir(epochal)
    with pytest.raises(AttributeError, match="has no attribute 'fti'"):
        _ = epochal.fti


def test_type_checkers_see_the_same_public_names():
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module.removeprefix("epochal.") for node in block.body for alias in node.names}
    assert seen == epochal._HOMES


def test_fit_takes_at_most_33_options():
    from epochal.plan import options

    assert len(options()) <= 33


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_changes_nothing():
    code = """
import logging, os, random
import numpy as np, torch
before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), dict(os.environ),
          logging.root.handlers[:], sorted(logging.root.manager.loggerDict), torch.get_num_threads(),
          torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
import epochal
for name in epochal.__all__:
    getattr(epochal, name)
after = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), dict(os.environ),
         logging.root.handlers[:], sorted(logging.root.manager.loggerDict), torch.get_num_threads(),
         torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
changed = [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
print(changed)
"""
    assert python(code) == "[]"


def test_importing_epochal_is_cheap():
    code = "import epochal, sys; print([m for m in ('torch', 'numpy', 'polars', 'rich') if m in sys.modules])"
    assert python(code) == "[]"
