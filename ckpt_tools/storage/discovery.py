"""Finding the checkpoints of a folder run: files by their names, and folders that are one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.paths import identity, is_folder, is_link
from ckpt_tools.storage.files.checkpoint_files import find_checkpoint_files
from ckpt_tools.storage.files.fetching import fetch_checkpoint, outline_remote_folder
from ckpt_tools.storage.folder_search import (
    count_checkpoints_below,
    is_checkpoint_folder,
    is_literal_path,
    search_checkpoints,
)

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
        return is_literal_path(path)
    number_below = 0
    try:
        number_below = count_checkpoints_below(path)
        find_checkpoint_files(fetch_checkpoint(location))
    except CheckpointError:
        # Of an empty folder the reader says best what is wrong with it.
        return not number_below
    return is_checkpoint_folder(path) or number_below < 2


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
        paths = search_checkpoints(
            [location.path for location in locations], include, exclude, excluded_folders
        )
    checkpoints = [DiscoveredCheckpoint(locations[0].with_path(path), place) for path, place in paths.items()]
    return _merge_aliases(checkpoints)


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


def _require_one_store(locations: Sequence[Location]) -> None:
    stores = {location.store for location in locations}
    if len(stores) > 1:
        names = sorted("this machine" if store is None else str(store) for store in stores)
        raise UsageError(
            f"{locations[-1]}: expected checkpoints of one store in a run, found those of "
            f"{' and '.join(names)}. Run them one after the other, with the same --manifest if one "
            "shall list them."
        )
