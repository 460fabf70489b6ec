"""The checkpoints in folders: files by their names, and folders that are one checkpoint as a whole."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.paths import identity, is_deep, is_file, is_folder, is_link, matching_paths
from ckpt_tools.remote.mirror import is_remote, store_folder
from ckpt_tools.storage.dcp.assembly import is_rank_file
from ckpt_tools.storage.dcp.dcp_folder import METADATA_NAME
from ckpt_tools.storage.files.checkpoint_files import find_checkpoint_files
from ckpt_tools.storage.files.fetching import outline_remote_folder
from ckpt_tools.storage.files.folder_members import CHECKPOINT_SUFFIXES, INDEX_SUFFIX, read_shard_names
from ckpt_tools.storage.files.sidecar import find_hub_weights, is_trainer_file
from ckpt_tools.storage.provenance import read_provenance_entry

__all__ = ["DiscoveredCheckpoint", "find_checkpoints", "is_one_checkpoint"]


@dataclass(frozen=True)
class DiscoveredCheckpoint:
    """A checkpoint, and its place below the folder that was searched, or that all searched folders lie in.

    ``also_named``: further paths that lead to the same file or folder, by links of either kind.
    """

    path: Path
    place: PurePath
    also_named: tuple[Path, ...] = ()


def is_one_checkpoint(path: Path) -> bool:
    """Whether a path that the user gave stands for one checkpoint and not for a folder of them."""
    outline_remote_folder(path)
    if not is_folder(path):
        return _exists(path) or not _is_pattern(path)
    below = 0
    try:
        below = len(list(_below(path, _Search(_absolute(path)))))
        find_checkpoint_files(path)
    except CheckpointError:
        return not below  # the reader says best what is wrong with it
    return _is_whole(path) or below < 2


def find_checkpoints(
    paths: Sequence[Path], include: Sequence[str] = (), exclude: Sequence[str] = (), *, outside: Sequence[Path] = ()
) -> tuple[DiscoveredCheckpoint, ...]:
    """Checkpoints named by files, glob patterns and folders, these searched to the bottom; each once, in order.

    A file with several names is found once, as training scripts that keep their best checkpoint as a hard link
    (timm's ``last`` and ``model_best``) or a symbolic one make them. It has the first of its names in order that is no
    symbolic link, which may lead elsewhere tomorrow; the others are ``also_named``.

    ``include`` and ``exclude`` are patterns for names, of files or of folders that they lie in, or for paths below the
    searched folder; ``**/`` may stand for nothing. Of what is searched or matched, files that are not named as
    checkpoints are, files that this tool wrote itself, and ``outside`` do not count. Links to folders are not followed.
    Of those behind URLs only names and headers are read.

    Whatever cannot be read (files and folders without permission, links that lead nowhere or to themselves, pipes) is
    found like any other, unless it is excluded: who reads it says what is wrong with it, and the others are done.

    Raises CheckpointError where a path yields none and where the patterns leave none; UsageError for paths in several
    stores, RemoteError.
    """
    _require_one_store(paths)
    for path in paths:
        outline_remote_folder(path)
    bases = [_base(path) for path in paths]
    root = Path(os.path.commonpath(bases))
    found: dict[Path, DiscoveredCheckpoint] = {}
    for path, base in zip(paths, bases, strict=True):
        named = list(_iterate_checkpoints(path, _Search(base, frozenset(map(os.path.realpath, outside)))))
        if not named:
            raise CheckpointError(_nothing(path))
        for one in named:
            place = _absolute(one)
            inside = _weights_in(one) if is_folder(one) else ()
            # Nobody knows what an unreadable folder would have matched.
            if _is_selected(place.relative_to(base), include if inside is not None else (), exclude, inside or ()):
                found.setdefault(place, DiscoveredCheckpoint(one, place.relative_to(root)))
    if not found:
        raise CheckpointError(_nothing(paths[0], " that --include and --exclude leave"))
    return _merge_aliases(found.values())


def _merge_aliases(found: Iterable[DiscoveredCheckpoint]) -> tuple[DiscoveredCheckpoint, ...]:
    """Checkpoints, each of which stands for all of those that are the same file or folder."""
    groups: dict[object, list[DiscoveredCheckpoint]] = {}
    for one in found:
        groups.setdefault(identity(one.path) or one.path, []).append(one)
    return tuple(map(_first, groups.values()))


def _first(same: Sequence[DiscoveredCheckpoint]) -> DiscoveredCheckpoint:
    chosen = next((one for one in same if not is_link(one.path)), same[0])
    return replace(chosen, also_named=tuple(one.path for one in same if one is not chosen))


@dataclass(frozen=True)
class _Search:
    """Below ``base``, without what is really in the folders ``outside``."""

    base: Path
    outside: frozenset[str] = frozenset()

    def covers(self, path: Path) -> bool:
        """Whether a path does not lie outside. What holds the searched folder itself is not meant."""
        base, real = (Path(os.path.realpath(one)) for one in (self.base, path))  # Path.resolve raises for loops
        return self.outside.isdisjoint(map(str, {real, *real.parents} - {base, *base.parents}))


def _require_one_store(paths: Sequence[Path]) -> None:
    stores = sorted({str(store_folder(path) or "this machine") for path in paths})
    if len(stores) > 1:
        raise UsageError(
            f"{paths[-1]}: expected checkpoints of one store in a run, found those of {' and '.join(stores)}. "
            "Run them one after the other, with the same --manifest if one shall list them."
        )


def _base(path: Path) -> Path:
    """The folder that a path searches: itself, what stands before the first wildcard, or where a file lies."""
    if is_folder(path) and not _is_whole(path):
        return _absolute(path)
    parts = tuple(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    if _exists(path) or len(parts) == len(path.parts):
        return _absolute(path).parent
    if ".." in path.parts[len(parts) :]:
        raise UsageError(f"{path}: expected no .. behind the first wildcard. Write the pattern without it.")
    return _absolute(Path(*parts))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - without .., and without following links


def _iterate_checkpoints(path: Path, search: _Search) -> Iterator[Path]:
    if is_folder(path) and not _is_whole(path):
        yield from _below(path, search)
    elif _exists(path) or not _is_pattern(path):
        yield path
    else:
        matches = matching_paths(str(path))
        folders = [match for match in matches if is_folder(match) and search.covers(match)]
        whole = set(filter(_is_whole, folders))
        files = [one for one in matches if not is_folder(one) and one.parent not in whole and search.covers(one)]
        usual = {match for match in files if _is_weights(match.name, match.parent)}
        for match in matches:
            if match in folders:
                yield from _iterate_checkpoints(match, search)
            elif match in usual or (not usual and match in files):  # *.weights names whatever ends so
                yield match


def _below(root: Path, search: _Search) -> Iterator[Path]:
    """The checkpoints below a folder, and at the end the folders in it that cannot be listed or lie too deep.

    Raises CheckpointError if that is the one which the user gave.
    """
    unreadable: list[OSError] = []
    deep: list[Path] = []
    for walked, inner, names in os.walk(root, onerror=unreadable.append):
        here = Path(walked)
        inner[:] = sorted(name for name in inner if not name.startswith(".") and search.covers(here / name))
        if is_deep(root, here):
            deep += [here / name for name in inner if not is_link(here / name)]
            inner.clear()
        if here != root and _is_whole(here):
            inner[:] = [name for name in inner if name.startswith(_EARLIER)]
            yield here
            continue
        for name in sorted(names):
            if _is_weights(name, here) and search.covers(here / name):
                yield here / name
    for error in unreadable:
        folder = Path(str(error.filename))
        if _absolute(folder) == search.base:
            raise CheckpointError(
                f"{folder}: expected a folder to search, but it cannot be read ({error.strerror}). Check its "
                "permissions."
            ) from error
        yield folder
    yield from deep


_EARLIER = "checkpoint-"  # checkpoints that transformers' Trainer keeps below the model


def _is_whole(folder: Path) -> bool:
    """Whether the files of a folder make one checkpoint: shards, ranks, or weights with what belongs to them."""
    try:
        names = [path.name for path in folder.iterdir() if is_file(path)]
    except OSError:
        return False
    indexed = any(
        name.endswith(INDEX_SUFFIX) and (is_remote(folder) or read_shard_names(folder / name)) for name in names
    )
    return indexed or METADATA_NAME in names or any(map(is_rank_file, names)) or _is_hub_folder(names)


def _is_hub_folder(names: list[str]) -> bool:
    return "config.json" in names and find_hub_weights(names) is not None


def _weights_in(folder: Path) -> list[str] | None:
    """The files of a whole folder that may be meant by their names; None if it cannot be listed."""
    try:
        return [path.name for path in folder.iterdir() if path.name.lower().endswith(CHECKPOINT_SUFFIXES)]
    except OSError:
        return None


def _exists(path: Path) -> bool:
    """Whether there is something; what cannot be reached may be there, and the reader says why it cannot be read."""
    try:
        return path.exists()
    except OSError:
        return True


def _is_weights(name: str, folder: Path) -> bool:
    if name.startswith(".") or is_trainer_file(name) or not name.lower().endswith(CHECKPOINT_SUFFIXES):
        return False
    return not (name.endswith(".safetensors") and read_provenance_entry(folder / name) is not None)


def _is_selected(place: PurePath, include: Sequence[str], exclude: Sequence[str], within: Sequence[str] = ()) -> bool:
    """Whether the patterns leave a place below the searched folder; ``within``: the files that it stands for."""
    places = [place, *(parent for parent in place.parents if parent.name)]
    names = [name for one in places for name in (one.name, one.as_posix())]

    def matches(patterns: Sequence[str], names: Sequence[str]) -> bool:
        plain = [pattern.rstrip("/") for pattern in patterns]
        plain += [pattern.removeprefix("**/") for pattern in plain]
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in plain for name in names)

    return (not include or matches(include, [*names, *within])) and not matches(exclude, names)


def _is_pattern(path: Path) -> bool:
    return glob.has_magic(str(path))


def _nothing(path: Path, filtered: str = "") -> str:
    kinds = " ".join(CHECKPOINT_SUFFIXES)
    if is_folder(path):
        return (
            f"{path}: expected checkpoints ({kinds}){filtered} in it or below, found none. What ckpt-fix wrote itself "
            "does not count. Check the folder, or name the files."
        )
    return f"{path}: expected it to match checkpoints ({kinds}){filtered}, found none. Check the pattern."
