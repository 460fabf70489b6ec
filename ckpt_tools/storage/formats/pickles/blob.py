"""The bytes of a file or of a part of one: for reading, and as storages."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch

from ckpt_tools.storage.formats.pickles.pickle_limits import MalformedFileError
from ckpt_tools.storage.formats.pickles.stack_machine import Buffer

__all__ = ["Blob", "copy_to_storage", "open_blob"]

_ALIGNMENT = 16  # bytes, of the widest element


class Blob:
    """Bytes to read, in ``data``, and the same bytes as storages of tensors.

    The storages are memory-mapped where ``mapped`` maps the same bytes, and copies otherwise.
    """

    def __init__(self, data: Buffer, mapped: torch.UntypedStorage | None = None) -> None:
        self.data = data
        self._mapped = mapped

    def storage(self, start: int, nbytes: int) -> torch.UntypedStorage:
        """Return ``nbytes`` bytes from ``start`` on as a storage.

        Raises MalformedFileError if the file ends before. The bytes are copied where nothing is
        mapped, or where ``start`` is not aligned for the widest element type.
        """
        if start < 0 or nbytes < 0 or start + nbytes > len(self.data):
            raise MalformedFileError(
                f"a storage of {nbytes:,} bytes from byte {start:,} on in a file of {len(self.data):,}"
            )
        if self._mapped is None or nbytes == 0 or start % _ALIGNMENT:
            return copy_to_storage(self.data[start : start + nbytes])
        return self._mapped[start : start + nbytes]  # type: ignore[no-any-return]


def copy_to_storage(raw: bytes | bytearray) -> torch.UntypedStorage:
    """Return a new storage that holds a copy of these bytes."""
    if not raw:  # torch.frombuffer refuses an empty buffer
        return torch.UntypedStorage(0)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).untyped_storage()


@contextmanager
def open_blob(path: Path) -> Iterator[Blob]:
    """Open a file as a Blob. Raises OSError.

    Its storages stay valid after the block, its ``data`` does not.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:  # mmap refuses an empty file
            yield Blob(b"")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield Blob(data, _map_file(path, len(data)))


def _map_file(path: Path, nbytes: int) -> torch.UntypedStorage | None:
    try:
        return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(path), False, nbytes))
    except (RuntimeError, UnicodeError):
        # A name that torch cannot spell, or a file system that cannot map files: copies will do.
        return None
