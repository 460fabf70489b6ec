"""Change pickles instruction by instruction, so that their reader gets far into them."""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import struct
from collections.abc import Sequence

from ckpt_tools.storage.formats.pickles.known_names import GLOBAL_CALLS, GLOBAL_VALUES
from fuzz.damaged_bytes import NUMBERS, mutate_text, pack_extreme

__all__ = ["is_pickled", "mutate_pickle"]

_NAMES = (
    *(*GLOBAL_CALLS, *GLOBAL_VALUES, "os.system", "builtins.eval"),
    *("torch.nn.modules.module.Module", "torch.FloatStorage"),
    *("torch.QInt8Storage", "torch.storage._load_from_bytes", "numpy.ndarray", "numpy.dtype"),
    *("copyreg._reconstructor", "numpy._core.numeric._frombuffer", "copyreg.__newobj__"),
    *("copyreg.__newobj_ex__", "torch._utils._rebuild_qtensor"),
    *("torch.distributed.checkpoint.metadata.Metadata", "omegaconf.dictconfig.DictConfig"),
    *("uuid.UUID", "a.B"),
)  # fmt: skip
# Instructions without an argument, the frequent ones again.
_OFTEN = b"ReubQ\x94\x85" * 2
_BARE = [*b"()]}t012NeauslobdRQ", *b"\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98", *_OFTEN]
_LARGEST = 3_000_000  # bytes of a pickle after a change

Chunk = tuple[str, bytes]


def is_pickled(data: bytes) -> bool:
    """Whether the data starts with a whole pickle."""
    return data[:1] == b"\x80" or (data[:1] in b"(]}cSIVKN)" and data.rstrip()[-1:] == b".")


def mutate_pickle(data: bytes, draw: random.Random, donors: Sequence[bytes] = ()) -> bytes:
    """Make one to three changes in one of the pickles that stand one after the other.

    Raises what pickletools raises.
    """
    pickles, tail = _pickles(data)
    at = draw.randrange(len(pickles))
    chunks = pickles[at]
    for _ in range(draw.choice((1, 1, 2, 3))):
        chunks = _change_chunks(chunks, draw, donors)
    pickles[at] = chunks
    return b"".join(raw for chunks_of_one in pickles for _, raw in chunks_of_one) + tail


def _pickles(data: bytes) -> tuple[list[list[Chunk]], bytes]:
    """Return the pickles at the start of a file as instructions, and the bytes behind them.

    Raises what pickletools raises if there is no whole pickle.
    """
    pickles, start = [], 0
    while data[start : start + 1] == b"\x80" or not pickles:
        try:
            chunks, start = _chunks(data, start)
        except Exception:
            if not pickles:
                raise
            break
        pickles.append(chunks)
    return pickles, data[start:]


def _chunks(data: bytes, start: int) -> tuple[list[Chunk], int]:
    stream = io.BytesIO(data)
    stream.seek(start)
    steps = [(code.name, position) for code, _, position in pickletools.genops(stream)]
    ends = [*(position for _, position in steps[1:]), stream.tell()]
    return [(name, data[at:end]) for (name, at), end in zip(steps, ends, strict=True)], ends[-1]


def _change_chunks(chunks: list[Chunk], draw: random.Random, donors: Sequence[bytes]) -> list[Chunk]:
    chunks, at, kind = list(chunks), draw.randrange(len(chunks)), draw.randrange(10)
    stop = min(len(chunks), at + draw.choice((1, 1, 2, 5, 30)))
    if kind == 0:
        del chunks[at:stop]
    elif kind == 1:
        size = sum(len(raw) for _, raw in chunks[at:stop]) + 1
        chunks[at:at] = chunks[at:stop] * min(draw.choice((1, 2, 100, 5000)), _LARGEST // size + 1)
    elif kind == 2:
        other = draw.randrange(len(chunks))
        chunks[at], chunks[other] = chunks[other], chunks[at]
    elif kind == 3:
        chunks.insert(at, ("", bytes([draw.choice(_BARE)])))
    elif kind == 4:
        chunks.insert(at, ("", _name(draw)))
    elif kind == 5:
        chunks.insert(at, ("", _value(draw)))
    elif kind == 6 and donors:
        chunks[at:at] = _borrow(draw.choice(donors), draw)
    else:  # another argument, where one stands
        places = [i for i, (name, _) in enumerate(chunks) if name in _ARGUMENTS]
        if places:
            at = draw.choice(places)
            chunks[at] = (chunks[at][0], _argument(*chunks[at], draw))
    return chunks or [("STOP", b".")]


def _borrow(other: bytes, draw: random.Random) -> list[Chunk]:
    try:
        chunks = _chunks(other, 0)[0]
    except Exception:
        return []
    start = draw.randrange(len(chunks))
    return chunks[start : start + draw.choice((1, 3, 10, 50))]


def _name(draw: random.Random) -> bytes:
    module, _, name = draw.choice(_NAMES).rpartition(".")
    return f"c{module}\n{name}\n".encode()


def _value(draw: random.Random) -> bytes:
    kind = draw.randrange(6)
    if kind == 0:
        return _integer(draw.choice(NUMBERS))
    if kind == 1:
        return _text(mutate_text("a", draw))
    if kind == 2:
        return b"G" + struct.pack(">d", draw.choice((0.0, -0.0, 1e308, float("inf"), float("nan"), 0.5)))
    if kind == 3:
        return b"h" + bytes([draw.randrange(40)])
    if kind == 4:
        raw = draw.randbytes(draw.choice((0, 1, 8, 100)))
        return b"B" + struct.pack("<I", len(raw)) + raw
    return pickle.dumps(
        draw.choice([(), [], {}, (1, 2), [0] * 70, {"a": 1}, {1, 2}, frozenset(), b"x", 1j]), 4
    )[2:-1]


def _integer(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


_COUNTED = {"BINUNICODE", "BINBYTES", "BINSTRING"}
_ARGUMENTS = {
    *(
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "GLOBAL",
        "BINGET",
        "LONG_BINGET",
    ),
    *(
        "BINPUT",
        "LONG_BINPUT",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINFLOAT",
        "FRAME",
        "INT",
        "LONG",
        "UNICODE",
        "STRING",
    ),
    *("PROTO", "GET", "PUT", "BINSTRING", "SHORT_BINSTRING", "BYTEARRAY8", "BINBYTES8", "PERSID", "INST"),
}


def _argument(name: str, raw: bytes, draw: random.Random) -> bytes:
    if name in ("BININT", "BININT1", "BININT2", "LONG1", "INT", "LONG"):
        return _integer(draw.choice(NUMBERS))
    if name in ("BINUNICODE", "SHORT_BINUNICODE") and draw.random() < 0.8:
        old = raw[5 if name == "BINUNICODE" else 2 :].decode("utf-8", "replace")
        return _text(
            draw.choice((mutate_text(old, draw), draw.choice(_NAMES), draw.choice(_NAMES).rpartition(".")[0]))
        )
    if name == "GLOBAL":
        return _name(draw)
    if name in ("BINGET", "BINPUT"):
        return raw[:1] + bytes([draw.randrange(256)])
    if (
        name in ("LONG_BINGET", "LONG_BINPUT", "BINFLOAT", "FRAME", "BYTEARRAY8", "BINBYTES8")
        or name in _COUNTED
    ):
        width = 4 if name.startswith("LONG") or name in _COUNTED else 8
        return raw[:1] + pack_extreme(draw, width) + raw[1 + width :]
    return raw[:1] + bytes([draw.randrange(256)]) + raw[2:]
