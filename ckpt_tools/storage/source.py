"""Which files make up a checkpoint: one file, the shards that an index lists, or a distributed checkpoint's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ckpt_tools.errors import CheckpointError
from ckpt_tools.remote.mirror import located
from ckpt_tools.storage.assembly import is_rank_file, load_rank_files
from ckpt_tools.storage.content import Content, load_content
from ckpt_tools.storage.distributed import METADATA, SHARD, load_distributed
from ckpt_tools.storage.fetching import fetch_checkpoint
from ckpt_tools.storage.foreign import foreign_folder
from ckpt_tools.storage.members import INDEX, SUFFIXES, candidates, is_plain_name
from ckpt_tools.storage.sidecar import is_trainer_file, sidecar_words

__all__ = ["SUFFIXES", "Source", "find_source", "load_source", "sha256"]


@dataclass(frozen=True)
class Source:
    """The files of one checkpoint.

    ``shard_of`` maps each key to its shard's name, as an index says; None for a single file and for a distributed
    checkpoint, whose ``index`` is its metadata.
    """

    path: Path
    files: tuple[Path, ...]
    index: Path | None = None
    shard_of: Mapping[str, str] | None = None


def find_source(path: Path) -> Source:
    """The files behind a path that the user gave: a file, an index, or a folder; those behind a URL are fetched.

    Raises CheckpointError, RemoteError.
    """
    fetch_checkpoint(path)
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.name == METADATA or path.suffix == SHARD:
            return _by_part(path)
        if path.is_file():
            return _indexed(path, path) if path.name.endswith(INDEX) else Source(path, (path,))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror}). Check its permissions.") from error
    found = "something that is neither a file nor a folder" if path.exists() else "nothing there"
    raise CheckpointError(f"{path}: expected a checkpoint file, found {found}. Check the path.")


def load_source(source: Source, *, trust: bool = False) -> Content:
    """Read all files of a checkpoint; shards become one mapping in the index's order. Raises CheckpointError."""
    content = _weights(source, trust)
    return replace(content, words={**content.words, **sidecar_words(source.path)})


def _weights(source: Source, trust: bool) -> Content:
    if source.shard_of is None and source.index is not None:
        found = load_distributed(source.index.parent)
        return Content("torch.distributed.checkpoint", found.root, load=found.load)
    if len(source.files) > 1 and source.shard_of is None:
        return Content(f"safetensors, {len(source.files)} ranks", load_rank_files(source.files))
    if source.shard_of is None:
        return load_content(source.files[0], trust=trust)
    shards = {file.name: load_content(file, trust=trust) for file in source.files}
    tensors = {key: _from_shard(source, shards[name], key, name) for key, name in source.shard_of.items()}
    metadata = {key: text for shard in shards.values() for key, text in shard.metadata.items()}
    formats = sorted({shard.format for shard in shards.values()})
    return Content(f"{' and '.join(formats)}, {len(shards)} shards", tensors, metadata)


def sha256(path: Path | str) -> str:
    """SHA-256 of a checkpoint as lower-case hex. Raises CheckpointError.

    Of shards: what ``sha256sum`` prints for them in the order of their names, hashed once more.
    """
    source = find_source(located(path))
    try:
        digests = [(_file_digest(file), file.name) for file in source.files]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    if source.shard_of is None and source.index is None and len(digests) == 1:
        return digests[0][0]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for digest, name in digests).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_folder(folder: Path) -> Source:
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not is_trainer_file(path.name))
    if METADATA in names:
        return _distributed(folder, names)
    if ranks := [folder / name for name in names if is_rank_file(name)]:
        return Source(folder, tuple(ranks))
    single = candidates(names)
    if len(single) == 1:
        file = folder / single[0]
        return _indexed(folder, file) if file.name.endswith(INDEX) else Source(folder, (file,))
    if not single and (foreign := foreign_folder(folder, names)):
        raise foreign
    found = f"{len(single)} candidates ({', '.join(single[:5])})" if single else "no checkpoint in it"
    raise CheckpointError(
        f"{folder}: expected a folder with one *{INDEX} or one checkpoint file, found {found}. Give the file itself."
    )


def _distributed(folder: Path, names: list[str]) -> Source:
    files = [folder / name for name in names if name == METADATA or name.endswith(SHARD)]
    return Source(folder, tuple(files), folder / METADATA)


def _by_part(path: Path) -> Source:
    """The checkpoint that a file of a distributed one belongs to; only the metadata can speak for the others."""
    if path.name == METADATA:
        return _distributed(path.parent, sorted(file.name for file in path.parent.iterdir()))
    raise CheckpointError(
        f"{path}: expected a checkpoint, found one shard of a distributed checkpoint. "
        f"Give the folder that also holds its {METADATA} file."
    )


def _indexed(path: Path, index: Path) -> Source:
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
    for key, name in shard_of.items():
        _check_shard(index, key, name)
    return Source(path, tuple(index.parent / name for name in sorted(set(shard_of.values()))), index, shard_of)


def _check_shard(index: Path, key: str, name: object) -> None:
    # An index is foreign input: a name like ../../etc/passwd or an absolute path must not lead anywhere.
    if not is_plain_name(name):
        raise CheckpointError(
            f"{index}: expected the name of a file beside the index for {key}, found {name!r}. Do not use this index."
        )
    if not (index.parent / name).is_file():
        raise CheckpointError(
            f"{index}: expected the shard {name} beside it (for {key}), found no such file. Fetch the missing shard."
        )


def _from_shard(source: Source, shard: Content, key: str, name: str) -> Tensor:
    tensor = shard.root.get(key) if isinstance(shard.root, Mapping) else None
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{source.index}: expected the tensor {key} in {name}, found none. Index and shards do not belong "
            "together; fetch them again."
        )
    return tensor
