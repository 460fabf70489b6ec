"""Who may read an output: nobody who may not read its source."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

__all__ = ["set_permissions"]

_ACCESS_LIST = (
    "system.posix_acl_access"  # the extended attribute in which Linux keeps a POSIX access list
)
_OWNER = stat.S_IRUSR | stat.S_IWUSR
_FOR_ALL = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


def set_permissions(path: Path, usual: int, sources: Sequence[Path]) -> None:
    """Give a new file its permissions: of the ``usual`` ones those that all ``sources`` give, too.

    The owner may always read and write. A file that its group may read, but not everybody, hands its group on where
    this user is in it. Where the groups differ, the new group gets what the source gives to everybody. What an access
    list says is not translated: beside such a source only the owner may read. Raises OSError.
    """
    allowed = 0o666
    if sources:
        found = [(source.stat(), _has_access_list(source)) for source in sources]
        _hand_group_on(path, [there for there, _ in found])
        group = path.stat().st_gid
        for there, listed in found:
            allowed &= _OWNER | (0 if listed else _shared_bits(there, group))
    if allowed & _FOR_ALL != _FOR_ALL:
        # The default access list of the folder may have given rights to users by name.
        with contextlib.suppress(OSError, AttributeError):
            os.removexattr(path, _ACCESS_LIST)
    path.chmod(usual & allowed)


def _shared_bits(source: os.stat_result, group: int) -> int:
    """What a file gives to a group and to everybody else.

    Members of a group get its bits alone, even where everybody else gets more (mode 0604). Nobody can tell who is in
    both groups, so under another group only those bits count that the source gives to its group and to everybody.
    """
    if source.st_gid == group:
        return source.st_mode & 0o066
    both = source.st_mode & (source.st_mode >> 3) & 0o006
    return both << 3 | both


def _hand_group_on(path: Path, sources: Sequence[os.stat_result]) -> None:
    """Give a file the group of its sources if only the group may read them, where the system allows that."""
    groups = {source.st_gid for source in sources}
    only_group = any(
        source.st_mode & stat.S_IRGRP and not source.st_mode & stat.S_IROTH for source in sources
    )
    if len(groups) == 1 and only_group and groups != {path.stat().st_gid} and hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(path, -1, groups.pop())


def _has_access_list(path: Path) -> bool:
    """Whether a file has a POSIX access list, under which the bits of the group mean something else."""
    try:
        os.getxattr(path, _ACCESS_LIST)
    except (
        OSError,
        AttributeError,
    ):  # no list, a file system without them, or a system without the call
        return False
    return True
