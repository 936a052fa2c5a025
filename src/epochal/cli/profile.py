"""``epochal profile``: where the time of a recipe's updates goes on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from epochal.cli.folders import refuse_missing_folder
from epochal.cli.options import Config, Device, Json, Precision, Recipe, Seconds, Seed
from epochal.cli.train import Set, blaming, load, planned


def profile(
    recipe: Recipe,
    /,
    *,
    seconds: Seconds = 1.0,
    trace: Annotated[Path | None, Parameter(help="A .json file for ui.perfetto.dev: ten updates in detail.")] = None,
    picture: Annotated[Path | None, Parameter(help="A .png, .svg or .pdf of the parts.")] = None,
    observers: Annotated[
        bool, Parameter(negative="", help="Call copies of the plan's observers, too, with updates that never were.")
    ] = False,
    device: Device | None = None,
    seed: Seed | None = None,
    precision: Precision | None = None,
    changes: Set = [],  # noqa: B006  (it is only read)
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure where the time of a recipe's updates goes.

    Into data, transfer to a device, forward, backward, optimizer, and the rest: metrics, checks, noise. Says whether it
    is bound by its data, by launching operations or by arithmetic, and what to try first. Nothing of the recipe is
    changed. The parameters of plan() are flags too.
    """
    given = {name: value for name, value in locals().items() if name != "recipe"}
    carry_out(recipe, load(recipe), {}, given)


def carry_out(path: Path, make: Callable[..., Any], chosen: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    from epochal.report import plots
    from epochal.speed import profiling

    if (picture := given.get("picture")) is not None:
        plots.kind_of(picture)
        refuse_missing_folder(picture, "--picture")
    if (trace := given.get("trace")) is not None:
        profiling.refuse_trace(trace)
    plan = planned(path, make, chosen, given)
    with blaming(path):
        found = profiling.profile(
            plan, seconds=given.get("seconds") or 1.0, trace=trace, observers=bool(given.get("observers"))
        )
    print(json.dumps(asdict(found), indent=2) if given.get("json") else found)
    if picture is not None:
        plots.save(plots.draw_parts(found.shown, f"an update of {path.name}"), picture)
    for name in ("trace", "picture"):
        if given.get(name) is not None:
            print(f"written: {given[name]}", file=sys.stderr)
