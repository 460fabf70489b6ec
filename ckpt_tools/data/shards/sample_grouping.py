"""Group the members of a shard into samples, by the rules of WebDataset."""

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

_MAX_NAME_LENGTH = 300  # characters of a name in a message
_SHARD_METADATA = re.compile(r"__[^/]*__(/|$)")


@dataclass(frozen=True)
class Sample(Generic[T]):
    """Neighbouring members of a shard that share a key.

    ``parts`` has, by extension in lower case, what the caller of ``group_members`` gave for each.
    """

    key: str
    parts: Mapping[str, T]


def split_name(name: str) -> tuple[str, str] | None:
    """Split the name of a member into key and extension, at the first dot behind the last slash.

    Returns None for names without extension, hidden files, and members with metadata of the shard.
    """
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    if not stem or not dot or (name.startswith("__") and _SHARD_METADATA.match(name)):
        return None
    return folder + slash + stem, extension.lower()


def group_members(members: Iterable[tuple[str, T]], shard: str) -> Iterator[Sample[T]]:
    """Group named members of a shard into samples: neighbours with the same key are one sample.

    Raises DataError for two members of the same name in a sample.
    """
    current_key, parts = "", dict[str, T]()
    for name, member in members:
        key_and_extension = split_name(name)
        if key_and_extension is None:
            continue
        key, extension = key_and_extension
        if key != current_key:
            if parts:
                yield Sample(current_key, parts)
            current_key, parts = key, {}
        if extension in parts:
            shown = printable_name(name)
            raise DataError(
                f"{shard}: expected members of different names, found {shown} again. Write it anew."
            )
        parts[extension] = member
    if parts:
        yield Sample(current_key, parts)


def image_extension(extensions: Iterable[str]) -> str | None:
    """Return the extension of the image in a sample; None if there is no image.

    Of several images, the first in the order of ``IMAGE_EXTENSIONS`` is taken.
    """
    present = {f".{extension}" for extension in extensions}
    return next((suffix[1:] for suffix in IMAGE_EXTENSIONS if suffix in present), None)


def printable_name(name: str) -> str:
    """Return a name in a shard as it can be shown.

    A tar's names may hold any bytes, also control characters that change what a terminal does.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    printable = "".join(character if character.isprintable() else "�" for character in text)
    return printable[:_MAX_NAME_LENGTH]
