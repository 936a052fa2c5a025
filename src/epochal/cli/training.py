"""What every training command does: train in a run folder, draw the curves, and say what came of it."""

from __future__ import annotations

import enum
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomlkit

from epochal.checkpoint.files import replace_bytes
from epochal.cli.folders import RUNS, held, new_folder, numbers, print_facts
from epochal.errors import EpochalError, Interrupted
from epochal.events import StopReason
from epochal.runtime.launched import check_restarts, decided, is_restarted, listen
from epochal.runtime.world import announced

if TYPE_CHECKING:
    from signal import Signals

    from epochal.plan import Plan
    from epochal.result import Result
    from epochal.run import Run

FLAGS = {"demo": "demo.toml", "fit": "fit.toml", "train": "recipe.toml"}  # the file of a command's flags in its run


def train(
    plan: Plan, command: Sequence[str], flags: Mapping[str, Any], files: Mapping[str, str | bytes], then: str
) -> None:
    """Trains, in a new folder ``runs/name-N`` where the plan has none, and prints the results.

    command: the words without flags, paths absolute. flags: all of them, as they were resolved. files: texts that
    belong into the run folder, by their names. then: the next command, "{run}" in it the folder.

    Raises Interrupted if a signal ended it.
    """
    is_first = announced().is_first
    folder = Path(decided("run", lambda: str(plan.run) if plan.run is not None else _new_folder(command)))
    kept = {FLAGS[command[0]]: written(flags), **files} if is_first else {}
    try:
        result = _trained(plan.replace(run=folder, resume=plan.resume or is_restarted()), command, kept)
    finally:
        if plan.run is None and is_first:
            with suppress(OSError):  # it holds something, unless the run failed before its start
                if os.listdir(folder) == [".lock"]:
                    os.unlink(folder / ".lock")
                folder.rmdir()
                RUNS.rmdir()
    if not is_first:
        return
    facts = {"results": _measured(result), "files": f"{folder}: {', '.join(held(folder))}"}
    print_facts({**facts, "next": then.format(run=shlex.quote(str(folder)))})


def _new_folder(command: Sequence[str]) -> str:
    check_restarts()
    return str(new_folder(Path(command[-1]).name.partition(".")[0]))


def written(flags: Mapping[str, Any]) -> str:
    """Flags as a file for ``--config``; the run folder and whether it is resumed are not part of it."""
    named = {name: _plain(value) for name, value in flags.items() if name not in {"run", "resume", "config"}}
    return tomlkit.dumps({name: value for name, value in named.items() if value is not None and value != []})


def _plain(value: Any) -> Any:
    """As the command line takes it: an enum by its name, whatever holds several as a list."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _trained(plan: Plan, command: Sequence[str], files: Mapping[str, str | bytes]) -> Result:
    run, folder = None, Path(plan.run or "")
    try:
        prepared = plan.prepare()
        listen()
        with prepared as run:
            run.started = replace(run.started, command=tuple(command))
            has_begun = (folder / "run.json").exists()
            for name, text in files.items():
                # A run that is continued keeps what it was begun with, but for the flags: it may be asked for more.
                if not (has_begun and (folder / name).exists()) or name in FLAGS.values():
                    replace_bytes(folder / name, text.encode() if isinstance(text, str) else text)
            for _ in run.alone():
                pass
    except KeyboardInterrupt as error:
        if run is not None:  # a second one: nothing more is done
            error.add_note(f"epochal resume {shlex.quote(str(folder))} goes on from the newest checkpoint")
        raise
    except BaseException:
        if run is not None:
            _draw(run, folder)
        raise
    if (signal := run.ending.signal) is not None and run.result.reason is StopReason.INTERRUPTED:
        _draw(run, folder)
        raise _interrupted(run, folder, signal)
    if announced().is_first:
        run.result.history.plot(folder / "results.png")
    return run.result


def _draw(run: Run, folder: Path) -> None:
    """What ended the run matters more than a picture that cannot be written."""
    if run.state.rows and announced().is_first:
        with suppress(EpochalError):
            run.result.history.plot(folder / "results.png")


def _interrupted(run: Run, folder: Path, signal: Signals) -> Interrupted:
    step = run.state.progress.step
    checkpoints = run.saver.checkpoints.all() if run.saver is not None else []
    is_saved = any(path.name.startswith(f"step-{step:08d}") for path in checkpoints)
    told = "a checkpoint is saved" if is_saved else "it could not be saved"
    what = f"{signal.name} ended the run after step {step}; {told}."
    error = Interrupted(what, where=str(folder), fix=f"epochal resume {shlex.quote(str(folder))}")
    error.exit_code, error.is_shared = 128 + signal, True  # whoever sent it sent it to all
    return error


def _measured(result: Result) -> str:
    """What was measured of the weights that the model holds."""
    rows, best = result.history.rows, result.best if result.restored else None
    if not rows:
        return "none: nothing was evaluated"
    row = next((row for row in rows if best and row["step"] == best.step), rows[-1])
    return f"epoch {row['epoch']}: {numbers(row, 'val_' if 'val_loss' in row else 'train_')}"
