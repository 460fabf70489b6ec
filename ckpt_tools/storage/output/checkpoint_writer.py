"""Writing an output: a safetensors file with all of the source's tensors, some of them replaced.

The bytes go to a temporary file beside the target, which is synced, read back and compared with the
source's tensors and the replaced ones. Only then it takes the target's name, in one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import CheckpointError, OutputError
from ckpt_tools.remote.mirror import resolve_location
from ckpt_tools.storage.files.checkpoint_files import find_checkpoint_files
from ckpt_tools.storage.files.stamps import FileStamp, stamp_file
from ckpt_tools.storage.formats.safetensors_file import (
    data_offset,
    load_safetensors,
    read_safetensors_header,
)
from ckpt_tools.storage.output.atomic_write import check_target, sync_to_disk, write_atomically
from ckpt_tools.storage.output.change_detection import require_same_stamps, require_unchanged
from ckpt_tools.storage.output.hashing import hash_in_background
from ckpt_tools.storage.output.patching import (
    OutputDigests,
    find_copyable_source,
    write_patched_copy,
)
from ckpt_tools.storage.output.safetensors_layout import (
    FilePart,
    Layout,
    encode_header,
    verify_and_hash,
)
from ckpt_tools.storage.provenance import BLANK_DIGEST, Seal, add_seal, output_metadata, seal_header
from ckpt_tools.storage.reading import checkpoint_sha256

__all__ = ["OutputDigests", "check_output", "replace_tensors", "save", "write_safetensors"]

_PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar", ".pt2"})

# This holds the place of the header's digest and is longer than one, so that the header ends up
# with more padding than the library ever writes.
_ROOMY_DIGEST = BLANK_DIGEST + "0" * 8


def save(
    path: Path | str,
    checkpoint: Checkpoint,
    replacements: Mapping[str, Tensor],
    *,
    provenance: Mapping[str, object],
    overwrite: bool = False,
) -> str:
    """Write a checkpoint as a safetensors file, with some tensors replaced, and return its SHA-256.

    ``replacements`` maps keys of the checkpoint to tensors of the same shape, which are cast to the
    stored dtype. Every other tensor comes out bit for bit as it is in the source, under the same
    key and in the same order. ``provenance`` (anything JSON can hold) is added to the output's
    metadata. If it has ``source_sha256``, the source is not hashed once more.

    Raises OutputError, and leaves no file behind, if the target exists and ``overwrite`` is not
    set, if it is the source, if a replacement does not fit, if the source is no longer what was
    read, or if the file cannot be written or reads back differently.
    """
    return replace_tensors(
        path, checkpoint, replacements, provenance=provenance, overwrite=overwrite
    ).output


def replace_tensors(
    path: Path | str,
    checkpoint: Checkpoint,
    replacements: Mapping[str, Tensor],
    *,
    provenance: Mapping[str, object],
    overwrite: bool = False,
    replaces: FileStamp | None = None,
) -> OutputDigests:
    """Do what ``save`` does, and return the digest of the source, too.

    Hashing the source costs least while the output is written. ``replaces`` is the stamp of a
    damaged output of an earlier run, which is replaced without ``overwrite`` as long as it still is
    that file. Raises OutputError.
    """
    target = resolve_location(path)
    check_output(target, checkpoint.path, overwrite=overwrite or replaces is not None)
    tensors = _apply_replacements(checkpoint.tensors, replacements)
    stamps = require_unchanged(checkpoint)
    source_sha256 = str(provenance.get("source_sha256") or "")
    describe = partial(output_metadata, checkpoint, provenance)
    sources = _list_files(checkpoint.path)
    with _open_output(target, tensors, overwrite, sources, replaces) as temporary:
        original = find_copyable_source(checkpoint)
        if original is not None:
            new = {key: tensors[key] for key in replacements}
            digests, metadata = write_patched_copy(
                original, temporary, new, describe, source_sha256
            )
            _check_header(temporary, tensors, metadata)
        else:
            source_sha256 = source_sha256 or checkpoint_sha256(checkpoint.path)
            digests = _write_and_verify(temporary, tensors, describe(source_sha256), source_sha256)
        require_same_stamps(checkpoint, stamps)
    return digests


def write_safetensors(
    target: Path | str,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    overwrite: bool = False,
) -> OutputDigests:
    """Write tensors to a safetensors file, all or nothing, and return its digest and size.

    Tensors may share memory and need not be contiguous. Metadata made by ``output_metadata`` are
    sealed. Raises OutputError.
    """
    with _open_output(resolve_location(target), tensors, overwrite) as temporary:
        return _write_and_verify(temporary, tensors, metadata)


@contextmanager
def _open_output(
    target: Path,
    tensors: Mapping[str, Tensor],
    overwrite: bool,
    sources: Sequence[Path] = (),
    replaces: FileStamp | None = None,
) -> Iterator[Path]:
    """Give a temporary path; what is written there becomes ``target`` when all went well.

    Only those who may read all ``sources`` may read it. Raises OutputError for what the system
    refuses.
    """
    may_replace = None
    if replaces is not None and not overwrite:
        may_replace = partial(_is_still, target, replaces)
    replace = overwrite or replaces is not None
    try:
        with write_atomically(
            target, overwrite=replace, sources=sources, may_replace=may_replace
        ) as temporary:
            yield temporary
    except (OSError, SafetensorError, CheckpointError, ValueError) as error:
        raise OutputError(
            f"{target}: expected to write {_size(tensors):,} bytes there, found: {error}. "
            "Nothing was left behind; free space or choose another folder with --output."
        ) from error


def _is_still(target: Path, stamp: FileStamp) -> bool:
    """Return whether a file is the one that the stamp was taken of."""
    try:
        return stamp_file(target) == stamp
    except OSError:
        return False


def check_output(target: Path, source_path: Path | None, *, overwrite: bool) -> None:
    """Raise OutputError at once for a target that could not be written at the end.

    This is the source itself, a taken name, a name in a missing folder, or one by which other tools
    would take the safetensors file for a pickle.
    """
    if source_path is not None:
        _require_no_source(target, source_path)
    check_target(target, overwrite=overwrite)
    if target.suffix.lower() in _PICKLE_SUFFIXES:
        raise OutputError(
            f"{target}: expected a name that ends in .safetensors, which is what is written, "
            f"found {target.suffix}, which torch.load would take for a pickle. Name it "
            f"{target.with_suffix('.safetensors').name}."
        )


def _require_no_source(target: Path, source_path: Path) -> None:
    if any(_is_same(target, file) for file in _list_files(source_path)):
        raise OutputError(
            f"{target}: expected a file of its own, found the source checkpoint ({source_path}), "
            "which is never written to. Choose another name."
        )


def _list_files(source_path: Path) -> tuple[Path, ...]:
    source = find_checkpoint_files(source_path)
    return (*source.files, source.index) if source.index else source.files


def _is_same(target: Path, file: Path) -> bool:
    try:
        # Symbolic and hard links are other names of the same file.
        return target.samefile(file)
    except OSError:  # there is no such target
        return False


def _apply_replacements(
    tensors: Mapping[str, Tensor], replacements: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if unknown := [key for key in replacements if key not in tensors]:
        raise OutputError(
            f"{unknown[0]}: expected a key of the checkpoint, found none of that name. Check the "
            "model."
        )
    return {
        key: _cast_replacement(key, tensor, replacements[key]) if key in replacements else tensor
        for key, tensor in tensors.items()
    }


def _cast_replacement(key: str, stored: Tensor, value: Tensor) -> Tensor:
    if value.shape != stored.shape:
        raise OutputError(
            f"{key}: expected the stored shape {tuple(stored.shape)}, found {tuple(value.shape)}. "
            "Check the architecture."
        )
    value = value.detach().cpu()
    cast = value.to(stored.dtype)
    # A number that is finite in float32 may be infinite in the stored type, such as float16.
    finite = (value.to(torch.float64).isfinite() & cast.to(torch.float64).isfinite()).view(-1)
    if not finite.all():
        at = int((~finite).nonzero()[0])
        raise OutputError(
            f"{key}: expected finite numbers, found {float(value.reshape(-1)[at]):g} in element "
            f"{at}, which is {float(cast.reshape(-1)[at]):g} as "
            f"{str(stored.dtype).removeprefix('torch.')}. Save the checkpoint in a wider type, or "
            "look at the data."
        )
    return cast


def _write_and_verify(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source_sha256: str = ""
) -> OutputDigests:
    """Write a file from memory, read it back and compare.

    Raises OSError, ValueError and the library's errors.
    """
    sealed_metadata = _write(path, tensors, metadata)
    _check_header(path, tensors, sealed_metadata)
    start, header = data_offset(path), read_safetensors_header(path)
    spans = {key: header[key]["data_offsets"] for key in tensors}
    parts = [
        FilePart(key, start + begin, end - begin, tensors[key])
        for key, (begin, end) in spans.items()
    ]
    with path.open("rb", buffering=0) as file:
        size = path.stat().st_size
        output_sha256 = verify_and_hash(file.fileno(), size, Layout(file.read(start), parts))
        return OutputDigests(source_sha256, output_sha256, size)


def _write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, str]:
    """Write a file, put its header in order, and return the metadata in it.

    They are sealed if they are those of an output.
    """
    dense = {key: tensor.detach() for key, tensor in tensors.items()}
    for key in _keys_to_copy(tensors):
        plain = dense[key].resolve_conj().resolve_neg()
        dense[key] = plain.clone(memory_format=torch.contiguous_format)
    blank_seal = Seal(BLANK_DIGEST, _size(tensors), _ROOMY_DIGEST)
    try:
        save_file(dense, path, metadata=add_seal(metadata, blank_seal))
    except KeyError as error:
        raise ValueError(f"a tensor of type {error}, which safetensors cannot hold") from error
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

    def make_header(metadata: Mapping[str, str]) -> bytes:
        return length.to_bytes(8, "little") + encode_header(entries, metadata).ljust(length)

    data_bytes = path.stat().st_size - 8 - length
    text, sealed_metadata = seal_header(make_header, metadata, data_sha256, data_bytes)
    if len(text) != 8 + length:
        raise ValueError(f"a header of {len(text) - 8:,} bytes, for which there are {length:,}")
    file.seek(0)
    file.write(text)
    return sealed_metadata


def _check_header(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise ValueError unless the library reads the keys, types, shapes and metadata in a file.

    The library maps the file: nothing of the tensors is read.
    """
    written, written_metadata = load_safetensors(path)
    if list(written) != list(tensors) or written_metadata != dict(metadata):
        raise ValueError("keys or metadata that read back differently")
    for key, tensor in tensors.items():
        if written[key].dtype != tensor.dtype or written[key].shape != tensor.shape:
            raise ValueError(f"{key} reading back differently from what was written")


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
