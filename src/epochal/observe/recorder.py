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
from torch import Tensor, nn

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
        self._rows: list[dict[str, Any]] = _rows_of(self.folder / "results.csv") if resume else []
        self._columns: list[str] = list(self._rows[0]) if self._rows else []
        _claim(self.folder, resume)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self._start(event)
        elif isinstance(event, Evaluated):
            self._append({"event": "evaluated", **event.row, "best": event.is_best})
            self._append_row(event.row)
            if event.is_best or self._facts.get("best") is None:
                self._note(best=_plain_best(event.best))
        elif isinstance(event, Saved):
            self._append({"event": "saved", "step": event.step, "path": event.path.name})
        elif isinstance(event, Ended):
            self._end(event)

    def _start(self, event: Started) -> None:
        if not (self.folder / "config.toml").exists():  # a run that is continued keeps the record of its start
            replace_bytes(self.folder / "config.toml", tomlkit.dumps(dict(event.config)).encode())
        self._append({"event": "started", "done": event.done, "step": event.step})
        kept = [row for row in self._rows if int(row["step"]) <= event.step]
        if len(kept) < len(self._rows):  # evaluations after the checkpoint will be made again
            self._rows = kept
            self._write_rows()
        self._note(
            status="running", started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), reason=None, best=None,
            monitor=event.monitor, seed=event.config.get("seed"), header=dict(event.facts), environment=environment(),
        )  # fmt: skip

    def _end(self, event: Ended) -> None:
        weights = {name: value for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}
        save_weights(weights, self.folder / "model.safetensors")  # any extra state is in the checkpoints
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
        """Adds a line to results.csv; a row with a new column writes the file anew, with all columns."""
        row = {name: value for name, value in row.items() if not isinstance(value, list)}
        self._rows.append(row)
        if set(row) <= set(self._columns):
            with self._open("results.csv", "a") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
            return
        self._columns += [name for name in row if name not in self._columns]
        self._write_rows()

    def _write_rows(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        replace_bytes(self.folder / "results.csv", text.getvalue().encode())

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


def _rows_of(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _plain_best(best: Best | None) -> dict[str, Any] | None:
    return asdict(best) if best else None


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity; they are written as the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    return [_strict(part) for part in value] if isinstance(value, list | tuple) else value
