"""What a first pass decoded, kept for the next: in memory, then in a file, up to a bound in each."""

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
from ckpt_tools.temporary_folders import large_temporary_folder

__all__ = ["PixelCache"]

_SHARE = 4  # of the memory, and of the disk, that is free: a quarter


@dataclass(frozen=True)
class _Stored:
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class PixelCache:
    """Uint8 batches by number. One that fits nowhere is not kept, and is decoded again.

    A pass that is broken off leaves what it read, and every batch is kept whole or not at all: the next pass takes
    those and reads the others. ``memory`` and ``disk`` are bounds in bytes, by default a quarter of what is free
    when the first batch arrives. The file has no name, so that the system removes it however the process ends.
    """

    def __init__(self, *, memory: int | None = None, disk: int | None = None) -> None:
        self._memory_left, self._disk_left = memory, disk
        self._held: dict[int, Tensor] = {}
        self._stored: dict[int, _Stored] = {}
        self._file: IO[bytes] | None = None
        self._end = 0
        self._lock = Lock()  # readers share one position in the file

    def __contains__(self, number: int) -> bool:
        return number in self._held or number in self._stored

    def keep(self, number: int, batch: Tensor) -> None:
        """Keeps a batch that nobody will write to, if there is room."""
        if number in self:
            return
        if self._memory_left is None:
            self._memory_left = available_bytes() // _SHARE
        if batch.nbytes <= self._memory_left:
            self._memory_left -= batch.nbytes
            self._held[number] = batch
        else:
            self._store(number, batch)

    def read(self, number: int) -> Tensor:
        """The batch as it was kept, in the same memory format. Threads may read at the same time."""
        if number in self._held:
            return self._held[number]
        stored = self._stored[number]
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
                self._append(number, batch.clone())  # without gaps between the pixels, which a view may have
        except OSError:  # the disk is full or cannot be written to: then there is no room
            self._disk_left = 0

    def _append(self, number: int, batch: Tensor) -> None:
        if self._disk_left is None:
            self._disk_left = shutil.disk_usage(large_temporary_folder()).free // _SHARE
        if batch.nbytes > self._disk_left:
            return
        file = self._open_file()
        file.seek(self._end)
        file.write(batch.as_strided((batch.numel(),), (1,)).numpy().data)
        file.flush()
        self._stored[number] = _Stored(self._end, tuple(batch.shape), batch.stride())
        self._end += batch.nbytes
        self._disk_left -= batch.nbytes

    def _open_file(self) -> IO[bytes]:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=large_temporary_folder())  # noqa: SIM115  # it lives as long as this object
            weakref.finalize(self, self._file.close)
        return self._file
