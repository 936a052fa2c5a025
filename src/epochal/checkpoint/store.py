"""Checkpoints of a run: written whole or not at all, found again, and thinned out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epochal.cadence import Every
from epochal.checkpoint import codec
from epochal.checkpoint.files import replace_bytes, sync
from epochal.checkpoint.weights import load_weights, save_weights
from epochal.errors import CheckpointError, PlanError

FORMAT = 1


@dataclass(frozen=True)
class Saving:
    """every: how often a checkpoint is saved, ``"1 epoch"``, ``"500 steps"`` or ``"10 min"``. keep: how many
    of the newest stay; older ones are removed once a newer one is whole. share: how much of the run's time
    saving may take before it is put off; None, and every one is saved. Without settings it is 0.05.
    """

    every: str | Every = "1 epoch"
    keep: int = 3
    share: float | None = None

    def __post_init__(self) -> None:
        Every.parse(self.every, where="save")
        if not isinstance(self.keep, int) or isinstance(self.keep, bool) or self.keep < 1:
            raise PlanError("keep must be an integer of at least 1.", where=f"keep={self.keep!r}", fix="try keep=3")

    @classmethod
    def of(cls, given: Saving | str | None) -> Saving:
        """The settings as given, or with ``every`` alone."""
        if given is None:
            return cls(share=0.05)
        return given if isinstance(given, Saving) else cls(given)


class Checkpoints:
    """The checkpoints in one folder; each is a folder ``step-00000120`` with a manifest of its files.

    >>> import tempfile
    >>> checkpoints = Checkpoints(tempfile.mkdtemp())
    >>> checkpoints.save(120, {"lr": 0.1}).name, checkpoints.load(checkpoints.newest())
    ('step-00000120', {'lr': 0.1})
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Commits a checkpoint: written aside, synced, renamed into place; then the oldest ones are removed."""
        final = self.folder / f"step-{step:08d}"
        aside = self.folder / f".{final.name}.{os.getpid()}.tmp"
        try:
            aside.mkdir(parents=True)
            tree, tensors = codec.encode(state)
            replace_bytes(aside / "state.json", json.dumps(tree).encode())
            save_weights(tensors, aside / "tensors.safetensors")
            manifest = {"format": FORMAT, "step": step, "files": {p.name: _facts(p) for p in sorted(aside.iterdir())}}
            replace_bytes(aside / "manifest.json", json.dumps(manifest, indent=1).encode())
            sync(aside)
            if final.exists():  # the same step, later: an evaluation or a decision has come since
                os.rename(final, aside.with_suffix(".old"))
            os.rename(aside, final)
            sync(self.folder)
        except OSError as error:
            if not final.exists() and aside.with_suffix(".old").exists():
                os.rename(aside.with_suffix(".old"), final)
            raise CheckpointError(
                f"the checkpoint cannot be written: {error.strerror or error}.",
                where=str(final),
                fix="free some space; earlier checkpoints are untouched",
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(aside.with_suffix(".old"), ignore_errors=True)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def all(self) -> list[Path]:
        """The committed checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / "manifest.json").is_file())

    def newest(self) -> Path:
        """The newest checkpoint; CheckpointError if there is none."""
        if not (found := self.all()):
            raise CheckpointError(
                "there is no checkpoint to resume from.", where=str(self.folder), fix="start anew in another folder"
            )
        return found[-1]

    def load(self, path: Path) -> Any:
        """The state of a checkpoint, after every file was compared with the manifest."""
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            changed = [name for name, facts in manifest["files"].items() if _facts(path / name) != facts]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint cannot be read: {error}.", where=str(path), fix="use an older one"
            ) from error
        if changed or manifest.get("format") != FORMAT:
            what = f"{', '.join(changed)} is not what was written" if changed else "it has another format"
            raise CheckpointError(f"the checkpoint is damaged: {what}.", where=str(path), fix="use an older one")
        tree = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return codec.decode(tree, load_weights(path / "tensors.safetensors"))


def _facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
