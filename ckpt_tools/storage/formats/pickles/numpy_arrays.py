"""numpy's part: numbers of numpy types are numbers; arrays of plain numbers can become tensors."""

from __future__ import annotations

import math
import re

import numpy
import torch

from ckpt_tools.storage.formats.pickles.blob import copy_tensor
from ckpt_tools.storage.formats.pickles.opaque_object import OpaqueObject
from ckpt_tools.storage.formats.pickles.pickle_limits import MalformedFileError
from ckpt_tools.storage.formats.pickles.tensors import Storage, tensor_over_storage

__all__ = ["NUMPY_ARRAY", "NUMPY_DTYPE", "ArrayConverter", "read_numpy_scalar"]

NUMPY_ARRAY, NUMPY_DTYPE = "numpy.ndarray", "numpy.dtype"

_SCALAR = re.compile(r"[biufcUS][0-9]{1,6}")
_TORCH = {
    **{f"f{width}": getattr(torch, f"float{8 * width}") for width in (2, 4, 8)},
    **{f"i{width}": getattr(torch, f"int{8 * width}") for width in (1, 2, 4, 8)},
    **{f"u{width}": getattr(torch, f"uint{8 * width}") for width in (1, 2, 4, 8)},
    **{"c8": torch.complex64, "c16": torch.complex128, "b1": torch.bool},
}


def read_numpy_scalar(dtype: object = None, raw: object = None, *_: object) -> object:
    """The Python number or string of one numpy item; an Opaque where it is none."""
    code, order = _type(dtype)
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw
    if not _SCALAR.fullmatch(code) or not isinstance(raw, bytes):
        return OpaqueObject("numpy.generic", (dtype, raw))
    kind = numpy.dtype(order + code)
    if len(raw) != kind.itemsize or kind.itemsize > 1 << 16:
        raise MalformedFileError(
            f"a numpy number of {len(raw):,} bytes where {code} has {kind.itemsize:,}"
        )
    return numpy.frombuffer(raw, kind)[0].item()


class ArrayConverter:
    """Makes tensors of arrays. Arrays that share their bytes share them afterwards, too."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, str, str], tuple[object, torch.UntypedStorage]] = {}

    def from_state(self, array: OpaqueObject, state: object) -> object:
        """A tensor for ``ndarray.__setstate__``'s (version, shape, dtype, fortran, bytes), or the Opaque."""
        array.state = state
        if isinstance(state, tuple) and len(state) in (4, 5):
            shape, dtype, fortran, raw = state[-4:]
            return self._tensor(array, raw, dtype, shape, "F" if fortran else "C")
        return array

    def from_buffer(
        self, raw: object = None, dtype: object = None, shape: object = (), order: object = "C"
    ) -> object:
        """A tensor for numpy's ``_frombuffer``, which protocol 5 uses, or an Opaque."""
        return self._tensor(
            OpaqueObject(NUMPY_ARRAY, (raw, dtype, shape, order)), raw, dtype, shape, order
        )

    def _tensor(
        self, array: OpaqueObject, raw: object, dtype: object, shape: object, order: object
    ) -> object:
        code, byte_order = _type(dtype)
        kind = _TORCH.get(code)
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw
        if kind is None or not isinstance(raw, bytes | bytearray):
            return array
        sizes = tuple(shape) if isinstance(shape, tuple | list) else ()
        if not all(type(size) is int and size >= 0 for size in sizes) or len(sizes) > 64:
            raise MalformedFileError("a numpy array whose shape is no short tuple of counts")
        if math.prod(sizes) * kind.itemsize != len(raw):
            raise MalformedFileError(
                f"a numpy array of shape {sizes} with {len(raw):,} bytes of {code}"
            )
        storage = Storage(self._copy(raw, code, byte_order, kind), kind)
        return tensor_over_storage(storage, 0, sizes, _strides(sizes, order == "F"), kind)

    def _copy(
        self, raw: bytes | bytearray, code: str, order: str, kind: torch.dtype
    ) -> torch.UntypedStorage:
        key = (id(raw), code, order)
        if key not in self._copies:
            storage = copy_tensor(raw)
            if order == ">" and kind.itemsize > 1:
                storage.byteswap(kind)
            self._copies[key] = (raw, storage)  # the bytes stay, and with them their identity
        return self._copies[key][1]


def _type(dtype: object) -> tuple[str, str]:
    """numpy's code of a type, such as f4, and its byte order; ("", "=") for anything but plain types."""
    if (
        type(dtype) is not OpaqueObject
        or dtype.name != NUMPY_DTYPE
        or not dtype.args
        or not isinstance(dtype.args[0], str)
    ):
        return "", "="
    state = dtype.state
    order = (
        state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else "="
    )
    return dtype.args[0].lstrip("<>|="), order


def _strides(sizes: tuple[int, ...], fortran: bool) -> tuple[int, ...]:
    lengths = sizes if fortran else sizes[::-1]
    strides = [math.prod(max(1, size) for size in lengths[:at]) for at in range(len(lengths))]
    return tuple(strides if fortran else strides[::-1])
