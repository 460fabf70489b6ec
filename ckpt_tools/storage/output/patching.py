"""Making an output from the source's own file.

The kernel copies the source's data behind a new header, and a few tensors are overwritten. What
stays the same does not go through this process's memory to be written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from ckpt_tools.contract import Checkpoint
from ckpt_tools.storage.files.checkpoint_files import find_checkpoint_files
from ckpt_tools.storage.formats.safetensors_file import data_offset, read_safetensors_header
from ckpt_tools.storage.output.byte_transfer import (
    BLOCK_BYTES,
    copy_range,
    flush_in_background,
    write_at,
)
from ckpt_tools.storage.output.hashing import hash_in_background
from ckpt_tools.storage.output.safetensors_layout import (
    FilePart,
    Layout,
    encode_header,
    verify_and_hash,
)
from ckpt_tools.storage.provenance import BLANK_DIGEST, Seal, add_seal, seal_header
from ckpt_tools.storage.tensor_bytes import raw_bytes

__all__ = ["CopyableSource", "OutputDigests", "find_copyable_source", "write_patched_copy"]

_LARGE = 1 << 26  # bytes of data, from which on a block of padding does not matter
_STEP = 1 << 27  # bytes after which the disk is told to start writing
_SMALL = 1 << 20  # a replaced tensor up to this size is copied and overwritten: gaps cost more
# A header has at least this many bytes of padding. The library pads by fewer, so that no program
# that uses it makes an equal header.
_MARGIN = 8

MakeMetadata = Callable[[str], Mapping[str, str]]  # from the source's SHA-256
_Entry = Mapping[str, Any]


@dataclass(frozen=True)
class OutputDigests:
    """SHA-256 of a source ("" where there is none) and of the output made from it."""

    source: str
    output: str
    size: int  # of the output, bytes


@dataclass(frozen=True)
class CopyableSource:
    """A safetensors file of which an output keeps all tensors.

    ``entries`` are those of its header, under the keys of the output.
    """

    path: Path
    start: int  # of the data in the file
    size: int  # of the data, bytes
    entries: Mapping[str, _Entry]

    def parts(self, start: int, replaced: Mapping[str, Tensor]) -> list[FilePart]:
        """Return the tensors in the order of a file whose data begins at ``start``."""
        spans = sorted((*entry["data_offsets"], key) for key, entry in self.entries.items())
        return [FilePart(key, start + begin, end - begin, replaced.get(key)) for begin, end, key in spans]

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """Return an output's first bytes: the header's length and the header with its padding."""
        text = encode_header(self.entries, metadata)
        start = 8 + len(text) + _MARGIN
        if self.size >= _LARGE and self.start % 8 == 0:
            # Where source and output are apart by whole blocks, their data lies at the same places
            # of pages, which the kernel copies faster.
            start += (self.start - start) % BLOCK_BYTES
        else:
            # The format asks for data that begins at a multiple of 8.
            start += -start % 8
        return (start - 8).to_bytes(8, "little") + text.ljust(start - 8)


def find_copyable_source(checkpoint: Checkpoint) -> CopyableSource | None:
    """Return a checkpoint's file if an output can be a copy of its data; else None.

    It must be one safetensors file, all of whose tensors were taken, under their own keys but for a
    prefix. Raises CheckpointError, OSError, ValueError.
    """
    source = find_checkpoint_files(checkpoint.path)
    if checkpoint.format != "safetensors" or len(source.files) != 1 or source.shard_of is not None:
        return None
    path, start = source.files[0], data_offset(source.files[0])
    header = read_safetensors_header(path)
    header.pop("__metadata__", None)
    if list(header) != [checkpoint.prefix + key for key in checkpoint.tensors]:
        return None
    entries = dict(zip(checkpoint.tensors, header.values(), strict=True))
    original = CopyableSource(path, start, path.stat().st_size - start, entries)
    return original if _covers_data(original, checkpoint.tensors) else None


def _covers_data(original: CopyableSource, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the tensors follow each other without gaps over all of the data."""
    end = 0
    for part in original.parts(0, {}):
        if part.at != end or part.size != tensors[part.name].nbytes:
            return False
        end += part.size
    return end == original.size


def write_patched_copy(
    original: CopyableSource,
    path: Path,
    replaced: Mapping[str, Tensor],
    describe: MakeMetadata,
    source_sha256: str = "",
) -> tuple[OutputDigests, dict[str, str]]:
    """Write a new file, read it back and compare it byte by byte; return its digests and metadata.

    ``describe`` makes the metadata from the source's SHA-256, which is computed meanwhile unless
    ``source_sha256`` is given. The seal is added to them. Raises OSError, ValueError.
    """
    with original.path.open("rb", buffering=0) as source, path.open("x+b", buffering=0) as file:
        with (
            hash_in_background(source.fileno(), source_sha256) as source_digest,
            flush_in_background(file.fileno()) as flush,
        ):
            # All digests have the same length, so that the header's size is known before they are.
            draft = describe(source_sha256 or BLANK_DIGEST)
            start = len(original.header(add_seal(draft, Seal(BLANK_DIGEST, original.size))))
            parts = original.parts(start, replaced)
            write_parts(parts, source.fileno(), file.fileno(), start - original.start, flush)
            source_sha256 = source_digest()
        with hash_in_background(file.fileno(), start=start) as data_digest:
            os.fsync(file.fileno())  # the disk works while the data is hashed
            header, metadata = seal_header(
                original.header, describe(source_sha256), data_digest(), original.size
            )
        write_at(file.fileno(), header, 0)
        os.fsync(file.fileno())
        layout = Layout(header, parts, source.fileno(), start - original.start)
        size = os.fstat(file.fileno()).st_size
        output_sha256 = verify_and_hash(file.fileno(), size, layout)
        return OutputDigests(source_sha256, output_sha256, size), metadata


def write_parts(
    parts: list[FilePart], source: int, target: int, shift: int, flush: Callable[[], None]
) -> None:
    """Write all parts of an output but its header into an open file.

    ``flush`` is called now and then, to have the disk work meanwhile. A part without a value has
    its bytes in the source, ``shift`` bytes before its place in the output. Raises OSError.
    """
    for start, stop in _runs_to_copy(parts):
        for to in range(start, stop, _STEP):
            copy_range(source, target, min(_STEP, stop - to), at=to - shift, to=to)
            if stop - start > _STEP:
                flush()
    for part in parts:
        if part.value is not None:
            write_at(target, raw_bytes(part.value).data, part.at)


def _runs_to_copy(parts: list[FilePart]) -> Iterator[tuple[int, int]]:
    """Yield start and end of the stretches to copy: all but large replaced tensors."""
    for is_copied, run in groupby(parts, lambda part: part.value is None or part.size <= _SMALL):
        if is_copied:
            stretch = list(run)
            yield stretch[0].at, stretch[-1].at + stretch[-1].size
