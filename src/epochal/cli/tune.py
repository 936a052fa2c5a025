"""``epochal tune-speed``: what would make a recipe train faster on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from epochal.checkpoint.files import replace_bytes
from epochal.cli.folders import refuse_missing_folder
from epochal.cli.options import Config, Device, Json, Precision, Recipe, Seconds, Seed
from epochal.cli.train import Set, blaming, load, planned
from epochal.cli.train import flags as asked
from epochal.cli.training import written
from epochal.errors import PlanError

if TYPE_CHECKING:
    from epochal.speed.tuning import Setting, Tuning

CLEARED = "\r\033[K"  # the line of a terminal


def tune_speed(
    recipe: Recipe,
    /,
    *,
    seconds: Seconds = 1.0,
    write: Annotated[Path | None, Parameter(help="A new TOML file, for train --config: what is suggested.")] = None,
    device: Device | None = None,
    seed: Seed | None = None,
    precision: Precision | None = None,
    changes: Set = [],  # noqa: B006  (it is only read)
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure what would make a recipe train faster.

    On this machine: threads, memory layout, precision, compiling and workers are tried on copies of its model, on its
    own data; nothing of the recipe is changed. Prints what each takes, and what is worth it, with its price: samples a
    second; memory at its peak, above what there was before; the seconds of the start (what is compiled, say) and of the
    whole training without validation; and the loss over the first 20 updates. The parameters of plan() are flags too.
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
    if write is not None and write.exists():
        fix = "name a new file, or delete this one first"
        raise PlanError("there is such a file already.", where=f"--write {write}", fix=fix)
    plan = planned(path, make, chosen, given)
    is_live = sys.stderr.isatty()

    def tell(setting: Setting) -> None:
        print(f"{CLEARED * is_live}measuring: {setting.name}", end="" if is_live else "\n", file=sys.stderr, flush=True)

    try:
        with blaming(path):
            found = tuning.tune_speed(plan, seconds=given.get("seconds") or 1.0, tell=tell)
    finally:
        print(CLEARED * is_live, end="", file=sys.stderr, flush=True)
    print(json.dumps(_as_json(found), indent=2) if given.get("json") else found)
    if write is not None and found.best is found.rows[0]:
        print(f"{write} is not written: nothing is suggested", file=sys.stderr)
    elif write is not None:
        replace_bytes(write, written(_together(asked(chosen, given), flags(found))).encode())
        print(f"written: {write}; epochal train {path} --config {write}", file=sys.stderr)


def _together(given: Mapping[str, Any], suggested: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for when it was measured, and what is suggested on top of it."""
    named = {change.partition("=")[0].strip() for change in suggested.get("set", [])}
    kept = [change for change in given["set"] if change.partition("=")[0].strip() not in named]
    return {**given, **suggested, "set": [*kept, *suggested.get("set", [])]}


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
