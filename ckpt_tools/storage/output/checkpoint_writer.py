"""Writing an output: a safetensors file with all of the source's tensors, some of them replaced.

The bytes go to a temporary file beside the target, which is synced, read back and compared with the
source's tensors and the replaced ones. Only then it takes the target's name, in one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import CheckpointError, OutputError
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.storage.files.checkpoint_files import find_checkpoint_files
from ckpt_tools.storage.files.fetching import fetch_checkpoint
from ckpt_tools.storage.files.stamps import FileStamp, stamp_file
from ckpt_tools.storage.output.atomic_write import check_target, write_atomically
from ckpt_tools.storage.output.change_detection import require_same_stamps, require_unchanged
from ckpt_tools.storage.output.patching import (
    OutputDigests,
    find_copyable_source,
    write_patched_copy,
)
from ckpt_tools.storage.output.safetensors_writer import (
    check_header,
    total_bytes,
    write_and_verify,
)
from ckpt_tools.storage.provenance import output_metadata
from ckpt_tools.storage.reading import checkpoint_sha256

__all__ = ["OutputDigests", "check_output", "replace_tensors", "save", "write_safetensors"]

_PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar", ".pt2"})


def save(
    path: LocationLike,
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
    """Do what ``save`` does, and return the digest of the source, too.

    Hashing the source costs least while the output is written. ``replaces`` is the stamp of a
    damaged output of an earlier run, which is replaced without ``overwrite`` as long as it still is
    that file. Raises OutputError.
    """
    target = Location.of(place)
    _require_no_source(target, checkpoint.path, checkpoint.shown_path)
    _check_writable(target, overwrite=overwrite or replaces is not None)
    tensors = _apply_replacements(checkpoint.tensors, replacements)
    stamps = require_unchanged(checkpoint)
    source_sha256 = str(provenance.get("source_sha256") or "")
    # The metadata names the source's digest, which may be known only once the output is written.
    describe = partial(output_metadata, checkpoint, provenance)
    sources = _list_files(checkpoint.path)
    with _open_output(target, tensors, overwrite, sources, replaces) as temporary:
        original = find_copyable_source(checkpoint)
        if original is not None:
            new = {key: tensors[key] for key in replacements}
            digests, metadata = write_patched_copy(original, temporary, new, describe, source_sha256)
            check_header(temporary, tensors, metadata)
        else:
            source_sha256 = source_sha256 or checkpoint_sha256(checkpoint.path)
            digests = write_and_verify(temporary, tensors, describe(source_sha256), source_sha256)
        # Another program may have written to the source while it was copied.
        require_same_stamps(checkpoint, stamps)
    return digests


def write_safetensors(
    place: LocationLike,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    overwrite: bool = False,
) -> OutputDigests:
    """Write tensors to a safetensors file, all or nothing, and return its digest and size.

    Tensors may share memory and need not be contiguous. Metadata made by ``output_metadata`` are
    sealed. Raises OutputError.
    """
    with _open_output(Location.of(place), tensors, overwrite) as temporary:
        return write_and_verify(temporary, tensors, metadata)


@contextmanager
def _open_output(
    target: Location,
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
        may_replace = partial(_is_still, target.path, replaces)
    replace = overwrite or replaces is not None
    try:
        with write_atomically(
            target, overwrite=replace, sources=sources, may_replace=may_replace
        ) as temporary:
            yield temporary
    except (OSError, SafetensorError, CheckpointError, ValueError) as error:
        raise OutputError(
            f"{target}: expected to write {total_bytes(tensors):,} bytes there, found: {error}. "
            "Nothing was left behind; free space or choose another folder with --output."
        ) from error


def _is_still(target: Path, stamp: FileStamp) -> bool:
    """Return whether a file is the one that the stamp was taken of."""
    try:
        return stamp_file(target) == stamp
    except OSError:
        return False


def check_output(place: LocationLike, source: LocationLike | None, *, overwrite: bool) -> None:
    """Raise OutputError at once for a target that could not be written at the end.

    This is the source itself, a taken name, a name in a missing folder, or one by which other tools
    would take the safetensors file for a pickle.
    """
    target = Location.of(place)
    if source is not None:
        source_location = Location.of(source)
        with source_location.urls_in_errors():
            source_path = fetch_checkpoint(source_location)
            _require_no_source(target, source_path, str(source_location))
    _check_writable(target, overwrite=overwrite)


def _check_writable(target: Location, *, overwrite: bool) -> None:
    check_target(target, overwrite=overwrite)
    path = target.path
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise OutputError(
            f"{target}: expected a name that ends in .safetensors, which is what is written, "
            f"found {path.suffix}, which torch.load would take for a pickle. Name it "
            f"{path.with_suffix('.safetensors').name}."
        )


def _require_no_source(target: Location, source_path: Path, shown_path: str) -> None:
    if any(_is_same(target.path, file) for file in _list_files(source_path)):
        raise OutputError(
            f"{target}: expected a file of its own, found the source checkpoint ({shown_path}), "
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
            f"{unknown[0]}: expected a key of the checkpoint, found none of that name. Check the model."
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
