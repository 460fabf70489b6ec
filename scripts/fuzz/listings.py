"""Read listings of remote folders, whatever a store lists.

Nothing may be written or read outside the folder of copies.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from stores import Lying

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.data_source import open_source
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.errors import CkptToolsError
from ckpt_tools.location import Location
from ckpt_tools.machine.temporary_folders import LOCK_NAME, large_temporary_folder
from ckpt_tools.remote.mirror import open_mirror
from ckpt_tools.storage.discovery import find_checkpoints
from ckpt_tools.storage.reading import read_checkpoint

__all__ = ["read_listing"]

URL = f"lying://{Lying.folder}"
SECRET = "secret"  # a folder beside the listing, into which no name may lead
_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EVENTS = frozenset(
    {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
)


class Trespass(AssertionError):
    """Something happened outside the folder of copies."""


def read_listing(path: Path) -> None:
    """Use a remote folder, whose entries stand in a JSON file, in every way. Its files have those
    beside the listing for content, by their suffixes. Refusals are answers like any other. Raises
    Trespass.
    """
    fsspec.register_implementation("lying", Lying, clobber=True)
    try:
        entries = json.loads(path.read_text("utf-8", "surrogatepass"))
    except (OSError, ValueError, RecursionError):
        return
    Lying.entries = entries if isinstance(entries, list) else [entries]
    Lying.contents = {
        file.suffix: file.read_bytes() for file in path.parent.iterdir() if file.name.startswith("any.")
    }
    for use in _USES:
        with open_mirror(), confine(path.parent / SECRET), suppress(CkptToolsError):
            use()


def _search() -> None:
    for checkpoint in find_checkpoints([Location.of(URL)]):
        read_checkpoint(checkpoint.location)


def _images() -> None:
    next(iter(open_source(URL).batches(InputSpec((3, 8, 8)), Reading(batch_size=8, workers=0))))


def _shards() -> None:
    next(iter(open_source(f"{URL}/*.tar").batches(InputSpec((3, 8, 8)), Reading(batch_size=8, workers=0))))


_USES: tuple[Callable[[], object], ...] = (
    _search,
    lambda: read_checkpoint(URL),
    lambda: read_checkpoint(f"{URL}/model.safetensors.index.json"),
    lambda: read_checkpoint(f"{URL}/.metadata"),
    lambda: find_checkpoints([Location.of(f"{URL}/*/*.pt")]),
    _images,
    _shards,
)

_watched: list[tuple[Path, list[str]]] = []


@contextmanager
def confine(secret: Path) -> Iterator[None]:
    """Raise Trespass at the end if the block changed anything but copies of remote files.

    It is also raised if the block read from `secret`.
    """
    if _hook not in _installed:
        sys.addaudithook(_hook)
        _installed.append(_hook)
    _watched.append((secret, []))
    try:
        yield
    finally:
        _, trespasses = _watched.pop()
    if trespasses:
        raise Trespass("; ".join(trespasses[:5]))


_installed: list[object] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or not (event == "open" or event in _EVENTS):
        return
    if not isinstance(arguments[0], (str, bytes, os.PathLike)) or "\0" in os.fsdecode(arguments[0]):
        return  # an open file, or what no system takes
    if event == "open" and arguments[0] == LOCK_NAME:
        return  # within an open temporary folder, whose descriptor the event does not tell
    path = Path(os.path.realpath(os.fsdecode(arguments[0])))
    secret, trespasses = _watched[-1]
    if event == "open":
        changes = isinstance(arguments[2], int) and arguments[2] & _CHANGES
        trespass = path.is_relative_to(secret) or (changes and not _is_copy(path))
    else:
        trespass = -1 in arguments[1:] and not _is_copy(path)  # others go by the descriptor of a folder
    if trespass:
        trespasses.append(f"{event} {path}")


def _is_copy(path: Path) -> bool:
    """Whether a path lies in a folder for copies of remote files."""
    root = Path(os.path.realpath(large_temporary_folder()))
    inside = path.relative_to(root).parts if path.is_relative_to(root) else ()
    return bool(inside) and inside[0].lstrip(".").startswith("ckpt-tools-")
