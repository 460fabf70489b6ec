"""Checkpoints behind URLs: their files are copied to where their places are, and read there."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckpt_tools.errors import RemoteError
from ckpt_tools.paths import folds_case, path_below, require_distinct
from ckpt_tools.remote.copies import fetch, peek, release
from ckpt_tools.remote.mirror import mirror_of
from ckpt_tools.remote.store import Remote
from ckpt_tools.storage.dcp.dcp_folder import METADATA, SHARD
from ckpt_tools.storage.files.members import INDEX, is_of_interest, members, shard_names
from ckpt_tools.storage.files.sidecar import SIDECARS, has_sidecars

__all__ = ["fetch_checkpoint", "peek_header", "release_checkpoint", "survey"]

_HEADER = 1 << 16  # bytes; the header of a safetensors file seldom is longer
_LONGEST = 100_000_000  # bytes of a header, from the format's specification
_THREADS = 8  # that wait for a store


def fetch_checkpoint(path: Path) -> None:
    """Copy all files of a remote checkpoint, unless they are there; nothing for a local one.

    ``path`` is the place of a file, an index, or a folder. Raises RemoteError.
    """
    mirror = mirror_of(path)
    if mirror is None or path in mirror.present:
        return
    remote = mirror.remote(path)
    if remote.is_folder():
        sizes = remote.sizes(_is_interesting, depth=1)
        mirror.make(path)
        places = _places(remote, path, [name for name in sizes if is_of_interest(name)])
        for name in (name for name, place in places.items() if not place.exists()):
            peek(places[name], size=sizes[name])  # whoever looks for the checkpoint sees all of them
        _fetch(path, members(list(places)), described=True)
        mirror.present.add(path)
    elif path.name == METADATA:
        folder = mirror.remote(path.parent)
        _fetch(path.parent, members(list(_places(folder, path.parent, folder.names(_is_interesting)))), described=False)
    elif path.suffix != SHARD:  # which nobody reads without its metadata
        _fetch(path.parent, [path.name], described=has_sidecars(path.name))


def _fetch(folder: Path, names: list[str], *, described: bool) -> None:
    for name in names:
        fetch(folder / name)
        for shard in shard_names(folder / name) if name.endswith(INDEX) else ():
            fetch(folder / shard, optional=True)  # the reader says best what misses it
    for name in SIDECARS if described else ():
        fetch(folder / name, optional=True)


def release_checkpoint(path: Path) -> None:
    """Remove the copies of a remote checkpoint's files; a local one is left alone."""
    mirror = mirror_of(path)
    if mirror is None:
        return
    beside = shard_names(path) if path.name.endswith(INDEX) else ()
    files = {path, *(path.parent / name for name in beside)}
    for file in [file for file in mirror.present if file in files or file.is_relative_to(path)]:
        mirror.present.discard(file)
        if not file.is_dir():
            release(file)


def survey(path: Path) -> None:
    """Give places to the files below a remote folder, or below the one that a pattern searches, without fetching them.

    Files get their size, safetensors files also their header, which says who wrote them. Nothing for local paths.
    Raises RemoteError, also if there is no such folder.
    """
    base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    mirror = mirror_of(base)
    if mirror is None or base in mirror.surveyed:
        return
    remote = mirror.remote(base)
    if remote.is_folder():
        mirror.make(base)
        sizes = remote.sizes(_is_visible)
        places = _places(remote, base, [name for name in sizes if _is_visible(name)])
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda name: _outline(places[name], sizes[name]), places))
    mirror.surveyed.add(base)


def _places(remote: Remote, folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The places of files of a remote folder, whose own place is ``folder``, by the names that its store lists.

    Raises RemoteError for names that cannot be those of files here, each by itself or all together.
    """
    places = {name: path_below(folder, name, origin=remote, error=RemoteError, nested=True) for name in names}
    require_distinct(names, origin=remote, error=RemoteError, fold=folds_case(folder))
    return places


def _is_interesting(name: str) -> bool:
    return is_of_interest(name.rpartition("/")[2])


def _is_visible(name: str) -> bool:
    """Whether a file can matter to a search, which leaves out hidden folders, and so what ``..`` leads to."""
    return _is_interesting(name) and not any(part.startswith(".") for part in name.split("/")[:-1])


def _outline(path: Path, size: int | None) -> None:
    if path.name.lower().endswith(".safetensors"):
        peek_header(path, size)
    else:
        peek(path, size=size)


def peek_header(path: Path, size: int | None = None) -> None:
    """Have the header of a remote safetensors file at its place, if there is such a file; nothing for a local one."""
    if mirror_of(path) is None:
        return
    head = peek(path, _HEADER, size)
    length = 8 + int.from_bytes((head or b"")[:8], "little")
    if head is not None and len(head) == _HEADER and _HEADER < length <= _LONGEST:
        peek(path, length, size)
