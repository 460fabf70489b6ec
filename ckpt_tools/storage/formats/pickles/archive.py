"""The zip format of ``torch.save``, and of TorchScript, which keeps more than one pickle.

A pickle names its storages by keys, and the bytes of each storage are a record of the archive
beside the pickle.
"""

from __future__ import annotations

# zipfile looks this codec up while it reads, at a time when nothing may be imported any more.
import encodings.cp437  # noqa: F401
import io
import sys
import zipfile
from collections.abc import Callable
from typing import IO, cast

import torch

from ckpt_tools.storage.formats.pickles.blob import Blob, copy_to_storage
from ckpt_tools.storage.formats.pickles.instructions import read_pickle
from ckpt_tools.storage.formats.pickles.pickle_limits import Limits, MalformedFileError
from ckpt_tools.storage.formats.pickles.tensors import Storage, storage_dtype
from ckpt_tools.storage.formats.pickles.value_resolver import SafeResolver

__all__ = ["ZIP_MAGIC", "Archive", "BlobReader", "read_archive"]

ZIP_MAGIC = b"PK\x03\x04"
# Bounds on what one archive may cost, as multiples of its own size. Weights shrink to half at best
# when they are compressed, and nobody reads a record that is stored as it is more than four times.
_MAX_INFLATION = 100
_MAX_COPIES = 4
_ALLOWANCE = 1 << 26  # bytes that even a tiny archive may cost


def read_archive(
    blob: Blob, limits: Limits, inner: Callable[[bytes], object], pickle: str = "data.pkl"
) -> object:
    """Return the value of one pickle of an archive, whose storages are records beside it.

    ``inner`` reads a pickle that is nested in this one. Raises MalformedFileError.
    """
    archive = Archive(blob)
    if pickle not in archive.records:
        raise MalformedFileError(f"a zip archive that torch.save did not write (there is no {pickle} in it)")
    data = archive.read(pickle)
    folder = pickle.removesuffix(".pkl")
    storages = _StorageRecords(archive, folder)
    # Without a single storage the weights, if there are any, are numpy arrays.
    arrays = not any(name.startswith(f"{folder}/") for name in archive.records)
    resolver = SafeResolver(limits, inner=inner, storages=storages.load, arrays=arrays)
    return read_pickle(data, resolver, limits)[0]


class Archive:
    """The records of a zip archive by their names without the folder that holds them all."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self._zip = zipfile.ZipFile(cast("IO[bytes]", BlobReader(blob)))
        self._inflation_left = _MAX_INFLATION * len(blob.data) + _ALLOWANCE
        self._copies_left = _MAX_COPIES * len(blob.data) + _ALLOWANCE
        self._storages: dict[str, torch.UntypedStorage] = {}
        records = self._zip.infolist()
        # torch.save puts all records of an archive into one folder.
        folder = records[0].filename.partition("/")[0] + "/" if records else ""
        self.records = {record.filename.removeprefix(folder): record for record in records}
        if len(self.records) != len(records):
            raise MalformedFileError("an archive in which two records have one name")
        # A hostile archive may list thousands of records over the same bytes, each of which would
        # be copied when it is read.
        if sum(_stored_size(record) for record in records) > len(blob.data):
            raise MalformedFileError("an archive whose records claim more bytes than it has")

    def read(self, name: str) -> bytes:
        """Return the bytes of a record.

        Raises MalformedFileError if there is no such record, if it is compressed by another method
        than deflate, or if reading it would cost more than the archive's size justifies.
        """
        record = self.records.get(name)
        if record is None:
            raise MalformedFileError(f"an archive without {name[:100]}")
        if record.compress_type == zipfile.ZIP_STORED:
            start = self._data_start(record)
            self._copies_left -= record.file_size
            if self._copies_left < 0:
                raise MalformedFileError(f"an archive that wants its record {name[:100]} over and over again")
            return cast(bytes, self._blob.data[start : start + record.file_size])
        self._inflation_left -= record.file_size
        if record.compress_type != zipfile.ZIP_DEFLATED or self._inflation_left < 0:
            raise MalformedFileError(
                f"an archive whose record {name[:100]} claims to hold {record.file_size:,} bytes"
            )
        return self._zip.read(record)

    def storage(self, name: str) -> torch.UntypedStorage:
        """Return the bytes of a record as a storage, the same object at every call.

        The storage is memory-mapped where the record lies uncompressed in a file, and a copy
        otherwise. Raises MalformedFileError under the conditions of ``read``.
        """
        if name not in self._storages:
            record = self.records.get(name)
            if record is None or record.compress_type != zipfile.ZIP_STORED:
                self._storages[name] = copy_to_storage(self.read(name))
            else:
                self._storages[name] = self._blob.storage(self._data_start(record), record.file_size)
        return self._storages[name]

    def _data_start(self, record: zipfile.ZipInfo) -> int:
        """Return where a stored record's bytes begin.

        They follow the record's local header: 30 bytes, then a name and extra fields, whose lengths
        stand in the header. Those need not be the lengths in the archive's table of contents.
        """
        at = record.header_offset
        header = self._blob.data[at : at + 30] if at >= 0 else b""
        name_length = int.from_bytes(header[26:28], "little")
        extra_length = int.from_bytes(header[28:30], "little")
        start = at + 30 + name_length + extra_length
        is_encrypted = record.flag_bits & 1
        reaches_beyond_end = start + record.file_size > len(self._blob.data)
        if header[:4] != ZIP_MAGIC or is_encrypted or reaches_beyond_end:
            raise MalformedFileError(
                f"an archive whose record {record.filename[:100]} is not where its table of contents says"
            )
        return start


def _stored_size(record: zipfile.ZipInfo) -> int:
    is_stored = record.compress_type == zipfile.ZIP_STORED
    return record.file_size if is_stored else record.compress_size


class _StorageRecords:
    """The storages of one pickle by their keys, in this machine's byte order."""

    def __init__(self, archive: Archive, folder: str) -> None:
        self._archive = archive
        self._folder = folder
        self._storages: dict[str, torch.UntypedStorage] = {}
        order = archive.read("byteorder") if "byteorder" in archive.records else b"little"
        if order not in (b"little", b"big"):
            raise MalformedFileError("an archive with an unknown byte order")
        self._swap = order.decode() != sys.byteorder

    def load(self, pid: object) -> Storage:
        """Return the storage of a persistent id ("storage", type, key, device, elements)."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] not in ("storage", b"storage"):
            raise MalformedFileError("a persistent id that names no storage")
        _, kind, key, _, count = pid
        dtype = storage_dtype(kind)
        if type(key) is not str or type(count) is not int or count < 0:
            raise MalformedFileError("a storage without a key or a size")
        if key not in self._storages:
            self._storages[key] = self._read_record(key, dtype, count)
        nbytes = self._storages[key].nbytes()
        if count * dtype.itemsize > nbytes:
            raise MalformedFileError(f"a storage of {count:,} {dtype} in a record of {nbytes:,} bytes")
        return Storage(self._storages[key], dtype)

    def _read_record(self, key: str, dtype: torch.dtype, count: int) -> torch.UntypedStorage:
        name = f"{self._folder}/{key}"
        if not count and name not in self._archive.records:
            return torch.UntypedStorage(0)
        storage = self._archive.storage(name)
        if self._swap and dtype.itemsize > 1:
            # The archive's own storage may be mapped from the file, so that a copy is swapped.
            storage = storage.clone()
            storage.byteswap(dtype)
        return storage


class BlobReader(io.RawIOBase):
    """The seekable binary file that zipfile and tarfile want, over the bytes of a Blob."""

    def __init__(self, blob: Blob) -> None:
        self._data = blob.data
        self._at = 0

    def seekable(self) -> bool:
        """Return True: a Blob can be read from any position."""
        return True

    def readable(self) -> bool:
        """Return True: reading is all that a Blob can do."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position and return it. Raises OSError for a negative position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        if base + offset < 0:
            raise OSError("a negative position")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Return up to ``size`` bytes from the position on, or all that are left."""
        stop = len(self._data) if size is None or size < 0 else self._at + size
        content = cast(bytes, self._data[self._at : stop])
        self._at += len(content)
        return content
