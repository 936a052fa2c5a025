"""``epochal check`` and ``epochal explain``: what is wrong with a recipe, and what a finding means."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from epochal.cli import train
from epochal.cli.options import Config, Device, Json, Precision, Recipe, Seed
from epochal.cli.train import Set, blaming, planned


def check(
    recipe: Recipe,
    /,
    *,
    device: Device | None = None,
    seed: Seed | None = None,
    precision: Precision | None = None,
    changes: Set = [],  # noqa: B006  (it is only read)
    config: Config = None,
    json: Json = False,
) -> None:
    """Look for the mistake in a recipe before it costs a night.

    In its plan, its data, its first batches, and trials on copies of its model, for some seconds; nothing of the
    recipe is changed. Prints what is found, the most certain first. The exit code is 1 if an error is among it. A
    finding that is meant so is silenced by ignore=["its-code"] in the plan. The parameters of plan() are flags too.
    """
    given = {name: value for name, value in locals().items() if name != "recipe"}
    carry_out(recipe, load(recipe), {}, given)


def load(path: Path) -> Callable[..., Any]:
    with redirect_stdout(sys.stderr):  # what the recipe prints is no finding
        return train.load(path)


def carry_out(path: Path, make: Callable[..., Any], chosen: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    from epochal.doctor.finding import every

    with redirect_stdout(sys.stderr):
        plan = planned(path, make, chosen, given)
        began = time.perf_counter()
        with blaming(path):
            found = plan.check()
    if plan.ignore:
        print(f"not told: {', '.join(plan.ignore)} (ignore=)", file=sys.stderr)
    if given.get("json"):
        print(json.dumps([one.as_dict() for one in found], indent=2))
    elif found:
        print("\n\n".join(map(str, found)))
        counts = {level: sum(one.level == level for one in found) for level in ("error", "warning", "info")}
        told = ", ".join(
            f"{count} {level}{'s' if count > 1 and level != 'info' else ''}" for level, count in counts.items() if count
        )
        print(f"\n{told}; epochal explain {found[0].code} says more", file=sys.stderr)
    else:
        print("nothing found")
        print(f"{len(every())} rules have looked, in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    if any(one.level == "error" for one in found):
        sys.stdout.flush()
        raise SystemExit(1)


def explain(
    code: Annotated[str | None, Parameter(help="Of a finding; without one, all of them are listed.")] = None,
    /,
    *,
    json: Json = False,
) -> None:
    """Say what a finding of check means.

    What is looked at, from which threshold on, and when it may be wrong. Without a code, all of them are listed.
    """
    from epochal.doctor.finding import every, known
    from epochal.errors import UnknownNameError

    pages = known()
    if code is None:
        listed = [{"code": one.code, "level": one.level, "why": one.why} for _, one in sorted(pages.items())]
        print(_json(listed) if json else "\n".join(f"{one['code']:28}{one['level']:9}{one['why']}" for one in listed))
        return
    if code not in pages:
        raise UnknownNameError.of_name("finding", code, pages, where=f"epochal explain {code}")
    looks = [one for one in every() if one.code == code]
    if json:
        print(_json([{"code": code, "level": one.level, "stage": one.stage, "page": one.page} for one in looks]))
        return
    print("\n\n".join(f"{code} ({one.level})\n\n{one.page}".replace("``", "`") for one in looks))
    print(f'\nSilence it with ignore=["{code}"] in the plan.')


def _json(value: Any) -> str:
    import json

    return json.dumps(value, indent=2)
