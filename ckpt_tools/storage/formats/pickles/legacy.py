"""The format of ``torch.save`` before PyTorch 1.6: pickles, then storages.

PyTorch still writes it on request. The file has a magic number, the number of the protocol, a
description of the writer's machine, the object, the list of its storages' keys (one pickle each),
and at the end the storages, each as a count of elements and the elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ckpt_tools.storage.formats.pickles.blob import Blob
from ckpt_tools.storage.formats.pickles.instructions import read_pickle
from ckpt_tools.storage.formats.pickles.opaque_object import OpaqueObject
from ckpt_tools.storage.formats.pickles.pickle_limits import Limits, MalformedFileError
from ckpt_tools.storage.formats.pickles.tensors import Storage, storage_dtype
from ckpt_tools.storage.formats.pickles.value_resolver import SafeResolver

__all__ = [
    "LEGACY_MAGIC",
    "LegacyStorages",
    "StorageCollector",
    "read_legacy",
    "slice_storage",
    "storage_at",
    "storage_key",
]

LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # torch.serialization.MAGIC_NUMBER as pickle writes it
_PROTOCOL = 1001
_HEAD_PICKLES = 3  # before the object: magic number, protocol, sizes of the writer's integers


def read_legacy(blob: Blob, limits: Limits, inner: Callable[[bytes], object]) -> object:
    """Return the object in a file whose storages follow the pickle. Raises MalformedFileError.

    The pickle is read twice. The first time tells which storages it refers to, and where it ends;
    there the storages begin. The second time builds the tensors over them.
    """
    data, start = blob.data, 0
    head: list[object] = []
    for _ in range(_HEAD_PICKLES):
        value, start = read_pickle(data, StorageCollector(), limits, start)
        head.append(value)
    if head[1] != _PROTOCOL:
        raise MalformedFileError("a file of an unknown protocol of torch.save")
    collector = StorageCollector()
    _, end = read_pickle(data, collector, limits, start)
    keys, end = read_pickle(data, StorageCollector(), limits, end)
    storages = _read_storages(blob, collector.sizes, keys, end)
    # Every tensor is pickled as a call of a function whose name begins with _rebuild_.
    arrays = data.find(b"_rebuild_", start, end) < 0
    return read_pickle(
        data,
        SafeResolver(limits, inner=inner, storages=storages.load, arrays=arrays),
        limits,
        start,
    )[0]


class StorageCollector:
    """A resolver that only notes which storages a pickle refers to.

    ``sizes`` are their element types and counts of elements, by their keys.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, tuple[torch.dtype, int]] = {}

    def resolve_global(self, name: str) -> object:
        """Return the bare name."""
        return OpaqueObject(name)

    def resolve_call(self, function: object, args: tuple[object, ...]) -> object:
        """Return a placeholder, as something has to stand on the stack."""
        return OpaqueObject("", args)

    def apply_state(self, value: object, state: object) -> object:
        """Return the value without its state."""
        return value

    def resolve_persistent_id(self, pid: object) -> object:
        """Note a storage's type and size, and return a placeholder. Raises MalformedFileError."""
        if isinstance(pid, tuple) and len(pid) == 6 and storage_key(pid[0]) == "storage":
            dtype, key, count = storage_dtype(pid[1]), storage_key(pid[2]), pid[4]
            if type(count) is not int or count < 0:
                raise MalformedFileError("a storage without a size")
            self.sizes.setdefault(key, (dtype, count))
        return OpaqueObject("torch.storage")


def _read_storages(
    blob: Blob, sizes: Mapping[str, tuple[torch.dtype, int]], keys: object, start: int
) -> LegacyStorages:
    """Return the storages that follow each other from ``start`` on, in the order of ``keys``."""
    if not isinstance(keys, list):
        raise MalformedFileError("a file without a list of its storages")
    storages: dict[str, Storage] = {}
    for key in map(storage_key, keys):
        # A key that comes twice would be read twice, and a hostile file can repeat one without end.
        if key not in sizes or key in storages:
            raise MalformedFileError("a file with a storage that nothing in it uses")
        dtype, count = sizes[key]
        storages[key], start = storage_at(blob, start, dtype)
        nbytes = storages[key].bytes.nbytes()
        if nbytes != count * dtype.itemsize:
            raise MalformedFileError(f"a storage of {nbytes:,} bytes where {count:,} {dtype} are announced")
    return LegacyStorages(storages)


def storage_at(blob: Blob, start: int, dtype: torch.dtype) -> tuple[Storage, int]:
    """Return the storage whose count of elements stands at ``start``, and where the storage ends.

    Raises MalformedFileError.
    """
    header = blob.data[start : start + 8]
    if len(header) < 8:
        raise MalformedFileError("a file that ends before its last storage")
    nbytes = int.from_bytes(header, "little", signed=True) * dtype.itemsize
    return Storage(blob.storage(start + 8, nbytes), dtype), start + 8 + max(0, nbytes)


class LegacyStorages:
    """Storages by their keys, and views of them: a persistent id may name a part of a storage."""

    def __init__(self, storages: Mapping[str, Storage]) -> None:
        self._storages = storages

    def load(self, pid: object) -> object:
        """Return the storage or class behind a persistent id. Raises MalformedFileError.

        A storage's id is ("storage", type, key, device, elements, view); a view is (key, offset,
        elements) or None.
        """
        if isinstance(pid, tuple) and len(pid) > 1 and storage_key(pid[0]) == "module":
            return pid[1]  # the class of a module, with its source code beside it
        if not isinstance(pid, tuple) or len(pid) != 6 or storage_key(pid[0]) != "storage":
            raise MalformedFileError("a persistent id that names no storage")
        dtype, key, view = storage_dtype(pid[1]), storage_key(pid[2]), pid[5]
        if key not in self._storages:
            raise MalformedFileError("a file without one of the storages that its tensors use")
        storage = self._storages[key].bytes
        if view is None:
            return Storage(storage, dtype)
        _, offset, count = view if isinstance(view, tuple) and len(view) == 3 else (None,) * 3
        return Storage(slice_storage(storage, offset, count, dtype), dtype)


def slice_storage(
    storage: torch.UntypedStorage, offset: object, count: object, dtype: torch.dtype
) -> torch.UntypedStorage:
    """Return ``count`` elements of a storage from the element ``offset`` on.

    Raises MalformedFileError for a part that reaches beyond the end of the storage.
    """
    if type(offset) is not int or type(count) is not int or offset < 0 or count < 0:
        raise MalformedFileError("a view of a storage without an offset or a size")
    if (offset + count) * dtype.itemsize > storage.nbytes():
        raise MalformedFileError(
            f"a view that reaches element {offset + count:,} of a storage of {storage.nbytes():,} bytes"
        )
    start, stop = offset * dtype.itemsize, (offset + count) * dtype.itemsize
    return storage[start:stop]  # type: ignore[no-any-return]


def storage_key(value: object) -> str:
    """Return a storage's key as text; old files have integers and bytes.

    Raises MalformedFileError.
    """
    if isinstance(value, bytes):
        return value.decode("latin-1")
    # Addresses of 64 bits were keys once. Python refuses to print much larger integers.
    if not isinstance(value, str | int) or (isinstance(value, int) and abs(value) >> 64):
        raise MalformedFileError("a key of a storage that is no text")
    return str(value)
