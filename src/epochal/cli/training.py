"""What every training command does: train in a run folder, draw the curves, and say what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from epochal.checkpoint.files import replace_bytes
from epochal.cli.folders import RUNS, held, new_folder, numbers, print_facts
from epochal.errors import EpochalError

if TYPE_CHECKING:
    from epochal.plan import Plan
    from epochal.result import Result


def train(plan: Plan, name: str, files: Mapping[str, str], then: str) -> None:
    """Trains, in a new folder ``runs/name-N`` where the plan has none, and prints the results.

    files: texts that belong into the run folder, by their names. then: the next command, "{run}" in it the folder.
    """
    made = new_folder(name) if plan.run is None else None
    try:
        result = _trained(plan.replace(run=made) if made else plan, files)
    finally:
        if made is not None:
            with suppress(OSError):  # it holds something, unless the run failed before its start
                made.rmdir()
                RUNS.rmdir()
    facts = {"results": _measured(result), "files": f"{result.run}: {', '.join(held(result.run))}"}
    print_facts({**facts, "next": then.format(run=result.run)})


def _trained(plan: Plan, files: Mapping[str, str]) -> Result:
    run = None
    try:
        with plan.prepare() as run:
            for name, text in files.items():
                replace_bytes(Path(plan.run, name), text.encode())
            for _ in run:
                pass
    except BaseException as error:
        if run is not None and run.state.rows:
            with suppress(EpochalError):  # what ended the run matters more than a picture that cannot be written
                run.result.history.plot(Path(plan.run, "results.png"))
        if isinstance(error, KeyboardInterrupt) and run is not None:
            error.add_note(f"{plan.run} holds what was trained so far")
        raise
    run.result.history.plot(Path(plan.run, "results.png"))
    return run.result


def _measured(result: Result) -> str:
    """What was measured of the weights that the model holds."""
    rows, best = result.history.rows, result.best
    row = next((row for row in rows if result.restored and row["step"] == best.step), rows[-1])
    side = "val_" if "val_loss" in row else "train_"
    return f"epoch {row['epoch']}: {numbers(row, side)}"
