"""Iterate over the members of a tar, from a file or from a stream that can only be read forward.

The standard library's tarfile is not used: it takes an archive for complete that is cut off between
two members or damaged in a header, it reads names of any length into memory, and it needs four
times as long for a header. The tests compare the two.

A tar is a sequence of blocks of 512 bytes. Each member has a header block and then its content,
padded to full blocks. A block of zeros marks the end.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from ckpt_tools.errors import DataError

__all__ = ["TarMember", "TarReader"]

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_EXTENDED_HEADER = 2**20  # bytes; an honest one holds a name, time stamps and attributes
_READ_BYTES = 2**20  # bytes to read at once
# Kinds of members, as the type flag of a header gives them.
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_COMPRESSED |= {b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


class TarMember(NamedTuple):
    """A regular file in a tar.

    ``offset`` is where its content begins in the tar, and ``size`` how long that is, in bytes.
    """

    name: str
    offset: int
    size: int


class TarReader:
    """Iterates over the regular files of a tar (v7, ustar, GNU or pax).

    Names are only labels here, so they need not be safe paths. ``length`` is the size of a file
    that supports seeking; without it, the file is read from its beginning to its end.

    Raises DataError for anything but a complete archive, and whatever reading the file raises.
    """

    def __init__(self, file: IO[bytes], name: str, length: int | None = None) -> None:
        self._file, self._name, self._length = file, name, length
        self._position = 0

    def __iter__(self) -> Iterator[TarMember]:
        """Yield the members. ``read`` returns the content of the one that was yielded last."""
        overrides: dict[str, bytes] = {}  # what extended headers say about the next member
        while (block := self._read_header()) is not None:
            kind, size = block[156:157], self._parse_number(block[124:136])
            if kind in (b"L", b"K", b"x", b"X", b"g"):
                overrides |= self._read_extended_header(kind, size)
                continue
            if "size" in overrides:
                size = self._parse_number(overrides["size"], 10)
            name = overrides.get("path") or _header_name(block)
            is_sparse = kind == b"S" or "sparse" in overrides
            overrides = {}
            padded_size = 0 if kind in _WITHOUT_CONTENT else size + -size % _BLOCK
            end = self._position + padded_size
            # Seeking beyond the end of a file would raise no error.
            if self._length is not None and end > self._length:
                raise self._cut_off_error()
            if is_sparse:
                shown = f"{_decode_name(name)!r:.300}"
                raise DataError(f"{self._name}: {shown} is a sparse file. Write the shard without -S.")
            if kind in _REGULAR:
                yield TarMember(_decode_name(name), self._position, size)
            self._skip_to(end)

    def read(self, count: int) -> bytearray:
        """Read the next ``count`` bytes of the current member.

        Raises DataError if the archive ends before.
        """
        content = bytearray()
        while len(content) < count:
            piece = self._file.read(min(_READ_BYTES, count - len(content)))
            if not piece:
                raise self._cut_off_error()
            content += piece
            self._position += len(piece)
        return content

    def _skip_to(self, position: int) -> None:
        if self._length is not None:
            self._file.seek(position)
        else:
            # In pieces, so that a large member that is skipped is never in memory as a whole.
            while position - self._position > _READ_BYTES:
                self.read(_READ_BYTES)
            self.read(position - self._position)
        self._position = position

    def _read_header(self) -> bytes | None:
        """Read the next header block; None for the zeros at the end."""
        start = self._position
        block = self._file.read(_BLOCK)
        # A file behind a URL may return fewer bytes than were asked for.
        while 0 < len(block) < _BLOCK and (more := self._file.read(_BLOCK - len(block))):
            block += more
        self._position += len(block)
        if block == _ZEROS:
            return None
        if start and not block:
            raise DataError(
                f"{self._name}: no mark at the end of this tar: it may be cut off. "
                "Write it again or, if it is complete, add one: head -c 1024 /dev/zero >> FILE."
            )
        if start and len(block) < _BLOCK:
            raise self._cut_off_error()
        if len(block) < _BLOCK or not _has_valid_checksum(block):
            raise self._damaged_error(start) if start else self._no_tar_error(block)
        return block

    def _read_extended_header(self, kind: bytes, size: int) -> dict[str, bytes]:
        """Read a header that precedes the header of a member.

        Returns the "path", "size" and "sparse" of that member, where they are given. The kinds "K"
        (the target of a link) and "g" (defaults for all members) hold nothing that is needed.
        """
        start = self._position - _BLOCK
        if size > _MAX_EXTENDED_HEADER:
            raise DataError(
                f"{self._name}: a header of {size:,} bytes at byte {start:,}. Do not use this tar."
            )
        content = bytes(self.read(size))
        self.read(-size % _BLOCK)
        if kind == b"L":
            return {"path": content.partition(b"\0")[0]}
        try:
            return dict(_parse_pax_records(content)) if kind in (b"x", b"X") else {}
        except ValueError:
            raise self._damaged_error(start) from None

    def _parse_number(self, field: bytes, base: int = 8) -> int:
        try:
            if field[:1] == b"\x80":  # GNU tar writes numbers with too many digits in binary
                return int.from_bytes(field[1:])
            number = int(field.partition(b"\0")[0].strip() or b"0", base)
        except ValueError:
            number = -1
        if number < 0:
            raise self._damaged_error(self._position - _BLOCK)
        return number

    def _cut_off_error(self) -> DataError:
        length = self._position if self._length is None else self._length
        return DataError(f"{self._name}: this tar is cut off after {length:,} bytes. Copy or write it again.")

    def _damaged_error(self, start: int) -> DataError:
        return DataError(f"{self._name}: expected a tar, found no header at byte {start:,}. Copy it again.")

    def _no_tar_error(self, block: bytes) -> DataError:
        kind = next((kind for magic, kind in _COMPRESSED.items() if block.startswith(magic)), None)
        if kind is not None:
            advice = "samples are drawn at random, which compression prevents. Unpack it to a plain .tar"
            return DataError(f"{self._name}: expected a plain tar, found {kind}; {advice}.")
        return DataError(
            f"{self._name}: expected a tar, found {'something else' if block else 'an empty file'}."
        )


def _has_valid_checksum(block: bytes) -> bool:
    try:
        expected = int(block[148:156].partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return False
    # The checksum is the sum of all bytes, with blanks in place of its own digits. The low half of
    # Adler-32 is that sum plus one, modulo 65521, and zlib computes it faster than Python can add.
    actual = zlib.adler32(block[:148] + b" " * 8 + block[156:]) & 0xFFFF
    return actual == (expected + 1) % 65521


def _header_name(block: bytes) -> bytes:
    name, prefix = (field.partition(b"\0")[0] for field in (block[:100], block[345:500]))
    # Only ustar has a prefix; in other formats these bytes mean something else.
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _decode_name(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _parse_pax_records(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the records of a pax header that matter: "path", "size", and "sparse" if it is sparse.

    A record is ``LENGTH KEY=VALUE`` and a line end; LENGTH counts all its bytes. Raises ValueError.
    """
    position = 0
    while position < len(content) and content[position]:
        space = content.index(b" ", position, position + 9)
        end = position + int(content[position:space])
        if not space < end <= len(content):
            raise ValueError
        key, equals, value = content[space + 1 : end].removesuffix(b"\n").partition(b"=")
        if not equals:
            raise ValueError
        if key in (b"path", b"size"):
            yield key.decode(), value
        elif key.startswith(b"GNU.sparse"):
            yield "sparse", value
        position = end
