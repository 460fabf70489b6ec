"""Files that this tool appends to or replaces without being told to: they must be its own.

A folder from somebody else may bring a file of the right name along, a link that leads elsewhere, or a second name of a
file that matters. Each road to a manifest or a report therefore passes through here before anything is written.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.errors import OutputError, UsageError
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.paths import identity
from ckpt_tools.remote.local_copies import read_remote_file

__all__ = ["OwnFileKind", "open_own_file", "read_own_file", "require_distinct_file", "require_own_content"]

_LARGEST = 1 << 30  # bytes of a file that is looked at
# O_NONBLOCK: a pipe that takes the file's place after it was looked at would be waited for.
_ALWAYS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class OwnFileKind:
    """A kind of file that this tool writes: its name in messages, its option, and how its content is recognised."""

    name: str
    option: str
    is_own: Callable[[bytes], bool]


def require_distinct_file(place: LocationLike, kind: OwnFileKind, others: Iterable[LocationLike | None]) -> None:
    """Refuse a file that is also another file of the run, under whatever name.

    Files are compared by device and inode, those that are not there yet by their resolved paths. Raises UsageError.
    """
    location = Location.of(place)
    own_identity = _file_behind(location.path)
    for other in others:
        if other is not None and _file_behind(Location.of(other).path) == own_identity:
            raise UsageError(
                f"{kind.option} {location}: expected a file of its own, found another file of this job ({other}). "
                "Rename it."
            )


def _file_behind(path: Path) -> object:
    """Equal for all names of one file."""
    return identity(path) or os.path.realpath(path)


def read_own_file(place: LocationLike, kind: OwnFileKind) -> bytes | None:
    """The content of a file that this tool wrote, or of an empty one; None if there is no such file.

    Raises OutputError for a link, a file with several names, anything that is no file, one that cannot be read, and one
    that something else wrote; RemoteError.
    """
    location = Location.of(place)
    if location.store is None:
        content = _local_content(location.path, kind)
    else:
        content = read_remote_file(location.store, location.path, _LARGEST)
    if content is not None:
        require_own_content(location, kind, content)
    return content


def require_own_content(location: LocationLike, kind: OwnFileKind, content: bytes) -> None:
    """Raise OutputError for the content of a file that something else wrote. An empty file is nobody's."""
    if content and (len(content) > _LARGEST or not kind.is_own(content)):
        raise OutputError(
            f"{location}: expected no file, or {kind.name} as ckpt-fix wrote it, found another file. It stays as it "
            f"is; give another name with {kind.option}."
        )


def _local_content(path: Path, kind: OwnFileKind) -> bytes | None:
    try:
        descriptor = open_own_file(path, kind, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        try:
            return file.read(_LARGEST + 1)
        except OSError as error:
            raise _unusable(path, kind, str(error.strerror)) from error


def open_own_file(path: Path, kind: OwnFileKind, flags: int) -> int:
    """Open a local file that exists, or with ``O_CREAT | O_EXCL`` a new one, and return its descriptor.

    No link is followed. Raises OutputError for a link, a file with several names, anything that is no file, and what
    the system refuses; FileNotFoundError, FileExistsError.
    """
    try:
        if not flags & os.O_EXCL:
            _require_plain(path, path.lstat(), kind)  # before it is opened: to open a device may set it in motion
        descriptor = os.open(path, flags | _ALWAYS, 0o666)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        found = "a link" if error.errno == errno.ELOOP else str(error.strerror)
        raise _unusable(path, kind, found) from error
    try:
        _require_plain(path, os.fstat(descriptor), kind)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_plain(path: Path, there: os.stat_result, kind: OwnFileKind) -> None:
    """Raise OutputError for anything but a file with a single name."""
    if stat.S_ISLNK(there.st_mode):
        raise _unusable(path, kind, "a link")
    if stat.S_ISDIR(there.st_mode):
        raise _unusable(path, kind, "a folder")
    if not stat.S_ISREG(there.st_mode):
        raise _unusable(path, kind, "a device or pipe")
    if there.st_nlink > 1:
        raise _unusable(path, kind, f"a file with {there.st_nlink} names (hard links)")


def _unusable(path: Path, kind: OwnFileKind, found: str) -> OutputError:
    return OutputError(
        f"{path}: expected no file, or {kind.name} as ckpt-fix wrote it, found: {found}. Nothing was written to it; "
        f"give another name with {kind.option}."
    )
