"""The recorder: what a run leaves in its folder, written as it goes."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomlkit
from torch import Tensor, nn

from epochal.checkpoint import files
from epochal.checkpoint.weights import save_weights
from epochal.errors import FileError, RunFolderError
from epochal.events import Best, Ended, Evaluated, Event, Noted, Row, Saved, Started, StepDone
from epochal.runtime.lock import Lock

SECONDS_A_NOTE = 10.0  # between two writings of run.json while a run goes on
# What is left where a run was killed before it had begun.
BEFORE_A_RUN = {"config.toml", "journal.jsonl", "recipe.py", "recipe.toml", "fit.toml", "demo.toml", "table.json"}


class Recorder:
    """Writes all files of a run folder but its checkpoints: what was planned, what was measured, what happened.

    folder: claimed by this run. environment: facts for ``run.json``. goes_on: a full disk ends nothing; what could not
    be written is made good later.

    What was measured stands in ``metrics.jsonl`` and ``results.csv``, a line an evaluation, the same bytes in every run
    of the same plan: no line tells the time. When what happened stands in ``journal.jsonl``.
    """

    def __init__(
        self, folder: Path, model: nn.Module, *, environment: Mapping[str, Any] | None = None, goes_on: bool = False
    ):
        self.folder, self.model, self.goes_on = folder, model, goes_on
        self._facts: dict[str, Any] = {"environment": dict(environment or {})}
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = []
        self._noted_at, self._is_torn = 0.0, False

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):  # first, for it comes most often
            return
        try:
            self._record(event)
        except FileError as error:
            cause = error.__cause__
            goes_on = self.goes_on and not isinstance(event, Ended)  # an end that is not written is no success
            if not (goes_on and isinstance(cause, OSError) and cause.errno in files.NO_SPACE):
                raise
            self._is_torn = True

    def _record(self, event: Event) -> None:
        if isinstance(event, Evaluated):
            self._add(_timeless(event.row))
            self._facts["best"] = _plain_best(event.best)
            if time.monotonic() - self._noted_at > SECONDS_A_NOTE:
                self._note()
        elif isinstance(event, Saved):
            self._tell("saved", step=event.step, checkpoint=event.path.name)
        elif isinstance(event, Noted):
            self._tell("noted", message=event.message)
        elif isinstance(event, Started):
            self._start(event)
        elif isinstance(event, Ended):
            self._end(event)

    def _start(self, event: Started) -> None:
        files.sweep(self.folder)
        self._tell("resumed" if event.step else "started", epochs=event.done, step=event.step)
        if not (event.step and (self.folder / "config.toml").exists()):  # a run that goes on keeps that of its start
            files.replace_bytes(self.folder / "config.toml", tomlkit.dumps(dict(event.config)).encode())
        self._note(
            status="running", started=_now(), reason=None, best=None, command=list(event.command) or None,
            monitor=event.monitor, seed=event.config.get("seed"), header=dict(event.facts),
        )  # fmt: skip
        self._rows = [_timeless(row) for row in event.rows]
        self._write_rows()  # evaluations after the checkpoint are cut off: they will be made again

    def _end(self, event: Ended) -> None:
        if self._is_torn:
            self._write_rows()
        if not event.is_torn:  # else the newest checkpoint has the last whole ones
            weights = {name: value for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}
            save_weights(weights, self.folder / "model.safetensors")  # any extra state is in the checkpoints
        ended = {**asdict(event), "reason": event.reason.name.lower(), "best": _plain_best(event.best)}
        self._tell("ended", **ended)
        self._note(status="stopped" if event.is_torn else "ended", **ended)

    def _note(self, **facts: Any) -> None:
        self._facts.update(facts)
        self._noted_at = time.monotonic()
        files.replace_bytes(self.folder / "run.json", json.dumps(_strict(self._facts), indent=1).encode() + b"\n")

    def _tell(self, what: str, **facts: Any) -> None:
        self._append("journal.jsonl", json.dumps(_strict({"at": _now(), "event": what, **facts})))

    def _add(self, row: dict[str, Any]) -> None:
        """Adds a line to both files; a row with a new column, and a file with half a line, are written anew."""
        self._rows.append(row)
        if self._is_torn or not set(_scalars(row)) <= set(self._columns):
            self._write_rows()
        else:
            self._append("metrics.jsonl", json.dumps(_strict(row)))
            self._append("results.csv", _csv(self._columns, [row]).rstrip("\n"))

    def _write_rows(self) -> None:
        self._columns = list(dict.fromkeys(name for row in self._rows for name in _scalars(row)))
        lines = "".join(json.dumps(_strict(row)) + "\n" for row in self._rows)
        files.replace_bytes(self.folder / "metrics.jsonl", lines.encode())
        header = _csv(self._columns, [dict(zip(self._columns, self._columns))]) if self._columns else ""
        files.replace_bytes(self.folder / "results.csv", (header + _csv(self._columns, self._rows)).encode())
        self._is_torn = False

    def _append(self, name: str, line: str) -> None:
        with files.telling(self.folder / name):
            files.append(self.folder / name, line.encode() + b"\n")


def claim(folder: Path, *, resume: bool) -> Lock:
    """Makes the folder and locks it. One that holds something is only taken to resume it, if it is a run's; what a
    run left that was killed before its start does not count.

    Raises RunFolderError.
    """
    try:
        files.make_folder(folder)
        _refuse_what_is_not_ours(folder, resume)  # before a lock is left in a stranger's folder
        lock = Lock(folder)
        try:
            _refuse_what_is_not_ours(folder, resume)  # another run may have been quicker
        except BaseException:
            lock.release()
            raise
        return lock
    except OSError as error:
        what, fix = f"the run folder cannot be used: {error.strerror or error}.", "choose a folder that can be written"
        raise RunFolderError(what, where=str(folder), fix=fix) from error


def _refuse_what_is_not_ours(folder: Path, resume: bool) -> None:
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    is_run = bool({"run.json", "checkpoints"} & set(held))
    if set(held) <= BEFORE_A_RUN or (is_run and resume):
        return
    where = f"{folder}: {', '.join(held[:4])}{' ...' if len(held) > 4 else ''}"
    if resume:
        fix = "name the folder of a run, or choose another name"
        raise RunFolderError("there is no run in the folder that could be resumed.", where=where, fix=fix)
    fix = "choose another name for the run"
    fix += f", or continue this one with resume=True (epochal resume {folder})" if is_run else ""
    raise RunFolderError("the run folder is not empty, and a run is never overwritten.", where=where, fix=fix)


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


def _plain_best(best: Best | None) -> dict[str, Any] | None:
    return asdict(best) if best else None


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity; they are written as the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    return [_strict(part) for part in value] if isinstance(value, list | tuple) else value
