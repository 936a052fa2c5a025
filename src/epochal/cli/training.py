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
    folder = Path(plan.run) if plan.run is not None else new_folder(name)
    try:
        result = _trained(plan.replace(run=folder), folder, files)
    finally:
        if plan.run is None:
            with suppress(OSError):  # it holds something, unless the run failed before its start
                folder.rmdir()
                RUNS.rmdir()
    facts = {"results": _measured(result), "files": f"{folder}: {', '.join(held(folder))}"}
    print_facts({**facts, "next": then.format(run=folder)})


def _trained(plan: Plan, folder: Path, files: Mapping[str, str]) -> Result:
    run = None
    try:
        with plan.prepare() as run:
            for name, text in files.items():
                if not (folder / name).exists():  # a run that is continued keeps the record of its start
                    replace_bytes(folder / name, text.encode())
            for _ in run:
                pass
    except BaseException as error:
        if run is not None and run.state.rows:
            with suppress(EpochalError):  # what ended the run matters more than a picture that cannot be written
                run.result.history.plot(folder / "results.png")
        if isinstance(error, KeyboardInterrupt) and run is not None:
            error.add_note(f"{folder} holds what was trained so far")
        raise
    run.result.history.plot(folder / "results.png")
    return run.result


def _measured(result: Result) -> str:
    """What was measured of the weights that the model holds."""
    rows, best = result.history.rows, result.best if result.restored else None
    if not rows:
        return "none: nothing was evaluated"
    row = next((row for row in rows if best and row["step"] == best.step), rows[-1])
    return f"epoch {row['epoch']}: {numbers(row, 'val_' if 'val_loss' in row else 'train_')}"
