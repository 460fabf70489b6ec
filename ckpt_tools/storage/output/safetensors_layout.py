"""The bytes that a safetensors file should have: its header, then its tensors."""

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
    """A tensor's ``size`` bytes in a file, from the place ``at`` on.

    Without a ``value`` they are the bytes that the source has there.
    """

    name: str
    at: int
    size: int
    value: Tensor | None = None


class Layout:
    """The expected content of a file: a header and the parts behind it, without gaps.

    ``source``, an open file, has the parts without a value, each ``shift`` bytes before its place
    here.
    """

    def __init__(self, header: bytes, parts: Sequence[FilePart], source: int = -1, shift: int = 0) -> None:
        self.size = len(header) + sum(part.size for part in parts)
        self._header = np.frombuffer(header, np.uint8)
        # A tensor without elements has the place of the next one, and must stand before it.
        self._parts = sorted(parts, key=lambda part: (part.at, part.size))
        self._starts = [part.at for part in self._parts]
        self._source, self._shift = source, shift
        # A tensor that does not lie in memory as in the file is copied once, not for each piece of
        # it.
        self._last: tuple[FilePart, ByteArray] | None = None

    def fill(self, piece: ByteArray, start: int) -> None:
        """Fill ``piece`` with the bytes that belong at the place ``start``. Raises OSError."""
        ahead = self._header[start : start + len(piece)]
        # The source is read for the complete piece, and the replaced parts in it are overwritten.
        if self._source >= 0 and len(ahead) < len(piece):
            read_at(self._source, piece[len(ahead) :], start + len(ahead) - self._shift)
        piece[: len(ahead)] = ahead
        for part in self._parts_between(start, start + len(piece)):
            if part.value is not None:
                first, last = max(start, part.at), min(start + len(piece), part.at + part.size)
                raw = self._raw_bytes(part)
                piece[first - start : last - start] = raw[first - part.at : last - part.at]

    def name_at(self, place: int) -> str:
        """Return the name of the tensor at a place, or "the header"."""
        at = bisect_right(self._starts, place) - 1
        return self._parts[at].name if at >= 0 else _HEADER

    def _parts_between(self, start: int, stop: int) -> Iterator[FilePart]:
        for number in range(max(0, bisect_right(self._starts, start) - 1), len(self._parts)):
            if self._starts[number] >= stop:
                return
            if self._starts[number] + self._parts[number].size > start:
                yield self._parts[number]

    def _raw_bytes(self, part: FilePart) -> ByteArray:
        if self._last is None or self._last[0] is not part:
            assert part.value is not None
            self._last = part, raw_bytes(part.value)
        return self._last[1]


def encode_header(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """Return the JSON of a safetensors header without padding; entries keep their order."""
    # The library gives metadata in another order each time; sorted, equal runs give equal bytes.
    content = {"__metadata__": dict(sorted(metadata.items())), **entries}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def verify_and_hash(file: int, size: int, layout: Layout) -> str:
    """Return the SHA-256 of an open file that has exactly the bytes of ``layout``.

    Raises ValueError for a file of another ``size`` or with other bytes, and OSError.
    """
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
