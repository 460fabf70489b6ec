"""Tensors over storages: every size, stride and offset is checked before torch sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ckpt_tools.storage.formats.pickles.opaque_object import OpaqueObject
from ckpt_tools.storage.formats.pickles.pickle_limits import MalformedFileError

__all__ = [
    "DTYPES",
    "NOT_DENSE",
    "TENSOR_REBUILDERS",
    "Storage",
    "storage_dtype",
    "tensor_over_storage",
]

_LARGEST = (1 << 63) - 1
_UNFOLDED = 1 << 26  # bytes; up to here a view may be any multiple of its storage
_REPEATS = 16

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "QInt8": torch.qint8,
    "QInt32": torch.qint32,
    "QUInt8": torch.quint8,
    "QUInt4x2": torch.quint4x2,
    "QUInt2x4": torch.quint2x4,
    "Untyped": torch.uint8,
    "_Untyped": torch.uint8,
}

DTYPES = {
    f"torch.{name}": value
    for name, value in sorted(vars(torch).items())
    if isinstance(value, torch.dtype)
}

# Rebuilders whose result is no dense tensor on the CPU, and what it is instead.
NOT_DENSE = {
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "without values (on the device meta)",
    "torch._utils._rebuild_wrapper_subclass": "of a subclass that keeps its values elsewhere",
    "torch.nn.parameter.UninitializedParameter": "without values (lazy)",
    "torch.nn.parameter.UninitializedBuffer": "without values (lazy)",
}


@dataclass(frozen=True)
class Storage:
    """Bytes of a file, and the type that a tensor over them has."""

    bytes: torch.UntypedStorage
    dtype: torch.dtype


def storage_dtype(kind: object) -> torch.dtype:
    """The element type that a storage class names, such as ``torch.FloatStorage``. Raises Fault."""
    name = kind.name if type(kind) is OpaqueObject else ""
    found = (
        _STORAGES.get(name.rpartition(".")[2].removesuffix("Storage"))
        if name.startswith("torch.")
        else None
    )
    if found is None:
        raise MalformedFileError(f"a storage of the unknown type {name or type(kind).__name__}")
    return found


def tensor_over_storage(
    storage: object, offset: object, size: object, stride: object, dtype: torch.dtype
) -> Tensor:
    """A view of a storage; offset and strides count elements. Raises Fault for one that leaves the storage."""
    if type(storage) is not Storage:
        raise MalformedFileError(
            f"a tensor over something that is no storage ({type(storage).__name__})"
        )
    sizes, strides = _counts(size), _counts(stride)
    (start,) = _counts((offset,))
    if len(sizes) != len(strides):
        raise MalformedFileError(f"a tensor with {len(sizes)} sizes and {len(strides)} strides")
    elements, extent = 1, start + 1
    for length, step in zip(sizes, strides, strict=True):
        elements *= length
        extent += (length - 1) * step
    held = storage.bytes.nbytes() // dtype.itemsize
    if (extent if elements else start) > held:
        raise MalformedFileError(
            f"a tensor of shape {sizes} that reaches element {extent:,} of a storage of {held:,}"
        )
    if elements > max(_UNFOLDED // dtype.itemsize, _REPEATS * held):
        raise MalformedFileError(f"a tensor that repeats {held:,} stored numbers to {elements:,}")
    return torch.empty(0, dtype=dtype).set_(storage.bytes, start, sizes, strides)


def _counts(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > 64:
        raise MalformedFileError("a tensor whose shape is no short tuple of integers")
    for value in values:
        if type(value) is not int or not 0 <= value <= _LARGEST:
            shown = (
                value if type(value) is int and abs(value) <= _LARGEST + 1 else type(value).__name__
            )
            raise MalformedFileError(f"a tensor with the size, stride or offset {shown}")
    return tuple(values)


def _rebuild(
    storage: object = None, offset: object = 0, size: object = (), stride: object = (), *_: object
) -> Tensor:
    dtype = storage.dtype if type(storage) is Storage else torch.uint8
    if dtype in _QUANTISED:
        raise MalformedFileError(f"a plain tensor over a storage of {dtype}")
    return tensor_over_storage(storage, offset, size, stride, dtype)


def _rebuild_v2(*args: object) -> object:
    return _with_metadata(_rebuild(*args[:4]), args[6] if len(args) > 6 else None)


def _rebuild_v3(*args: object) -> object:
    dtype = args[6] if len(args) > 6 else None
    if not isinstance(dtype, torch.dtype) or dtype in _QUANTISED:
        raise MalformedFileError("a tensor without a type")
    return _with_metadata(
        tensor_over_storage(args[0], args[1], args[2], args[3], dtype),
        args[7] if len(args) > 7 else None,
    )


def _with_metadata(tensor: Tensor, metadata: object) -> Tensor:
    """The lazy conjugate or negative that the flags ask for."""
    flags = metadata if isinstance(metadata, dict) else {}
    if flags.get("conj") is True and tensor.is_complex():
        tensor = tensor.conj()
    return torch._neg_view(tensor) if flags.get("neg") is True else tensor


def _first_tensor(value: object = None, *_: object) -> object:
    return value


def _from_type(
    function: object = None, kind: object = None, args: object = (), *_: object
) -> object:
    name = function.name if type(function) is OpaqueObject else ""
    if name not in TENSOR_REBUILDERS or type(args) is not tuple:
        # A subclass that keeps its values elsewhere, such as a distributed tensor.
        return OpaqueObject(name, args if type(args) is tuple else ())
    return TENSOR_REBUILDERS[name](*args)


_QUANTISED = frozenset({torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4})

TENSOR_REBUILDERS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _first_tensor,
    "torch._utils._rebuild_parameter_with_state": _first_tensor,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first_tensor,
    "torch._utils._rebuild_device_tensor_from_numpy": _first_tensor,
    "torch._utils._rebuild_xla_tensor": _first_tensor,
    "torch.nn.parameter.Parameter": _first_tensor,
    "torch.autograd.variable.Variable": _first_tensor,
    # The pickles inside TorchScript archives mark the types of their lists.
    "torch.jit._pickle.build_intlist": _first_tensor,
    "torch.jit._pickle.build_tensorlist": _first_tensor,
    "torch.jit._pickle.build_doublelist": _first_tensor,
    "torch.jit._pickle.build_boollist": _first_tensor,
    "torch.jit._pickle.restore_type_tag": _first_tensor,
}
for _module in ("_tensor", "tensor"):
    TENSOR_REBUILDERS[f"torch.{_module}._rebuild_from_type"] = TENSOR_REBUILDERS[
        f"torch.{_module}._rebuild_from_type_v2"
    ] = _from_type
