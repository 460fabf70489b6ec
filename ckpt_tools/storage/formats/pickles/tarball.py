"""The tar format of ``torch.save`` before PyTorch 0.1.10: storages, tensors over them, a pickle that names these."""

from __future__ import annotations

import struct
import tarfile
from collections.abc import Callable
from typing import IO, cast

from torch import Tensor

from ckpt_tools.storage.formats.pickles.archive import BlobReader
from ckpt_tools.storage.formats.pickles.blob import Blob
from ckpt_tools.storage.formats.pickles.instructions import read_pickle
from ckpt_tools.storage.formats.pickles.legacy import (
    StorageCollector,
    slice_storage,
    storage_at,
    storage_key,
)
from ckpt_tools.storage.formats.pickles.pickle_limits import Limits, MalformedFileError
from ckpt_tools.storage.formats.pickles.tensors import Storage, storage_dtype, tensor_over_storage
from ckpt_tools.storage.formats.pickles.value_resolver import SafeResolver

__all__ = ["is_tar", "read_tar"]


def is_tar(head: bytes) -> bool:
    """Whether a file that starts with these bytes (512 are enough) is a tar archive."""
    return head[257:262] == b"ustar"


def read_tar(blob: Blob, limits: Limits, inner: Callable[[bytes], object]) -> object:
    """The value of the archive's pickle. Raises Fault."""
    with tarfile.open(fileobj=cast("IO[bytes]", BlobReader(blob)), mode="r:") as archive:
        members = {
            member.name: member
            for member in archive.getmembers()
            if member.isreg() and not member.issparse()
        }
    for name in ("storages", "tensors", "pickle"):
        if name not in members:
            raise MalformedFileError(
                f"a tar archive without {name}, which torch.save did not write"
            )
    starts = {name: member.offset_data for name, member in members.items()}
    storages = _storages(blob, limits, starts["storages"])
    tensors = _tensors(blob, limits, starts["tensors"], storages)

    def persistent(pid: object) -> object:
        if isinstance(pid, tuple):  # a class, with its source beside it
            return pid[0] if pid else None
        key = storage_key(pid)
        if key not in tensors and key not in storages:
            raise MalformedFileError("a persistent id that names no tensor")
        return tensors.get(key, storages.get(key))

    return read_pickle(
        blob.data, SafeResolver(limits, inner=inner, storages=persistent), limits, starts["pickle"]
    )[0]


def _storages(blob: Blob, limits: Limits, at: int) -> dict[str, Storage]:
    found: dict[str, Storage] = {}
    count, at = read_pickle(blob.data, StorageCollector(), limits, at)
    for _ in range(_count(count, blob)):
        described, at = read_pickle(blob.data, StorageCollector(), limits, at)
        key, _, kind = _items(described, 3)
        found[storage_key(key)], at = storage_at(blob, at, storage_dtype(kind))
    views, at = read_pickle(blob.data, StorageCollector(), limits, at)
    for view in views if isinstance(views, list) else []:
        target, root, offset, size = _items(view, 4)
        whole = _require_storage(found, root)
        found[storage_key(target)] = Storage(
            slice_storage(whole.bytes, offset, size, whole.dtype), whole.dtype
        )
    return found


def _tensors(
    blob: Blob, limits: Limits, at: int, storages: dict[str, Storage]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    count, at = read_pickle(blob.data, StorageCollector(), limits, at)
    for _ in range(_count(count, blob)):
        described, at = read_pickle(blob.data, StorageCollector(), limits, at)
        key, storage, _ = _items(described, 3)
        (dimensions,) = _integers(blob, "<i", at)
        if not 0 <= dimensions <= 64:
            raise MalformedFileError(f"a tensor of {dimensions} dimensions")
        numbers = _integers(
            blob, f"<{2 * dimensions + 1}q", at + 8
        )  # the count of dimensions takes 8 bytes
        at += 8 + 8 * len(numbers)
        over = _require_storage(storages, storage)
        size, stride = numbers[:dimensions], numbers[dimensions:-1]
        found[storage_key(key)] = tensor_over_storage(over, numbers[-1], size, stride, over.dtype)
    return found


def _count(value: object, blob: Blob) -> int:
    if type(value) is not int or not 0 <= value <= len(blob.data):
        raise MalformedFileError("a tar archive that does not say how much it holds")
    return value


def _items(value: object, count: int) -> tuple[object, ...]:
    if not isinstance(value, tuple | list) or len(value) != count:
        raise MalformedFileError("a tar archive whose storages or tensors are not described")
    return tuple(value)


def _require_storage(found: dict[str, Storage], key: object) -> Storage:
    if storage_key(key) not in found:
        raise MalformedFileError("a tar archive without one of the storages that its tensors use")
    return found[storage_key(key)]


def _integers(blob: Blob, layout: str, at: int) -> tuple[int, ...]:
    raw = blob.data[at : at + struct.calcsize(layout)]
    if len(raw) < struct.calcsize(layout):
        raise MalformedFileError("a tar archive that ends before its last tensor")
    return struct.unpack(layout, raw)
