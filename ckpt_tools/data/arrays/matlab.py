"""Read numeric arrays from MATLAB files of version 5, the format of the SVHN data set.

Source of the format: "MAT-File Format", MathWorks. The project does not use scipy's reader, because
that ends the whole process on some damaged files. This reader believes no size that the file claims
before it has compared it with the bytes that are there.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MatlabArray", "matlab_arrays"]

# A file is a header and then elements. An element is a tag (type and length) and its content.
_HEADER_BYTES = 128
_TAG_BYTES = 8
_MATRIX, _COMPRESSED = 14, 15  # types of elements that hold an array

# Numpy's types for the type codes of stored values, and for the classes of arrays. They may differ:
# MATLAB stores an array of doubles as bytes if its values fit.
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "float64", 7: "float32", 8: "int8", 9: "uint8", 10: "int16", 11: "uint16"}
_CLASSES |= {12: "int32", 13: "uint32", 14: "int64", 15: "uint64"}

_DESCRIPTION_BYTES = 4096  # the type, shape and name of an array stand within its first bytes
_MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class MatlabArray:
    """Name, shape and numpy type (``kind``) of an array, and where its element lies in its file.

    ``byte_order`` is numpy's "<" or ">". ``start`` and ``size`` count bytes: of the element with
    its tag or, if the array is compressed, of the zlib stream within it.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    byte_order: str
    start: int
    size: int
    compressed: bool

    @property
    def nbytes(self) -> int:
        """Bytes that the values take in memory."""
        return math.prod(self.shape) * np.dtype(self.kind).itemsize

    def read(self) -> npt.NDArray[Any]:
        """Read the values, as numpy's type ``kind``.

        Raises ValueError or zlib.error for a damaged file.
        """
        content = _read_content(self, self.nbytes + _DESCRIPTION_BYTES)
        *_, (code, values) = _iterate_elements(content, self.byte_order, 4)
        stored = np.dtype(self.byte_order + _TYPES.get(code, "V0"))
        if code not in _TYPES or len(values) != math.prod(self.shape) * stored.itemsize:
            raise ValueError(f"{self.name}: {len(values):,} bytes for the shape {self.shape}")
        # MATLAB stores columns first.
        return np.frombuffer(values, stored).astype(self.kind).reshape(self.shape, order="F")


def matlab_arrays(file: Path) -> dict[str, MatlabArray]:
    """Find the numeric arrays in a file, by name, without reading their values.

    Raises ValueError or zlib.error for a damaged file.
    """
    file_size = file.stat().st_size
    with file.open("rb") as stream:
        mark = stream.read(_HEADER_BYTES)[-2:]  # "MI", written as a number of 16 bits
        if mark not in (b"IM", b"MI"):
            raise ValueError("no MATLAB file of version 5")
        byte_order = "<" if mark == b"IM" else ">"
        arrays: dict[str, MatlabArray] = {}
        position = _HEADER_BYTES
        while position + _TAG_BYTES <= file_size:
            stream.seek(position)
            code, length = _decode_tag(stream.read(_TAG_BYTES), byte_order)
            content_start = position + _TAG_BYTES
            if length > file_size - content_start:
                available = file_size - content_start
                raise ValueError(f"{length:,} bytes announced where {available:,} follow")
            if code in (_MATRIX, _COMPRESSED):
                compressed = code == _COMPRESSED
                start = content_start if compressed else position
                size = content_start + length - start
                array = _read_description(MatlabArray(file, "", (), "", byte_order, start, size, compressed))
                if array is not None:
                    arrays[array.name] = array
            position = content_start + length
    return arrays


def _read_description(blank: MatlabArray) -> MatlabArray | None:
    """Return the array with its name, shape and kind; None for text, cells and the like."""
    elements = _iterate_elements(_read_content(blank, _DESCRIPTION_BYTES), blank.byte_order, 3)
    (_, flags), (_, dimensions), (_, name) = elements
    # The lowest byte of the flags is the class; others say whether the array is complex or global.
    array_class = int.from_bytes(flags[:4], "little" if blank.byte_order == "<" else "big") & 0xFF
    sizes = np.frombuffer(dimensions[: 4 * _MAX_DIMENSIONS], blank.byte_order + "i4")
    shape = tuple(int(size) for size in sizes)
    if array_class not in _CLASSES:
        return None
    if min(shape, default=-1) < 0 or len(dimensions) > 4 * _MAX_DIMENSIONS:
        raise ValueError(f"an array of shape {shape}")
    return replace(blank, name=name.decode("latin-1"), shape=shape, kind=_CLASSES[array_class])


def _read_content(array: MatlabArray, max_bytes: int) -> bytes:
    """Read the beginning of an array's element, tag included, and decompress it where needed."""
    with array.file.open("rb") as stream:
        stream.seek(array.start)
        if not array.compressed:
            return stream.read(min(max_bytes, array.size))
        # The limit holds for the output: a small stream may decompress to gigabytes.
        return zlib.decompressobj().decompress(stream.read(array.size), max_bytes)


def _iterate_elements(content: bytes, byte_order: str, count: int) -> Iterator[tuple[int, bytes]]:
    """Yield type and content of the first ``count`` elements within an array's own element.

    Raises ValueError if there are fewer.
    """
    position = _TAG_BYTES
    for _ in range(count):
        tag = content[position : position + _TAG_BYTES].ljust(_TAG_BYTES, b"\0")
        code, length = _decode_tag(tag, byte_order)
        if code >> 16:  # the small format: up to four bytes of content stand within the tag
            code, length = code & 0xFFFF, code >> 16
            start, end = position + 4, position + _TAG_BYTES
        else:
            start = position + _TAG_BYTES
            end = start + length + -length % 8  # elements are padded to multiples of 8 bytes
        if start + length > len(content):
            raise ValueError("an array that ends too early")
        yield code, content[start : start + length]
        position = end


def _decode_tag(tag: bytes, byte_order: str) -> tuple[int, int]:
    """Return the type and the length in bytes that a tag announces."""
    code, length = np.frombuffer(tag, byte_order + "u4").tolist()
    return code, length
