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

__all__ = ["Blob", "copy_tensor", "open_blob"]

_ALIGNMENT = 16  # bytes, of the widest element


class Blob:
    """``data`` to read, and the same bytes as storages: memory-mapped ones of a file, copies otherwise."""

    def __init__(self, data: Buffer, mapped: torch.UntypedStorage | None = None) -> None:
        self.data = data
        self._mapped = mapped

    def storage(self, start: int, nbytes: int) -> torch.UntypedStorage:
        """The bytes from ``start`` on. Raises Fault if the file ends before."""
        if start < 0 or nbytes < 0 or start + nbytes > len(self.data):
            raise MalformedFileError(
                f"a storage of {nbytes:,} bytes from byte {start:,} on in a file of {len(self.data):,}"
            )
        if self._mapped is None or nbytes == 0 or start % _ALIGNMENT:
            return copy_tensor(self.data[start : start + nbytes])
        return self._mapped[start : start + nbytes]  # type: ignore[no-any-return]


def copy_tensor(raw: bytes | bytearray) -> torch.UntypedStorage:
    """A storage of its own with these bytes."""
    if not raw:
        return torch.UntypedStorage(0)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).untyped_storage()


@contextmanager
def open_blob(path: Path) -> Iterator[Blob]:
    """A file as a Blob; its storages stay valid afterwards, its ``data`` does not. Raises OSError."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            yield Blob(b"")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield Blob(data, _map_file(path, len(data)))


def _map_file(path: Path, nbytes: int) -> torch.UntypedStorage | None:
    try:
        return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(path), False, nbytes))
    except (
        RuntimeError,
        UnicodeError,
    ):  # a name that torch cannot spell, or a file system that cannot map
        return None
