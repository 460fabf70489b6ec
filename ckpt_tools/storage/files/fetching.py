"""Copies of checkpoints behind URLs: whole, with their headers, or only with names and sizes."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckpt_tools.errors import RemoteError
from ckpt_tools.location import Location
from ckpt_tools.paths import folds_case, path_below, require_distinct
from ckpt_tools.remote.local_copies import fetch_beginning, fetch_file, remove_copy
from ckpt_tools.remote.mirror import MirroredStore
from ckpt_tools.remote.remote_store import RemotePath
from ckpt_tools.storage.dcp.dcp_folder import METADATA_NAME, SHARD_SUFFIX
from ckpt_tools.storage.files.folder_members import (
    INDEX_SUFFIX,
    is_checkpoint_related,
    list_checkpoint_members,
    read_shard_names,
)
from ckpt_tools.storage.files.sidecar import SIDECAR_NAMES, has_sidecars

__all__ = ["fetch_checkpoint", "fetch_header", "outline_remote_folder", "remove_checkpoint_copies"]

_HEADER = 1 << 16  # bytes; the header of a safetensors file seldom is longer
_LONGEST = 100_000_000  # bytes of a header, from the format's specification
_THREADS = 8  # that wait for a store


def fetch_checkpoint(location: Location) -> Path:
    """Return the path of a checkpoint on this machine, after copying all of its files there.

    The location is that of a file, of an index of shards, or of a folder. Raises RemoteError.
    """
    store, path = location.store, location.path
    if store is None or path in store.fetched:
        return path
    remote = store.remote_path(path)
    if remote.is_folder():
        sizes = remote.sizes(_is_checkpoint_file, depth=1)
        store.mirror.make_folder(path)
        copies = _paths_of_copies(remote, path, list(filter(is_checkpoint_related, sizes)))
        for name, copy in copies.items():
            if not copy.exists():  # the search for the checkpoint in the folder needs all names
                fetch_beginning(store, copy, size=sizes[name])
        _fetch_members(store, path, list_checkpoint_members(list(copies)), with_sidecars=True)
        store.fetched.add(path)
    elif path.name == METADATA_NAME:
        folder = store.remote_path(path.parent)
        names = list(_paths_of_copies(folder, path.parent, folder.names(_is_checkpoint_file)))
        _fetch_members(store, path.parent, list_checkpoint_members(names), with_sidecars=False)
    elif path.suffix != SHARD_SUFFIX:  # a shard alone is refused, whatever is in it
        with_sidecars = has_sidecars(path.name)
        _fetch_members(store, path.parent, [path.name], with_sidecars=with_sidecars)
    return path


def _fetch_members(store: MirroredStore, folder: Path, names: list[str], *, with_sidecars: bool) -> None:
    for name in names:
        fetch_file(store, folder / name)
        shards = read_shard_names(folder / name) if name.endswith(INDEX_SUFFIX) else ()
        for shard in shards:
            # The reader has a better message for a shard that is missing.
            fetch_file(store, folder / shard, optional=True)
    for name in SIDECAR_NAMES if with_sidecars else ():
        fetch_file(store, folder / name, optional=True)


def remove_checkpoint_copies(location: Location) -> None:
    """Remove the copies of a remote checkpoint's files; a local checkpoint is left alone.

    A folder of checkpoints may be larger than the disk.
    """
    store, path = location.store, location.path
    if store is None:
        return
    shards = read_shard_names(path) if path.name.endswith(INDEX_SUFFIX) else ()
    files = {path, *(path.parent / name for name in shards)}
    for copy in [copy for copy in store.fetched if copy in files or copy.is_relative_to(path)]:
        if copy.is_dir():
            store.fetched.discard(copy)
        else:
            remove_copy(store, copy)


def outline_remote_folder(location: Location) -> None:
    """Make empty copies of the files below a remote folder, so that it can be searched.

    Copies have the size that the store lists, and those of safetensors files also the header, which
    tells whether this tool wrote them. Of a pattern, the folder before the first wildcard is
    outlined. Nothing happens for a local path.

    Raises RemoteError, also if there is no such folder.
    """
    fixed_parts = itertools.takewhile(lambda part: not glob.has_magic(part), location.path.parts)
    store, base = location.store, Path(*fixed_parts)
    if store is None or base in store.outlined:
        return
    remote = store.remote_path(base)
    if remote.is_folder():
        store.mirror.make_folder(base)
        sizes = remote.sizes(_is_visible)
        copies = _paths_of_copies(remote, base, list(filter(_is_visible, sizes)))

        def outline(name: str) -> None:
            if name.lower().endswith(".safetensors"):
                fetch_header(location.with_path(copies[name]), sizes[name])
            else:
                fetch_beginning(store, copies[name], size=sizes[name])

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(outline, copies))
    store.outlined.add(base)


def _paths_of_copies(remote: RemotePath, folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the paths of the copies of a remote folder's files, by the names that the store lists.

    ``folder`` is the path of the folder's own copy. Raises RemoteError for a name that cannot be
    that of a file here, and for two names that are one on this file system.
    """
    copies = {name: path_below(folder, name, origin=remote, error=RemoteError, nested=True) for name in names}
    require_distinct(names, origin=remote, error=RemoteError, fold=folds_case(folder))
    return copies


def _is_checkpoint_file(name: str) -> bool:
    return is_checkpoint_related(name.rpartition("/")[2])


def _is_visible(name: str) -> bool:
    """Whether a file can matter to a search.

    A search leaves out hidden folders; that rule also leaves out what ``..`` leads to.
    """
    folders = name.split("/")[:-1]
    return _is_checkpoint_file(name) and not any(part.startswith(".") for part in folders)


def fetch_header(location: Location, size: int | None = None) -> None:
    """Write the header of a remote safetensors file to its copy, if there is such a file.

    ``size``: the file's size in bytes, if it is known. Nothing happens for a local file.
    """
    if location.store is None:
        return
    head = fetch_beginning(location.store, location.path, _HEADER, size)
    length = 8 + int.from_bytes((head or b"")[:8], "little")
    if head is not None and len(head) == _HEADER and _HEADER < length <= _LONGEST:
        fetch_beginning(location.store, location.path, length, size)
