"""Pickles assembled instruction by instruction, where pickle itself would not write them."""

from __future__ import annotations

import pickle
import struct


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def value(item: object) -> bytes:
    if isinstance(item, bytes):
        return item  # assembled already
    if isinstance(item, bool):
        return b"\x88" if item else b"\x89"
    if isinstance(item, str):
        return text(item)
    if isinstance(item, int):
        return number(item)
    if isinstance(item, tuple):
        return b"(" + b"".join(map(value, item)) + b"t"
    if isinstance(item, list):
        return b"](" + b"".join(map(value, item)) + b"e"
    if isinstance(item, dict):
        return b"}(" + b"".join(value(key) + value(inner) for key, inner in item.items()) + b"u"
    assert item is None
    return b"N"


def name(dotted: str) -> bytes:
    module, _, last = dotted.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def call(function: str | bytes, *args: object) -> bytes:
    return (name(function) if isinstance(function, str) else function) + value(args) + b"R"


def built(item: bytes, state: object) -> bytes:
    return item + value(state) + b"b"


def whole(body: bytes, protocol: int = 2) -> bytes:
    return (bytes([0x80, protocol]) if protocol > 1 else b"") + body + b"."


def storage(kind: str = "torch.FloatStorage", key: object = "0", count: object = 4) -> bytes:
    return value(("storage", name(kind) if kind else 3, key, "cpu", count)) + b"Q"


def tensor(
    size: object = (4,),
    stride: object = (1,),
    offset: object = 0,
    where: bytes | None = None,
    rebuild: str = "v2",
) -> bytes:
    over = storage() if where is None else where
    return call(f"torch._utils._rebuild_tensor_{rebuild}", over, offset, size, stride, False, call(ORDERED))


ORDERED = "collections.OrderedDict"


def reduced(function: object, *args: object, protocol: int = 2) -> bytes:
    """What pickle itself writes for an object that wants to be made by this call."""
    return pickle.dumps(type("Evil", (), {"__reduce__": lambda self: (function, args)})(), protocol=protocol)
