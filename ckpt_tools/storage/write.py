"""Writing an output: all of the source's tensors but the replaced ones, or nothing at all.

The bytes go to a temporary file beside the target, are synced, read back, compared with the source's and the
replaced ones', and only then take the target's name, in one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import CheckpointError, OutputError
from ckpt_tools.remote.mirror import located
from ckpt_tools.storage.atomic import check_target, new_file, new_folder, sync
from ckpt_tools.storage.content import data_start, load_safetensors, safetensors_header
from ckpt_tools.storage.layout import Layout, Part, header_text, verified
from ckpt_tools.storage.patch import Digests, find_original, write_patched
from ckpt_tools.storage.provenance import output_metadata
from ckpt_tools.storage.read import sha256
from ckpt_tools.storage.source import find_source
from ckpt_tools.storage.unchanged import require_stamps, require_unchanged

__all__ = ["Digests", "check_output", "replace_tensors", "save", "write_safetensors"]

_PICKLES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar", ".pt2"})


def save(
    path: Path | str,
    checkpoint: Checkpoint,
    replacements: Mapping[str, Tensor],
    *,
    provenance: Mapping[str, object],
    overwrite: bool = False,
) -> str:
    """Write a checkpoint with some tensors replaced as a safetensors file, and return its SHA-256.

    ``replacements`` maps keys of the checkpoint to tensors of the same shape, which are cast to the stored dtype.
    Every other tensor comes out bit for bit as it is in the source, under the same key and in the same order.
    ``provenance`` (anything JSON can hold) is added to the output's metadata; ``source_sha256`` in it saves hashing
    the source once more.

    Raises OutputError, and leaves no file behind, if the target exists and ``overwrite`` is not set, if it is
    the source, if a replacement does not fit, if the source is no longer what was read, or if the file cannot be
    written or reads back differently.
    """
    return replace_tensors(path, checkpoint, replacements, provenance=provenance, overwrite=overwrite).output


def replace_tensors(
    path: Path | str,
    checkpoint: Checkpoint,
    replacements: Mapping[str, Tensor],
    *,
    provenance: Mapping[str, object],
    overwrite: bool = False,
) -> Digests:
    """Do what ``save`` does, and return the SHA-256 of the source too, which costs least while the output is written.

    Raises OutputError.
    """
    target = located(path)
    check_output(target, checkpoint.path, overwrite=overwrite)
    tensors = _replaced(checkpoint.tensors, replacements)
    stamps = require_unchanged(checkpoint)
    known = str(provenance.get("source_sha256") or "")
    describe = partial(output_metadata, checkpoint, provenance)
    with _output(target, tensors, overwrite) as temporary:
        original = find_original(checkpoint)
        if original is not None:
            digests = write_patched(original, temporary, {key: tensors[key] for key in replacements}, describe, known)
            _check_header(temporary, tensors, describe(digests.source))
        else:
            source = known or sha256(checkpoint.path)
            digests = Digests(source, _write_new(temporary, tensors, describe(source)))
        require_stamps(checkpoint, stamps)
    return digests


def write_safetensors(
    target: Path | str, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str], overwrite: bool = False
) -> str:
    """Write tensors to a safetensors file, all or nothing, and return its SHA-256.

    Tensors may share memory and need not be contiguous. Raises OutputError.
    """
    with _output(located(target), tensors, overwrite) as temporary:
        return _write_new(temporary, tensors, metadata)


@contextmanager
def _output(target: Path, tensors: Mapping[str, Tensor], overwrite: bool) -> Iterator[Path]:
    """Where to write what becomes ``target`` when all went well. Raises OutputError for what the system refuses."""
    try:
        with new_file(target, overwrite=overwrite) as temporary:
            yield temporary
    except (OSError, SafetensorError, CheckpointError, ValueError) as error:
        raise OutputError(
            f"{target}: expected to write {_size(tensors):,} bytes there, found: {error}. "
            "Nothing was left behind; free space or choose another folder with --output."
        ) from error


def check_output(target: Path, source_path: Path | None, *, overwrite: bool) -> None:
    """Refuse at once what cannot be written at the end: the source itself, a taken name, a missing folder.

    Also refuses a name by which other tools would take the safetensors file for a pickle. Raises OutputError.
    """
    if source_path is not None:
        _refuse_source(target, source_path)
    check_target(target, overwrite=overwrite)
    if target.suffix.lower() in _PICKLES:
        raise OutputError(
            f"{target}: expected a name that ends in .safetensors, which is what is written, found {target.suffix}, "
            f"which torch.load would take for a pickle. Name it {target.with_suffix('.safetensors').name}."
        )


def _refuse_source(target: Path, source_path: Path) -> None:
    source = find_source(source_path)
    files = [*source.files, *([source.index] if source.index else [])]
    if any(_is_same(target, file) for file in files):
        raise OutputError(
            f"{target}: expected a file of its own, found the source checkpoint ({source_path}), which is never "
            "written to. Choose another name."
        )


def _is_same(target: Path, file: Path) -> bool:
    try:
        return target.samefile(file)  # through symbolic and hard links
    except OSError:
        return False  # no such target


def _replaced(tensors: Mapping[str, Tensor], replacements: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def _write_new(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a file from memory, read it back and compare; its SHA-256. Raises OSError, ValueError and the library's."""
    _write(path, tensors, metadata)
    _check_header(path, tensors, metadata)
    start, header = data_start(path), safetensors_header(path)
    spans = {key: header[key]["data_offsets"] for key in tensors}
    parts = [Part(key, start + begin, end - begin, tensors[key]) for key, (begin, end) in spans.items()]
    with path.open("rb", buffering=0) as file:
        return verified(file.fileno(), path.stat().st_size, Layout(file.read(start), parts))


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    copied = _overlapping(tensors)
    dense = {
        key: tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        if key in copied
        else tensor.detach()
        for key, tensor in tensors.items()
    }
    # The library writes under a name of its own beside the one that it is given: a folder of ours is swept with it.
    with new_folder(path.parent) as folder:
        try:
            save_file(dense, folder / path.name, metadata=dict(metadata))
        except KeyError as error:
            raise ValueError(f"a tensor of type {error}, which safetensors cannot hold") from error
        (folder / path.name).rename(path)
    _restore_order(path, list(tensors), metadata)
    sync(path)


def _overlapping(tensors: Mapping[str, Tensor]) -> set[str]:
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


def _restore_order(path: Path, keys: list[str], metadata: Mapping[str, str]) -> None:
    """Put the header's entries into the source's order; the library sorts them by type and name."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = safetensors_header(path)
        entries = {key: header[key] for key in keys if key in header}
        text = header_text(entries, metadata)
        if len(entries) + 1 == len(header) and len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


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
