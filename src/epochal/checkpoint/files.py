"""The disk: whatever writes, renames or removes, so that a crash or a full disk leaves the old or the new, whole.

All of it goes through ``os`` of this module and nothing else: the campaigns watch, break and kill each call there.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from epochal.errors import FileError

Data = bytes | bytearray | memoryview
SMALL = 2**20  # bytes that are put together and written at once
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
ASIDE = re.compile(r"\..+\.\d+\.tmp")  # as :func:`aside` makes them
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
FOR_READING = os.O_RDONLY | NO_LINK | getattr(os, "O_NONBLOCK", 0)  # and no waiting for a pipe


def write(path: Path, *chunks: Data) -> None:
    """Writes a new file and waits until it is on the disk. Raises OSError, also for a file that is there already."""
    if sum(len(chunk) for chunk in chunks) < SMALL:
        chunks = (b"".join(chunks),)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for chunk in chunks:
            left = memoryview(chunk).cast("B")
            while left:
                if (written := os.write(descriptor, left)) == 0:
                    raise OSError(errno.EIO, "nothing was written")
                left = left[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(path: Path, data: bytes) -> None:
    """Adds to the end of a file, which is made if it is missing; does not wait for the disk. Raises OSError, and adds
    nothing then.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINK, 0o666)
    try:
        if (written := os.write(descriptor, data)) < len(data):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)  # no half lines
            raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes were written")
    finally:
        os.close(descriptor)


def read(path: Path, size: int | None = None, most: int | None = None) -> bytes:
    """The bytes of a file, not of a link, a pipe or a device. Raises OSError, also if it has not ``size`` bytes, or
    more than ``most``.
    """
    descriptor = os.open(path, FOR_READING)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
        if size is not None and facts.st_size != size:
            raise OSError(errno.EINVAL, f"it has {facts.st_size:,} bytes instead of {size:,}")
        if most is not None and facts.st_size > most:
            raise OSError(errno.EFBIG, f"it has {facts.st_size:,} bytes, more than {most:,}")
        parts, missing = [], facts.st_size
        while missing:
            parts.append(os.read(descriptor, missing))
            if not parts[-1]:
                raise OSError(errno.EIO, "it ends early")
            missing -= len(parts[-1])
        return b"".join(parts)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, and waits until their names are on the disk."""
    missing = [folder for folder in (path, *path.parents) if not os.path.isdir(folder)]
    for folder in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(folder)
        with suppress(PermissionError):
            sync(folder.parent)


def new_folder(path: Path) -> None:
    """Makes a folder that is not there yet."""
    os.mkdir(path)


def rename(old: Path, new: Path) -> None:
    """Renames, and waits until the new name is on the disk."""
    os.rename(old, new)
    sync(new.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Removes a folder that holds nothing but files; anything else in it stays, and the folder with it."""
    with suppress(OSError):
        for name in os.listdir(path):
            with suppress(OSError):
                os.unlink(path / name)
        os.rmdir(path)


def discard(path: Path) -> None:
    """Removes a folder of files; first its name, at once, so that no half of it is ever taken for the whole."""
    os.rename(path, aside(path))
    remove_folder(aside(path))


def aside(path: Path) -> Path:
    """Where a file or folder is made before it takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sweep(folder: Path) -> None:
    """Removes what crashed processes left aside in a folder that this process alone may write to."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if ASIDE.fullmatch(name):
                with suppress(OSError):
                    os.unlink(folder / name)
                remove_folder(folder / name)


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a path beside ``path``, syncs what came to be there, and renames it into place.

    Raises FileError where that cannot be done.
    """
    temporary = aside(path)
    with telling(path):
        try:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            with suppress(OSError):
                os.unlink(temporary)


def replace_bytes(path: str | os.PathLike[str], *chunks: Data) -> None:
    """As :func:`replace`, with what the file shall hold."""
    replace(Path(path), lambda temporary: write(temporary, *chunks))


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Makes an OSError inside a FileError about ``path``."""
    try:
        yield
    except OSError as error:
        missing = not path.parent.is_dir()
        raise FileError(
            f"{path.name} cannot be written: {'its folder does not exist' if missing else error.strerror or error}.",
            where=str(path),
            fix="make the folder first" if missing else "free some space, or choose another place",
        ) from error
