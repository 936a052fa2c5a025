"""The recorder: what a run leaves in its folder, written as it goes."""

from __future__ import annotations

import csv
import io
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomlkit
from torch import nn

from epochal.checkpoint.files import replace_bytes, unwritable
from epochal.checkpoint.weights import save_weights
from epochal.errors import RunFolderError
from epochal.events import Best, Ended, Evaluated, Event, Row, Saved, Started
from epochal.runtime.environment import environment


class Recorder:
    """Writes ``run.json``, ``config.toml``, ``metrics.jsonl``, ``results.csv`` and ``model.safetensors``.

    folder: new or empty, unless ``resume``; a run is never overwritten.

    Raises RunFolderError if the folder is in use or cannot be written.
    """

    def __init__(self, folder: str | Path, model: nn.Module, *, resume: bool = False):
        self.folder, self.model = Path(folder), model
        self._facts: dict[str, Any] = {}
        _claim(self.folder, resume)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self._start(event)
        elif isinstance(event, Evaluated):
            self._append({"event": "evaluated", **event.row, "best": event.is_best})
            self._append_row(event.row)
            self._note(best=_plain_best(event.best))
        elif isinstance(event, Saved):
            self._append({"event": "saved", "step": event.step, "path": event.path.name})
        elif isinstance(event, Ended):
            self._end(event)

    def _start(self, event: Started) -> None:
        if not (self.folder / "config.toml").exists():  # a run that is continued keeps the record of its start
            replace_bytes(self.folder / "config.toml", tomlkit.dumps(dict(event.config)).encode())
        self._append({"event": "started", "done": event.done})
        self._note(
            status="running", started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), reason=None, best=None,
            monitor=event.monitor, seed=event.config.get("seed"), header=dict(event.facts), environment=environment(),
        )  # fmt: skip

    def _end(self, event: Ended) -> None:
        save_weights(self.model.state_dict(), self.folder / "model.safetensors")
        ended = {**asdict(event), "reason": event.reason.name.lower(), "best": _plain_best(event.best)}
        self._append({"event": "ended", **ended})
        self._note(status="ended", **ended)

    def _note(self, **facts: Any) -> None:
        self._facts.update(facts)
        replace_bytes(self.folder / "run.json", json.dumps(_strict(self._facts), indent=1).encode() + b"\n")

    def _append(self, entry: dict[str, Any]) -> None:
        with self._open("metrics.jsonl", "a") as file:
            file.write(json.dumps(_strict(entry)) + "\n")

    def _append_row(self, row: Row) -> None:
        """Adds a line to results.csv; a row with a new column rewrites the file with all columns."""
        path = self.folder / "results.csv"
        row = {name: value for name, value in row.items() if not isinstance(value, list)}
        old = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []
        columns = list(old[0]) if old else list(row)
        if set(row) <= set(columns) and old:
            with self._open("results.csv", "a") as file:
                csv.DictWriter(file, columns, lineterminator="\n").writerow(row)
            return
        columns += [name for name in row if name not in columns]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, row])
        replace_bytes(path, text.getvalue().encode())

    def _open(self, name: str, mode: str) -> Any:
        try:
            return open(self.folder / name, mode, encoding="utf-8", newline="")
        except OSError as error:
            raise unwritable(self.folder / name, error) from error


def _claim(folder: Path, resume: bool) -> None:
    """Makes the folder; one that holds something already is only taken to resume it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in folder.iterdir())
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunFolderError(
            f"the run folder cannot be used: {error.strerror or error}.",
            where=str(folder),
            fix="choose a folder that can be written",
        ) from error
    if held and not resume:
        raise RunFolderError(
            "the run folder is not empty, and a run is never overwritten.",
            where=f"{folder}: {', '.join(held[:4])}{' ...' if len(held) > 4 else ''}",
            fix="choose another name for the run, or continue this one with resume=True (--set resume=true)",
        )


def _plain_best(best: Best | None) -> dict[str, Any] | None:
    return asdict(best) if best else None


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity; they are written as the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    return [_strict(part) for part in value] if isinstance(value, list | tuple) else value
