"""Which members of a shard are one sample, as WebDataset has it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from ckpt_tools.data.images.image_files import IMAGE_EXTENSIONS
from ckpt_tools.errors import DataError

__all__ = ["LABEL_EXTENSION", "Sample", "group_members", "image_extension", "printable_name", "split_name"]

T = TypeVar("T")

LABEL_EXTENSION = "cls"
"""Extension of a member that holds a class number as text."""

_IMAGES = tuple(extension[1:] for extension in IMAGE_EXTENSIONS)
_SHOWN = 300  # characters
_ABOUT_THE_SHARD = re.compile(r"__[^/]*__(/|$)")


@dataclass(frozen=True)
class Sample(Generic[T]):
    """Neighbours in a shard that share a key: what stands for each of them, by extension in lower case."""

    key: str
    parts: Mapping[str, T]


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension: all before the first dot of the last part of the name, and all behind it.

    None for names without extension, hidden files and what WebDataset says about the shard itself.
    """
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    if not stem or not dot or (name.startswith("__") and _ABOUT_THE_SHARD.match(name)):
        return None
    return folder + slash + stem, extension.lower()


def group_members(members: Iterable[tuple[str, T]], shard: str) -> Iterator[Sample[T]]:
    """The samples of the named members of a shard. Raises DataError for two members of the same name in a sample."""
    key, parts = "", dict[str, T]()
    for name, member in members:
        split = split_name(name)
        if split is None:
            continue
        if split[0] != key:
            if parts:
                yield Sample(key, parts)
            key, parts = split[0], {}
        if split[1] in parts:
            raise DataError(
                f"{shard}: expected every member of a sample once, found {printable_name(name)} again. Write it anew."
            )
        parts[split[1]] = member
    if parts:
        yield Sample(key, parts)


def image_extension(extensions: Iterable[str]) -> str | None:
    """The extension of the image of a sample; of several, the first in the order of ``IMAGE_EXTENSIONS``."""
    found = set(extensions)
    return next((extension for extension in _IMAGES if extension in found), None)


def printable_name(name: str) -> str:
    """A name in a shard as it can be shown: it may hold anything, also what steers a terminal."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "�" for character in text)[:_SHOWN]
