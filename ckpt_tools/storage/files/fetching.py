"""Checkpoints behind URLs: their files are copied to where their places are, and read there."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckpt_tools.errors import RemoteError
from ckpt_tools.paths import folds_case, path_below, require_distinct
from ckpt_tools.remote.local_copies import fetch_beginning, fetch_file, remove_copy
from ckpt_tools.remote.mirror import find_mirror
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


def fetch_checkpoint(path: Path) -> None:
    """Copy all files of a remote checkpoint, unless they are there; nothing for a local one.

    ``path`` is the place of a file, an index, or a folder. Raises RemoteError.
    """
    mirror = find_mirror(path)
    if mirror is None or path in mirror.present:
        return
    remote = mirror.remote(path)
    if remote.is_folder():
        sizes = remote.sizes(_is_interesting, depth=1)
        mirror.make_folder(path)
        places = _places(remote, path, [name for name in sizes if is_checkpoint_related(name)])
        for name in (name for name, place in places.items() if not place.exists()):
            fetch_beginning(places[name], size=sizes[name])  # whoever looks for the checkpoint sees all of them
        _fetch(path, list_checkpoint_members(list(places)), described=True)
        mirror.present.add(path)
    elif path.name == METADATA_NAME:
        folder = mirror.remote(path.parent)
        _fetch(
            path.parent,
            list_checkpoint_members(list(_places(folder, path.parent, folder.names(_is_interesting)))),
            described=False,
        )
    elif path.suffix != SHARD_SUFFIX:  # which nobody reads without its metadata
        _fetch(path.parent, [path.name], described=has_sidecars(path.name))


def _fetch(folder: Path, names: list[str], *, described: bool) -> None:
    for name in names:
        fetch_file(folder / name)
        for shard in read_shard_names(folder / name) if name.endswith(INDEX_SUFFIX) else ():
            fetch_file(folder / shard, optional=True)  # the reader says best what misses it
    for name in SIDECAR_NAMES if described else ():
        fetch_file(folder / name, optional=True)


def remove_checkpoint_copies(path: Path) -> None:
    """Remove the copies of a remote checkpoint's files; a local one is left alone."""
    mirror = find_mirror(path)
    if mirror is None:
        return
    beside = read_shard_names(path) if path.name.endswith(INDEX_SUFFIX) else ()
    files = {path, *(path.parent / name for name in beside)}
    for file in [file for file in mirror.present if file in files or file.is_relative_to(path)]:
        mirror.present.discard(file)
        if not file.is_dir():
            remove_copy(file)


def outline_remote_folder(path: Path) -> None:
    """Give places to the files below a remote folder, or below the one that a pattern searches, without fetching them.

    Files get their size, safetensors files also their header, which says who wrote them. Nothing for local paths.
    Raises RemoteError, also if there is no such folder.
    """
    base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    mirror = find_mirror(base)
    if mirror is None or base in mirror.surveyed:
        return
    remote = mirror.remote(base)
    if remote.is_folder():
        mirror.make_folder(base)
        sizes = remote.sizes(_is_visible)
        places = _places(remote, base, [name for name in sizes if _is_visible(name)])
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda name: _outline(places[name], sizes[name]), places))
    mirror.surveyed.add(base)


def _places(remote: RemotePath, folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The places of files of a remote folder, whose own place is ``folder``, by the names that its store lists.

    Raises RemoteError for names that cannot be those of files here, each by itself or all together.
    """
    places = {name: path_below(folder, name, origin=remote, error=RemoteError, nested=True) for name in names}
    require_distinct(names, origin=remote, error=RemoteError, fold=folds_case(folder))
    return places


def _is_interesting(name: str) -> bool:
    return is_checkpoint_related(name.rpartition("/")[2])


def _is_visible(name: str) -> bool:
    """Whether a file can matter to a search, which leaves out hidden folders, and so what ``..`` leads to."""
    return _is_interesting(name) and not any(part.startswith(".") for part in name.split("/")[:-1])


def _outline(path: Path, size: int | None) -> None:
    if path.name.lower().endswith(".safetensors"):
        fetch_header(path, size)
    else:
        fetch_beginning(path, size=size)


def fetch_header(path: Path, size: int | None = None) -> None:
    """Have the header of a remote safetensors file at its place, if there is such a file; nothing for a local one."""
    if find_mirror(path) is None:
        return
    head = fetch_beginning(path, _HEADER, size)
    length = 8 + int.from_bytes((head or b"")[:8], "little")
    if head is not None and len(head) == _HEADER and _HEADER < length <= _LONGEST:
        fetch_beginning(path, length, size)
