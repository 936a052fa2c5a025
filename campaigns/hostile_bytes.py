"""Hostile bytes: pickles in boxes, headers, states and manifests that no honest program writes. R9 hands them in."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from campaigns import forging
from campaigns.forging import PLAIN_FILE, WEIGHT, contents, entry, header

DEEP = 10_000
WIDE = 3 * 2**20  # bytes


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)


def pickles(canary: Path) -> dict[str, bytes]:
    """A pickle that runs code, in every container that something reads."""
    raw = pickle.dumps({"weight": Payload(canary)})
    by_eval = f"cbuiltins\neval\n(S'open({str(canary)!r}, \"w\")'\ntR.".encode()
    boxes = {
        "a raw pickle": raw,
        "a pickle of protocol 0": pickle.dumps(Payload(canary), 0),
        "a pickle of eval": by_eval,
    }
    for name in ("archive/data.pkl", "data.pkl", "constants.pkl"):
        boxes[f"a zip with {name}"] = zipped({name: raw, "archive/version": b"3\n", "archive/byteorder": b"little"})
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as archive:
        for name in ("pickle", "storages", "tensors"):
            facts = tarfile.TarInfo(name)
            facts.size = len(raw)
            archive.addfile(facts, io.BytesIO(raw))
    boxes["a tar"] = memory.getvalue()
    boxes["an npy of objects"] = (
        b"\x93NUMPY\x01\x00"
        + (118).to_bytes(2, "little")
        + (b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n" + raw)
    )
    return boxes


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of these files, as torch's own format is one."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return memory.getvalue()


def headers() -> dict[str, bytes]:
    """Files that are nearly safetensors."""
    name = "state.model.weight"
    lengths = {
        f"a header of {n} bytes": header({name: entry()}, WEIGHT, length=n) for n in (0, 1, 10**6, 2**62, 2**64 - 1)
    }
    entries = {
        "two tensors on one place": {name: entry(), "b": entry()},
        "tensors that overlap": {name: entry(), "b": entry(shape=[4], offsets=[8, 24])},
        "offsets beyond the end": {name: entry(offsets=[0, 2**40], shape=[2**38])},
        "offsets from back to front": {name: entry(offsets=[16, 0])},
        "negative offsets": {name: entry(offsets=[-16, 0])},
        "offsets that overflow": {name: entry(offsets=[0, 2**64])},
        "offsets that are no integers": {name: entry(offsets=[0, 16.0])},
        "a gap": {name: entry(shape=[2], offsets=[8, 16])},
        "bytes left over": {name: entry(shape=[2], offsets=[0, 8])},
        "a shape that overflows": {name: entry(shape=[2**32, 2**32, 4])},
        "a shape that overflows to the right size": {name: entry(shape=[2**62, 16], offsets=[0, 0])},
        "a negative shape": {name: entry(shape=[-4])},
        "two negative sizes": {name: entry(shape=[-2, -2])},
        "a shape of floats": {name: entry(shape=[4.0])},
        "a shape of strings": {name: entry(shape=["4"])},
        "a shape of a million sizes": {name: entry(shape=[1] * 10**6)},
        "an empty tensor of impossible shape": {name: entry(shape=[0, 2**63], offsets=[0, 0])},
        "an unknown type": {name: entry(dtype="OBJECT")},
        "a type that is a list": {name: entry(dtype=["F32"])},
        "a class for a type": {name: entry(dtype="os.system")},
        "metadata of numbers": {"__metadata__": {"a": 1}, name: entry()},
        "metadata that is a list": {"__metadata__": [], name: entry()},
        "a list for a header": [name],
        "a tensor of nothing": {name: {}},
    }
    one = json.dumps({name: entry()}).encode()
    twice = one[:-1] + b"," + one[1:]
    texts = {
        "a header that is no JSON": b"import os; os.abort()",
        "a header that is no UTF-8": b'{"\xff\xfe": 1}',
        "a header with a name twice": twice,
        "a header nested deeply": b"[" * DEEP + b"]" * DEEP,
        "a header of many lists": b"[" + b"[]," * (WIDE // 3) + b"[]]",
        "a header of many dicts": b'{"a":[' + b"{}," * (WIDE // 3) + b"{}]}",
        "a header of spaces": b" " * WIDE,
        "a number of a million digits": b'{"a":' + b"9" * 10**6 + b"}",
    }  # fmt: skip
    return {**lengths, **{k: header(v, WEIGHT) for k, v in entries.items()}, **{k: header(v) for k, v in texts.items()}}


def trees() -> dict[str, Any]:
    """States that the codec does not write: values of a tree, or text."""
    weight = {"$tensor": "state.model.weight"}
    view = ["state.model.weight", "float32", [4], [1], 0]
    marks = {
        "a class": {"$class": "os.system"}, "a reduce": {"$reduce": ["os.system", ["true"]]},
        "an object": {"$object": {"py/object": "os.system"}}, "an unknown tensor": {"$tensor": "other"},
        "a tensor by number": {"$tensor": 0}, "two marks": {"$tensor": "state.model.weight", "$tuple": []},
        "a view beyond the end": {"$view": [*view[:2], [5], [1], 0]},
        "a view that grows": {"$view": [*view[:2], [2**40], [0], 0]},
        "a view that overflows": {"$view": [*view[:2], [2**62, 4], [1, 1], 0]},
        "a view with a negative stride": {"$view": [*view[:2], [4], [-1], 3]},
        "a view with a negative offset": {"$view": [*view[:4], -1]},
        "a view with an offset beyond": {"$view": [*view[:4], 2**62]},
        "a view of a class": {"$view": [view[0], "__class__", *view[2:]]},
        "a view of 100 dimensions": {"$view": [*view[:2], [1] * 100, [1] * 100, 0]},
        "an array of objects": {"$array": [weight, "|O", [2]]},
        "an array of structs": {"$array": [weight, "i4,O", [1]]},
        "an array that grows": {"$array": [weight, "<f4", [2**40]]},
        "an array of long strings": {"$array": [weight, "<U99999999", [1]]},
        "a scalar object": {"$scalar": ["|O", "00" * 8]}, "a scalar too long": {"$scalar": ["<f8", "00" * 999]},
        "a type that is a function": {"$dtype": "load"}, "a device with a command": {"$device": "cpu; touch x"},
        "a device that is far away": {"$device": "cuda:99999"}, "bytes that are none": {"$bytes": "zz"},
        "an integer that is none": {"$int": "__import__('os')"},
        "a float that is none": {"$float": "00"}, "text that is none": {"$str": "ff"},
        "a tuple that is a dict": {"$tuple": {"a": 1}}, "a dict with lists for keys": {"$dict": [[[1], 2]]},
        "a dict with a key twice": {"$dict": [[1, 2], [1, 3]]},
        "a dict with dicts for keys": {"$dict": [[{"a": 1}, 2]]},
        "a sparse tensor outside itself": {"$coo": [[2], True, weight, weight]},
        "a sparse tensor that grows": {"$csr": [[2**40, 2**40], weight, weight, weight]},
        "a state dict with methods": {"$state_dict": [{}, {"a": "__class__"}]},
        "a complex of lists": {"$complex": [[], []]}, "a mark that is long": {"$" + "a" * 10**6: 1},
    }  # fmt: skip
    texts = {
        "lists nested deeply": b"[" * DEEP + b"]" * DEEP,
        "dicts nested deeply": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        "tuples nested deeply": b'{"$tuple":[' * DEEP + b"]}" * DEEP,
        "a key twice": b'{"a":1,"a":2}', "a number too large": b'{"a":1e999}', "not a number": b'{"a":NaN}',
        "an integer of a million digits": b'{"a":' + b"9" * 10**6 + b"}", "a lone surrogate": b'{"a":"\\ud800"}',
        "no JSON": b"import os", "nothing": b"", "two values": b"{} {}", "no UTF-8": b'{"a":"\xff"}',
        "a comment": b"{}//a",
    }  # fmt: skip
    dense = {"many lists": b"[" + b"[]," * (WIDE // 3) + b"[]]", "many dicts": b"[" + b"{}," * (WIDE // 3) + b"{}]"}
    return {**marks, **texts, **{name: _unpadded(text) for name, text in dense.items()}}


class _unpadded(bytes):
    """Text that does not get the room that the codec asks for: bytes are counted as 0 lists."""

    def count(self, *given: Any) -> int:
        return 0


def manifests() -> dict[str, bytes]:
    """Manifests that must not be believed."""
    files = {name: data for name, data in contents().items() if name != "manifest.json"}
    good = forging.manifest(files)
    names = [
        "../state.json", "/etc/passwd", "..", "", ".", "state.json\n", "state.json\0", "a/b.safetensors", "C:\\x",
        "~/x", "tensors-00000.safetensors/../x", "tensors-٠٠٠٠٠.safetensors", "$HOME", "manifest.json",
    ]  # fmt: skip
    shapes: dict[str, Any] = {
        "overflows": [2**32, 2**32], "is negative": [-4], "is of floats": [4.0], "is deep": [[4]], "is huge": [2**61],
        "is not that of the file": [2, 2],
    }  # fmt: skip
    shaped = {how: forging.manifest(files, {"state.model.weight": ("F32", shape)}) for how, shape in shapes.items()}
    return {
        **{f"names {name!r}": forging.manifest({**files, name: b"x"}) for name in names},
        **{f"a shape that {how}": data for how, data in shaped.items()},
        **{f"format {v!r}"[:30]: forging.manifest(files, version=v)
           for v in (2, 99, 0, -1, True, "1", None, 1.5, [1], 2**62)},
        **{f"step {v!r}": forging.manifest(files, step=v) for v in (-1, 1.0, "1", None, 2**63)},
        "an unknown type": forging.manifest(files, {"state.model.weight": ("os.system", [4])}),
        "a tensor too many": forging.manifest(files, {**forging.PLAIN_TENSORS, "b": ("F32", [4])}),
        "a tensor too few": forging.manifest(files, {}),
        "a field too many": forging.manifest(files, code="import os"),
        "no state": forging.manifest({"tensors-00000.safetensors": PLAIN_FILE}),
        "the format twice": b'{"format":1,' + good[1:], "a newer format twice": b'{"format":2,' + good[1:],
        "a file twice": good.replace(b'"files":{', b'"files":{"state.json":{"size":1,"sha256":"' + b"0" * 64 + b'"},'),
        "spaces": good + b" ", "half of it": good[: len(good) // 2], "nested deeply": b"[" * DEEP + b"]" * DEEP,
        "nested deeply inside": b'{"format":1,"step":' + b"[" * DEEP + b"]" * DEEP + b"}",
        "many lists": b'{"format":1,"step":[' + b"[]," * (WIDE // 3) + b"[]]}",
        "a format of a million digits": b'{"format":' + b"9" * 10**6 + b"}",
        "a size that is negative": good.replace(b'"size":', b'"size":-'),
        "a size that is huge": good.replace(b'"size":', b'"size":9999999999'),
        "a hash in capitals": good.replace(b"a", b"A"), "nothing": b"", "null": b"null",
    }  # fmt: skip
