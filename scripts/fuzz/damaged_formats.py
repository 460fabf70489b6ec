"""Changes that know a format: members of archives, headers, chunks of images, with lengths and sums
put right again.

What a checksum or a length would catch at once says little about the code behind it.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence

from fuzz.damaged_bytes import NUMBERS, mutate_bytes, mutate_json, mutate_text, pack_extreme
from fuzz.damaged_pickles import is_pickled, mutate_pickle

__all__ = ["mutate"]

Mutator = Callable[[bytes, random.Random, Sequence[bytes]], bytes]
_DEEPEST = 3  # formats within formats


def mutate(data: bytes, draw: random.Random, donors: Sequence[bytes] = (), depth: int = 0) -> bytes:
    """Return the data with one change, of its own format or of none.

    Parts may be taken from `donors`. `depth` counts formats within formats.
    """
    change = _mutator(data)
    if change is None or depth > _DEEPEST or draw.random() < 0.25:
        return mutate_bytes(data, draw, donors)
    try:
        return change(data, draw, donors)
    except Exception:  # an earlier change broke the format
        return mutate_bytes(data, draw, donors)


def _mutator(data: bytes) -> Mutator | None:
    for signature, change in _FORMATS:
        if data.startswith(signature):
            return change
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        return _safetensors
    if data[257:262] == b"ustar":
        return _tar
    if data[:1] in (b"{", b"["):
        return _json
    return mutate_pickle if is_pickled(data) else None


# --- headers of JSON ------------------------------------------------------------------------------


def _json(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    lines = data.splitlines()
    at = draw.randrange(len(lines)) if len(lines) > 1 and all(line[:1] == b"{" for line in lines) else 0
    if at or len(lines) == 1:  # a manifest has a line for each
        lines[at] = mutate_json(json.loads(lines[at]), draw)
        return b"\n".join(lines)
    return mutate_json(json.loads(data), draw)


def _safetensors(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind, names = draw.randrange(6), [name for name in header if name != "__metadata__"]
    if kind == 0:
        header = dict(draw.sample(list(header.items()), len(header)))
    elif kind == 1 and names:  # offsets that overlap, leave gaps or go backwards
        start, stop = header[draw.choice(names)]["data_offsets"]
        header[draw.choice(names)]["data_offsets"] = draw.choice(
            ([stop, start], [start + 1, stop + 1], [start, stop])
        )
    elif kind == 2 and names:
        header[draw.choice(names)]["shape"] = [
            draw.choice((0, 1, *NUMBERS)) for _ in range(draw.randrange(5))
        ]
    text = json.dumps(header).encode() if kind < 3 else mutate_json(header, draw)
    if kind == 3:
        text += b" " * draw.choice((1, 7, 4096))
    size = (
        len(text)
        if draw.random() < 0.9
        else draw.choice((len(text) - 1, len(text) + 1, *NUMBERS)) % (1 << 64)
    )
    return size.to_bytes(8, "little") + text + body


# --- archives -------------------------------------------------------------------------------------

# Where the fields of zip's records stand: offset and width by signature.
_FIELDS = {
    b"PK\x01\x02": (
        (6, 2),
        (8, 2),
        (10, 2),
        (16, 4),
        (20, 4),
        (24, 4),
        (28, 2),
        (30, 2),
        (32, 2),
        (34, 2),
        (42, 4),
    ),
    b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x05\x06": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    b"PK\x06\x06": ((4, 8), (16, 4), (24, 8), (32, 8), (40, 8), (48, 8)),
}
_NAMES = (
    *(
        "../../../etc/passwd",
        "/etc/passwd",
        "a/../b",
        "",
        "a" * 300,
        "archive/data.pkl",
        "archive/data/0",
        "data.pkl",
    ),
    *(
        "archive/constants.pkl",
        "archive/byteorder",
        "archive/code/x.py",
        "archive_format",
        "\\x",
        "é\u202e",
        "a.npy",
    ),
)


def _zip(data: bytes, draw: random.Random, donors: Sequence[bytes]) -> bytes:
    return _zip_field(data, draw) if draw.random() < 0.4 else _zip_members(data, draw, donors)


def _zip_field(data: bytes, draw: random.Random) -> bytes:
    places = [(m.start(), m[0]) for m in re.finditer(rb"PK(?:\x01\x02|\x03\x04|\x05\x06|\x06\x06)", data)]
    start, signature = draw.choice(places)
    offset, width = draw.choice(_FIELDS[signature])
    at = start + offset
    value = pack_extreme(draw, width, "little")
    if draw.random() < 0.3:  # a little off
        near = int.from_bytes(data[at : at + width], "little") + draw.choice((-1, 1, 16, -64))
        value = (near % (1 << 8 * width)).to_bytes(width, "little")
    return data[:at] + value + data[at + width :]


def _zip_members(data: bytes, draw: random.Random, donors: Sequence[bytes]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at, kind = draw.randrange(len(members)), draw.randrange(10)
    name, content = members[at]
    if kind == 0:
        del members[at]
    elif kind == 1:
        members.insert(draw.randrange(len(members) + 1), members[at])
    elif kind == 2:
        draw.shuffle(members)
    elif kind == 3:
        members[at] = (draw.choice((*_NAMES, mutate_text(name, draw), members[0][0])), content)
    elif kind == 4:
        members[at] = (name, bytes(draw.choice((0, 1, 100, 10_000, 100_000))))
    elif kind == 5:
        members.append((draw.choice(_NAMES), draw.choice(members)[1]))
    else:
        inside = [
            i for i, (n, _) in enumerate(members) if n.endswith((".pkl", ".pt", ".json", ".py", ".npy"))
        ]
        at = draw.choice(inside) if inside and kind > 6 else at
        contents = [content for _, content in members]
        changed = mutate(members[at][1], draw, [*donors, *contents], depth=1)
        members[at] = (members[at][0], changed)
    return _write_zip(members, draw)


def _write_zip(members: Sequence[tuple[str, bytes]], draw: random.Random) -> bytes:
    method = zipfile.ZIP_STORED if draw.random() < 0.7 else zipfile.ZIP_DEFLATED
    if draw.random() < 0.03:  # slow to write
        method = draw.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    if draw.random() < 0.01:
        method, members = (
            zipfile.ZIP_DEFLATED,
            [(name, content + bytes(20_000_000)) for name, content in members[:2]],
        )
    target = io.BytesIO()
    with (
        warnings.catch_warnings(action="ignore"),
        zipfile.ZipFile(target, "w") as archive,
    ):  # names that come twice
        for name, content in members:
            info = zipfile.ZipInfo(name.encode("utf-8", "replace").decode().replace("\0", "?") or "x")
            archive.writestr(info, content, method, 1)
    return target.getvalue()


_RECORDS = (
    *(
        b"16 size=1000000\n",
        b"11 size=-1\n",
        b"9 size=0\n",
        b"0 path=x\n",
        b"-5 path=x\n",
        b"999999999 path=x\n",
    ),
    *(
        b"10 path=\0\n",
        b"20 path=../../../x\n",
        b"25 GNU.sparse.size=10000\n",
        b"7 path\n",
        b"path=x\n",
        b"12 path=\xff\n",
    ),
)


def _tar(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    blocks = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = draw.choice(blocks)
    header = bytearray(data[at : at + 512])
    if header[156:157] in (b"x", b"g", b"L") and draw.random() < 0.7:  # what is said of the next member
        size = min(int(header[124:135], 8), len(data) - at - 512)
        records = draw.choice((mutate_bytes(data[at + 512 : at + 512 + size], draw), *_RECORDS))[:size]
        return data[: at + 512] + records.ljust(size, b"\0") + data[at + 512 + size :]
    offset, width = draw.choice(
        ((0, 100), (124, 12), (124, 12), (124, 12), (156, 1), (156, 1), (157, 100), (345, 155))
    )
    if width == 1:
        header[offset] = draw.choice(b"0123456789gxLKSDV\0\xff")
    elif width == 12 and draw.random() < 0.5:
        header[offset : offset + width] = f"{draw.choice(NUMBERS) & ((1 << 33) - 1):011o}\0".encode()
    elif width == 12:  # binary, negative ones too
        number = pack_extreme(draw, 8, "big").rjust(11, b"\xff")
        header[offset : offset + width] = draw.choice((b"\x80", b"\xff")) + number
    else:
        text = draw.choice(("storages", "tensors", "pickle", "../x", "a" * 100)).encode()
        header[offset : offset + width] = text.ljust(width, b"\0")[:width]
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return data[:at] + bytes(header) + data[at + 512 :]


def _gzip(data: bytes, draw: random.Random, donors: Sequence[bytes]) -> bytes:
    content = gzip.decompress(data)
    if draw.random() < 0.1:
        content += bytes(draw.choice((1, 100_000, 20_000_000)))
    return gzip.compress(mutate_bytes(content, draw, donors), 1)


# --- arrays and images ----------------------------------------------------------------------------

_TYPES = (
    "<f4",
    ">f8",
    "|u1",
    "|O",
    "|V8",
    "<U9",
    "f3",
    "<f16",
    "<c8",
    "|S0",
    "(2,)f4",
    "",
    "f4,f4",
    "|V2147483647",
    "M8[ns]",
)


def _npy(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    wide = data[6] > 1
    start = 12 if wide else 10
    length = int.from_bytes(data[8:start], "little")
    text, body = data[start : start + length].decode("latin-1"), data[start + length :]
    kind = draw.randrange(6)
    if kind < 3:
        shape = tuple(draw.choice((1, 2, 3, 4, 0, *NUMBERS)) for _ in range(draw.randrange(6)))
        text = re.sub(r"'shape': \([^)]*\)", f"'shape': {shape}", text)
    elif kind == 3:
        text = re.sub(r"'descr': '[^']*'", f"'descr': {draw.choice(_TYPES)!r}", text)
    elif kind == 4:
        text = text.replace("False", draw.choice(("True", "None", "3", "[" * 300, "-" * 8000 + "1")))
    else:
        text = mutate_bytes(text.encode("latin-1"), draw).decode("latin-1")
    raw = text.encode("latin-1")
    return data[:8] + (len(raw) % (1 << 8 * (start - 8))).to_bytes(start - 8, "little") + raw + body


def _png(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    place, kind = draw.randrange(len(chunks)), draw.randrange(6)
    name, content = chunks[place]
    if kind < 2:
        size = [draw.choice((0, 1, 2, 65_535, 30_000, 100_000, 1 << 31)) for _ in range(2)]
        chunks[0] = (b"IHDR", struct.pack(">II", *size) + chunks[0][1][8:])
    elif kind == 2:
        chunks.insert(
            draw.randrange(len(chunks)),
            (
                draw.choice((b"zTXt", b"iCCP", b"iTXt", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"IDAT")),
                b"a\0\0" + zlib.compress(bytes(draw.choice((0, 9, 2_000_000)))),
            ),
        )
    elif kind == 3:
        chunks.insert(draw.randrange(len(chunks)), chunks[place])
    elif kind == 4:
        del chunks[place]
    else:
        chunks[place] = (name, mutate_bytes(content, draw))
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return data[:8] + b"".join(parts)


def _image(data: bytes, draw: random.Random, donors: Sequence[bytes]) -> bytes:
    """Sizes stand in the first hundred bytes of all of them, or behind a JPEG's SOF marker."""
    frame = re.search(rb"\xff[\xc0-\xc2]..\x08", data, re.DOTALL)
    if frame and draw.random() < 0.4:
        at = frame.end() + draw.choice((0, 2))
        return data[:at] + pack_extreme(draw, 2, "big") + data[at + 2 :]
    if draw.random() < 0.5:
        at = draw.randrange(min(len(data), 120))
        field = pack_extreme(draw)
        return data[:at] + field + data[at + len(field) :]
    return mutate_bytes(data, draw, donors)


_FORMATS: tuple[tuple[bytes, Mutator], ...] = (
    (b"PK\x03\x04", _zip),
    (b"\x1f\x8b", _gzip),
    (b"\x93NUMPY", _npy),
    (b"\x89PNG", _png),
    *((start, _image) for start in (b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")),
    *((start, _image) for start in (b"P5", b"P6")),
    (b"\0\0\0\x0cjP", _image),
)  # fmt: skip
