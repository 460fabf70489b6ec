"""Every byte that a safetensors file should have, from first to last: its header, then its tensors."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ckpt_tools.storage.output.byte_transfer import read_at
from ckpt_tools.storage.output.hashing import hash_and_check
from ckpt_tools.storage.tensor_bytes import ByteArray, raw_bytes

__all__ = ["FilePart", "Layout", "encode_header", "verify_and_hash"]

_HEADER = "the header"


@dataclass(frozen=True)
class FilePart:
    """``size`` bytes from the place ``at`` on. ``value`` None: those that the source has there."""

    name: str
    at: int
    size: int
    value: Tensor | None = None


class Layout:
    """A header and the parts behind it, without gaps.

    ``source``, an open file, has the parts without a value, each ``shift`` bytes before its place here.
    """

    def __init__(
        self, header: bytes, parts: Sequence[FilePart], source: int = -1, shift: int = 0
    ) -> None:
        self.size = len(header) + sum(part.size for part in parts)
        self._header = np.frombuffer(header, np.uint8)
        self._parts = sorted(parts, key=lambda part: (part.at, part.size))
        self._starts = [part.at for part in self._parts]
        self._source, self._shift = source, shift
        self._last: tuple[FilePart, ByteArray] | None = None

    def fill(self, piece: ByteArray, start: int) -> None:
        """Put into ``piece`` what belongs at the place ``start``. Raises OSError."""
        ahead = self._header[start : start + len(piece)]
        if self._source >= 0 and len(ahead) < len(piece):
            read_at(self._source, piece[len(ahead) :], start + len(ahead) - self._shift)
        piece[: len(ahead)] = ahead
        for part in self._within(start, start + len(piece)):
            if part.value is not None:
                first, last = max(start, part.at), min(start + len(piece), part.at + part.size)
                piece[first - start : last - start] = self._raw(part)[
                    first - part.at : last - part.at
                ]

    def name_at(self, place: int) -> str:
        """What lies at a place."""
        at = bisect_right(self._starts, place) - 1
        return self._parts[at].name if at >= 0 else _HEADER

    def _within(self, start: int, stop: int) -> Iterator[FilePart]:
        for number in range(max(0, bisect_right(self._starts, start) - 1), len(self._parts)):
            if self._starts[number] >= stop:
                return
            if self._starts[number] + self._parts[number].size > start:
                yield self._parts[number]

    def _raw(self, part: FilePart) -> ByteArray:
        # A tensor that does not lie in memory as in the file is copied once, not for each piece of it.
        if self._last is None or self._last[0] is not part:
            assert part.value is not None
            self._last = part, raw_bytes(part.value)
        return self._last[1]


def encode_header(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """The JSON of a safetensors header, entries in the given order, without padding."""
    # Sorted: the library hands metadata out in another order each time, and equal runs should give equal bytes.
    content = {"__metadata__": dict(sorted(metadata.items())), **entries}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def verify_and_hash(file: int, size: int, layout: Layout) -> str:
    """The SHA-256 of an open file of ``size`` bytes that has exactly these. Raises ValueError for others, OSError."""
    if size != layout.size:
        raise ValueError(f"{size:,} bytes instead of {layout.size:,}")
    expected = np.empty(0, np.uint8)

    def check(start: int, piece: ByteArray) -> None:
        nonlocal expected
        if len(expected) < len(piece):
            expected = np.empty(len(piece), np.uint8)
        layout.fill(expected[: len(piece)], start)
        differs = expected[: len(piece)] != piece
        if differs.any():
            name = layout.name_at(start + int(differs.argmax()))
            raise ValueError(f"{name} reading back differently from what was written")

    return hash_and_check(file, size, check)
