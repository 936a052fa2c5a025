"""The recipes in ``examples/``: each is trained in the small setting that its own docstring gives as a command."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import epochal
from epochal.errors import MissingPackageError

EXAMPLES = Path(__file__).parent.parent / "examples"
NOT_RECIPES = {"plain_loop"}  # the loop by hand, which test_parity compares with
REACHED = {  # by the small setting: the column, and its worst allowed value
    "char_lm": ("val_perplexity", 15),
    "diabetes": ("val_r2", 0.35),
    "diamonds": ("val_r2", 0.9),
    "digits_cnn": ("val_accuracy", 0.9),
    "digits_mlp": ("val_accuracy", 0.85),
    "frozen_backbone": ("val_accuracy", 0.85),
    "gan": ("val_loss", 4),
    "masked_tokens": ("val_accuracy", 0.3),
    "mnist_cnn": ("val_accuracy", 0.8),
}
GROWS_BETTER = ("val_accuracy", "val_r2")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(generator)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands(name: str) -> list[list[str]]:
    """The arguments of each command in the docstring, after ``epochal train examples/NAME.py``."""
    described = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    lines = re.findall(r"^ {4}(epochal train .*)$", described, re.MULTILINE)
    assert all(line.startswith(f"epochal train examples/{name}.py") for line in lines)
    return [shlex.split(line)[3:] for line in lines]


def small_setting(name: str, plan: Any) -> dict[str, Any]:
    """The flags of the second command as arguments of ``plan``; all of them are whole numbers."""
    flags = commands(name)[1]
    given = {flag.removeprefix("--").replace("-", "_"): int(value) for flag, value in zip(flags[::2], flags[1::2])}
    assert given.keys() <= inspect.signature(plan).parameters.keys()
    return given


def small(name: str, **options: Any) -> tuple[ModuleType, epochal.Plan]:
    """The recipe, and its plan in the small setting: silent, seeded, on the CPU."""
    recipe = load(name)
    plan = recipe.plan(**small_setting(name, recipe.plan))
    return recipe, plan.replace(observers=(), seed=0, device="cpu", **options)


def test_every_example_is_covered():
    assert {path.stem for path in EXAMPLES.glob("*.py")} - NOT_RECIPES == set(REACHED)


@pytest.mark.parametrize("name", sorted(REACHED))
def test_a_recipe_is_a_typed_function_of_defaults(name):
    recipe = load(name)
    parameters = inspect.signature(recipe.plan).parameters
    hints = get_type_hints(recipe.plan)
    assert hints.pop("return") is epochal.Plan
    assert hints.keys() == parameters.keys()
    assert all(parameter.default is not parameter.empty for parameter in parameters.values())
    assert commands(name)[0] == []


@pytest.mark.parametrize("name", sorted(REACHED))
def test_a_recipe_learns(name):
    _, plan = small(name)
    before = plan.prepare()._evaluate().row["val_loss"] if False else None  # placeholder
    result = plan.fit()
    column, bound = REACHED[name]
    best = next(row for row in result.history.rows if row["step"] == result.best.step)
    print(name, best)
    assert best[column] >= bound if column in GROWS_BETTER else best[column] <= bound
