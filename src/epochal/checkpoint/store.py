"""Checkpoints of a run: written whole or not at all, found again, and thinned out."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from epochal.cadence import Every
from epochal.checkpoint import codec, files, tensors
from epochal.checkpoint.files import Data
from epochal.checkpoint.manifest import (
    MANIFEST,
    ROWS,
    STATE,
    Written,
    damaged,
    describe,
    described,
    facts,
    read_files,
    read_manifest,
    verify,
)  # fmt: skip
from epochal.errors import CheckpointError, DiskFullError, PlanError, UnknownNameError
from epochal.runtime.processes import Group

LARGEST_FILE = 512 * 2**20  # bytes of tensors in one file, so that reading it does not take the memory of all
TRANSIENT = frozenset(  # a network's or another process's fault, that may be over in a moment
    {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT}
)
PAUSES = (0.05, 0.2)  # seconds, before another attempt
NAME = re.compile(r"step-(\d{8,15})(?:-(\d{1,9}))?")


@dataclass(frozen=True)
class Saving:
    """every: how often a checkpoint is saved, ``"1 epoch"``, ``"500 steps"`` or ``"10 min"``. keep: how many
    of the newest stay; older ones are removed once a newer one is whole. share: how much of the run's time
    saving may take before it is put off; None, and every one is saved. on_full: whether a full disk ends the run
    (``"stop"``) or is told while the run goes on without saving (``"continue"``).
    """

    every: str | Every = "1 epoch"
    keep: int = 3
    share: float | None = 0.02
    on_full: str = "stop"

    def __post_init__(self) -> None:
        Every.parse(self.every, where="save")
        if not isinstance(self.keep, int) or isinstance(self.keep, bool) or self.keep < 1:
            raise PlanError("keep must be an integer of at least 1.", where=f"keep={self.keep!r}", fix="try keep=3")
        if self.share is not None and not (isinstance(self.share, int | float) and self.share > 0):
            raise PlanError("share is a part of the time, above 0.", where=f"share={self.share!r}", fix="try 0.02")
        if self.on_full not in ("stop", "continue"):
            raise UnknownNameError.of_name(
                "policy for a full disk", self.on_full, ("stop", "continue"), where="on_full"
            )

    @classmethod
    def of(cls, given: Saving | str | None) -> Saving:
        """The settings as given, or with ``every`` alone."""
        return given if isinstance(given, Saving) else cls() if given is None else cls(given)


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole: its folder and its state; and what is wrong with each that is newer."""

    path: Path
    state: Any
    damaged: list[CheckpointError] = field(default_factory=list)


class Piece(NamedTuple):
    """A part of a tensor: the row at which it begins, and type and shape of the whole, as a manifest tells them."""

    tensor: Tensor
    row: int
    whole: tuple[str, list[int]]


NO_PIECES: Mapping[str, Piece] = {}


class Checkpoints:
    """The checkpoints in one folder; each is a folder ``step-00000120`` with a manifest of its files.

    One process at a time may save (a run holds the lock of its folder).

    >>> import tempfile
    >>> checkpoints = Checkpoints(tempfile.mkdtemp())
    >>> checkpoints.save(120, {"lr": 0.1}).name, checkpoints.newest_whole().state
    ('step-00000120', {'lr': 0.1})
    """

    def __init__(self, folder: str | Path, keep: int = 3, group: Group | None = None):
        self.folder, self.keep, self.group = Path(folder), Saving(keep=keep).keep, group or Group()
        self._damaged: set[Path] = set()

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Commits a checkpoint of the state, and removes the oldest ones. step: at least 0."""
        if step < 0:
            raise PlanError("a step is not negative.", where=f"step={step}", fix="count updates from 0")
        tree, named = codec.encode(state)
        return self.commit(step, tree, {name: tensor.cpu() for name, tensor in named.items()})

    def commit(
        self, step: int, tree: Any, named: Mapping[str, Tensor], pieces: Mapping[str, Piece] = NO_PIECES
    ) -> Path:
        """Commits an encoded state, its tensors on the host; what may pass is tried again, each time anew.

        Of several processes (``group``) each gives the tensors that it shall write, and the pieces; the first one
        writes the tree. Raises DiskFullError, or CheckpointError for anything else; the older checkpoints are untouched
        then.
        """
        contents: dict[str, list[Data]] = {STATE: [codec.dumps(tree)]} if self.group.is_first else {}
        wholes = {name: piece.whole for name, piece in pieces.items() if piece.row == 0}  # each told by one process
        written = Written({}, described(named) | wholes, bool(pieces))
        for number, part in enumerate(_parts({**named, **{name: piece.tensor for name, piece in pieces.items()}})):
            file = f"tensors-{number * self.group.size + self.group.rank:05d}.safetensors"
            rows = {name: pieces[name].row for name in part if name in pieces}
            contents[file] = tensors.chunks(part, {ROWS: msgspec.json.encode(rows).decode()} if rows else None)
        written.files.update({name: facts(chunks) for name, chunks in contents.items()})
        for pause in (*PAUSES, None):
            try:
                return self._commit(step, contents, written)
            except OSError as error:
                if error.errno not in TRANSIENT or pause is None:
                    raise _unwritable(self.folder, error) from error
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _commit(self, step: int, contents: Mapping[str, list[Data]], written: Written) -> Path:
        """Written aside and synced, the manifest last; renamed into place; read back; and only then others go."""
        group = self.group
        everything = group.to_first(written)
        final, aside = group.first(lambda: self._begin(step, describe(step, everything), everything))
        try:
            group.together(lambda: [files.write(aside / name, *chunks) for name, chunks in contents.items()])
            group.first(lambda: self._place(aside, final, describe(step, everything)))
        except BaseException:
            if group.is_first:
                files.remove_folder(aside)
            raise
        try:
            group.together(lambda: verify(final, contents.keys()))
        except CheckpointError as error:
            if group.is_first:
                files.discard(final)
            raise OSError(errno.EIO, "what was written is not what is read back") from error
        group.first(lambda: self._prune(final))
        return final

    def _begin(self, step: int, manifest: bytes, written: Sequence[Written]) -> tuple[Path, Path]:
        """Where the checkpoint shall be in the end, and where it is written, which is made."""
        files.make_folder(self.folder)
        files.sweep(self.folder)
        needed = len(manifest) + sum(file.size for one in written for file in one.files.values())
        if needed > free_space(self.folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        final = self._free(step)
        aside = files.aside(final)
        try:
            files.new_folder(aside)
        except BaseException:
            files.remove_folder(aside)
            raise
        return final, aside

    def _place(self, aside: Path, final: Path, manifest: bytes) -> None:
        files.write(aside / MANIFEST, manifest)
        files.sync(aside)
        files.rename(aside, final)

    def _free(self, step: int) -> Path:
        """The folder for a step; one that is saved again, after an evaluation or a decision, has a number more."""
        taken = [_order(path)[1] for path in self.all() if _order(path)[0] == step]
        return self.folder / (f"step-{step:08d}" + (f"-{max(taken) + 1}" if taken else ""))

    def _prune(self, newest: Path) -> None:
        """Removes all but the last of the newest steps, and ``newest``, which has just been verified.

        What was found damaged takes nobody's place, and stays.
        """
        whole = [path for path in self.all() if path not in self._damaged]
        last = {_order(path)[0]: path for path in whole}
        kept = {newest, *list(last.values())[-self.keep :]}
        for path in whole:
            if path not in kept:
                _remove(path)

    def all(self) -> list[Path]:
        """Everything that is named like a checkpoint, oldest first, whole or not."""
        try:
            found = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            what = f"the checkpoints cannot be listed: {error.strerror or error}."
            raise CheckpointError(what, where=str(self.folder), fix="make it a folder that can be read") from error
        return sorted((self.folder / name for name in found if NAME.fullmatch(name)), key=_order)

    def newest_whole(self) -> Found | None:
        """The newest checkpoint that is as it was written, and what is wrong with those newer than it.

        None if there is no checkpoint at all. Raises CheckpointError if none of them is whole.
        """
        problems: list[CheckpointError] = []
        for path in reversed(self.all()):
            try:
                return Found(path, self.load(path), problems)
            except CheckpointError as error:
                problems.append(error)
                self._damaged.add(path)
        if not problems:
            return None
        told = "; ".join(
            f"{problem.where}: {problem.what.removeprefix('the checkpoint is ').rstrip('.')}" for problem in problems
        )
        fix = "copy one from a backup, or start anew in another folder; nothing was removed"
        raise CheckpointError("none of the checkpoints is whole.", where=told, fix=fix)

    def load(self, path: Path) -> Any:
        """The state of a checkpoint, after every file was compared with the manifest. Raises CheckpointError."""
        manifest = read_manifest(path)
        if manifest.step != _order(path)[0]:
            raise damaged(path, f"its manifest is of step {manifest.step}")
        text, named = read_files(path, manifest)
        return codec.decode(codec.loads(text), named)


def free_space(folder: Path) -> int:
    """Bytes that may still be written on the disk of a folder, which need not be there yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    facts = os.statvfs(there)
    return facts.f_bavail * facts.f_frsize


def look_for_room(needed: int, folder: Path, saving: Saving) -> Iterator[str]:
    """Before anything is trained: tells if there is little room on the disk for checkpoints of so many bytes.

    Raises DiskFullError if there is no room for a single one, unless the run shall go on.
    """
    free = free_space(folder)
    told = f"a checkpoint takes about {_size(needed)}, and {_size(free)} are free"
    if needed > free and saving.on_full == "stop":
        fix = 'free some space, choose another disk, or give save=epochal.Saving(on_full="continue")'
        raise DiskFullError("there is no room on the disk for a checkpoint.", where=f"{folder}; {told}", fix=fix)
    if needed * (saving.keep + 1) > free:
        yield f"the disk is nearly full: {told}; {saving.keep + 1} have to fit while one is replaced."


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _order(path: Path) -> tuple[int, int]:
    """What checkpoints are sorted by: the step, and which of that step it is, from 1."""
    step, again = NAME.fullmatch(path.name).groups()  # type: ignore[union-attr]
    return int(step), int(again or 1)


def _parts(named: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named.items():
        if part and size + tensor.nbytes > LARGEST_FILE:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    if part:
        yield part


def _remove(path: Path) -> None:
    """Removes what the manifest of a checkpoint names, and nothing else; what cannot be known as ours stays."""
    try:
        ours = {MANIFEST, *read_manifest(path).files}
        if set(os.listdir(path)) <= ours:
            files.discard(path)
    except (OSError, CheckpointError):
        return  # it stays: one checkpoint too many is no harm


def _unwritable(folder: Path, error: OSError) -> CheckpointError:
    kind = DiskFullError if error.errno in files.NO_SPACE else CheckpointError
    fix = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space",
        errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
        errno.EROFS: "make the disk writable",
        errno.EACCES: "give the user of this process the right to write there",
    }.get(error.errno or 0, "look at the disk, or choose another place")
    fix = f"{fix}; the checkpoints there are untouched"
    told = kind(f"the checkpoint cannot be written: {error.strerror or error}.", where=str(folder), fix=fix)
    told.rank, told.is_shared = getattr(error, "rank", None), hasattr(error, "rank")  # as processes.together told it
    return told
