"""The zip format of ``torch.save``, and of TorchScript, which keeps more than one pickle."""

from __future__ import annotations

import encodings.cp437  # noqa: F401  zipfile asks for it while it reads, when nothing may be imported any more
import io
import sys
import zipfile
from collections.abc import Callable
from typing import IO, cast

import torch

from ckpt_tools.storage.formats.pickles.blob import Blob, copy_tensor
from ckpt_tools.storage.formats.pickles.instructions import read_pickle
from ckpt_tools.storage.formats.pickles.pickle_limits import Limits, MalformedFileError
from ckpt_tools.storage.formats.pickles.tensors import Storage, storage_dtype
from ckpt_tools.storage.formats.pickles.value_resolver import SafeResolver

__all__ = ["ZIP_MAGIC", "Archive", "BlobReader", "read_archive"]

ZIP_MAGIC = b"PK\x03\x04"
_INFLATED = 100  # times the size of the whole archive; weights shrink to half at best
_COPIED = 4  # times, of records that are stored as they are; nobody reads one more often
_SLACK = 1 << 26


def read_archive(
    blob: Blob, limits: Limits, inner: Callable[[bytes], object], pickle: str = "data.pkl"
) -> object:
    """The value of one pickle of an archive, whose storages are records beside it. Raises Fault."""
    archive = Archive(blob)
    if pickle not in archive.records:
        raise MalformedFileError(
            f"a zip archive that torch.save did not write (there is no {pickle} in it)"
        )
    data = archive.read(pickle)
    folder = pickle.removesuffix(".pkl")
    storages = _Storages(archive, folder)
    # Arrays are the weights only where nothing else is.
    arrays = not any(name.startswith(f"{folder}/") for name in archive.records)
    return read_pickle(
        data, SafeResolver(limits, inner=inner, storages=storages.load, arrays=arrays), limits
    )[0]


class Archive:
    """The records of a zip archive by their names without the folder that holds them all."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self._zip = zipfile.ZipFile(cast("IO[bytes]", BlobReader(blob)))
        self._inflated = _INFLATED * len(blob.data) + _SLACK
        self._copied = _COPIED * len(blob.data) + _SLACK
        self._storages: dict[str, torch.UntypedStorage] = {}
        records = self._zip.infolist()
        folder = records[0].filename.partition("/")[0] + "/" if records else ""
        self.records = {record.filename.removeprefix(folder): record for record in records}
        if len(self.records) != len(records):
            raise MalformedFileError("an archive in which two records have one name")
        # Thousands of records over the same bytes would be copied as often.
        if sum(_stored_size(record) for record in records) > len(blob.data):
            raise MalformedFileError("an archive whose records claim more bytes than it has")

    def read(self, name: str) -> bytes:
        """The bytes of a record. Raises Fault if there is none, or if it inflates without measure."""
        record = self.records.get(name)
        if record is None:
            raise MalformedFileError(f"an archive without {name[:100]}")
        if record.compress_type == zipfile.ZIP_STORED:
            start = self._start(record)
            self._copied -= record.file_size
            if self._copied < 0:
                raise MalformedFileError(
                    f"an archive that wants its record {name[:100]} over and over again"
                )
            return cast(bytes, self._blob.data[start : start + record.file_size])
        self._inflated -= record.file_size
        if record.compress_type != zipfile.ZIP_DEFLATED or self._inflated < 0:
            raise MalformedFileError(
                f"an archive whose record {name[:100]} claims to hold {record.file_size:,} bytes"
            )
        return self._zip.read(record)

    def storage(self, name: str) -> torch.UntypedStorage:
        """The same as a storage, mapped where the record lies in the file as it is; one for each record."""
        if name not in self._storages:
            record = self.records.get(name)
            if record is None or record.compress_type != zipfile.ZIP_STORED:
                self._storages[name] = copy_tensor(self.read(name))
            else:
                self._storages[name] = self._blob.storage(self._start(record), record.file_size)
        return self._storages[name]

    def _start(self, record: zipfile.ZipInfo) -> int:
        """Where a stored record's bytes begin: behind its local header, whose length varies."""
        at = record.header_offset
        header = self._blob.data[at : at + 30] if at >= 0 else b""
        start = (
            at
            + 30
            + int.from_bytes(header[26:28], "little")
            + int.from_bytes(header[28:30], "little")
        )
        if (
            header[:4] != ZIP_MAGIC
            or record.flag_bits & 1
            or start + record.file_size > len(self._blob.data)
        ):
            raise MalformedFileError(
                f"an archive whose record {record.filename[:100]} is not where its table of contents says"
            )
        return start


def _stored_size(record: zipfile.ZipInfo) -> int:
    """Bytes of the archive that a record takes."""
    return record.file_size if record.compress_type == zipfile.ZIP_STORED else record.compress_size


class _Storages:
    """Storages by key; one record is read once."""

    def __init__(self, archive: Archive, folder: str) -> None:
        self._archive = archive
        self._folder = folder
        self._read: dict[str, torch.UntypedStorage] = {}
        order = archive.read("byteorder") if "byteorder" in archive.records else b"little"
        if order not in (b"little", b"big"):
            raise MalformedFileError("an archive with an unknown byte order")
        self._swap = order.decode() != sys.byteorder

    def load(self, pid: object) -> Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] not in ("storage", b"storage"):
            raise MalformedFileError("a persistent id that names no storage")
        _, kind, key, _, count = pid
        dtype = storage_dtype(kind)
        if type(key) is not str or type(count) is not int or count < 0:
            raise MalformedFileError("a storage without a key or a size")
        if key not in self._read:
            self._read[key] = self._storage(key, dtype, count)
        if count * dtype.itemsize > self._read[key].nbytes():
            raise MalformedFileError(
                f"a storage of {count:,} {dtype} in a record of {self._read[key].nbytes():,} bytes"
            )
        return Storage(self._read[key], dtype)

    def _storage(self, key: str, dtype: torch.dtype, count: int) -> torch.UntypedStorage:
        name = f"{self._folder}/{key}"
        if not count and name not in self._archive.records:
            return torch.UntypedStorage(0)
        storage = self._archive.storage(name)
        if self._swap and dtype.itemsize > 1:
            storage = storage.clone()
            storage.byteswap(dtype)
        return storage


class BlobReader(io.RawIOBase):
    """A Blob's bytes as the seekable file that zipfile and tarfile want."""

    def __init__(self, blob: Blob) -> None:
        self._data = blob.data
        self._at = 0

    def seekable(self) -> bool:
        """True."""
        return True

    def readable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        if base + offset < 0:
            raise OSError("a negative position")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """The bytes from the position on."""
        stop = len(self._data) if size is None or size < 0 else self._at + size
        found = cast(bytes, self._data[self._at : stop])
        self._at += len(found)
        return found
