"""The search for checkpoints in folders of this machine, and which folders are one checkpoint."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.paths import is_deep, is_file, is_folder, is_link, matching_paths
from ckpt_tools.storage.dcp.assembly import is_rank_file
from ckpt_tools.storage.dcp.dcp_folder import METADATA_NAME
from ckpt_tools.storage.files.folder_members import (
    CHECKPOINT_SUFFIXES,
    INDEX_SUFFIX,
    read_shard_names,
)
from ckpt_tools.storage.files.sidecar import find_hub_weights, is_trainer_file
from ckpt_tools.storage.provenance import read_provenance_entry

__all__ = [
    "count_checkpoints_below",
    "is_checkpoint_folder",
    "is_literal_path",
    "search_checkpoints",
]

_EARLIER = "checkpoint-"  # checkpoints that transformers' Trainer keeps below the model


def search_checkpoints(
    paths: Sequence[Path],
    include: Sequence[str],
    exclude: Sequence[str],
    excluded_folders: frozenset[str],
) -> dict[Path, PurePath]:
    """Return the paths of checkpoints, each with its path below the folder common to all ``paths``.

    ``paths`` are files, patterns and folders of this machine, ``include`` and ``exclude`` as in
    ``find_checkpoints``. ``excluded_folders`` are paths without links.

    Raises CheckpointError where a path yields no checkpoint and where the patterns leave none.
    """
    bases = [_base(path) for path in paths]
    root = Path(os.path.commonpath(bases))
    places: dict[Path, tuple[Path, PurePath]] = {}
    for path, base in zip(paths, bases, strict=True):
        matches = list(_iterate_matches(path, _Search(base, excluded_folders)))
        if not matches:
            raise CheckpointError(_no_match_message(path))
        for match in matches:
            absolute = _absolute_path(match)
            inside = _weights_in(match) if is_folder(match) else ()
            # Nobody knows what an unreadable folder would have matched.
            included = include if inside is not None else ()
            if _is_selected(absolute.relative_to(base), included, exclude, inside or ()):
                places.setdefault(absolute, (match, absolute.relative_to(root)))
    if not places:
        raise CheckpointError(_no_match_message(paths[0], " that --include and --exclude leave"))
    return dict(places.values())


def count_checkpoints_below(folder: Path) -> int:
    """Return the number of checkpoints below a folder.

    Raises CheckpointError if it cannot be listed.
    """
    return len(list(_checkpoints_below(folder, _Search(_absolute_path(folder)))))


def is_literal_path(path: Path) -> bool:
    """Whether a path names one file or folder, and is no pattern for several."""
    return _may_exist(path) or not glob.has_magic(str(path))


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


def _base(path: Path) -> Path:
    """Return the folder that a path searches.

    That is a folder itself, the part of a pattern before the first wildcard, or a file's folder.
    """
    if is_folder(path) and not is_checkpoint_folder(path):
        return _absolute_path(path)
    parts = tuple(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    if _may_exist(path) or len(parts) == len(path.parts):
        return _absolute_path(path).parent
    if ".." in path.parts[len(parts) :]:
        raise UsageError(f"{path}: expected no .. behind the first wildcard. Write the pattern without it.")
    return _absolute_path(Path(*parts))


def _absolute_path(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - without .., and without following links


def _iterate_matches(path: Path, search: _Search) -> Iterator[Path]:
    if is_folder(path) and not is_checkpoint_folder(path):
        yield from _checkpoints_below(path, search)
    elif is_literal_path(path):
        yield path
    else:
        matches = matching_paths(str(path))
        folders = [match for match in matches if is_folder(match) and search.covers(match)]
        checkpoint_folders = set(filter(is_checkpoint_folder, folders))
        files = [
            match
            for match in matches
            if not is_folder(match) and match.parent not in checkpoint_folders and search.covers(match)
        ]
        # A pattern such as *.weights may name only files without a checkpoint's usual suffix.
        usual_files = [match for match in files if _is_weights(match.name, match.parent)]
        selected_files = set(usual_files or files)
        for match in matches:
            if match in folders:
                yield from _iterate_matches(match, search)
            elif match in selected_files:
                yield match


def _checkpoints_below(root: Path, search: _Search) -> Iterator[Path]:
    """Yield the checkpoints below a folder.

    At the end come the folders in it that cannot be listed or lie too deep: their reader reports
    the error. Raises CheckpointError if the folder that the user gave cannot be listed.
    """
    unreadable: list[OSError] = []
    deep: list[Path] = []
    for folder_name, inner, names in os.walk(root, onerror=unreadable.append):
        folder = Path(folder_name)
        # os.walk enters only the folders that are left in ``inner``.
        inner[:] = sorted(name for name in inner if not name.startswith(".") and search.covers(folder / name))
        if is_deep(root, folder):
            deep += [folder / name for name in inner if not is_link(folder / name)]
            inner.clear()
        if folder != root and is_checkpoint_folder(folder):
            inner[:] = [name for name in inner if name.startswith(_EARLIER)]
            yield folder
            continue
        for name in sorted(names):
            if _is_weights(name, folder) and search.covers(folder / name):
                yield folder / name
    for error in unreadable:
        folder = Path(str(error.filename))
        if _absolute_path(folder) == search.base:
            raise CheckpointError(
                f"{folder}: expected a folder to search, but it cannot be read "
                f"({error.strerror}). Check its permissions."
            ) from error
        yield folder
    yield from deep


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether the files of a folder are one checkpoint.

    They may be shards with an index, a distributed checkpoint, files of ranks, or weights with the
    ``config.json`` of a Hugging Face folder.
    """
    try:
        names = [path.name for path in folder.iterdir() if is_file(path)]
    except OSError:
        return False
    indexed = any(
        name.endswith(INDEX_SUFFIX) and (read_shard_names(folder / name) or _is_outline(folder / name))
        for name in names
    )
    return indexed or METADATA_NAME in names or any(map(is_rank_file, names)) or _is_hub_folder(names)


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
    """Return the names of a folder's checkpoint files; None if it cannot be listed."""
    try:
        return [path.name for path in folder.iterdir() if path.name.lower().endswith(CHECKPOINT_SUFFIXES)]
    except OSError:
        return None


def _may_exist(path: Path) -> bool:
    """Whether something is there, or may be there: the reader says why it cannot be read."""
    try:
        return path.exists()
    except OSError:
        return True


def _is_weights(name: str, folder: Path) -> bool:
    """Whether a file is named like a checkpoint, and is no output of this tool."""
    if name.startswith(".") or is_trainer_file(name):
        return False
    if not name.lower().endswith(CHECKPOINT_SUFFIXES):
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


def _no_match_message(path: Path, filtered: str = "") -> str:
    kinds = " ".join(CHECKPOINT_SUFFIXES)
    if is_folder(path):
        return (
            f"{path}: expected checkpoints ({kinds}){filtered} in it or below, found none. What "
            "ckpt-fix wrote itself does not count. Check the folder, or name the files."
        )
    return f"{path}: expected it to match checkpoints ({kinds}){filtered}, found none. Check the pattern."
