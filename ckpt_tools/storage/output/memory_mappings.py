"""Where in which file a tensor's memory comes from, for memory that maps a file and was never written to.

Two tensors from the same place of the same file are equal; nobody needs to read them to know.
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
    r"^(?P<start>[0-9a-f]+)-(?P<stop>[0-9a-f]+) \S+ (?P<offset>[0-9a-f]+) (?P<file>\S+ [1-9]\d*) .*\n"
    r"(?P<fields>(?:\w+:.*\n)*)",
    re.MULTILINE,
)
# A page that was written to is the process's own, in memory or swapped out.
_OWN_PAGES = re.compile(r"^(?:Anonymous|Swap): *(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, order=True)
class _Mapping:
    start: int
    stop: int
    offset: int
    file: str  # device and inode


class FileMappings:
    """The untouched mappings of files in this process's memory, as they were at one moment."""

    def __init__(self, found: Iterable[_Mapping] = ()) -> None:
        self._found = sorted(found)
        self._starts = [mapping.start for mapping in self._found]

    def same_place(self, one: Tensor, other: Tensor) -> bool:
        """Whether two tensors are alike and surely the same bytes of one file; False where nobody can tell."""
        return (
            _form(one) == _form(other)
            and (place := self._place(one)) is not None
            and place == self._place(other)
        )

    def _place(self, tensor: Tensor) -> tuple[str, int] | None:
        address = tensor.data_ptr()
        at = bisect_right(self._starts, address) - 1
        if not tensor.is_contiguous() or at < 0 or address + tensor.nbytes > self._found[at].stop:
            return None
        mapping = self._found[at]
        return mapping.file, address - mapping.start + mapping.offset


def read_file_mappings() -> FileMappings:
    """The mappings at this moment; none where the system does not tell."""
    try:
        text = _SMAPS.read_text("utf-8", "surrogateescape")
    except OSError:
        return FileMappings()
    return FileMappings(
        _mapping(found) for found in _MAPPING.finditer(text) if _is_untouched(found["fields"])
    )


def _is_untouched(fields: str) -> bool:
    own = _OWN_PAGES.findall(fields)
    return len(own) == 2 and not any(map(int, own))


def _mapping(found: re.Match[str]) -> _Mapping:
    start, stop, offset = (int(found[name], 16) for name in ("start", "stop", "offset"))
    return _Mapping(start, stop, offset, found["file"])


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.is_conj(), tensor.is_neg()
