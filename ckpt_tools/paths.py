"""Names that come from outside become paths here, and nowhere else.

The listing of a remote folder, an index of shards and the metadata of a distributed checkpoint hold
names that somebody else has chosen. Every such name passes through ``path_below`` before a file is
opened or written under it.
"""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from ckpt_tools.errors import CheckpointError, CkptToolsError

__all__ = [
    "folds_case",
    "identity",
    "is_deep",
    "is_file",
    "is_folder",
    "is_link",
    "matching_paths",
    "name_fault",
    "path_below",
    "require_below",
    "require_distinct",
    "shown_name",
    "spelling_fault",
]

_LONGEST_NAME = 255  # bytes of a file name on ext4, XFS, APFS and NTFS
_LONGEST_PATH = 4000  # bytes; Linux takes 4,096, and temporary files need names beside the file
_SHOWN = 120  # characters of a name in a message
# Folders within folders; os.walk of Python 3.11 ends at about 1,000 with an error of the
# interpreter
_DEEPEST = 64

_DRIVE = re.compile(r"[A-Za-z]:")
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file: devices, whatever suffix follows
# their name.
_DEVICE = re.compile(
    r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³]) *(\..*)?", re.IGNORECASE | re.DOTALL
)
# No file name on Windows has them; a colon opens another stream of a file
_WINDOWS_MARKS = frozenset('<>:"|?*')
_DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Control characters, lone surrogates, separators of lines
_INVISIBLE = frozenset({"Cc", "Cs", "Zl", "Zp"})

# https://huggingface.co/docs/huggingface_hub/guides/manage-cache
_HUB_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+", re.DOTALL)


def path_below(
    folder: Path,
    name: object,
    *,
    origin: object,
    error: type[CkptToolsError] = CheckpointError,
    nested: bool = False,
) -> Path:
    """Return the path that a name from outside has below a folder.

    ``origin`` is the file or URL that the name comes from, as a message shows it. ``nested``: the
    name may have folders in it, separated by slashes; otherwise it must be that of a file directly
    in ``folder``.

    Raises ``error`` for a name that could lead out of the folder (``name_fault`` lists them), and
    for one behind which a link leads out of it, by the rule of ``require_below``. Whether there is
    a file is not asked.
    """
    fault = name_fault(name, nested=nested)
    if fault is not None or not isinstance(name, str):
        raise error(
            f"{origin}: expected the name of a file {'below' if nested else 'beside'} it, found "
            f"{shown_name(name)}, {fault}. "
            "Do not trust what names it; if it is yours, rename the file."
        )
    path = folder.joinpath(*name.split("/"))
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise error(
            f"{origin}: expected paths of up to {_LONGEST_PATH:,} bytes, found a longer one for "
            f"{shown_name(name)}. Use a folder with a shorter path."
        )
    return require_below(folder, path, origin=origin, error=error)


def require_below(
    folder: Path, path: Path, *, origin: object, error: type[CkptToolsError] = CheckpointError
) -> Path:
    """Return a path that was made by joining a name to ``folder`` if no link leads out of it.

    A link counts as the file that it leads to, and that must lie in the folder or below it. The one
    exception is the cache of huggingface_hub, where each file of
    ``models--ORG--NAME/snapshots/REVISION`` is a link to a file in ``models--ORG--NAME/blobs``:
    there a file itself, but no folder on its way, may be such a link. Links on the way to
    ``folder`` are the user's own and do not matter.

    Raises ``error``.
    """
    root = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(path))
    if target.is_relative_to(root):
        return path
    if target.parent == _hub_blobs(root) and Path(os.path.realpath(path.parent)).is_relative_to(root):
        return path
    raise error(
        f"{origin}: expected {shown_name(os.path.relpath(path, folder))} to be a file of {folder}, "
        f"found a link that leads out of it, to {target}. Put the file itself there if you trust that place."
    )


def name_fault(name: object, *, nested: bool = False) -> str | None:
    """Say in a phrase why a name cannot be that of a file below a folder; None for one that can.

    Refused are, besides those of ``spelling_fault``: drive letters (``C:x``), names that are
    reserved on Windows (``NUL``, ``com1.txt``), names that end in a dot or a blank, which Windows
    drops, and names that are too long for a file system. They are refused on every system, so that
    a checkpoint does not mean one thing here and another there.
    """
    fault = spelling_fault(name)
    if fault is not None or not isinstance(name, str):
        return fault
    if "/" in name and not nested:
        return "which is in another folder"
    if name.count("/") > _DEEPEST:
        return f"which is more than {_DEEPEST} folders deep"
    return next(filter(None, map(_part_fault, name.split("/"))), None)


def spelling_fault(name: object) -> str | None:
    """Say in a phrase why a name with slashes could lead out of a folder of any store.

    Return None for a name that could not.

    Refused are: what is no text, empty names and empty parts, ``.`` and ``..``, absolute names,
    backslashes, NUL and other control characters, separators of lines, marks that turn the
    direction of writing, and lone surrogates.
    """
    if not isinstance(name, str):
        return f"which is no text but of the type {type(name).__name__}"
    if not name:
        return "which is empty"
    if name.startswith("/"):
        return "which is an absolute path"
    parts = name.split("/")
    if ".." in parts:
        return "which leads out of the folder"
    if "" in parts or "." in parts:
        return "which has an empty part or a dot for one"
    if "\\" in name:
        return "which has a backslash in it"
    if any(
        character in _DIRECTION_MARKS or unicodedata.category(character) in _INVISIBLE for character in name
    ):
        return "which has characters in it that do not show"
    return None


def _part_fault(part: str) -> str | None:
    if _DRIVE.match(part):
        return "which begins with the letter of a drive"
    if _DEVICE.fullmatch(part):
        return "which is the name of a device on Windows"
    if part.endswith((".", " ")):
        return "which ends in a dot or a blank"
    if len(part.encode()) > _LONGEST_NAME:
        return f"which is longer than the {_LONGEST_NAME} bytes that a file system takes"
    if os.name == "nt" and not _WINDOWS_MARKS.isdisjoint(part):
        return "which has characters in it that Windows does not take"
    return None


def require_distinct(
    names: Iterable[str], *, origin: object, error: type[CkptToolsError] = CheckpointError, fold: bool = False
) -> None:
    """Refuse names that cannot all be files below one folder.

    Such are two equal names, and a file that is also a folder.

    ``fold``: the file system takes upper and lower case, and different ways to compose a letter,
    for the same, as those of macOS and Windows do. Raises ``error``.
    """
    name_by_key: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name).casefold() if fold else name
        if key in name_by_key:
            raise error(
                f"{origin}: expected names that differ also in lower case, as this machine needs "
                f"them, found {shown_name(name_by_key[key])} and {shown_name(name)}. Rename one of them."
            )
        name_by_key[key] = name
    for key, name in name_by_key.items():
        at = key.find("/")
        while at >= 0:
            if key[:at] in name_by_key:
                parent = shown_name(name_by_key[key[:at]])
                raise error(
                    f"{origin}: expected {parent} to be a file or a folder, found both, "
                    f"for there also is {shown_name(name)}. Rename one of them."
                )
            at = key.find("/", at + 1)


def is_deep(root: Path, folder: Path) -> bool:
    """Return whether a folder lies too deep below ``root`` for a search for files."""
    return len(folder.parts) - len(root.parts) >= _DEEPEST


def folds_case(folder: Path) -> bool:
    """Return whether the file system of an existing folder ignores case."""
    # The first name on the way up that has letters, so that its case can be swapped.
    cased = next((path for path in (folder, *folder.parents) if path.name.swapcase() != path.name), folder)
    swapped = identity(cased.with_name(cased.name.swapcase()))
    return swapped is not None and swapped == identity(cased)


def shown_name(name: object) -> str:
    """Quote a foreign name for a message: on one line, shortened, with escapes."""
    if not isinstance(name, str):
        return f"a {type(name).__name__}"
    return repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…")


def _hub_blobs(folder: Path) -> Path | None:
    """Return the ``blobs`` of the cached repository of which ``folder`` is a snapshot, or None."""
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and _HUB_REPOSITORY.fullmatch(repository.name):
            return repository / "blobs"
    return None


def matching_paths(pattern: str) -> list[Path]:
    """Return the paths that a pattern matches, sorted, as ``glob.glob`` with ``recursive`` does.

    But ``**`` does not follow links to folders: two links that lead back to their own folder keep
    ``glob`` busy for ever. Nor does it look into folders that are too deep for ``is_deep``.
    """
    return sorted(_matching(Path(pattern)), key=str)


def _matching(pattern: Path) -> set[Path]:
    parts = pattern.parts
    if "**" not in parts:
        return set(map(Path, glob.glob(str(pattern))))  # noqa: PTH207 - Path.glob takes no absolute pattern
    at = parts.index("**")
    paths: set[Path] = set()
    for start in _matching(Path(*parts[:at])):
        for folder, inner, names in os.walk(start):
            inner[:] = [
                name for name in inner if not name.startswith(".") and not is_deep(start, Path(folder))
            ]
            if parts[at + 1 :]:
                paths |= _matching(Path(glob.escape(folder), *parts[at + 1 :]))
            else:
                paths |= {
                    Path(folder),
                    *(Path(folder, name) for name in [*inner, *names] if not name.startswith(".")),
                }
    return paths


# Unlike ``Path.is_dir`` and its like, these do not raise for names that are too long and folders
# without permission.


def is_folder(path: Path) -> bool:
    """Return whether the path leads to a folder, also through links."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: Path) -> bool:
    """Return whether the path leads to a regular file, also through links."""
    return os.path.isfile(path)  # noqa: PTH113


def is_link(path: Path) -> bool:
    """Return whether the path itself is a symbolic link, wherever that leads."""
    return os.path.islink(path)  # noqa: PTH114


def identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of the file or folder behind a path; None where they are unknown.

    They are the same for all names of a file, among them hard links.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    # Some network file systems number none
    return (status.st_dev, status.st_ino) if status.st_ino else None
