"""Hostile files: each case lays one into an empty folder. R9 says what has to happen then."""

from __future__ import annotations

import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from campaigns import forging
from campaigns.forging import NAME, WEIGHT, contents, entry, header, lay
from campaigns.hostile_bytes import DEEP, headers, manifests, pickles, trees, zipped

Case = tuple[str, Callable[[Path], Path]]  # a name, and what makes the file (or the folder of a checkpoint)
TIB = 2**40


def checkpoints(canary: Path) -> Iterator[Case]:
    """Folders of checkpoints."""
    for name, data in pickles(canary).items():
        yield f"{name} for a checkpoint", lambda folder, data=data: _file(folder / "checkpoints" / NAME, data)
        for part in ("manifest.json", "state.json", "tensors-00000.safetensors"):
            yield f"{name} for {part}", lambda folder, data=data, part=part: lay(folder, _hashed(part, data))
    for name, data in headers().items():
        yield f"tensors: {name}", lambda folder, data=data: lay(folder, contents(tensors=data))
    for name, tree in trees().items():
        yield (
            f"state: {name}",
            lambda folder, tree=tree: lay(folder, contents({"a": tree} if isinstance(tree, dict) else tree)),
        )
    for name, data in manifests().items():
        yield f"manifest: {name}", lambda folder, data=data: lay(folder, {**contents(), "manifest.json": data})
    for part in ("manifest.json", "state.json", "tensors-00000.safetensors"):
        for kind, make in {**LINKS, **DEVICES}.items():
            yield f"{part} is {kind}", lambda folder, part=part, make=make: _instead(folder, part, make)
        yield f"{part} is huge", lambda folder, part=part: _huge(folder, part)
    yield "the checkpoint is a link", _linked
    yield "another step", lambda folder: lay(folder, contents(step=2))


def _hashed(part: str, data: bytes) -> dict[str, bytes]:
    files = {name: data if name == part else whole for name, whole in contents().items()}
    if part != "manifest.json":
        files["manifest.json"] = forging.manifest({k: v for k, v in files.items() if k != "manifest.json"})
    return files


def _file(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


def _node(path: Path, major: int, minor: int) -> None:
    try:
        os.mknod(path, 0o020666, os.makedev(major, minor))
    except PermissionError:
        path.symlink_to("/dev/zero" if minor == 5 else "/dev/random")


def _hard_link(path: Path) -> None:
    shutil.copyfile("/etc/passwd", path.with_name("p"))  # another file system cannot be linked to
    os.link(path.with_name("p"), path)


def _link_to_the_right_file(path: Path) -> None:
    path.with_name("a").write_bytes(contents()[path.name])
    path.symlink_to("a")


LINKS: dict[str, Callable[[Path], object]] = {
    "a link to another file": lambda path: path.symlink_to("/etc/passwd"),
    "a hard link": _hard_link,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to the right file": _link_to_the_right_file,
}
DEVICES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo, "a socket": _socket, "zeros without end": lambda path: _node(path, 1, 5),
    "noise without end": lambda path: _node(path, 1, 8), "a folder": Path.mkdir,
    "a link to zeros": lambda path: path.symlink_to("/dev/zero"),
}  # fmt: skip


def _instead(folder: Path, part: str, make: Callable[[Path], object]) -> Path:
    path = lay(folder, contents())
    (path / part).unlink()
    make(path / part)
    return path


def _linked(folder: Path) -> Path:
    path = lay(folder, contents())
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    return path


def _huge(folder: Path, part: str) -> Path:
    """A file of a TiB without blocks, and a manifest that says so."""
    path = lay(folder, contents())
    os.truncate(path / part, TIB)
    if part != "manifest.json":
        size = len(contents()[part])
        data = (path / "manifest.json").read_bytes().replace(b'"size":%d,' % size, b'"size":%d,' % TIB)
        (path / "manifest.json").write_bytes(data)
    return path


def weights(canary: Path) -> Iterator[Case]:
    """Lone files where weights are expected."""
    for name, data in pickles(canary).items():
        yield f"weights: {name}", lambda folder, data=data: _file(folder / "w.safetensors", data)
    for name, data in headers().items():
        yield f"weights: {name}", lambda folder, data=data: _file(folder / "w.safetensors", data)
    for kind, make in DEVICES.items():
        yield (
            f"weights: {kind}",
            lambda folder, make=make: (make(folder / "w.safetensors"), folder / "w.safetensors")[1],
        )
    for name, shared in {"deep": "[" * DEEP + "]" * DEEP, "no dict": "[]", "of numbers": '{"a":1}'}.items():
        data = header({"__metadata__": {"epochal.shared": shared}, "a": entry()}, WEIGHT)
        yield f"weights: shared names {name}", lambda folder, data=data: _file(folder / "w.safetensors", data)

    def huge(folder: Path, start: bytes) -> Path:
        path = _file(folder / "w.safetensors", start)
        os.truncate(path, TIB)
        return path

    yield "weights: a TiB of zeros", lambda folder: huge(folder, b"")
    big = header({"a": entry("U8", [TIB - 80], [0, TIB - 80])})
    yield "weights: a TiB of one tensor", lambda folder: huge(folder, big)


def torch_files(canary: Path) -> Iterator[Case]:
    """Files for ``import-checkpoint``, the one place where torch's own format is read."""
    for name, data in pickles(canary).items():
        yield f"import: {name}", lambda folder, data=data: _file(folder / "w.pt", data)
    bomb = b"cbuiltins\nbytearray\n(I%d\ntR." % 2**36
    start = {"archive/version": b"3\n", "archive/byteorder": b"little"}
    yield "import: a pickle that asks for memory", lambda folder: _file(folder / "w.pt", bomb)
    yield (
        "import: a zip that asks for memory",
        lambda folder: _file(folder / "w.pt", zipped({"archive/data.pkl": bomb, **start})),
    )
    grown = zipped({"archive/data.pkl": b"\0" * 2**28, **start}, zipfile.ZIP_DEFLATED)
    yield "import: a zip that grows", lambda folder: _file(folder / "w.pt", grown)
    laughs = b"\x80\x02]q\x00" + b"".join(b"](h%c" % i + b"h%c" % i * 9 + b"eq%c" % (i + 1) for i in range(60)) + b"."
    yield (
        "import: lists of lists of lists",
        lambda folder: _file(folder / "w.pt", zipped({"archive/data.pkl": laughs, **start})),
    )
    nested = b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
    yield (
        "import: lists nested deeply",
        lambda folder: _file(folder / "w.pt", zipped({"archive/data.pkl": nested, **start})),
    )
    for kind, make in DEVICES.items():
        yield f"import: {kind}", lambda folder, make=make: (make(folder / "w.pt"), folder / "w.pt")[1]
