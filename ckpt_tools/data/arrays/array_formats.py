"""The formats of array files: each reader lists the arrays in a file of its format.

A reader looks at names, shapes and types alone where the format allows. Nothing that a file claims
about sizes is believed before it has been compared with the bytes that are there, and nothing in a
file is executed. Readers raise whatever a damaged file leads them to; ``find_array`` translates it.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from ckpt_tools.data.arrays.stored_array import StoredArray, are_class_numbers, max_decompressed_bytes
from ckpt_tools.errors import CheckpointError, DataError
from ckpt_tools.storage.formats.pickles import OpaqueObject, load_pickle

__all__ = ["ARRAY_READERS"]

_MAX_HEADER_BYTES = 1024  # numpy takes seconds to parse some headers that are longer


def _find_in_npy(path: Path) -> dict[str, StoredArray]:
    with path.open("rb") as stream:
        shape, dtype = _read_npy_header(stream, max_decompressed_bytes(path))
        start = stream.tell()

    def read() -> Tensor:
        _require_bytes(shape, dtype, path.stat().st_size - start)
        # Mode "c" is copy-on-write: torch warns about arrays that cannot be written to.
        return _as_tensor(np.load(path, mmap_mode="c", allow_pickle=False))

    return {"": StoredArray(str(path), shape, dtype.name, read)}


def _find_in_npz(path: Path) -> dict[str, StoredArray]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            with _open_entry(archive, entry) as stream:
                shape, dtype = _read_npy_header(stream, max_decompressed_bytes(path))
            arrays[name] = StoredArray(
                f"{path}[{name}]", shape, dtype.name, partial(_read_npz_entry, path, entry)
            )
    return arrays


def _read_npz_entry(path: Path, entry: zipfile.ZipInfo) -> Tensor:
    if entry.file_size > max_decompressed_bytes(path):
        raise ValueError(f"it claims to hold {entry.file_size:,} bytes, which is out of all proportion")
    with zipfile.ZipFile(path) as archive:
        with _open_entry(archive, entry) as stream:
            shape, dtype = _read_npy_header(stream, entry.file_size)
            _require_bytes(shape, dtype, entry.file_size - stream.tell())
        with _open_entry(archive, entry) as stream:
            return _as_tensor(np.lib.format.read_array(stream, allow_pickle=False))


def _open_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> IO[bytes]:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # numpy writes no other
        raise ValueError(f"{entry.filename} is compressed by method {entry.compress_type}")
    return archive.open(entry)


def _read_npy_header(stream: IO[bytes], available: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the shape and type in front of an array.

    Raises ValueError if the array needs more bytes than are ``available``.
    """
    version = np.lib.format.read_magic(stream)
    # From version 2 on the length field is wider. Version 3 differs in names of record fields.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read(stream, max_header_size=_MAX_HEADER_BYTES)
    except (MemoryError, RecursionError):  # Python's parser raises these for many nested brackets
        raise ValueError("a header that is nested without end") from None
    if min(shape, default=0) < 0:
        raise ValueError(f"the shape {shape}")
    _require_bytes(shape, dtype, available)
    return shape, dtype


def _require_bytes(shape: tuple[int, ...], dtype: np.dtype[Any], available: int) -> None:
    """Raise ValueError if an array needs more bytes than follow.

    It is called before memory is allocated for the array.
    """
    needed = math.prod(shape) * dtype.itemsize
    if needed > available:
        raise ValueError(f"{dtype.name} {shape} takes {needed:,} bytes, {available:,} follow")


def _as_tensor(array: npt.NDArray[Any]) -> Tensor:
    if array.dtype.itemsize > 8:  # long double, which torch does not have
        array = array.astype(np.float32)
    # Torch accepts the machine's own byte order only.
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _find_in_pt(path: Path) -> dict[str, StoredArray]:
    try:
        content = load_pickle(path)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{path}: ")
        advice = "Save a plain tensor with torch.save(images, path)."
        raise DataError(f"{path}: it cannot be read: {reason} {advice}") from error
    if isinstance(content, tuple | list):
        if len(content) == 2:
            images, labels = content[0], _list_to_tensor(content[1])
            if isinstance(images, Tensor) and isinstance(labels, Tensor) and _are_labels_of(labels, images):
                label_array = _stored_tensor(f"{path}[1]", labels)
                return {"": _stored_tensor(str(path), images), "labels": label_array}
            content = [images, labels]
        content = _join_batches(path, content)
    if isinstance(content, Tensor):
        return {"": _stored_tensor(str(path), content)}
    if not isinstance(content, dict):
        type_name = content.name if type(content) is OpaqueObject else type(content).__name__
        raise DataError(f"{path}: expected a tensor or a dict of tensors, found {type_name}.")
    values = {str(name): _list_to_tensor(value) for name, value in content.items()}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return {name: _stored_tensor(f"{path}[{name}]", tensor) for name, tensor in tensors.items()}


def _list_to_tensor(value: object) -> object:
    """Return a list of class numbers as a tensor, and every other value as it is."""
    if isinstance(value, list | tuple) and value and are_class_numbers(value):
        return torch.tensor(value)
    return value


def _are_labels_of(labels: Tensor, images: Tensor) -> bool:
    return labels.ndim == 1 and labels.shape == images.shape[:1]


def _join_batches(path: Path, content: Sequence[object]) -> object:
    """Return the samples in a list: all batches joined if they look alike, else its first part.

    A pair (images, labels) has parts of different shapes, so the first part is the images.
    """
    shapes = {part.shape[1:] if isinstance(part, Tensor) and part.ndim > 1 else None for part in content}
    if len(content) > 1 and len(shapes) == 1 and None not in shapes:
        batches = [part for part in content if isinstance(part, Tensor)]
        # A pickle can refer to one tensor many times, and grow out of proportion when joined.
        if sum(batch.nbytes for batch in batches) > max_decompressed_bytes(path):
            raise DataError(f"{path}: expected batches, found the same few repeated. Do not use this file.")
        return torch.cat(batches)
    return content[0] if content else None


def _stored_tensor(label: str, tensor: Tensor) -> StoredArray:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        dtype = f"{tensor.layout} {dtype}"
    return StoredArray(label, tuple(tensor.shape), dtype, tensor.detach)


def _find_in_safetensors(path: Path) -> dict[str, StoredArray]:
    arrays = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # a file handle, not a dict
            entry = file.get_slice(name)
            dtype = _SAFETENSORS_TYPES.get(entry.get_dtype(), entry.get_dtype())
            shape = tuple(entry.get_shape())
            arrays[name] = StoredArray(
                f"{path}[{name}]", shape, dtype, partial(_read_safetensors, path, name)
            )
    return arrays


def _read_safetensors(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


_SAFETENSORS_TYPES = {
    "U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip

ARRAY_READERS: Mapping[str, Callable[[Path], dict[str, StoredArray]]] = {
    ".npz": _find_in_npz,
    ".npy": _find_in_npy,
    ".pt": _find_in_pt,
    ".safetensors": _find_in_safetensors,
}
