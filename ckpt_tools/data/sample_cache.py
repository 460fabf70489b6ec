"""A cache of decoded batches for later passes: in memory first, then in a temporary file."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from threading import Lock
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ckpt_tools.machine.memory import available_bytes
from ckpt_tools.machine.temporary_folders import large_temporary_folder

__all__ = ["PixelCache"]

_FREE_SPACE_DIVISOR = 4  # the cache takes up to a quarter of the free memory, and of the free disk


@dataclass(frozen=True)
class _StoredBatch:
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class PixelCache:
    """Uint8 batches by number.

    A batch that fits nowhere is not kept, and is decoded again in the next pass. A batch is kept
    complete or not at all, so a pass that is broken off leaves batches that the next pass can use.
    ``memory`` and ``disk`` are bounds in bytes, by default a quarter of the free space when the
    first batch arrives.
    """

    def __init__(self, *, memory: int | None = None, disk: int | None = None) -> None:
        self._memory_left, self._disk_left = memory, disk
        self._in_memory: dict[int, Tensor] = {}
        self._on_disk: dict[int, _StoredBatch] = {}
        self._file: IO[bytes] | None = None
        self._end = 0
        self._lock = Lock()  # threads that read share one position in the file

    def __contains__(self, number: int) -> bool:
        return number in self._in_memory or number in self._on_disk

    def keep(self, number: int, batch: Tensor) -> None:
        """Keep a batch if there is room, in memory or else on disk.

        The caller must not write to the batch afterwards, because it is not copied.
        """
        if number in self:
            return
        if self._memory_left is None:
            self._memory_left = available_bytes() // _FREE_SPACE_DIVISOR
        if batch.nbytes <= self._memory_left:
            self._memory_left -= batch.nbytes
            self._in_memory[number] = batch
        else:
            self._store(number, batch)

    def read(self, number: int) -> Tensor:
        """Return a batch in the memory format in which it was kept.

        Threads may read at the same time. Raises OSError if the file cannot be read.
        """
        if number in self._in_memory:
            return self._in_memory[number]
        stored = self._on_disk[number]
        pixels = np.empty(math.prod(stored.shape), np.uint8)
        with self._lock:
            file = self._open_file()
            file.seek(stored.offset)
            if file.readinto(pixels) != pixels.nbytes:  # type: ignore[attr-defined]  # every binary file has it
                raise OSError("the file of decoded images has become shorter")
        return torch.from_numpy(pixels).as_strided(stored.shape, stored.strides)

    def _store(self, number: int, batch: Tensor) -> None:
        try:
            with self._lock:
                # A view may have gaps between its pixels; a clone has none.
                self._append(number, batch.clone())
        except OSError:  # a disk that is full or cannot be written to has no room
            self._disk_left = 0

    def _append(self, number: int, batch: Tensor) -> None:
        if self._disk_left is None:
            self._disk_left = shutil.disk_usage(large_temporary_folder()).free // _FREE_SPACE_DIVISOR
        if batch.nbytes > self._disk_left:
            return
        file = self._open_file()
        file.seek(self._end)
        # The bytes are written in the order of memory, and the strides restore the memory format.
        file.write(batch.as_strided((batch.numel(),), (1,)).numpy().data)
        file.flush()
        self._on_disk[number] = _StoredBatch(self._end, tuple(batch.shape), batch.stride())
        self._end += batch.nbytes
        self._disk_left -= batch.nbytes

    def _open_file(self) -> IO[bytes]:
        if self._file is None:
            # A temporary file has no name, so the system removes it however the process ends.
            self._file = tempfile.TemporaryFile(dir=large_temporary_folder())  # noqa: SIM115  # open as long as this object
            weakref.finalize(self, self._file.close)
        return self._file
