"""Telling from which place of which file a tensor's memory is mapped.

Two tensors that map the same place of the same file are equal, and need not be read to know it.
This holds for memory that was never written to: a written page is the process's own copy.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

__all__ = ["FileMappings", "read_file_mappings"]

_SMAPS = Path("/proc/self/smaps")  # Linux; elsewhere no mapping is known
_MAPPING = re.compile(
    r"^(?P<start>[0-9a-f]+)-(?P<stop>[0-9a-f]+) \S+ (?P<offset>[0-9a-f]+) "
    r"(?P<file>\S+ [1-9]\d*) .*\n"
    r"(?P<fields>(?:\w+:.*\n)*)",
    re.MULTILINE,
)
# The pages of a mapping that were written to, which are in memory or swapped out.
_OWN_PAGES = re.compile(r"^(?:Anonymous|Swap): *(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, order=True)
class _Mapping:
    start: int
    stop: int
    offset: int
    file: str  # device and inode


class FileMappings:
    """The untouched mappings of files in this process's memory, as they were at one moment."""

    def __init__(self, mappings: Iterable[_Mapping] = ()) -> None:
        self._mappings = sorted(mappings)
        self._starts = [mapping.start for mapping in self._mappings]

    def same_place(self, first: Tensor, second: Tensor) -> bool:
        """Return whether two tensors of one type and shape surely are the same bytes of one file.

        Where the system does not tell, this is False.
        """
        if _form(first) != _form(second):
            return False
        place = self._find_place(first)
        return place is not None and place == self._find_place(second)

    def _find_place(self, tensor: Tensor) -> tuple[str, int] | None:
        address = tensor.data_ptr()
        at = bisect_right(self._starts, address) - 1
        if (
            not tensor.is_contiguous()
            or at < 0
            or address + tensor.nbytes > self._mappings[at].stop
        ):
            return None
        mapping = self._mappings[at]
        return mapping.file, address - mapping.start + mapping.offset


def read_file_mappings() -> FileMappings:
    """Return the mappings of this moment, or none where the system does not tell."""
    try:
        text = _SMAPS.read_text("utf-8", "surrogateescape")
    except OSError:
        return FileMappings()
    matches = _MAPPING.finditer(text)
    return FileMappings(
        _parse_mapping(match) for match in matches if _is_untouched(match["fields"])
    )


def _is_untouched(fields: str) -> bool:
    sizes = _OWN_PAGES.findall(fields)
    return len(sizes) == 2 and not any(map(int, sizes))


def _parse_mapping(match: re.Match[str]) -> _Mapping:
    start, stop, offset = (int(match[name], 16) for name in ("start", "stop", "offset"))
    return _Mapping(start, stop, offset, match["file"])


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.is_conj(), tensor.is_neg()
