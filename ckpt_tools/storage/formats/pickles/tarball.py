"""The tar format of ``torch.save`` before PyTorch 0.1.10.

Three members matter: ``storages`` (elements, and views of other storages), ``tensors`` (shapes over
storages) and ``pickle`` (the object, which names tensors and storages by their keys). Each of the
first two begins with a pickled count.
"""

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
    """Return whether a file that starts with these bytes (512 are enough) is a tar archive."""
    return head[257:262] == b"ustar"


def read_tar(blob: Blob, limits: Limits, inner: Callable[[bytes], object]) -> object:
    """Return the object in the archive's pickle. Raises MalformedFileError."""
    # "r:" takes no compressed archive, which could unfold to far more than its own size.
    with tarfile.open(fileobj=cast("IO[bytes]", BlobReader(blob)), mode="r:") as archive:
        members = {
            member.name: member for member in archive.getmembers() if member.isreg() and not member.issparse()
        }
    for name in ("storages", "tensors", "pickle"):
        if name not in members:
            raise MalformedFileError(f"a tar archive without {name}, which torch.save did not write")
    starts = {name: member.offset_data for name, member in members.items()}
    storages = _read_storages(blob, limits, starts["storages"])
    tensors = _read_tensors(blob, limits, starts["tensors"], storages)

    def resolve_persistent_id(pid: object) -> object:
        if isinstance(pid, tuple):  # the class of a module, with its source code beside it
            return pid[0] if pid else None
        key = storage_key(pid)
        if key not in tensors and key not in storages:
            raise MalformedFileError("a persistent id that names no tensor")
        return tensors.get(key, storages.get(key))

    resolver = SafeResolver(limits, inner=inner, storages=resolve_persistent_id)
    return read_pickle(blob.data, resolver, limits, starts["pickle"])[0]


def _read_storages(blob: Blob, limits: Limits, at: int) -> dict[str, Storage]:
    storages: dict[str, Storage] = {}
    count, at = read_pickle(blob.data, StorageCollector(), limits, at)
    for _ in range(_require_count(count, blob)):
        description, at = read_pickle(blob.data, StorageCollector(), limits, at)
        key, _, kind = _require_items(description, 3)
        storages[storage_key(key)], at = storage_at(blob, at, storage_dtype(kind))
    views, at = read_pickle(blob.data, StorageCollector(), limits, at)
    for view in views if isinstance(views, list) else []:
        key, root_key, offset, size = _require_items(view, 4)
        root = _require_storage(storages, root_key)
        part = slice_storage(root.bytes, offset, size, root.dtype)
        storages[storage_key(key)] = Storage(part, root.dtype)
    return storages


def _read_tensors(blob: Blob, limits: Limits, at: int, storages: dict[str, Storage]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    count, at = read_pickle(blob.data, StorageCollector(), limits, at)
    for _ in range(_require_count(count, blob)):
        description, at = read_pickle(blob.data, StorageCollector(), limits, at)
        key, storage_id, _ = _require_items(description, 3)
        (dimensions,) = _read_integers(blob, "<i", at)
        if not 0 <= dimensions <= 64:
            raise MalformedFileError(f"a tensor of {dimensions} dimensions")
        # Sizes, strides and the offset follow. The count of dimensions takes 8 bytes, of which 4
        # matter.
        integers = _read_integers(blob, f"<{2 * dimensions + 1}q", at + 8)
        at += 8 + 8 * len(integers)
        storage = _require_storage(storages, storage_id)
        size, stride, offset = integers[:dimensions], integers[dimensions:-1], integers[-1]
        tensors[storage_key(key)] = tensor_over_storage(storage, offset, size, stride, storage.dtype)
    return tensors


def _require_count(value: object, blob: Blob) -> int:
    # Each storage and each tensor takes a byte at least, so that a larger count is a lie.
    if type(value) is not int or not 0 <= value <= len(blob.data):
        raise MalformedFileError("a tar archive that does not say how much it holds")
    return value


def _require_items(value: object, count: int) -> tuple[object, ...]:
    if not isinstance(value, tuple | list) or len(value) != count:
        raise MalformedFileError("a tar archive whose storages or tensors are not described")
    return tuple(value)


def _require_storage(storages: dict[str, Storage], key: object) -> Storage:
    if storage_key(key) not in storages:
        raise MalformedFileError("a tar archive without one of the storages that its tensors use")
    return storages[storage_key(key)]


def _read_integers(blob: Blob, layout: str, at: int) -> tuple[int, ...]:
    raw = blob.data[at : at + struct.calcsize(layout)]
    if len(raw) < struct.calcsize(layout):
        raise MalformedFileError("a tar archive that ends before its last tensor")
    return struct.unpack(layout, raw)
