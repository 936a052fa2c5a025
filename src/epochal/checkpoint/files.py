"""Writing a file so that a crash or a full disk leaves either the old one or the new one, whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from epochal.errors import FileError


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary path beside ``path``, syncs it to the disk and renames it into place.

    Raises FileError where that cannot be done.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """As :func:`replace`, with what the file shall hold."""
    replace(Path(path), lambda temporary: temporary.write_bytes(data))


def unwritable(path: Path, error: OSError) -> FileError:
    """What to raise when a file cannot be written."""
    missing = not path.parent.is_dir()
    return FileError(
        f"{path.name} cannot be written: {'its folder does not exist' if missing else error.strerror or error}.",
        where=str(path),
        fix="make the folder first" if missing else "free some space, or choose another place",
    )


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
