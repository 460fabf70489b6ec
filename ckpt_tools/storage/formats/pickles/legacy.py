"""The format of ``torch.save`` before PyTorch 1.6, still there as an option: pickles, and the storages behind them."""

from __future__ import annotations

from collections.abc import Callable

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
_SAME_MACHINE = (
    3  # pickles before the object: magic number, protocol, sizes of the writer's integers
)


def read_legacy(blob: Blob, limits: Limits, inner: Callable[[bytes], object]) -> object:
    """The value of a file whose storages follow the pickle. Raises Fault.

    The pickle is read twice: first for the storages it wants, and for its end, then over the storages found there.
    """
    data, start = blob.data, 0
    head: list[object] = []
    for _ in range(_SAME_MACHINE):
        value, start = read_pickle(data, StorageCollector(), limits, start)
        head.append(value)
    if head[1] != _PROTOCOL:
        raise MalformedFileError("a file of an unknown protocol of torch.save")
    scan = StorageCollector()
    _, end = read_pickle(data, scan, limits, start)
    keys, end = read_pickle(data, StorageCollector(), limits, end)
    storages = _behind(blob, scan, keys, end)
    arrays = data.find(b"_rebuild_", start, end) < 0
    return read_pickle(
        data,
        SafeResolver(limits, inner=inner, storages=storages.load, arrays=arrays),
        limits,
        start,
    )[0]


class StorageCollector:
    """Takes down which storages a pickle names, and makes nothing."""

    def __init__(self) -> None:
        self.wanted: dict[str, tuple[torch.dtype, int]] = {}

    def resolve_global(self, name: str) -> object:
        """The bare name."""
        return OpaqueObject(name)

    def resolve_call(self, function: object, args: tuple[object, ...]) -> object:
        """Nothing but something to put on the stack."""
        return OpaqueObject("", args)

    def apply_state(self, value: object, state: object) -> object:
        """The value without its state."""
        return value

    def resolve_persistent_id(self, pid: object) -> object:
        """Take down a storage's type and size."""
        if isinstance(pid, tuple) and len(pid) == 6 and storage_key(pid[0]) == "storage":
            dtype, key, count = storage_dtype(pid[1]), storage_key(pid[2]), pid[4]
            if type(count) is not int or count < 0:
                raise MalformedFileError("a storage without a size")
            self.wanted.setdefault(key, (dtype, count))
        return OpaqueObject("torch.storage")


def _behind(blob: Blob, scan: StorageCollector, keys: object, start: int) -> LegacyStorages:
    """The storages that stand one after the other from ``start`` on: a count, then the numbers."""
    if not isinstance(keys, list):
        raise MalformedFileError("a file without a list of its storages")
    found: dict[str, Storage] = {}
    for key in map(storage_key, keys):
        if key not in scan.wanted or key in found:
            raise MalformedFileError("a file with a storage that nothing in it uses")
        dtype, count = scan.wanted[key]
        found[key], start = storage_at(blob, start, dtype)
        if found[key].bytes.nbytes() != count * dtype.itemsize:
            raise MalformedFileError(
                f"a storage of {found[key].bytes.nbytes():,} bytes where {count:,} {dtype} are announced"
            )
    return LegacyStorages(found)


def storage_at(blob: Blob, start: int, dtype: torch.dtype) -> tuple[Storage, int]:
    """The storage whose count of numbers stands at ``start``, and where it ends. Raises Fault."""
    header = blob.data[start : start + 8]
    if len(header) < 8:
        raise MalformedFileError("a file that ends before its last storage")
    nbytes = int.from_bytes(header, "little", signed=True) * dtype.itemsize
    return Storage(blob.storage(start + 8, nbytes), dtype), start + 8 + max(0, nbytes)


class LegacyStorages:
    """Storages by key, and the parts of them that old files name as views."""

    def __init__(self, found: dict[str, Storage]) -> None:
        self.found = found

    def load(self, pid: object) -> object:
        """The storage or class behind a persistent id. Raises Fault."""
        if isinstance(pid, tuple) and len(pid) > 1 and storage_key(pid[0]) == "module":
            return pid[1]  # a class, with its source beside it
        if not isinstance(pid, tuple) or len(pid) != 6 or storage_key(pid[0]) != "storage":
            raise MalformedFileError("a persistent id that names no storage")
        dtype, key, view = storage_dtype(pid[1]), storage_key(pid[2]), pid[5]
        if key not in self.found:
            raise MalformedFileError("a file without one of the storages that its tensors use")
        whole = self.found[key].bytes
        return Storage(whole if view is None else self._view(whole, view, dtype), dtype)

    def _view(
        self, whole: torch.UntypedStorage, view: object, dtype: torch.dtype
    ) -> torch.UntypedStorage:
        _, offset, count = (
            view if isinstance(view, tuple) and len(view) == 3 else (None, None, None)
        )
        return slice_storage(whole, offset, count, dtype)


def slice_storage(
    whole: torch.UntypedStorage, offset: object, count: object, dtype: torch.dtype
) -> torch.UntypedStorage:
    """Part of a storage, in elements. Raises Fault if it reaches beyond the end."""
    if type(offset) is not int or type(count) is not int or offset < 0 or count < 0:
        raise MalformedFileError("a view of a storage without an offset or a size")
    if (offset + count) * dtype.itemsize > whole.nbytes():
        raise MalformedFileError(
            f"a view that reaches element {offset + count:,} of a storage of {whole.nbytes():,} bytes"
        )
    return whole[offset * dtype.itemsize : (offset + count) * dtype.itemsize]  # type: ignore[no-any-return]


def storage_key(value: object) -> str:
    """A storage's key as text; old files have integers and bytes. Raises Fault."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if not isinstance(value, str | int) or (isinstance(value, int) and abs(value) >> 64):
        raise MalformedFileError("a key of a storage that is no text")
    return str(value)
