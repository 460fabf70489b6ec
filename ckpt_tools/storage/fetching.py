"""Checkpoints behind URLs: their files are copied to where their places are, and read there."""

from __future__ import annotations

import glob
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckpt_tools.remote.copies import fetch, peek, release
from ckpt_tools.remote.mirror import mirror_of
from ckpt_tools.storage.distributed import METADATA, SHARD
from ckpt_tools.storage.members import INDEX, is_of_interest, members, shard_names
from ckpt_tools.storage.sidecar import SIDECARS, has_sidecars

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
        sizes = remote.sizes(depth=1)
        mirror.make(path)
        for name in (name for name in sizes if is_of_interest(name) and not (path / name).exists()):
            peek(path / name, size=sizes[name])  # whoever looks for the checkpoint sees all of them
        _fetch(path, members(list(sizes)), described=True)
        mirror.present.add(path)
    elif path.name == METADATA:
        _fetch(path.parent, members(mirror.remote(path.parent).names()), described=False)
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
        sizes = {name: size for name, size in remote.sizes().items() if _is_visible(name)}
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda name: _outline(base / name, sizes[name]), sizes))
    mirror.surveyed.add(base)


def _is_visible(name: str) -> bool:
    """Whether a file can matter to a search. Names come from the store: none may lead out of the folder."""
    *folders, last = name.split("/")
    return is_of_interest(last) and not any(part.startswith(".") or not part for part in folders)


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
