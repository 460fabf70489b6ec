"""The files that make up a checkpoint, and their content.

They are one file, the shards that an index lists, the files of several ranks, or the folder of a
distributed checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ckpt_tools.errors import CheckpointError
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.paths import is_link, path_below, require_below
from ckpt_tools.storage.dcp.assembly import is_rank_file, load_rank_files
from ckpt_tools.storage.dcp.dcp_folder import METADATA_NAME, SHARD_SUFFIX, load_distributed
from ckpt_tools.storage.files.fetching import fetch_checkpoint
from ckpt_tools.storage.files.folder_members import (
    CHECKPOINT_SUFFIXES,
    INDEX_SUFFIX,
    find_weight_candidates,
)
from ckpt_tools.storage.files.sidecar import is_trainer_file, read_sidecar_words
from ckpt_tools.storage.formats.file_formats import FileContent, load_file_content
from ckpt_tools.storage.formats.foreign_formats import foreign_folder_error, unpacked_archive_error

__all__ = [
    "CHECKPOINT_SUFFIXES",
    "CheckpointFiles",
    "checkpoint_sha256",
    "find_checkpoint_files",
    "load_checkpoint_files",
]


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint.

    ``shard_of`` maps each key to the name of its shard, as an index says. It is None for a single
    file, for the files of ranks, and for a distributed checkpoint, whose ``index`` is its metadata.
    """

    path: Path
    files: tuple[Path, ...]
    index: Path | None = None
    shard_of: Mapping[str, str] | None = None


def find_checkpoint_files(path: Path) -> CheckpointFiles:
    """Return the files of a checkpoint on this machine.

    ``path`` is that of a file, an index or a folder. Raises CheckpointError.
    """
    try:
        if path.is_dir():
            return _find_in_folder(path)
        if path.suffix == SHARD_SUFFIX:
            raise _single_shard_error(path)
        if path.is_file():
            # Users may give the metadata in place of its folder.
            if path.name == "data.pkl" and (unpacked := unpacked_archive_error(path.parent)):
                raise unpacked
            if path.name == METADATA_NAME:
                return _distributed_files(path.parent, sorted(file.name for file in path.parent.iterdir()))
            return _expand_index(path, path)
        # The path leads to a device or a pipe, or nowhere, for which this raises the error.
        path.stat()
    except FileNotFoundError as error:
        problem = "nothing there"
        if is_link(path):
            problem = f"a link to {path.readlink()}, which is not there"
        raise CheckpointError(
            f"{path}: expected a checkpoint file, found {problem}. Check the path."
        ) from error
    except (OSError, ValueError) as error:
        # A path with a NUL or a lone surrogate raises ValueError.
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{path}: cannot be opened ({reason}). Check the path and its permissions."
        ) from error
    raise CheckpointError(
        f"{path}: expected a checkpoint file, found something that is neither a file nor a folder. "
        "Check the path."
    )


def load_checkpoint_files(source: CheckpointFiles, *, trust: bool = False) -> FileContent:
    """Read all files of a checkpoint, and what stands beside them about the model.

    Shards become one mapping in the order of the index. Raises CheckpointError.
    """
    content = _load_weights(source, trust)
    return replace(content, words={**content.words, **read_sidecar_words(source.path)})


def _load_weights(source: CheckpointFiles, trust: bool) -> FileContent:
    files = source.files
    if source.shard_of is None:
        if source.index is not None:
            folder = load_distributed(source.index.parent)
            return FileContent("torch.distributed.checkpoint", folder.root, load=folder.load)
        if len(files) > 1:
            return FileContent(f"safetensors, {len(files)} ranks", load_rank_files(files))
        return load_file_content(files[0], trust=trust)
    shards = {file.name: load_file_content(file, trust=trust) for file in files}
    tensors = {key: _require_tensor(source, shards[name], key, name) for key, name in source.shard_of.items()}
    metadata = {key: text for shard in shards.values() for key, text in shard.metadata.items()}
    formats = sorted({shard.format for shard in shards.values()})
    return FileContent(f"{' and '.join(formats)}, {len(shards)} shards", tensors, metadata)


def checkpoint_sha256(place: LocationLike) -> str:
    """Return the SHA-256 of a checkpoint as lower-case hex.

    Of several files it is that of the lines which ``sha256sum`` prints for them, in the order of
    their names. Raises CheckpointError, RemoteError.
    """
    location = Location.of(place)
    with location.urls_in_errors():
        source = find_checkpoint_files(fetch_checkpoint(location))
    try:
        digests = [(_hash_file(file), file.name) for file in source.files]
    except OSError as error:
        raise CheckpointError(
            f"{location}: cannot be read ({error.strerror}). Check its permissions."
        ) from error
    if source.shard_of is None and source.index is None and len(digests) == 1:
        return digests[0][0]
    lines = "".join(f"{digest}  {name}\n" for digest, name in digests)
    return hashlib.sha256(lines.encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_in_folder(folder: Path) -> CheckpointFiles:
    if unpacked := unpacked_archive_error(folder):
        raise unpacked
    names = sorted(
        path.name for path in folder.iterdir() if path.is_file() and not is_trainer_file(path.name)
    )
    if METADATA_NAME in names:
        return _distributed_files(folder, names)
    # The files of ranks need no index: their metadata says where their parts of tensors belong.
    if ranks := [_member(folder, name) for name in names if is_rank_file(name)]:
        return CheckpointFiles(folder, tuple(ranks))
    candidates = find_weight_candidates(names)
    if "coremldata.bin" in names:  # ends as weights do
        candidates = []
    if len(candidates) == 1:
        return _expand_index(folder, _member(folder, candidates[0]))
    if not candidates and (foreign := foreign_folder_error(folder, names)):
        raise foreign
    problem = "no checkpoint in it"
    if candidates:
        problem = f"{len(candidates)} candidates ({', '.join(candidates[:5])})"
    raise CheckpointError(
        f"{folder}: expected a folder with one *{INDEX_SUFFIX} or one checkpoint file, found "
        f"{problem}. Give the file itself."
    )


def _member(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder.

    Raises CheckpointError for a link that leads out of it.
    """
    return require_below(folder, folder / name, origin=folder)


def _distributed_files(folder: Path, names: list[str]) -> CheckpointFiles:
    files = [_member(folder, name) for name in names if name == METADATA_NAME or name.endswith(SHARD_SUFFIX)]
    return CheckpointFiles(folder, tuple(files), folder / METADATA_NAME)


def _single_shard_error(path: Path) -> CheckpointError:
    """Return the error for a single shard: only the metadata names the others."""
    return CheckpointError(
        f"{path}: expected a checkpoint, found one shard of a distributed checkpoint. "
        f"Give the folder that also holds its {METADATA_NAME} file."
    )


def _expand_index(path: Path, file: Path) -> CheckpointFiles:
    """Return the shards that a file lists if it is an index, and the file itself if it is none.

    ``path`` is that of the user: the file or its folder. Raises CheckpointError.
    """
    if not file.name.endswith(INDEX_SUFFIX):
        return CheckpointFiles(path, (file,))
    return _sharded_files(path, file)


def _sharded_files(path: Path, index: Path) -> CheckpointFiles:
    try:
        content = json.loads(index.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: expected a JSON index of shards, found none ({error}). Fetch it again."
        ) from error
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(
            f"{index}: expected a `weight_map` from keys to shards, found none. Fetch the index again."
        )
    files: dict[str, Path] = {}
    for key, name in shard_of.items():
        # A name that is no text is passed on as well, and path_below refuses it.
        if not isinstance(name, str) or name not in files:
            file = _require_shard(index, key, name)
            files[file.name] = file
    return CheckpointFiles(path, tuple(files[name] for name in sorted(files)), index, shard_of)


def _require_shard(index: Path, key: str, name: object) -> Path:
    """Return the file that an index names for a key.

    An index may come from anywhere. Raises CheckpointError for a name that leads out of its folder,
    and for a file that is missing.
    """
    file = path_below(index.parent, name, origin=index)
    if not file.is_file():
        raise CheckpointError(
            f"{index}: expected the shard {file.name} beside it (for {key}), found no such file. "
            "Fetch the missing shard."
        )
    return file


def _require_tensor(source: CheckpointFiles, shard: FileContent, key: str, name: str) -> Tensor:
    tensor = shard.root.get(key) if isinstance(shard.root, Mapping) else None
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{source.index}: expected the tensor {key} in {name}, found none. Index and shards "
            "do not belong together; fetch them again."
        )
    return tensor
