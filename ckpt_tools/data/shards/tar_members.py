"""The members of a tar, one after the other, from a file or from what can only be read forward.

The standard library takes an archive for complete that is cut off between two members or damaged in a header, reads
names of any length into memory, and needs four times as long for a header. The tests compare the two.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from ckpt_tools.errors import DataError

__all__ = ["TarMember", "TarReader"]

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_LONGEST = 2**20  # bytes of an extended header: a name, time stamps, attributes
_LOT = 2**20  # bytes to read at once
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip",
}  # fmt: skip


class TarMember(NamedTuple):
    """A regular file in a tar: its name, where its content begins, how long it is."""

    name: str
    offset: int
    size: int


class TarReader:
    """Iterates over the regular files of a tar (v7, ustar, GNU or pax). Names are only labels here.

    ``length`` is that of a file which can be sought in; without one, it is read from its beginning to its end. Raises
    DataError for anything but a complete archive; reading raises what the file does.
    """

    def __init__(self, file: IO[bytes], name: str, length: int | None = None) -> None:
        self._file, self._name, self._length = file, name, length
        self._at = 0

    def __iter__(self) -> Iterator[TarMember]:
        """While a member is the current one, ``read`` gives its content."""
        said: dict[str, bytes] = {}  # by extended headers, about the next member
        while (block := self._header()) is not None:
            kind, size = block[156:157], self._number(block[124:136])
            if kind in (b"L", b"K", b"x", b"X", b"g"):
                said |= self._read_extended_header(kind, size)
                continue
            if "size" in said:
                size = self._number(said["size"], 10)
            name = said.get("path") or _name(block)
            sparse = kind == b"S" or "sparse" in said
            said = {}
            end = self._at if kind in _WITHOUT_DATA else self._at + size + -size % _BLOCK
            if self._length is not None and end > self._length:
                raise self._cut_off_error()
            if sparse:
                raise DataError(
                    f"{self._name}: {_text(name)!r:.300} is stored as a sparse file. Write the shard without -S."
                )
            if kind in _REGULAR:
                yield TarMember(_text(name), self._at, size)
            self._go(end)

    def read(self, count: int) -> bytearray:
        """The next ``count`` bytes. Raises DataError if the archive ends before."""
        content = bytearray()
        while len(content) < count:
            lot = self._file.read(min(_LOT, count - len(content)))
            if not lot:
                raise self._cut_off_error()
            content += lot
            self._at += len(lot)
        return content

    def _go(self, to: int) -> None:
        if self._length is not None:
            self._file.seek(to)
        else:
            while to - self._at > _LOT:
                self.read(_LOT)
            self.read(to - self._at)
        self._at = to

    def _header(self) -> bytes | None:
        """The next header; None for the zeros at the end."""
        start = self._at
        block = self._file.read(_BLOCK)
        while 0 < len(block) < _BLOCK and (more := self._file.read(_BLOCK - len(block))):
            block += more
        self._at += len(block)
        if block == _ZEROS:
            return None
        if start and not block:
            raise DataError(
                f"{self._name}: expected a mark at the end of this tar, found none: it may be cut off. Write it again, "
                f"or, if it is whole, add the mark: head -c 1024 /dev/zero >> FILE."
            )
        if start and len(block) < _BLOCK:
            raise self._cut_off_error()
        if len(block) < _BLOCK or not _has_valid_checksum(block):
            raise self._damaged_error(start) if start else self._no_tar_error(block)
        return block

    def _read_extended_header(self, kind: bytes, size: int) -> dict[str, bytes]:
        """What a header says that precedes a member's own: its name, its size; of all others, nothing."""
        start = self._at - _BLOCK
        if size > _LONGEST:
            raise DataError(f"{self._name}: the header at byte {start:,} has {size:,} bytes. This is no usable shard.")
        content = bytes(self.read(size))
        self.read(-size % _BLOCK)
        if kind == b"L":
            return {"path": content.partition(b"\0")[0]}
        try:
            return dict(_records(content)) if kind in (b"x", b"X") else {}
        except ValueError:
            raise self._damaged_error(start) from None

    def _number(self, field: bytes, base: int = 8) -> int:
        try:
            if field[:1] == b"\x80":  # GNU's way to write what has too many digits
                return int.from_bytes(field[1:])
            number = int(field.partition(b"\0")[0].strip() or b"0", base)
        except ValueError:
            number = -1
        if number < 0:
            raise self._damaged_error(self._at - _BLOCK)
        return number

    def _cut_off_error(self) -> DataError:
        length = self._at if self._length is None else self._length
        return DataError(f"{self._name}: this tar is cut off after {length:,} bytes. Copy or write it again.")

    def _damaged_error(self, start: int) -> DataError:
        return DataError(
            f"{self._name}: expected a tar, found no header at byte {start:,}: it is damaged. Copy it again."
        )

    def _no_tar_error(self, block: bytes) -> DataError:
        kind = next((kind for magic, kind in _COMPRESSED.items() if block.startswith(magic)), None)
        if kind is not None:
            advice = "samples are drawn at random, which compression does not allow. Unpack it to a plain .tar"
            return DataError(f"{self._name}: expected a plain tar, found {kind}; {advice}.")
        return DataError(f"{self._name}: expected a tar, found {'something else' if block else 'an empty file'}.")


def _has_valid_checksum(block: bytes) -> bool:
    try:
        said = int(block[148:156].partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return False
    # a sum of bytes, fast: the low half of Adler-32 is one more, modulo 65521; the sum's own digits count as blanks
    found = zlib.adler32(block[:148] + b" " * 8 + block[156:]) & 0xFFFF
    return found == (said + 1) % 65521


def _name(block: bytes) -> bytes:
    name, prefix = (field.partition(b"\0")[0] for field in (block[:100], block[345:500]))
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _records(content: bytes) -> Iterator[tuple[str, bytes]]:
    """What a pax header, ``LENGTH KEY=VALUE`` and a line end each, says of interest. Raises ValueError."""
    at = 0
    while at < len(content) and content[at]:
        space = content.index(b" ", at, at + 9)
        end = at + int(content[at:space])
        if not space < end <= len(content):
            raise ValueError
        key, equals, value = content[space + 1 : end].removesuffix(b"\n").partition(b"=")
        if not equals:
            raise ValueError
        if key in (b"path", b"size"):
            yield key.decode(), value
        elif key.startswith(b"GNU.sparse"):
            yield "sparse", value
        at = end
