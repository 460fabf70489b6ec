"""Which place of which file a tensor's memory is mapped from, if nobody has written to it.

Two tensors mapped from the same place of the same file are equal, and nobody needs to read them to
know. Reading them takes 0.65 s a gigabyte (two busy cores) and counts the whole file as memory of
this process. torch's version counters are no substitute: they miss writes through ``.data``,
through numpy, and by a BatchNorm layer in train mode.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path

from torch import Tensor

__all__ = ["FileMappings"]

_SMAPS = Path("/proc/self/smaps")  # Linux alone has it: proc_pid_smaps(5)
# Address range, permissions, offset, device and inode, which is 0 for memory without a file; then
# one field a line.
_MAPPING = re.compile(r"^(\w+)-(\w+) \S+ (\w+) (\S+ [1-9]\d*) .*\n((?:\w+:.*\n)*)", re.MULTILINE)
# Pages that were written to are copies that belong to this process, in memory ("Anonymous") or
# swapped out.
_NO_COPIES = re.compile(r"^(?:Anonymous|Swap): +0 kB$", re.MULTILINE)


class FileMappings:
    """The mappings of files that nobody has written to, as they were when this object was made.

    There are none where the system does not tell, so that ``same_place`` is always False there.
    """

    def __init__(self) -> None:
        try:
            text = _SMAPS.read_text("utf-8", "surrogateescape")
        except OSError:
            text = ""
        self._mappings = [
            (int(start, 16), int(stop, 16), int(offset, 16), file)
            for start, stop, offset, file, fields in _MAPPING.findall(text)
            if len(_NO_COPIES.findall(fields)) == 2
        ]

    def same_place(self, left: Tensor, right: Tensor) -> bool:
        """Return whether two tensors are alike and surely the same bytes of one file."""
        place = self._place(left)
        return place is not None and place == self._place(right)

    def _place(self, tensor: Tensor) -> Hashable:
        """Return file, offset and all that gives the bytes a meaning; None without a mapping."""
        address = tensor.data_ptr()
        for start, stop, offset, file in self._mappings:
            if start <= address and address + tensor.nbytes <= stop and tensor.is_contiguous():
                position = address - start + offset
                return file, position, tensor.dtype, tensor.shape, tensor.is_conj(), tensor.is_neg()
        return None
