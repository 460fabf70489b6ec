"""Whole files that are wrong beyond their pickle: archives and legacy files that lie, explode or run code.

``FILES`` has one entry a trick; what a canary is tells ``malicious``.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable

import torch
from malicious import CANARY, CODE, SHELL, Maker
from pickle_assembler import built, call, data, name, storage, tensor, value, whole

__all__ = ["FILES", "as_archive", "as_legacy"]


def as_archive(pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """The pickle as torch.save's archive with one storage of four numbers."""
    target = io.BytesIO()
    contents = {
        "data.pkl": pickled,
        "byteorder": b"little",
        "data/0": struct.pack("<4f", 1, 2, 3, 4),
        "version": b"3\n",
    }
    with zipfile.ZipFile(target, "w", compression) as archive:
        for record, content in {**contents, **records}.items():
            archive.writestr(f"archive/{record}", content)
    return target.getvalue()


def as_legacy(pickled: bytes, keys: object = ("0",), count: int = 4) -> bytes:
    """The pickle as a legacy file.

    Storages have one more field there, so those in PICKLES are wrong in this, too.
    """
    head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
    raw = struct.pack("<q", count) + struct.pack("<4f", 1, 2, 3, 4)
    return b"".join(pickle.dumps(part, 2) for part in head) + pickled + pickle.dumps(list(keys), 2) + raw  # type: ignore[call-overload]


def _archive_with(change: Callable[[bytes], bytes]) -> bytes:
    return change(as_archive(whole(value({"good": tensor()}))))


def _twice() -> bytes:
    target = io.BytesIO()
    good = as_archive(whole(value({"good": tensor()})))
    target.write(good)
    with zipfile.ZipFile(target, "a") as archive:
        archive.filelist[0].filename = "archive/data.pkl"
        info = zipfile.ZipInfo("archive/data.pkl")
        archive.NameToInfo.pop("archive/data.pkl")
        archive.writestr(info, whole(call("os.system", SHELL)))
    return target.getvalue()


def _bomb() -> bytes:
    return as_archive(whole(b"X" + struct.pack("<I", 80_000_000) + bytes(80_000_000)), zipfile.ZIP_DEFLATED)


def _claims(size: int) -> bytes:
    """A table of contents that says every record has this size."""
    raw = bytearray(as_archive(whole(value({"good": tensor()}))))
    at = raw.find(b"PK\x01\x02")
    while at >= 0:
        raw[at + 20 : at + 28] = struct.pack("<II", size, size)
        at = raw.find(b"PK\x01\x02", at + 1)
    return bytes(raw)


def _legacy(body: bytes, **options: object) -> bytes:
    return as_legacy(whole(body), **options)  # type: ignore[arg-type]


def _legacy_tensor(count: int = 4, view: object = None, size: object = (4,)) -> bytes:
    pid = value(("storage", name("torch.FloatStorage"), "0", "cpu", count, view)) + b"Q"
    return value({"good": tensor(size, where=pid)})


FILES: dict[str, Maker] = {
    "archive: one name twice": _twice,
    "archive: names that leave it": lambda: as_archive(
        whole(value({"w": tensor(where=storage(key="../../../canary"))})),
        **{"data/../../../canary": struct.pack("<4f", 1, 2, 3, 4)},
    ),
    "archive: an absolute name": lambda: as_archive(
        whole(value({"good": tensor()})), **{f"/tmp/{CANARY}": b"x"}
    ),
    "archive: a bomb": _bomb,
    "archive: records of four gigabytes": lambda: _claims(0xFFFFFFF0),
    "archive: records of size zero": lambda: _claims(0),
    "archive: headers elsewhere": lambda: _archive_with(
        lambda raw: (
            raw.replace(b"PK\x03\x04", b"PK\x07\x08")[:0]
            + raw[:4]
            + raw[4:].replace(b"PK\x03\x04", b"PK\x07\x08")
        )
    ),
    "archive: encrypted": lambda: _archive_with(
        lambda raw: raw.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")
    ),
    "archive: lzma": lambda: as_archive(whole(value({"good": tensor()})), zipfile.ZIP_LZMA),
    "archive: an unknown byte order": lambda: as_archive(
        whole(value({"good": tensor()})), byteorder=b"middle"
    ),
    "archive: a short storage": lambda: as_archive(whole(value({"good": tensor()})), **{"data/0": b"xx"}),
    "archive: only the end": lambda: b"PK\x03\x04" + _archive_with(lambda raw: raw[-22:]),
    "archive: inside a pickle": lambda: whole(
        call("torch.storage._load_from_bytes", data(as_archive(whole(call("os.system", SHELL)))))
    ),
    "archive: extra code records": lambda: as_archive(
        whole(value({"good": tensor()})), **{"code/__torch__.py": CODE.encode()}
    ),
    "archive: a script without classes": lambda: as_archive(
        whole(built(call("__torch__.Evil"), {"w": tensor(), "f": name("os.system")})),
        **{"constants.pkl": whole(b")")},
    ),
    "legacy: code": lambda: _legacy(call("os.system", SHELL)),
    "legacy: code in the list of keys": lambda: (
        as_legacy(whole(_legacy_tensor()))[:-24] + whole(call("os.system", SHELL))
    ),
    "legacy: code before the object": lambda: (
        pickle.dumps(torch.serialization.MAGIC_NUMBER, 2) + whole(call("os.system", SHELL)) * 3
    ),
    "legacy: more announced than there": lambda: _legacy(_legacy_tensor(1 << 40), count=1 << 40),
    "legacy: a negative count": lambda: _legacy(_legacy_tensor(), count=-4),
    "legacy: another count": lambda: _legacy(_legacy_tensor(), count=3),
    "legacy: keys that are no list": lambda: as_legacy(whole(_legacy_tensor()))[:-24] + whole(b"K\x01"),
    "legacy: a key that nothing uses": lambda: _legacy(_legacy_tensor(), keys=("7",)),
    "legacy: one key twice": lambda: _legacy(_legacy_tensor(), keys=("0", "0")),
    "legacy: a key that is a list": lambda: _legacy(_legacy_tensor(), keys=([],)),
    "legacy: a view beyond": lambda: _legacy(_legacy_tensor(view=("1", 2, 4))),
    "legacy: a view before": lambda: _legacy(_legacy_tensor(view=("1", -2, 4))),
    "legacy: a view that is a text": lambda: _legacy(_legacy_tensor(view="evil")),
    "legacy: a tensor beyond": lambda: _legacy(_legacy_tensor(size=(5,))),
    "legacy: a class with its source": lambda: _legacy(
        call(value(("module", name("evil.Net"), "evil.py", CODE)) + b"Q", 1)
    ),
}
