"""Writing an output: all of the source's tensors but the replaced ones, or nothing at all.

The bytes go to a temporary file beside the target, are synced, read back, compared with the source's and the
replaced ones', and only then take the target's name, in one step.
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
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.storage.files.checkpoint_files import find_checkpoint_files
from ckpt_tools.storage.files.fetching import fetch_checkpoint
from ckpt_tools.storage.files.stamps import FileStamp, stamp_file
from ckpt_tools.storage.formats.safetensors_file import data_offset, load_safetensors, read_safetensors_header
from ckpt_tools.storage.output.atomic_write import check_target, sync_to_disk, write_atomically
from ckpt_tools.storage.output.change_detection import require_same_stamps, require_unchanged
from ckpt_tools.storage.output.hashing import hash_in_background
from ckpt_tools.storage.output.patching import OutputDigests, find_copyable_source, write_patched_copy
from ckpt_tools.storage.output.safetensors_layout import FilePart, Layout, encode_header, verify_and_hash
from ckpt_tools.storage.provenance import BLANK_DIGEST, Seal, add_seal, output_metadata, seal_header
from ckpt_tools.storage.reading import checkpoint_sha256

__all__ = ["OutputDigests", "check_output", "replace_tensors", "save", "write_safetensors"]

_PICKLES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar", ".pt2"})

# Longer than the digest that takes its place, so that the header is padded by more than the library ever does.
_ROOMY = BLANK_DIGEST + "0" * 8


def save(
    path: LocationLike,
    checkpoint: Checkpoint,
    replacements: Mapping[str, Tensor],
    *,
    provenance: Mapping[str, object],
    overwrite: bool = False,
) -> str:
    """Write a checkpoint with some tensors replaced as a safetensors file, and return its SHA-256.

    ``replacements`` maps keys of the checkpoint to tensors of the same shape, which are cast to the stored dtype.
    Every other tensor comes out bit for bit as it is in the source, under the same key and in the same order.
    ``checkpoint_provenance`` (anything JSON can hold) is added to the output's metadata; ``source_sha256`` in it saves hashing
    the source once more.

    Raises OutputError, and leaves no file behind, if the target exists and ``overwrite`` is not set, if it is
    the source, if a replacement does not fit, if the source is no longer what was read, or if the file cannot be
    written or reads back differently.
    """
    return replace_tensors(path, checkpoint, replacements, provenance=provenance, overwrite=overwrite).output


def replace_tensors(
    place: LocationLike,
    checkpoint: Checkpoint,
    replacements: Mapping[str, Tensor],
    *,
    provenance: Mapping[str, object],
    overwrite: bool = False,
    replaces: FileStamp | None = None,
) -> OutputDigests:
    """Do what ``save`` does, and return the SHA-256 of the source too, which costs least while the output is written.

    ``replaces``: the stamp of a damaged output of an earlier run, which is replaced without ``overwrite`` as long as
    it still is that file. Raises OutputError.
    """
    target = Location.of(place)
    _refuse_source(target, checkpoint.path, checkpoint.shown_path)
    _check_writable(target, overwrite=overwrite or replaces is not None)
    tensors = _apply_replacements(checkpoint.tensors, replacements)
    stamps = require_unchanged(checkpoint)
    known = str(provenance.get("source_sha256") or "")
    describe = partial(output_metadata, checkpoint, provenance)
    with _output(target, tensors, overwrite, _files_of(checkpoint.path), replaces) as temporary:
        original = find_copyable_source(checkpoint)
        if original is not None:
            new = {key: tensors[key] for key in replacements}
            digests, metadata = write_patched_copy(original, temporary, new, describe, known)
            _check_header(temporary, tensors, metadata)
        else:
            source_sha256 = known or checkpoint_sha256(checkpoint.path)
            digests = _write_new(temporary, tensors, describe(source_sha256), source_sha256)
        require_same_stamps(checkpoint, stamps)
    return digests


def write_safetensors(
    place: LocationLike, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str], overwrite: bool = False
) -> OutputDigests:
    """Write tensors to a safetensors file, all or nothing, and return its digest and size.

    Tensors may share memory and need not be contiguous. ``metadata`` of ``output_metadata`` are sealed. Raises
    OutputError.
    """
    with _output(Location.of(place), tensors, overwrite) as temporary:
        return _write_new(temporary, tensors, metadata)


@contextmanager
def _output(
    target: Location,
    tensors: Mapping[str, Tensor],
    overwrite: bool,
    sources: Sequence[Path] = (),
    replaces: FileStamp | None = None,
) -> Iterator[Path]:
    """Where to write what becomes ``target`` when all went well, readable for those who may read all ``sources``.

    Raises OutputError for what the system refuses.
    """
    may_replace = partial(_is_still, target.path, replaces) if replaces is not None and not overwrite else None
    replace = overwrite or replaces is not None
    try:
        with write_atomically(target, overwrite=replace, sources=sources, may_replace=may_replace) as temporary:
            yield temporary
    except (OSError, SafetensorError, CheckpointError, ValueError) as error:
        raise OutputError(
            f"{target}: expected to write {_size(tensors):,} bytes there, found: {error}. "
            "Nothing was left behind; free space or choose another folder with --output."
        ) from error


def _is_still(target: Path, stamp: FileStamp) -> bool:
    """Whether a file is the one that the stamp was taken of."""
    try:
        return stamp_file(target) == stamp
    except OSError:
        return False


def check_output(place: LocationLike, source: LocationLike | None, *, overwrite: bool) -> None:
    """Refuse at once what cannot be written at the end: the source itself, a taken name, a missing folder.

    Also refuses a name by which other tools would take the safetensors file for a pickle. Raises OutputError.
    """
    target = Location.of(place)
    if source is not None:
        source_location = Location.of(source)
        with source_location.urls_in_errors():
            _refuse_source(target, fetch_checkpoint(source_location), str(source_location))
    _check_writable(target, overwrite=overwrite)


def _check_writable(target: Location, *, overwrite: bool) -> None:
    check_target(target, overwrite=overwrite)
    name = target.path
    if name.suffix.lower() in _PICKLES:
        raise OutputError(
            f"{target}: expected a name that ends in .safetensors, which is what is written, found {name.suffix}, "
            f"which torch.load would take for a pickle. Name it {name.with_suffix('.safetensors').name}."
        )


def _refuse_source(target: Location, source_path: Path, shown_path: str) -> None:
    if any(_is_same(target.path, file) for file in _files_of(source_path)):
        raise OutputError(
            f"{target}: expected a file of its own, found the source checkpoint ({shown_path}), which is never "
            "written to. Choose another name."
        )


def _files_of(source_path: Path) -> tuple[Path, ...]:
    source = find_checkpoint_files(source_path)
    return (*source.files, source.index) if source.index else source.files


def _is_same(target: Path, file: Path) -> bool:
    try:
        return target.samefile(file)  # through symbolic and hard links
    except OSError:
        return False  # no such target


def _apply_replacements(tensors: Mapping[str, Tensor], replacements: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if unknown := [key for key in replacements if key not in tensors]:
        raise OutputError(f"{unknown[0]}: expected a key of the checkpoint, found none of that name. Check the model.")
    return {
        key: _cast(key, tensor, replacements[key]) if key in replacements else tensor for key, tensor in tensors.items()
    }


def _cast(key: str, stored: Tensor, value: Tensor) -> Tensor:
    if value.shape != stored.shape:
        raise OutputError(
            f"{key}: expected the stored shape {tuple(stored.shape)}, found {tuple(value.shape)}. "
            "Check the architecture."
        )
    value = value.detach().cpu()
    cast = value.to(stored.dtype)
    finite = (value.to(torch.float64).isfinite() & cast.to(torch.float64).isfinite()).view(-1)
    if not finite.all():
        at = int((~finite).nonzero()[0])
        raise OutputError(
            f"{key}: expected finite numbers, found {float(value.reshape(-1)[at]):g} in element {at}, which is "
            f"{float(cast.reshape(-1)[at]):g} as {str(stored.dtype).removeprefix('torch.')}. "
            "Save the checkpoint in a wider type, or look at the data."
        )
    return cast


def _write_new(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source_sha256: str = ""
) -> OutputDigests:
    """Write a file from memory, read it back and compare. Raises OSError, ValueError and the library's errors."""
    complete = _write(path, tensors, metadata)
    _check_header(path, tensors, complete)
    start, header = data_offset(path), read_safetensors_header(path)
    spans = {key: header[key]["data_offsets"] for key in tensors}
    parts = [FilePart(key, start + begin, end - begin, tensors[key]) for key, (begin, end) in spans.items()]
    with path.open("rb", buffering=0) as file:
        size = path.stat().st_size
        return OutputDigests(source_sha256, verify_and_hash(file.fileno(), size, Layout(file.read(start), parts)), size)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Write a file and put its header in order; the metadata in it, sealed if they are those of an output."""
    copied = _keys_to_copy(tensors)
    dense = {
        key: tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        if key in copied
        else tensor.detach()
        for key, tensor in tensors.items()
    }
    try:
        save_file(dense, path, metadata=add_seal(metadata, Seal(BLANK_DIGEST, _size(tensors), _ROOMY)))
    except KeyError as error:
        raise ValueError(f"a tensor of type {error}, which safetensors cannot hold") from error
    with path.open("r+b") as file, hash_in_background(file.fileno(), start=data_offset(path)) as data_digest:
        sync_to_disk(path)  # the disk works while the data is hashed
        complete = _finish_header(file, path, list(tensors), metadata, data_digest())
    sync_to_disk(path)
    return complete


def _keys_to_copy(tensors: Mapping[str, Tensor]) -> set[str]:
    """Keys that need a copy, because safetensors takes neither gaps nor tensors that share memory."""
    copied = {
        key for key, tensor in tensors.items() if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg()
    }
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if key not in copied and tensor.data_ptr() < end:
            copied.add(key)
        elif key not in copied:
            end = tensor.data_ptr() + tensor.nbytes
    return copied


def _finish_header(
    file: BinaryIO, path: Path, keys: list[str], metadata: Mapping[str, str], data_sha256: str
) -> dict[str, str]:
    """Seal the header, and put its entries into the source's order: the library sorts them by type and name.

    The header keeps its length. Returns the metadata in it. Raises ValueError if it does not fit.
    """
    stored = read_safetensors_header(path)
    stored.pop("__metadata__", None)
    entries = {key: stored[key] for key in keys}
    length = data_offset(path) - 8

    def header(said: Mapping[str, str]) -> bytes:
        return length.to_bytes(8, "little") + encode_header(entries, said).ljust(length)

    text, complete = seal_header(header, metadata, data_sha256, path.stat().st_size - 8 - length)
    if len(text) != 8 + length:
        raise ValueError(f"a header of {len(text) - 8:,} bytes, for which there are {length:,}")
    file.seek(0)
    file.write(text)
    return complete


def _check_header(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Have the library read the file's header. Raises ValueError if it says anything else than it should.

    The library maps the file: nothing of the tensors is read.
    """
    written, said = load_safetensors(path)
    if list(written) != list(tensors) or said != dict(metadata):
        raise ValueError("keys or metadata that read back differently")
    for key, tensor in tensors.items():
        if written[key].dtype != tensor.dtype or written[key].shape != tensor.shape:
            raise ValueError(f"{key} reading back differently from what was written")


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
