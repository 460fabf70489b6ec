"""The checkpoints in folders: files by their names, and folders that are one checkpoint as a whole."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.remote.mirror import store_of
from ckpt_tools.storage.assembly import is_rank_file
from ckpt_tools.storage.distributed import METADATA
from ckpt_tools.storage.fetching import survey
from ckpt_tools.storage.members import INDEX, SUFFIXES
from ckpt_tools.storage.provenance import recorded
from ckpt_tools.storage.sidecar import hub_weights, is_trainer_file
from ckpt_tools.storage.source import find_source

__all__ = ["Found", "find_checkpoints", "is_one_checkpoint"]


@dataclass(frozen=True)
class Found:
    """A checkpoint, and its place below the folder that was searched, or that all searched folders lie in."""

    path: Path
    place: PurePath


def is_one_checkpoint(path: Path) -> bool:
    """Whether a path that the user gave stands for one checkpoint and not for a folder of them."""
    survey(path)
    if not path.is_dir():
        return path.exists() or not _is_pattern(path)
    try:
        below = len(list(_below(path, _Search(_absolute(path)))))
    except CheckpointError:  # of the folder's search, which may have been told to leave something out
        return False
    try:
        find_source(path)
    except CheckpointError:
        return not below  # the reader says best what is wrong with it
    return _is_whole(path) or below < 2


def find_checkpoints(
    paths: Sequence[Path], include: Sequence[str] = (), exclude: Sequence[str] = (), *, outside: Sequence[Path] = ()
) -> tuple[Found, ...]:
    """Checkpoints named by files, glob patterns and folders, these searched to the bottom; each once, in order.

    ``include`` and ``exclude`` are patterns for file names or for paths below the searched folder. What this tool
    wrote itself, and what lies in ``outside``, does not count. Of those behind URLs only names and
    headers are read. Raises CheckpointError where a path yields none, where the patterns leave none, and for a folder
    that cannot be read and is not excluded; UsageError for paths in several stores, RemoteError.
    """
    _require_one_store(paths)
    for path in paths:
        survey(path)
    bases = [_base(path) for path in paths]
    root = Path(os.path.commonpath(bases))
    found: dict[Path, Found] = {}
    for path, base in zip(paths, bases, strict=True):
        named = list(_named(path, _Search(base, tuple(exclude), frozenset(map(Path.resolve, outside)))))
        if not named:
            raise CheckpointError(_nothing(path))
        for one in named:
            place = _absolute(one)
            if _wanted(place.relative_to(base), include, exclude):
                found.setdefault(place, Found(one, place.relative_to(root)))
    if not found:
        raise CheckpointError(_nothing(paths[0], " that --include and --exclude leave"))
    return tuple(found.values())


@dataclass(frozen=True)
class _Search:
    """Below ``base``, without the folders ``outside``. An unreadable folder is an error unless it is excluded."""

    base: Path
    exclude: tuple[str, ...] = ()
    outside: frozenset[Path] = frozenset()

    def missed(self, error: OSError) -> None:
        """Raise CheckpointError for a folder that cannot be read."""
        folder = _absolute(Path(str(error.filename)))
        if _wanted(folder.relative_to(self.base), (), self.exclude):
            raise CheckpointError(
                f"{folder}: expected a folder to search, but it cannot be read ({error.strerror}). Check its "
                f"permissions, or leave it out: --exclude '{glob.escape(folder.name)}'."
            ) from error


def _require_one_store(paths: Sequence[Path]) -> None:
    stores = sorted({str(store_of(path) or "this machine") for path in paths})
    if len(stores) > 1:
        raise UsageError(
            f"{paths[-1]}: expected checkpoints of one store in a run, found those of {' and '.join(stores)}. "
            "Run them one after the other, with the same --manifest if one shall list them."
        )


def _base(path: Path) -> Path:
    """The folder that a path searches: itself, what stands before the first wildcard, or where a file lies."""
    if path.is_dir() and not _is_whole(path):
        return _absolute(path)
    parts = tuple(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    if path.exists() or len(parts) == len(path.parts):
        return _absolute(path).parent
    if ".." in path.parts[len(parts) :]:
        raise UsageError(f"{path}: expected no .. behind the first wildcard. Write the pattern without it.")
    return _absolute(Path(*parts))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - without .., and without following links


def _named(path: Path, search: _Search) -> Iterator[Path]:
    if path.is_dir() and not _is_whole(path):
        yield from _below(path, search)
    elif path.exists() or not _is_pattern(path):
        yield path
    else:
        for match in sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207 - of absolute patterns, too
            yield from _named(Path(match), search)


def _below(root: Path, search: _Search) -> Iterator[Path]:
    for folder, inner, names in os.walk(root, onerror=search.missed):
        here = Path(folder)
        inner[:] = sorted(
            name for name in inner if not name.startswith(".") and (here / name).resolve() not in search.outside
        )
        if here != root and _is_whole(here):
            inner.clear()
            yield here
            continue
        for name in sorted(names):
            if _is_weights(name, here):
                yield here / name


def _is_whole(folder: Path) -> bool:
    """Whether the files of a folder make one checkpoint: shards, ranks, or weights with what belongs to them."""
    try:
        names = [path.name for path in folder.iterdir() if path.is_file()]
    except OSError:
        return False
    indexed = any(name.endswith(INDEX) for name in names)
    return indexed or METADATA in names or any(map(is_rank_file, names)) or _is_hub_folder(names)


def _is_hub_folder(names: list[str]) -> bool:
    return "config.json" in names and hub_weights(names) is not None


def _is_weights(name: str, folder: Path) -> bool:
    if name.startswith(".") or is_trainer_file(name) or not name.lower().endswith(SUFFIXES):
        return False
    return not (name.endswith(".safetensors") and recorded(folder / name) is not None)


def _wanted(place: PurePath, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        names = (place.name, place.as_posix())
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)

    return (not include or matches(include)) and not matches(exclude)


def _is_pattern(path: Path) -> bool:
    return glob.has_magic(str(path))


def _nothing(path: Path, filtered: str = "") -> str:
    kinds = " ".join(SUFFIXES)
    if path.is_dir():
        return (
            f"{path}: expected checkpoints ({kinds}){filtered} in it or below, found none. What ckpt-fix wrote itself "
            "does not count. Check the folder, or name the files."
        )
    return f"{path}: expected it to match checkpoints ({kinds}){filtered}, found none. Check the pattern."
