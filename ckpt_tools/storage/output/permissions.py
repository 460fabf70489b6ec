"""The permissions of an output: nobody may read it who may not read its source."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

__all__ = ["set_permissions"]

# The extended attribute in which Linux keeps a POSIX access list.
_ACCESS_LIST = "system.posix_acl_access"
_OWNER = stat.S_IRUSR | stat.S_IWUSR
_FOR_ALL = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


def set_permissions(path: Path, usual: int, sources: Sequence[Path]) -> None:
    """Give a new file those of its ``usual`` permissions that all ``sources`` give, too.

    The owner may always read and write. If only their group may read the sources, the new file gets
    that group where this user is in it. Where the groups differ, the new group gets what the source
    gives to everybody. What an access list says is not translated: if a source has one, only the
    owner may read the new file. Raises OSError.
    """
    allowed = 0o666
    if sources:
        statuses = [source.stat() for source in sources]
        _hand_group_on(path, statuses)
        group = path.stat().st_gid
        for source, status in zip(sources, statuses, strict=True):
            allowed &= _OWNER | (0 if _has_access_list(source) else _shared_bits(status, group))
    if allowed & _FOR_ALL != _FOR_ALL:
        # The folder may have a default access list, which gave rights on the new file to users by
        # name.
        with contextlib.suppress(OSError, AttributeError):
            os.removexattr(path, _ACCESS_LIST)
    path.chmod(usual & allowed)


def _shared_bits(source: os.stat_result, group: int) -> int:
    """Return the permissions that a file gives to a group and to everybody else.

    Members of a group get its bits alone, even where everybody else gets more (mode 0604). Nobody
    can tell who is in both groups, so under another group only those bits count that the source
    gives to its group and to everybody.
    """
    if source.st_gid == group:
        return source.st_mode & 0o066
    both = source.st_mode & (source.st_mode >> 3) & 0o006
    return both << 3 | both


def _hand_group_on(path: Path, sources: Sequence[os.stat_result]) -> None:
    """Give a file the group of its sources if only that group may read them.

    Nothing happens where the system does not allow it.
    """
    groups = {source.st_gid for source in sources}
    only_group = any(
        source.st_mode & stat.S_IRGRP and not source.st_mode & stat.S_IROTH for source in sources
    )
    if len(groups) == 1 and only_group and groups != {path.stat().st_gid} and hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(path, -1, groups.pop())


def _has_access_list(path: Path) -> bool:
    """Return whether a file has a POSIX access list: it changes what the group's bits mean."""
    try:
        os.getxattr(path, _ACCESS_LIST)
    except (OSError, AttributeError):
        # There is no list, the file system has none, or the system does not know the call.
        return False
    return True
