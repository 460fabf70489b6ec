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
# A view with strides of 0 repeats its storage, so that a few bytes of a file can claim any memory
# as soon as somebody copies it. Views up to this many bytes, or this many times their storage, are
# accepted.
_FREE_BYTES = 1 << 26
_MAX_REPEATS = 16

# The classes are named for their element types: torch.FloatStorage. Untyped storages count bytes.
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
    f"torch.{name}": value for name, value in sorted(vars(torch).items()) if isinstance(value, torch.dtype)
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
    """Return the element type that a storage class such as ``torch.FloatStorage`` names.

    Raises MalformedFileError.
    """
    name = kind.name if type(kind) is OpaqueObject else ""
    prefix = name.rpartition(".")[2].removesuffix("Storage")
    if not name.startswith("torch.") or prefix not in _STORAGES:
        raise MalformedFileError(f"a storage of the unknown type {name or type(kind).__name__}")
    return _STORAGES[prefix]


def tensor_over_storage(
    storage: object, offset: object, size: object, stride: object, dtype: torch.dtype
) -> Tensor:
    """Return a tensor over a storage; ``offset`` and ``stride`` count elements.

    Raises MalformedFileError for a tensor that reaches beyond the storage, or that repeats it too
    often.
    """
    if type(storage) is not Storage:
        raise MalformedFileError(f"a tensor over something that is no storage ({type(storage).__name__})")
    sizes, strides = _require_counts(size), _require_counts(stride)
    (start,) = _require_counts((offset,))
    if len(sizes) != len(strides):
        raise MalformedFileError(f"a tensor with {len(sizes)} sizes and {len(strides)} strides")
    elements, end = 1, start + 1
    for length, step in zip(sizes, strides, strict=True):
        elements *= length
        end += (length - 1) * step
    stored = storage.bytes.nbytes() // dtype.itemsize
    # A tensor without elements needs no byte behind its offset.
    if (end if elements else start) > stored:
        raise MalformedFileError(
            f"a tensor of shape {sizes} that reaches element {end:,} of a storage of {stored:,}"
        )
    if elements > max(_FREE_BYTES // dtype.itemsize, _MAX_REPEATS * stored):
        raise MalformedFileError(f"a tensor that repeats {stored:,} stored numbers to {elements:,}")
    return torch.empty(0, dtype=dtype).set_(storage.bytes, start, sizes, strides)


def _require_counts(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > 64:
        raise MalformedFileError("a tensor whose shape is no short tuple of integers")
    for value in values:
        if type(value) is not int or not 0 <= value <= _LARGEST:
            # Python refuses to print integers of more than some thousand digits.
            is_short = type(value) is int and abs(value) <= _LARGEST + 1
            shown = value if is_short else type(value).__name__
            raise MalformedFileError(f"a tensor with the size, stride or offset {shown}")
    return tuple(values)


def _rebuild_tensor(
    storage: object = None, offset: object = 0, size: object = (), stride: object = (), *_: object
) -> Tensor:
    """Make a tensor of the arguments that all releases of torch write; others do not matter."""
    dtype = storage.dtype if type(storage) is Storage else torch.uint8
    if dtype in _QUANTISED:
        raise MalformedFileError(f"a plain tensor over a storage of {dtype}")
    return tensor_over_storage(storage, offset, size, stride, dtype)


def _rebuild_tensor_v2(*args: object) -> object:
    return _apply_flags(_rebuild_tensor(*args[:4]), args[6] if len(args) > 6 else None)


def _rebuild_tensor_v3(*args: object) -> object:
    dtype = args[6] if len(args) > 6 else None
    if not isinstance(dtype, torch.dtype) or dtype in _QUANTISED:
        raise MalformedFileError("a tensor without a type")
    tensor = tensor_over_storage(args[0], args[1], args[2], args[3], dtype)
    return _apply_flags(tensor, args[7] if len(args) > 7 else None)


def _apply_flags(tensor: Tensor, metadata: object) -> Tensor:
    """Return the lazy conjugate or negative of a tensor, if the flags of its views ask for one."""
    flags = metadata if isinstance(metadata, dict) else {}
    if flags.get("conj") is True and tensor.is_complex():
        tensor = tensor.conj()
    return torch._neg_view(tensor) if flags.get("neg") is True else tensor


def _first_argument(value: object = None, *_: object) -> object:
    return value


def _rebuild_from_type(function: object = None, kind: object = None, args: object = (), *_: object) -> object:
    name = function.name if type(function) is OpaqueObject else ""
    if name not in TENSOR_REBUILDERS or type(args) is not tuple:
        # A subclass that keeps its values elsewhere, such as a distributed tensor.
        return OpaqueObject(name, args if type(args) is tuple else ())
    return TENSOR_REBUILDERS[name](*args)


_QUANTISED = frozenset({torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4})

TENSOR_REBUILDERS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    # A parameter, or a tensor of another device, is its first argument.
    "torch._utils._rebuild_parameter": _first_argument,
    "torch._utils._rebuild_parameter_with_state": _first_argument,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first_argument,
    "torch._utils._rebuild_device_tensor_from_numpy": _first_argument,
    "torch._utils._rebuild_xla_tensor": _first_argument,
    "torch.nn.parameter.Parameter": _first_argument,
    "torch.autograd.variable.Variable": _first_argument,
    # The pickles inside TorchScript archives mark the types of their lists.
    "torch.jit._pickle.build_intlist": _first_argument,
    "torch.jit._pickle.build_tensorlist": _first_argument,
    "torch.jit._pickle.build_doublelist": _first_argument,
    "torch.jit._pickle.build_boollist": _first_argument,
    "torch.jit._pickle.restore_type_tag": _first_argument,
}
for _module in ("torch._tensor", "torch.tensor"):
    TENSOR_REBUILDERS[f"{_module}._rebuild_from_type"] = _rebuild_from_type
    TENSOR_REBUILDERS[f"{_module}._rebuild_from_type_v2"] = _rebuild_from_type
