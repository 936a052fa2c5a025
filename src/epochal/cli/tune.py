"""``epochal tune-speed``: what would make a recipe train faster on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tomlkit
from cyclopts import Parameter

from epochal.checkpoint.files import replace_bytes
from epochal.cli.folders import refuse_missing_folder
from epochal.cli.options import Config, Device, Json, Precision, Recipe, Seconds, Seed
from epochal.cli.train import Set, blaming, load, planned
from epochal.errors import PlanError

if TYPE_CHECKING:
    from epochal.speed.tuning import Row, Tuning


def tune_speed(
    recipe: Recipe,
    /,
    *,
    seconds: Seconds = 1.0,
    write: Annotated[Path | None, Parameter(help="A TOML file for what is suggested, for train --config.")] = None,
    device: Device | None = None,
    seed: Seed | None = None,
    precision: Precision | None = None,
    changes: Set = [],  # noqa: B006  (it is only read)
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure what would make a recipe train faster.

    On this machine: threads, memory layout, precision, compiling and workers are tried on copies of its model, on its
    own data; nothing of the recipe is changed. Prints what each takes, and what is worth it, with its price. The
    parameters of plan() are flags too.
    """
    given = {name: value for name, value in locals().items() if name != "recipe"}
    carry_out(recipe, load(recipe), {}, given)


def carry_out(path: Path, make: Callable[..., Any], chosen: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    from epochal.speed import tuning

    write = given.get("write")
    if write is not None and write.suffix != ".toml":
        fix = "name a file that ends in .toml"
        raise PlanError("the suggestion is written as TOML.", where=f"--write {write}", fix=fix)
    if write is not None:
        refuse_missing_folder(write, "--write")
    plan = planned(path, make, chosen, given)

    def tell(row: Row) -> None:
        took = f"{row.trial.milliseconds:.3f} ms a step" if row.trial is not None else row.why
        print(f"{row.setting.name}: {took}", file=sys.stderr, flush=True)

    with blaming(path):
        found = tuning.tune_speed(plan, seconds=given.get("seconds") or 1.0, tell=tell)
    print(json.dumps(_as_json(found), indent=2) if given.get("json") else found)
    if write is not None:
        replace_bytes(write, tomlkit.dumps(flags(found)).encode())
        print(f"written: {write}; epochal train {path} --config {write}", file=sys.stderr)


def flags(tuning: Tuning) -> dict[str, Any]:
    """What is suggested, as flags of ``epochal train``."""
    setting = tuning.best.setting
    options = {name: value for name, value in setting.options.items() if name != "precision"}
    given = {
        "threads": setting.threads,
        "channels-last": setting.channels_last or None,
        "precision": setting.options.get("precision"),
        "set": [f"{name}={json.dumps(value)}" for name, value in options.items()] or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _as_json(tuning: Tuning) -> dict[str, Any]:
    rows = [{"name": row.setting.name, **asdict(row)} for row in tuning.rows]
    suggested = {"name": tuning.best.setting.name, "factor": tuning.factor, "price": tuning.best.setting.price}
    return {"rows": rows, "suggested": {**suggested, "flags": flags(tuning), "code": tuning.code()}}
