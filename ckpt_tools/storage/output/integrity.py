"""Whether an output is still what was written.

A full disk, a bad copy or another program may have changed it since.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckpt_tools.location import Location, LocationLike
from ckpt_tools.remote.local_copies import iterate_remote_bytes
from ckpt_tools.storage.formats.safetensors_file import data_offset
from ckpt_tools.storage.output.hashing import hash_and_check
from ckpt_tools.storage.provenance import Seal
from ckpt_tools.storage.tensor_bytes import ByteArray

__all__ = ["FileDigest", "MeasuredOutput", "measure_output"]


@dataclass(frozen=True)
class FileDigest:
    """SHA-256 and size of a whole file, as a manifest holds them."""

    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class MeasuredOutput:
    """The digests that an output has now: of the file, and of the data behind its header."""

    file: FileDigest
    data_sha256: str
    data_bytes: int

    def describe_damage(self, seal: Seal, recorded: FileDigest | None) -> str:
        """Say how an output differs from what was written; empty if it does not.

        ``seal`` stands in the output itself, ``recorded`` in a manifest, if there is one.
        """
        if self.data_bytes != seal.data_bytes:
            return f"it holds {self.data_bytes:,} bytes of data, of {seal.data_bytes:,} that were written"
        if self.data_sha256 != seal.data_sha256:
            return "its data is not what was written: the SHA-256 differs"
        if recorded is not None and recorded != self.file:
            return "it is not the file that the manifest records: the SHA-256 differs"
        return ""


def measure_output(place: LocationLike) -> MeasuredOutput:
    """Read a safetensors file once, and return all of its digests.

    Of a remote file only the header needs to be at its place here: the file is read in pieces, and
    no copy is kept. Raises OSError, RemoteError.
    """
    location = Location.of(place)
    start = data_offset(location.path)
    data = hashlib.sha256()

    def add_data(at: int, piece: ByteArray) -> None:
        # A piece may begin within the header, which is no data.
        data.update(piece[max(0, start - at) :].data)

    if location.store is None:
        digest = _read_local(location.path, add_data)
    else:
        digest = _hash_pieces(iterate_remote_bytes(location.store, location.path), add_data)
    return MeasuredOutput(digest, data.hexdigest(), max(0, digest.size - start))


def _read_local(path: Path, receive: Callable[[int, ByteArray], None]) -> FileDigest:
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        return FileDigest(hash_and_check(file.fileno(), size, receive), size)


def _hash_pieces(pieces: Iterator[bytes], receive: Callable[[int, ByteArray], None]) -> FileDigest:
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        receive(size, np.frombuffer(piece, np.uint8))
        size += len(piece)
    return FileDigest(digest.hexdigest(), size)
