"""The recorder: what a run leaves in its folder, written as it goes."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomlkit
from torch import Tensor

from epochal.checkpoint import files
from epochal.checkpoint.weights import IMPORTED, save_weights
from epochal.errors import FileError, RunFolderError
from epochal.events import Ended, Evaluated, Event, Found, Noted, Row, Saved, Started, StepDone
from epochal.runtime.lock import Lock, was_held

SECONDS_A_NOTE = 10.0  # between two writings of run.json while a run goes on
SECONDS_A_LINE = 0.25  # between two writings of what was measured, so that short epochs do not wait for the disk
# What is left where a run was killed before it had begun.
BEFORE_A_RUN = {"config.toml", "journal.jsonl", "recipe.py", "recipe.toml", "fit.toml", "demo.toml", "table.json"}
# What is there, too, where a run ended by an error before its first update; run.json goes last, for it says so.
BEFORE_AN_UPDATE = ("checkpoints", "model.safetensors", "metrics.jsonl", "results.csv", "run.json")


class Recorder:
    """Writes all files of a run folder but its checkpoints: what was planned, what was measured, what happened.

    folder: claimed by this run. weights: gives those that the run ends with. environment: facts for ``run.json``.
    goes_on: a full disk ends nothing; what could not be written is made good later.

    What was measured stands in ``metrics.jsonl`` and ``results.csv``, a line an evaluation, the same bytes in every run
    of the same plan: no line tells the time. When what happened stands in ``journal.jsonl``. Lines are written when an
    evaluation comes a quarter of a second after the last writing, and at the end.
    """

    def __init__(
        self,
        folder: Path,
        weights: Callable[[], Mapping[str, Tensor]],
        *,
        environment: Mapping[str, Any] | None = None,
        goes_on: bool = False,
    ):
        self.folder, self.weights, self.goes_on = folder, weights, goes_on
        self._facts: dict[str, Any] = {"environment": dict(environment or {})}
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = []
        self._written, self._written_at, self._noted_at, self._is_torn = 0, 0.0, 0.0, False
        self._has_begun, self._config = False, b""  # config.toml, as long as it is not written

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):  # first, for it comes most often
            return
        try:
            self._record(event)
        except FileError as error:
            self._is_torn, cause = True, error.__cause__
            goes_on = self.goes_on and not isinstance(event, Ended)  # an end that is not written is no success
            if not (goes_on and isinstance(cause, OSError) and cause.errno in files.NO_SPACE):
                raise

    def _record(self, event: Event) -> None:
        if isinstance(event, Evaluated):
            self._rows.append(_timeless(event.row))
            self._facts["best"] = event.best and asdict(event.best)
            if time.monotonic() - self._noted_at > SECONDS_A_NOTE:
                self._note()
            if time.monotonic() - self._written_at > SECONDS_A_LINE:
                self._write_lines()
        elif isinstance(event, Saved):
            self._tell("saved", step=event.step, checkpoint=event.path.name)
        elif isinstance(event, Noted):
            self._tell("noted", message=event.message)
        elif isinstance(event, Found):
            self._tell("found", finding=event.finding.as_dict())
        elif isinstance(event, Started):
            self._start(event)
        elif isinstance(event, Ended):
            self._end(event)

    def _start(self, event: Started) -> None:
        self._facts |= {
            "status": "running", "started": _now(), "reason": None, "best": None,
            "command": list(event.command) or None, "monitor": event.monitor, "seed": event.config.get("seed"),
            "header": dict(event.facts),
        }  # fmt: skip
        self._rows = [_timeless(row) for row in event.rows]
        files.sweep(self.folder)
        self._tell("resumed" if event.step else "started", epochs=event.done, step=event.step)
        if not (event.step and (self.folder / "config.toml").exists()):  # a run that goes on keeps that of its start
            self._config = tomlkit.dumps(dict(event.config)).encode()
        self._note()
        self._write_rows()  # evaluations after the checkpoint are cut off: they will be made again
        self._has_begun = True

    def _end(self, event: Ended) -> None:
        if not (self._has_begun or (self.goes_on and "status" in self._facts)):
            return  # it has had no start, or that could not be written: what stands there is not touched
        try:
            self._write_lines()
        finally:
            if not event.is_torn:  # else the newest checkpoint has the last whole ones
                self._save_weights()
        ended = {**asdict(event), "reason": event.reason.name.lower()}
        self._tell("ended", **ended)
        self._note(status="stopped" if event.is_torn else "ended", **ended)

    def _save_weights(self) -> None:
        try:
            save_weights(self.weights(), self.folder / "model.safetensors")
        except FileError as error:
            error.fix = "free some space and resume the run: it goes on from its newest checkpoint"
            raise

    def _note(self, **facts: Any) -> None:
        self._facts.update(facts)
        self._noted_at = time.monotonic()
        if self._config:
            files.replace_bytes(self.folder / "config.toml", self._config)
            self._config = b""
        files.replace_bytes(self.folder / "run.json", json.dumps(_strict(self._facts), indent=1).encode() + b"\n")

    def _tell(self, what: str, **facts: Any) -> None:
        self._append("journal.jsonl", json.dumps(_strict({"at": _now(), "event": what, **facts})))

    def _write_lines(self) -> None:
        """Adds the lines that are due to both files; for a new column, or after half a line, they are written anew."""
        due = self._rows[self._written :]
        if self._is_torn or any(name not in self._columns for row in due for name in _scalars(row)):
            self._write_rows()
        elif due:
            self._is_torn = True  # until both have them
            self._append("metrics.jsonl", "\n".join(json.dumps(_strict(row)) for row in due))
            self._append("results.csv", _csv(self._columns, due).rstrip("\n"))
            self._is_torn = False
        self._written, self._written_at = len(self._rows), time.monotonic()

    def _write_rows(self) -> None:
        self._columns = list(dict.fromkeys(name for row in self._rows for name in _scalars(row)))
        lines = "".join(json.dumps(_strict(row)) + "\n" for row in self._rows)
        files.replace_bytes(self.folder / "metrics.jsonl", lines.encode())
        header = _csv(self._columns, [dict(zip(self._columns, self._columns))]) if self._columns else ""
        files.replace_bytes(self.folder / "results.csv", (header + _csv(self._columns, self._rows)).encode())
        self._is_torn, self._written = False, len(self._rows)

    def _append(self, name: str, line: str) -> None:
        with files.telling(self.folder / name):
            files.append(self.folder / name, line.encode() + b"\n")


def claim(folder: Path, *, resume: bool) -> Lock:
    """Makes the folder and locks it. One that holds something is only taken to resume it, if it is a run's; what a
    run left that was killed before its start, or that failed before its first update, does not count.

    Raises RunFolderError.
    """
    try:
        files.make_folder(folder)
        was_locked = was_held(folder)  # by a run that was killed
        if not was_locked:
            _refuse_what_is_not_ours(folder, resume, was_locked)  # before a lock is left in a stranger's folder
        lock = Lock(folder)
        try:
            _refuse_what_is_not_ours(folder, resume, was_locked)  # another run may have been quicker
            if not resume and _has_trained_nothing(folder):
                for name in BEFORE_AN_UPDATE:
                    files.remove_folder(folder / name / "step-00000000")
                    files.remove_folder(folder / name) if (folder / name).is_dir() else (folder / name).unlink(True)
        except BaseException:
            lock.release()
            raise
        return lock
    except OSError as error:
        what, fix = f"the run folder cannot be used: {error.strerror or error}.", "choose a folder that can be written"
        raise RunFolderError(what, where=str(folder), fix=fix) from error


def _refuse_what_is_not_ours(folder: Path, resume: bool, was_locked: bool) -> None:
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    is_run = bool({"run.json", "checkpoints"} & set(held))
    is_ours = was_locked or "journal.jsonl" in held
    if not held or (is_ours and set(held) <= BEFORE_A_RUN) or (is_run and resume) or _has_trained_nothing(folder):
        return
    where = f"{folder}: {', '.join(held[:4])}{' ...' if len(held) > 4 else ''}"
    if resume:
        fix = "name the folder of a run, or choose another name"
        raise RunFolderError("there is no run in the folder that could be resumed.", where=where, fix=fix)
    fix = "choose another name for the run"
    if IMPORTED in held:
        fix += f", or begin with its weights: resume=True (epochal train RECIPE.py --run {folder} --resume)"
    elif is_run:
        fix += f", or continue this one with resume=True (epochal resume {folder}, if a command began it)"
    raise RunFolderError("the run folder is not empty, and a run is never overwritten.", where=where, fix=fix)


def _has_trained_nothing(folder: Path) -> bool:
    """Whether the folder holds a run that ended by an error before its first update, and nothing else."""
    try:
        facts = json.loads(files.read(folder / "run.json", most=2**20))
        saved = set(os.listdir(folder / "checkpoints")) if (folder / "checkpoints").exists() else set()
    except (OSError, ValueError):
        return False
    held = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    has_failed = isinstance(facts, dict) and facts.get("reason") == "failed" and facts.get("steps") == 0
    return has_failed and held <= {*BEFORE_A_RUN, *BEFORE_AN_UPDATE} and saved <= {"step-00000000"}


def _timeless(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "time"}


def _scalars(row: Row) -> list[str]:
    return [name for name, value in row.items() if not isinstance(value, list)]


def _csv(columns: list[str], rows: Iterable[Row]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore").writerows(rows)
    return text.getvalue()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity; they are written as the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    return [_strict(part) for part in value] if isinstance(value, list | tuple) else value
