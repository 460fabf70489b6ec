"""Finding the checkpoints of a folder run: files by their names, and folders that are one."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.paths import identity, is_deep, is_file, is_folder, is_link, matching_paths
from ckpt_tools.storage.dcp.assembly import is_rank_file
from ckpt_tools.storage.dcp.dcp_folder import METADATA_NAME
from ckpt_tools.storage.files.checkpoint_files import find_checkpoint_files
from ckpt_tools.storage.files.fetching import fetch_checkpoint, outline_remote_folder
from ckpt_tools.storage.files.folder_members import (
    CHECKPOINT_SUFFIXES,
    INDEX_SUFFIX,
    read_shard_names,
)
from ckpt_tools.storage.files.sidecar import find_hub_weights, is_trainer_file
from ckpt_tools.storage.provenance import read_provenance_entry

__all__ = ["DiscoveredCheckpoint", "find_checkpoints", "is_one_checkpoint"]


@dataclass(frozen=True)
class DiscoveredCheckpoint:
    """A checkpoint of a folder run.

    ``place`` is its path below the folder that was searched, or below the folder that all searched
    folders lie in. ``also_named``: further paths to the same file or folder, by links of either
    kind.
    """

    location: Location
    place: PurePath
    also_named: tuple[Location, ...] = ()


def is_one_checkpoint(place: LocationLike) -> bool:
    """Whether a path or URL of the user means one checkpoint and not a folder of them."""
    location = Location.of(place)
    path = location.path
    outline_remote_folder(location)
    if not is_folder(path):
        return _exists(path) or not _is_pattern(path)
    number_below = 0
    try:
        number_below = len(list(_below(path, _Search(_absolute(path)))))
        find_checkpoint_files(fetch_checkpoint(location))
    except CheckpointError:
        # Of an empty folder the reader says best what is wrong with it.
        return not number_below
    return _is_whole(path) or number_below < 2


def find_checkpoints(
    places: Sequence[LocationLike],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    outside: Sequence[LocationLike] = (),
) -> tuple[DiscoveredCheckpoint, ...]:
    """Find the checkpoints that files, glob patterns and folders name; each once, in order.

    Folders are searched to the bottom. Training scripts keep their best checkpoint as a second name
    of its file (timm's ``last`` and ``model_best``), so a file with several names counts once,
    under the first name that is no symbolic link: a symbolic link may lead elsewhere tomorrow. The
    other names are ``also_named``.

    ``include`` and ``exclude`` are patterns for the names of files and of folders that they lie in,
    or for paths below the searched folder; ``**/`` may stand for nothing. A search and a pattern
    leave out files that are not named like checkpoints, files that this tool wrote itself, and
    what lies in ``outside``. Links to folders are not followed. Of files behind URLs only names and
    headers are read.

    What cannot be read (no permission, a link that leads nowhere or to itself, a pipe) is returned
    like any other, unless it is excluded: its reader reports the error, and the others are done.

    Raises CheckpointError where a path yields no checkpoint and where the patterns leave none,
    UsageError for paths in several stores, RemoteError.
    """
    locations = list(map(Location.of, places))
    _require_one_store(locations)
    for location in locations:
        outline_remote_folder(location)
    excluded_folders = frozenset(os.path.realpath(Location.of(place).path) for place in outside)
    with locations[0].urls_in_errors():
        paths = _search(
            [location.path for location in locations], include, exclude, excluded_folders
        )
    checkpoints = [
        DiscoveredCheckpoint(locations[0].with_path(path), place) for path, place in paths.items()
    ]
    return _merge_aliases(checkpoints)


def _search(
    paths: Sequence[Path],
    include: Sequence[str],
    exclude: Sequence[str],
    excluded_folders: frozenset[str],
) -> dict[Path, PurePath]:
    """Return the paths of checkpoints, with their paths below the common folder."""
    bases = [_base(path) for path in paths]
    root = Path(os.path.commonpath(bases))
    places: dict[Path, tuple[Path, PurePath]] = {}
    for path, base in zip(paths, bases, strict=True):
        matches = list(_iterate_checkpoints(path, _Search(base, excluded_folders)))
        if not matches:
            raise CheckpointError(_nothing(path))
        for match in matches:
            absolute = _absolute(match)
            inside = _weights_in(match) if is_folder(match) else ()
            # Nobody knows what an unreadable folder would have matched.
            included = include if inside is not None else ()
            if _is_selected(absolute.relative_to(base), included, exclude, inside or ()):
                places.setdefault(absolute, (match, absolute.relative_to(root)))
    if not places:
        raise CheckpointError(_nothing(paths[0], " that --include and --exclude leave"))
    return dict(places.values())


def _merge_aliases(
    checkpoints: Iterable[DiscoveredCheckpoint],
) -> tuple[DiscoveredCheckpoint, ...]:
    """Return one checkpoint for every file or folder, with its other names as ``also_named``."""
    groups: dict[object, list[DiscoveredCheckpoint]] = {}
    for checkpoint in checkpoints:
        path = checkpoint.location.path
        groups.setdefault(identity(path) or path, []).append(checkpoint)
    return tuple(map(_merge_names, groups.values()))


def _merge_names(same: Sequence[DiscoveredCheckpoint]) -> DiscoveredCheckpoint:
    no_links = (checkpoint for checkpoint in same if not is_link(checkpoint.location.path))
    chosen = next(no_links, same[0])
    aliases = (checkpoint.location for checkpoint in same if checkpoint is not chosen)
    return replace(chosen, also_named=tuple(aliases))


@dataclass(frozen=True)
class _Search:
    """A search below ``base`` that leaves out folders, given by their paths without links."""

    base: Path
    excluded_folders: frozenset[str] = frozenset()

    def covers(self, path: Path) -> bool:
        """Whether a path lies in no excluded folder.

        An excluded folder that the whole search lies in does not count.
        """
        # Path.resolve raises for links that lead to themselves.
        base, real = (Path(os.path.realpath(folder)) for folder in (self.base, path))
        folders = {real, *real.parents} - {base, *base.parents}
        return self.excluded_folders.isdisjoint(map(str, folders))


def _require_one_store(locations: Sequence[Location]) -> None:
    stores = {location.store for location in locations}
    if len(stores) > 1:
        names = sorted("this machine" if store is None else str(store) for store in stores)
        raise UsageError(
            f"{locations[-1]}: expected checkpoints of one store in a run, found those of "
            f"{' and '.join(names)}. Run them one after the other, with the same --manifest if one "
            "shall list them."
        )


def _base(path: Path) -> Path:
    """Return the folder that a path searches.

    That is a folder itself, the part of a pattern before the first wildcard, or a file's folder.
    """
    if is_folder(path) and not _is_whole(path):
        return _absolute(path)
    parts = tuple(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    if _exists(path) or len(parts) == len(path.parts):
        return _absolute(path).parent
    if ".." in path.parts[len(parts) :]:
        raise UsageError(
            f"{path}: expected no .. behind the first wildcard. Write the pattern without it."
        )
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
        checkpoint_folders = set(filter(_is_whole, folders))
        files = [
            match
            for match in matches
            if not is_folder(match)
            and match.parent not in checkpoint_folders
            and search.covers(match)
        ]
        # A pattern such as *.weights may name only files without a checkpoint's usual suffix.
        usual_files = [match for match in files if _is_weights(match.name, match.parent)]
        selected_files = set(usual_files or files)
        for match in matches:
            if match in folders:
                yield from _iterate_checkpoints(match, search)
            elif match in selected_files:
                yield match


def _below(root: Path, search: _Search) -> Iterator[Path]:
    """Yield the checkpoints below a folder.

    At the end come the folders in it that cannot be listed or lie too deep: their reader reports
    the error. Raises CheckpointError if the folder that the user gave cannot be listed.
    """
    unreadable: list[OSError] = []
    deep: list[Path] = []
    for walked, inner, names in os.walk(root, onerror=unreadable.append):
        here = Path(walked)
        inner[:] = sorted(
            name for name in inner if not name.startswith(".") and search.covers(here / name)
        )
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
                f"{folder}: expected a folder to search, but it cannot be read "
                f"({error.strerror}). Check its permissions."
            ) from error
        yield folder
    yield from deep


_EARLIER = "checkpoint-"  # checkpoints that transformers' Trainer keeps below the model


def _is_whole(folder: Path) -> bool:
    """Whether the files of a folder are one checkpoint.

    They may be shards with an index, a distributed checkpoint, files of ranks, or weights with the
    ``config.json`` of a Hugging Face folder.
    """
    try:
        names = [path.name for path in folder.iterdir() if is_file(path)]
    except OSError:
        return False
    indexed = any(
        name.endswith(INDEX_SUFFIX)
        and (read_shard_names(folder / name) or _is_outline(folder / name))
        for name in names
    )
    return (
        indexed or METADATA_NAME in names or any(map(is_rank_file, names)) or _is_hub_folder(names)
    )


def _is_outline(index: Path) -> bool:
    """Whether an index is that of a remote folder, of which only the name and size are known yet.

    Its copy is a hole (``outline_remote_folder``) and reads as zeros, with which no JSON begins.
    """
    try:
        with index.open("rb") as file:
            return file.read(1) == b"\0"
    except OSError:
        return False


def _is_hub_folder(names: list[str]) -> bool:
    return "config.json" in names and find_hub_weights(names) is not None


def _weights_in(folder: Path) -> list[str] | None:
    """Return the names of a folder's checkpoint files, which patterns may mean; None if it cannot
    be listed.
    """
    try:
        return [
            path.name
            for path in folder.iterdir()
            if path.name.lower().endswith(CHECKPOINT_SUFFIXES)
        ]
    except OSError:
        return None


def _exists(path: Path) -> bool:
    """Whether something is there, or may be there: the reader says why it cannot be read."""
    try:
        return path.exists()
    except OSError:
        return True


def _is_weights(name: str, folder: Path) -> bool:
    if (
        name.startswith(".")
        or is_trainer_file(name)
        or not name.lower().endswith(CHECKPOINT_SUFFIXES)
    ):
        return False
    return not (name.endswith(".safetensors") and read_provenance_entry(folder / name) is not None)


def _is_selected(
    place: PurePath, include: Sequence[str], exclude: Sequence[str], within: Sequence[str] = ()
) -> bool:
    """Whether the patterns select a path below the searched folder.

    ``within``: the names of a folder's files, by which the folder may be included.
    """
    places = [place, *(parent for parent in place.parents if parent.name)]
    names = [name for parent in places for name in (parent.name, parent.as_posix())]

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
            f"{path}: expected checkpoints ({kinds}){filtered} in it or below, found none. What "
            "ckpt-fix wrote itself does not count. Check the folder, or name the files."
        )
    return (
        f"{path}: expected it to match checkpoints ({kinds}){filtered}, found none. Check the "
        "pattern."
    )
