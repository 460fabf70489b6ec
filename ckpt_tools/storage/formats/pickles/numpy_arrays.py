"""numpy in pickles: its numbers become Python's, and its arrays can become tensors."""

from __future__ import annotations

import math
import re

import numpy
import torch

from ckpt_tools.storage.formats.pickles.blob import copy_to_storage
from ckpt_tools.storage.formats.pickles.opaque_object import OpaqueObject
from ckpt_tools.storage.formats.pickles.pickle_limits import MalformedFileError
from ckpt_tools.storage.formats.pickles.python2_strings import bytes_of_string
from ckpt_tools.storage.formats.pickles.tensors import Storage, tensor_over_storage

__all__ = ["NUMPY_ARRAY", "ArrayConverter", "read_numpy_scalar"]

NUMPY_ARRAY = "numpy.ndarray"

_SCALAR = re.compile(r"[biufcUS][0-9]{1,6}")
_TORCH_DTYPES = {
    **{f"f{width}": getattr(torch, f"float{8 * width}") for width in (2, 4, 8)},
    **{f"i{width}": getattr(torch, f"int{8 * width}") for width in (1, 2, 4, 8)},
    **{f"u{width}": getattr(torch, f"uint{8 * width}") for width in (1, 2, 4, 8)},
    **{"c8": torch.complex64, "c16": torch.complex128, "b1": torch.bool},
}


def read_numpy_scalar(dtype: object = None, raw: object = None, *_: object) -> object:
    """Return the Python number or string of one numpy item from its dtype and its bytes.

    Other kinds of items, such as dates, give an OpaqueObject. Raises MalformedFileError for the
    wrong number of bytes.
    """
    code, order = _parse_dtype(dtype)
    # Pickles of Python 2 hold bytes as strings, each character of which is a byte.
    raw = bytes_of_string(raw) if isinstance(raw, str) else raw
    if not _SCALAR.fullmatch(code) or not isinstance(raw, bytes):
        return OpaqueObject("numpy.generic", (dtype, raw))
    # The pattern keeps out dtypes of Python objects, whose bytes numpy would take for addresses.
    kind = numpy.dtype(order + code)
    if len(raw) != kind.itemsize or kind.itemsize > 1 << 16:
        raise MalformedFileError(f"a numpy number of {len(raw):,} bytes where {code} has {kind.itemsize:,}")
    return numpy.frombuffer(raw, kind)[0].item()


class ArrayConverter:
    """Makes tensors of arrays. Arrays that share their bytes become tensors that share theirs."""

    def __init__(self) -> None:
        self._storages: dict[tuple[int, str, str], tuple[object, torch.UntypedStorage]] = {}

    def from_state(self, array: OpaqueObject, state: object) -> object:
        """Return the tensor of an array with the state (version, shape, dtype, fortran, bytes).

        An array that can be no tensor is returned as it is, with its state. Old files leave the
        version out.
        """
        array.state = state
        if isinstance(state, tuple) and len(state) in (4, 5):
            shape, dtype, fortran, raw = state[-4:]
            return self._make_tensor(array, raw, dtype, shape, "F" if fortran else "C")
        return array

    def from_buffer(
        self, raw: object = None, dtype: object = None, shape: object = (), order: object = "C"
    ) -> object:
        """Return the tensor of an array that numpy's ``_frombuffer`` makes, which protocol 5 uses.

        An array that can be no tensor gives an OpaqueObject.
        """
        array = OpaqueObject(NUMPY_ARRAY, (raw, dtype, shape, order))
        return self._make_tensor(array, raw, dtype, shape, order)

    def _make_tensor(
        self, array: OpaqueObject, raw: object, dtype: object, shape: object, order: object
    ) -> object:
        code, byte_order = _parse_dtype(dtype)
        kind = _TORCH_DTYPES.get(code)
        raw = bytes_of_string(raw) if isinstance(raw, str) else raw
        if kind is None or not isinstance(raw, bytes | bytearray):
            return array
        sizes = tuple(shape) if isinstance(shape, tuple | list) else ()
        if not all(type(size) is int and size >= 0 for size in sizes) or len(sizes) > 64:
            raise MalformedFileError("a numpy array whose shape is no short tuple of counts")
        if math.prod(sizes) * kind.itemsize != len(raw):
            raise MalformedFileError(f"a numpy array of shape {sizes} with {len(raw):,} bytes of {code}")
        storage = Storage(self._copy_bytes(raw, code, byte_order, kind), kind)
        return tensor_over_storage(storage, 0, sizes, _strides(sizes, order == "F"), kind)

    def _copy_bytes(
        self, raw: bytes | bytearray, code: str, order: str, kind: torch.dtype
    ) -> torch.UntypedStorage:
        key = (id(raw), code, order)
        if key not in self._storages:
            storage = copy_to_storage(raw)
            if order == ">" and kind.itemsize > 1:
                storage.byteswap(kind)
            # The bytes are kept, too: their identity must not be given to others.
            self._storages[key] = (raw, storage)
        return self._storages[key][1]


def _parse_dtype(dtype: object) -> tuple[str, str]:
    """Return numpy's code of a type, such as f4, and its byte order.

    For anything but a plain type they are "" and "=".
    """
    if type(dtype) is not OpaqueObject or dtype.name != "numpy.dtype" or not dtype.args:
        return "", "="
    code, state, order = dtype.args[0], dtype.state, "="
    if not isinstance(code, str):
        return "", "="
    # The state of a dtype is (version, byte order, …).
    if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
        order = state[1]
    return code.lstrip("<>|="), order


def _strides(sizes: tuple[int, ...], fortran: bool) -> tuple[int, ...]:
    """Return the strides of an array without gaps.

    In Fortran's order the first index runs fastest, in C's the last.
    """
    lengths = sizes if fortran else sizes[::-1]
    # A length of 0 counts as 1, as in the strides that torch gives to empty tensors.
    strides = [math.prod(max(1, size) for size in lengths[:at]) for at in range(len(lengths))]
    return tuple(strides if fortran else strides[::-1])
