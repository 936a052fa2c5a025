"""A model of what a disk keeps when the power fails: from what a process asked of it, the states it may be found in.

After POSIX and what ext4, xfs and btrfs allow, and in places beyond them:

- What was written to a file since its last fsync is there, or not, or cut, or its size is and zeros are (the size
  reaches the disk before the blocks), or some of its pages are and others not. fsync of a file keeps what was written
  before it, not the file's name.
- A new name, a rename and a removal are on the disk for sure once the folder that holds the name was synced. Until
  then each of them may have happened or not, whatever came of those before it in the same or in another folder: a
  rename may be there without the creation that it renames, a later removal without an earlier one.
- One rename is one: never both names, never none. (Journals promise that; without it no protocol can work.)
- A folder that was not synced may lack any of its names, and keep any that were removed.

Not in the model: disks that lie about fsync, and damage to what was written long ago (R5, R6).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = 4096  # what reaches a disk as a whole; the files here are smaller, so in half of the cases it is 64 bytes
Crashed = dict[str, bytes | None]  # files with their bytes, folders with None, by their paths


@dataclass(eq=False)
class Node:
    """A file or a folder. synced: bytes of the file that are on the disk for sure. names: of a folder, as seen."""

    is_folder: bool
    data: bytes = b""
    synced: bytes = b""
    names: dict[str, Node] = field(default_factory=dict)
    kept: dict[str, Node] = field(default_factory=dict)  # names that are on the disk for sure
    pending: list[list[tuple[str, Node | None]]] = field(default_factory=list)  # changes of names that may be lost


class Journal:
    """The model of a file system, fed by what a process does; :meth:`crash` gives a state that it may be left in."""

    def __init__(self, root: Path, *, syncs: bool = True, top: Node | None = None):
        self.root, self.syncs = root, syncs
        self.top = top or Node(is_folder=True)
        self.open: dict[int, tuple[Node, int]] = {}

    def node(self, path: Any) -> Node:
        node = self.top
        for name in Path(path).relative_to(self.root).parts:
            node = node.names[name]
        return node

    def _change(self, folder: Node, *entries: tuple[str, Node | None]) -> None:
        folder.pending.append(list(entries))
        for name, node in entries:
            _put(folder.names, name, node)

    def saw(self, call: str, arguments: tuple, result: Any) -> bool:
        """Takes in a call that has been made; whether it changed anything."""
        path = Path(arguments[0]) if arguments and isinstance(arguments[0], str | os.PathLike) else self.root
        folder = path.parent
        match call:
            case "open":
                if path != self.root and path.name not in self.node(folder).names:
                    self._change(self.node(folder), (path.name, Node(is_folder=False)))
                node = self.node(path)
                self.open[result] = node, len(node.data) if arguments[1] & os.O_APPEND else 0
            case "close":
                self.open.pop(arguments[0], None)
            case "write":
                node, at = self.open[arguments[0]]
                data = bytes(arguments[1])[:result]
                node.data = node.data[:at] + data + node.data[at + len(data) :]
                self.open[arguments[0]] = node, at + len(data)
            case "fsync" if self.syncs:
                node, _ = self.open[arguments[0]]
                node.synced, node.kept, node.pending = node.data, dict(node.names), []
            case "mkdir":
                self._change(self.node(folder), (path.name, Node(is_folder=True)))
            case "rename" | "replace":
                new = Path(arguments[1])
                if new.parent != folder:
                    raise NotImplementedError("a rename into another folder is two entries that may part")
                self._change(self.node(folder), (path.name, None), (new.name, self.node(path)))
            case "unlink" | "rmdir":
                self._change(self.node(folder), (path.name, None))
        return call in ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")

    @property
    def at_risk(self) -> int:
        """How many things are not on the disk for sure."""
        return _at_risk(self.top)

    def crash(self, rng: random.Random) -> Crashed:
        """A state that the disk may be found in, each time another one."""
        mood = rng.choice((0.1, 0.5, 0.9))  # how much of what was not synced has reached the disk
        return dict(_survivors(self.top, "", rng, mood, {}))


def _at_risk(node: Node) -> int:
    return len(node.pending) + 2 * (node.data != node.synced) + sum(map(_at_risk, node.names.values()))


def _put(names: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _survivors(
    folder: Node, prefix: str, rng: random.Random, mood: float, files: dict[Node, bytes]
) -> Iterator[tuple[str, bytes | None]]:
    names = dict(folder.kept)
    for change in folder.pending:
        if rng.random() < mood:
            for name, node in change:
                _put(names, name, node)
    for name, node in names.items():
        if node.is_folder:
            yield prefix + name, None
            yield from _survivors(node, f"{prefix}{name}/", rng, mood, files)
        else:
            yield prefix + name, files.setdefault(node, _bytes_left(node, rng, mood))


def _bytes_left(node: Node, rng: random.Random, mood: float) -> bytes:
    """What may be read of a file: all that was synced, and something of what came after it."""
    if node.data == node.synced or rng.random() < mood / 2:
        return node.data
    old = node.synced
    size = rng.choice((len(old), len(node.data), rng.randint(min(len(old), len(node.data)), len(node.data))))
    grown = old[:size] + b"\0" * (size - len(old))
    page = rng.choice((PAGE, 64))
    pieces = ((node.data if rng.random() < mood else grown)[at : min(at + page, size)] for at in range(0, size, page))
    return b"".join(pieces)


def materialise(place: Path, crashed: Crashed) -> None:
    """Makes a folder that holds what was left."""
    place.mkdir()
    for name, data in crashed.items():
        if data is None:
            (place / name).mkdir()
        else:
            (place / name).write_bytes(data)


def as_synced(crashed: Crashed) -> Node:
    """What was left, as a disk on which all of it is for sure: that of a computer that starts again."""
    top = Node(is_folder=True)
    for name, data in crashed.items():
        folder = top
        *above, last = name.split("/")
        for part in above:
            folder = folder.names[part]
        folder.names[last] = folder.kept[last] = Node(data is None, data or b"", data or b"")
    return top
