"""Writing tensors from memory to a safetensors file, which is read back and compared.

The library writes the file. It sorts the header's entries, and takes neither tensors with gaps nor
tensors that share memory; both are dealt with here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from ckpt_tools.errors import OutputError
from ckpt_tools.storage.formats.safetensors_file import (
    data_offset,
    load_safetensors,
    read_safetensors_header,
)
from ckpt_tools.storage.output.atomic_write import sync_to_disk
from ckpt_tools.storage.output.hashing import hash_in_background
from ckpt_tools.storage.output.patching import OutputDigests
from ckpt_tools.storage.output.safetensors_layout import (
    FilePart,
    Layout,
    encode_header,
    verify_and_hash,
)
from ckpt_tools.storage.provenance import BLANK_DIGEST, Seal, add_seal, seal_header

__all__ = ["check_header", "total_bytes", "write_and_verify"]

# This holds the place of the header's digest and is longer than one, so that the header ends up
# with more padding than the library ever writes.
_ROOMY_DIGEST = BLANK_DIGEST + "0" * 8


def write_and_verify(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source_sha256: str = ""
) -> OutputDigests:
    """Write a file from memory, read it back and compare.

    Raises OSError, ValueError and the library's errors.
    """
    sealed_metadata = _write(path, tensors, metadata)
    check_header(path, tensors, sealed_metadata)
    start, header = data_offset(path), read_safetensors_header(path)
    spans = {key: header[key]["data_offsets"] for key in tensors}
    parts = [FilePart(key, start + begin, end - begin, tensors[key]) for key, (begin, end) in spans.items()]
    with path.open("rb", buffering=0) as file:
        size = path.stat().st_size
        output_sha256 = verify_and_hash(file.fileno(), size, Layout(file.read(start), parts))
        return OutputDigests(source_sha256, output_sha256, size)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Write a file, put its header in order, and return the metadata in it.

    They are sealed if they are those of an output.
    """
    dense = {key: tensor.detach() for key, tensor in tensors.items()}
    for key in _keys_to_copy(tensors):
        plain = dense[key].resolve_conj().resolve_neg()
        dense[key] = plain.clone(memory_format=torch.contiguous_format)
    blank_seal = Seal(BLANK_DIGEST, total_bytes(tensors), _ROOMY_DIGEST)
    try:
        save_file(dense, path, metadata=add_seal(metadata, blank_seal))
    except KeyError as error:
        # The library looks a tensor's type up in a table of those that it can write.
        key = next((key for key, tensor in tensors.items() if str(tensor.dtype) in str(error)), "a tensor")
        raise OutputError(
            f"{key}: expected a type that safetensors can hold, found {error}. Save the checkpoint in a "
            "narrower type, complex64 for one."
        ) from error
    with (
        path.open("r+b") as file,
        hash_in_background(file.fileno(), start=data_offset(path)) as data_digest,
    ):
        sync_to_disk(path)  # the disk works while the data is hashed
        sealed_metadata = _finish_header(file, path, list(tensors), metadata, data_digest())
    sync_to_disk(path)
    return sealed_metadata


def _keys_to_copy(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the keys of tensors that have to be copied before the library can write them.

    It takes neither tensors with gaps nor tensors that share memory. Of those that share, the first
    stays.
    """
    keys = {
        key
        for key, tensor in tensors.items()
        if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg()
    }
    # In the order of their memory, a tensor that begins before the last one ends shares bytes with
    # it.
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if key not in keys and tensor.data_ptr() < end:
            keys.add(key)
        elif key not in keys:
            end = tensor.data_ptr() + tensor.nbytes
    return keys


def _finish_header(
    file: BinaryIO, path: Path, keys: list[str], metadata: Mapping[str, str], data_sha256: str
) -> dict[str, str]:
    """Seal the header, put its entries into the source's order, and return the metadata in it.

    The library has sorted the entries by type and name. The header keeps its length. Raises
    ValueError if it does not fit.
    """
    stored = read_safetensors_header(path)
    stored.pop("__metadata__", None)
    entries = {key: stored[key] for key in keys}
    length = data_offset(path) - 8

    # Blanks behind the JSON are the format's own way of padding a header.
    def make_header(metadata: Mapping[str, str]) -> bytes:
        return length.to_bytes(8, "little") + encode_header(entries, metadata).ljust(length)

    data_bytes = path.stat().st_size - 8 - length
    text, sealed_metadata = seal_header(make_header, metadata, data_sha256, data_bytes)
    if len(text) != 8 + length:
        raise ValueError(f"a header of {len(text) - 8:,} bytes, for which there are {length:,}")
    file.seek(0)
    file.write(text)
    return sealed_metadata


def check_header(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise ValueError unless the library reads the keys, types, shapes and metadata in a file.

    The library maps the file: nothing of the tensors is read.
    """
    written, written_metadata = load_safetensors(path)
    if list(written) != list(tensors) or written_metadata != dict(metadata):
        raise ValueError("keys or metadata that read back differently")
    for key, tensor in tensors.items():
        if written[key].dtype != tensor.dtype or written[key].shape != tensor.shape:
            raise ValueError(f"{key} reading back differently from what was written")


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return how many bytes of data a file with these tensors has."""
    return sum(tensor.nbytes for tensor in tensors.values())
