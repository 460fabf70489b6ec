"""Change bytes and JSON without knowing the format: extremes, cuts, repeats."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["EXTREMES", "NUMBERS", "mutate_bytes", "mutate_json", "mutate_text", "pack_extreme"]

NUMBERS = (
    *(0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x10000, 1_000_000, 0x7FFFFFFF, 0x80000000),
    *(0xFFFFFFFF, 0x100000000, 1 << 40, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
    *(-1, -2, -(1 << 31), -(1 << 63)),
)  # fmt: skip
_TEXTS = (
    *(
        "",
        "a",
        ".",
        "..",
        "/",
        "../../../../etc/passwd",
        "/etc/passwd",
        "C:\\x",
        "\0",
        "\ud800",
        "\u202e",
        "\x1b[2J",
    ),
    *(
        "<script>alert(1)</script>",
        "\r\n::error::x",
        "%s%n",
        "x" * 300,
        "y" * 5000,
        "module.",
        "__class__",
        "NaN",
    ),
)
EXTREMES: tuple[Any, ...] = (
    *(None, True, False, 1e308, -0.0, 1e-320, float("nan"), float("inf"), float("-inf"), 10**400, -(10**30)),
    *(*NUMBERS, *_TEXTS, [], {}, [[]], {"": None}, [0] * 100, list(range(70)), ["a", 1, None]),
)
_DEEP = "@deep@"  # stands for brackets that json cannot write as a value
_JOIN = 200_000  # bytes; nothing is grown beyond


def mutate_bytes(data: bytes, draw: random.Random, donors: Sequence[bytes] = ()) -> bytes:
    """Return the data with one change anywhere; parts may be taken from `donors`."""
    return draw.choice(_CHANGES)(data or b"\0", draw, donors)


def _flip(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _unused in range(draw.choice((1, 1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _byte(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))]) + data[at + 1 :]


def pack_extreme(draw: random.Random, width: int = 0, order: str = "") -> bytes:
    """An extreme number of 2, 4 or 8 bytes."""
    width = width or draw.choice((2, 4, 4, 8))
    return (draw.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, order or draw.choice(("little", "big")))  # type: ignore[arg-type]


def _number(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    field = pack_extreme(draw)
    # Headers stand in front and at the end, and their fields are aligned more often than not.
    end = draw.choice((64, 256, len(data)))
    at = draw.randrange(max(1, min(end, len(data) - len(field))))
    at -= at % draw.choice((1, len(field)))
    if draw.random() < 0.2:
        at = max(0, len(data) - draw.randrange(1, 128))
    return data[:at] + field + data[at + len(field) :]


def _cut(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    return data[: draw.choice((draw.randrange(len(data)), max(0, len(data) - draw.randrange(1, 64))))]


def _span(data: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(data))
    return start, min(len(data), start + draw.choice((1, 2, 4, 8, 16, 64, 512, 4096)))


def _drop(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    start, stop = _span(data, draw)
    return data[:start] + data[stop:]


def _repeat(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    start, stop = _span(data, draw)
    times = min(draw.choice((2, 2, 3, 50, 2000)), _JOIN // (stop - start) + 1)
    return data[:start] + data[start:stop] * times + data[stop:]


def _swap(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    (a, b), (c, d) = sorted((_span(data, draw), _span(data, draw)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _splice(data: bytes, draw: random.Random, donors: Sequence[bytes]) -> bytes:
    donor = draw.choice(donors) if donors else data
    if not donor:
        return data
    start, stop = _span(donor, draw)
    if draw.random() < 0.5:
        return data[: draw.randrange(len(data))] + donor[start:]
    at = draw.randrange(len(data))
    return data[:at] + donor[start:stop] + data[at + draw.choice((0, stop - start)) :]


def _insert(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.randbytes(draw.choice((1, 2, 4, 16, 256))) + data[at:]


def _blank(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    start, stop = _span(data, draw)
    return data[:start] + draw.choice((b"\0", b"\xff")) * (stop - start) + data[stop:]


def _digits(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    numbers = list(re.finditer(rb"-?\d+", data[:100_000]))
    if not numbers:
        return _number(data, draw, ())
    number = draw.choice(numbers)
    extreme = str(draw.choice((*NUMBERS, 10**30, 10**400))).encode()
    return data[: number.start()] + extreme + data[number.end() :]


_CHANGES: tuple[Callable[[bytes, random.Random, Sequence[bytes]], bytes], ...] = (
    *(_flip, _byte, _number) * 2, _number, _cut, _drop, _repeat, _swap, _splice, _insert, _blank, _digits,
)  # fmt: skip


def mutate_text(text: str, draw: random.Random) -> str:
    """A text, or another that somebody may regret to have read."""
    if draw.random() < 0.5:
        return draw.choice(_TEXTS)
    at = draw.randrange(len(text) + 1)
    return text[:at] + draw.choice(_TEXTS) + text[at + draw.choice((0, 1, 4)) :]


def mutate_json(value: Any, draw: random.Random) -> bytes:
    """Return the value as JSON text with one to three changes in it.

    Values are replaced, keys occur twice, and brackets nest without end.
    """
    value = json.loads(json.dumps(value))  # a copy that may be changed
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = _change_value(value, draw)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.9)
    if draw.random() < 0.05:  # one key twice
        text = re.sub(r'("[^"]{,50}": [^,{}\[\]]{1,50})', r"\1, \1", text, count=1)
    depth, (opened, closed) = draw.choice((70, 990, 5_000, 50_000)), draw.choice((("[", "]"), ('{"a":', "}")))
    deep = opened * depth + "0" + closed * depth * draw.choice((1, 1, 0))
    text = text.replace(f'"{_DEEP}"', deep, 1).replace(f'"{_DEEP}"', "0")
    return text.encode("utf-8", "surrogatepass")


def _change_value(value: Any, draw: random.Random) -> Any:
    holders: list[Any] = []
    _collect(value, holders)
    if not holders or draw.random() < 0.05:
        return _DEEP if draw.random() < 0.1 else draw.choice(EXTREMES)
    holder = draw.choice(holders)
    keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not keys:
        _put(holder, "new", draw.choice(EXTREMES))
        return value
    key, kind = draw.choice(keys), draw.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other = draw.choice(keys)
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == 2 and isinstance(holder, dict):
        holder[mutate_text(str(key), draw)] = holder.pop(key)
    elif kind == 3:
        many = (
            2 if isinstance(holder[key], dict | list) else 1000
        )  # lists of lists of lists take a while to write
        holder[key] = [holder[key]] * draw.choice((1, 2, many)) if draw.random() < 0.5 else {"a": holder[key]}
    elif kind == 4 and isinstance(holder[key], str):
        holder[key] = mutate_text(holder[key], draw)
    elif kind == 5 and isinstance(holder[key], int):
        holder[key] += draw.choice((-1, 1, 1 << 31, 1 << 62))
    else:
        holder[key] = _DEEP if draw.random() < 0.03 else draw.choice(EXTREMES)
    return value


def _put(holder: Any, key: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[key] = value
    else:
        holder.append(value)


def _collect(value: Any, holders: list[Any]) -> None:
    if isinstance(value, dict | list):
        holders.append(value)
        for inner in value.values() if isinstance(value, dict) else value:
            _collect(inner, holders)
