"""Numeric arrays in MATLAB files of version 5, the format of SVHN. Nothing but sizes that fit the file is believed.

Source: "MAT-File Format", MathWorks. scipy's reader ends the whole process on some damaged files.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MatlabArray", "matlab_arrays"]

_HEADER = 128  # bytes; the last two tell the byte order
_MATRIX, _COMPRESSED = 14, 15
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "float64", 7: "float32", 8: "int8", 9: "uint8", 10: "int16", 11: "uint16", 12: "int32", 13: "uint32"}
_CLASSES |= {14: "int64", 15: "uint64"}
_START = 4096  # bytes of an array in which its type, shape and name stand
_DIMENSIONS = 64


@dataclass(frozen=True)
class MatlabArray:
    """Name, shape and type of an array, and where in its file it stands."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    order: str
    at: int
    size: int
    compressed: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the values in memory."""
        return math.prod(self.shape) * np.dtype(self.kind).itemsize

    def read(self) -> npt.NDArray[Any]:
        """The values, of the array's own type. Raises ValueError or zlib.error for a damaged file."""
        raw = _content(self, self.nbytes + _START)
        *_, (code, value) = _elements(raw, self.order, 4)
        stored = np.dtype(self.order + _TYPES.get(code, "V0"))
        if code not in _TYPES or len(value) != math.prod(self.shape) * stored.itemsize:
            raise ValueError(f"{self.name}: {len(value):,} bytes for the shape {self.shape}")
        return np.frombuffer(value, stored).astype(self.kind).reshape(self.shape, order="F")


def matlab_arrays(file: Path) -> dict[str, MatlabArray]:
    """The numeric arrays of a file by their names. Raises ValueError or zlib.error for a damaged file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        mark = stream.read(_HEADER)[-2:]
        if mark not in (b"IM", b"MI"):
            raise ValueError("no MATLAB file of version 5")
        order = "<" if mark == b"IM" else ">"
        found, at = {}, _HEADER
        while at + 8 <= size:
            stream.seek(at)
            code, length = _numbers(stream.read(8), order)
            if length > size - at - 8:
                raise ValueError(f"{length:,} bytes announced where {size - at - 8:,} follow")
            if code in (_MATRIX, _COMPRESSED):
                start = at if code == _MATRIX else at + 8
                held = length + 8 if code == _MATRIX else length
                array = _read_description(MatlabArray(file, "", (), "", order, start, held, code == _COMPRESSED))
                if array is not None:
                    found[array.name] = array
            at += 8 + length
    return found


def _read_description(blank: MatlabArray) -> MatlabArray | None:
    """The array with what its first bytes say; None for text, cells and the like."""
    (_, flags), (_, dimensions), (_, name) = _elements(_content(blank, _START), blank.order, 3)
    kind = _CLASSES.get(int.from_bytes(flags[:4], "little" if blank.order == "<" else "big") & 0xFF)
    shape = tuple(int(n) for n in np.frombuffer(dimensions[: 4 * _DIMENSIONS], blank.order + "i4"))
    if kind is None:
        return None
    if min(shape, default=-1) < 0 or len(dimensions) > 4 * _DIMENSIONS:
        raise ValueError(f"an array of shape {shape}")
    said = {"name": name.decode("latin-1"), "shape": shape, "kind": kind}
    return MatlabArray(**{**vars(blank), **said})


def _content(array: MatlabArray, most: int) -> bytes:
    """The first ``most`` bytes of an array's element, inflated."""
    with array.file.open("rb") as stream:
        stream.seek(array.at)
        if not array.compressed:
            return stream.read(min(most, array.size))
        return zlib.decompressobj().decompress(stream.read(array.size), most)


def _elements(raw: bytes, order: str, count: int) -> Iterator[tuple[int, bytes]]:
    """Type and bytes of the first elements within an array's. Raises ValueError if there are fewer."""
    at = 8  # behind the tag of the array
    for _ in range(count):
        code, length = _numbers(raw[at : at + 8].ljust(8, b"\0"), order)
        if code >> 16:  # four bytes at most stand in the tag itself
            code, length, start, after = code & 0xFFFF, code >> 16, at + 4, at + 8
        else:
            start, after = at + 8, at + 8 + length + -length % 8
        if start + length > len(raw):
            raise ValueError("an array that ends too early")
        yield code, raw[start : start + length]
        at = after


def _numbers(raw: bytes, order: str) -> tuple[int, int]:
    code, length = np.frombuffer(raw, order + "u4").tolist()
    return code, length
