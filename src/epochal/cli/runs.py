"""``epochal runs ls`` and ``show``: what run folders tell, read from their files alone."""

from __future__ import annotations

import json as text
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from epochal.checkpoint import files
from epochal.cli.folders import RUNS, existing, held, numbers, print_facts
from epochal.cli.options import Json
from epochal.errors import EpochalError, RunFolderError
from epochal.observe.console import number
from epochal.report.history import History
from epochal.runtime.lock import is_held

FACTS = (
    "status", "reason", "message", "where", "fix", "started", "best", "monitor", "epochs", "steps", "seconds", "seed",
    "header", "command",
)  # fmt: skip
BROKEN = ("interrupted", "failed", "closed")  # reasons after which a run can go on
COLUMNS = ("run", "status", "best", "started")
BARS = "▁▂▃▄▅▆▇█"
WIDEST = 60  # of a line of bars


def ls(folder: Annotated[Path, Parameter(help="Where the run folders are.")] = RUNS, /, *, json: Json = False) -> None:
    """List the run folders in a folder."""
    if not folder.is_dir():
        fix = "name a folder of runs, or make a first one with epochal demo"
        raise RunFolderError("there is no such folder.", where=str(folder), fix=fix)
    found = [
        read_facts(path)
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and (os.path.exists(path / "run.json") or os.path.exists(path / "checkpoints"))
    ]
    found.sort(key=lambda facts: facts["started"] or "")
    if json:
        print(text.dumps(found, indent=1))
    elif not found:
        print(f"no runs in {folder}")
    else:
        lines = [COLUMNS, *([_told(facts).get(column, "") for column in COLUMNS] for facts in found)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def show(run: Annotated[Path, Parameter(help="A run folder.")], /, *, json: Json = False) -> None:
    """Show what a run did and what it left."""
    facts, rows = read_facts(existing(run)), []
    if facts["status"] == "incomplete" and "checkpoints/" not in held(run):
        raise RunFolderError("there is no run in the folder.", where=str(run), fix="epochal runs ls FOLDER lists them")
    with suppress(EpochalError):  # no results yet, or damaged ones
        rows = History.from_csv(run / "results.csv").rows
    if json:
        finite = [{name: value if math.isfinite(value) else str(value) for name, value in row.items()} for row in rows]
        print(text.dumps({**facts, "rows": finite, "files": held(run)}, indent=1))
        return
    told = _told(facts)
    for column in ("train_loss", "val_loss"):
        if bars := _bars([row[column] for row in rows if column in row]):
            told[column] = bars
    if rows:
        told["last"] = numbers(rows[-1])
    told["files"] = ", ".join(held(run)) or "none"
    if facts["command"] and (facts["status"] == "stopped" or facts["reason"] in BROKEN):
        told["next"] = f"epochal resume {shlex.quote(str(run))}"
    elif (run / "table.json").exists():
        told["next"] = f"epochal predict {run} NEW.csv -o OUT.csv"
    elif (run / "recipe.toml").exists():
        told["again"] = f"epochal train {run / 'recipe.py'} --config {run / 'recipe.toml'}"
    print_facts(told)


def read_facts(folder: Path) -> dict[str, Any]:
    """The FACTS of run.json; where it is missing or damaged, ``status`` and ``message`` say so."""
    try:
        read = text.loads(files.read(folder / "run.json"))
        facts = {"run": str(folder), **{name: read.get(name) for name in FACTS}}
        if facts["status"] == "running" and not is_held(folder):
            facts["status"] = "stopped"  # its process is gone, and had no time to say so
        _told(facts)
        return facts
    except FileNotFoundError:
        problem = {"status": "incomplete", "message": "there is no run.json"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = {"status": "damaged", "message": f"run.json cannot be read: {error!r}"}
    return {"run": str(folder), **dict.fromkeys(FACTS), **problem}


def _told(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts as people read them; those that are not known are left out."""
    best = facts["best"] and "epoch {epoch}, {metric} {value}".format_map(
        {**facts["best"], "value": number(float(facts["best"]["value"]))}
    )
    started = facts["started"] and facts["started"][:16].replace("T", " ")
    status = facts["status"] if facts["reason"] in (None, "epochs") else facts["reason"].replace("_", " ")
    told = {"run": None, "status": status, **{name: facts[name] for name in ("message", "where", "fix")}}
    told |= {"started": started, "best": best, **(facts["header"] or {}), "run": facts["run"]}
    return {label: str(value) for label, value in told.items() if value}


def _bars(values: Sequence[float]) -> str:
    """The values as bars, at most WIDEST of them, from the least to the greatest; a gap where one is not finite.

    >>> _bars([1.0, 0.5, 0.0, float("nan")])
    '█▄▁ '
    """
    shown = [values[place * len(values) // WIDEST] for place in range(WIDEST)] if len(values) > WIDEST else values
    finite = [value for value in shown if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(BARS[int((value - low) / span * 7.999)] if math.isfinite(value) else " " for value in shown)
