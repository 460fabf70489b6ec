"""Find the images in a folder and its subfolders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePath
from typing import Literal

from ckpt_tools.data.foreign_data import advise_callable, describe_foreign_names
from ckpt_tools.data.images.image_files import IMAGE_EXTENSIONS, USUAL_EXTENSIONS, ImageSource
from ckpt_tools.data.images.remote_image_folder import RemoteFolder
from ckpt_tools.errors import DataError
from ckpt_tools.paths import is_deep

__all__ = ["FolderSource", "find_images", "search_folder"]


@dataclass(frozen=True)
class FolderSource(ImageSource):
    """All images below a folder, whatever its structure. Names of subfolders are no labels here."""

    root: Path | RemoteFolder
    names: tuple[str, ...]  # relative to root, sorted
    # How many other files there are of each extension, the most frequent first
    other_files: Mapping[str, int] = field(default_factory=dict, hash=False)
    kind: Literal["folder"] = field(default="folder", init=False)

    @classmethod
    def open(cls, spec: str, root: Path | RemoteFolder, *, limit: int | None, seed: int) -> FolderSource:
        """List the images without reading one. Raises DataError if there is none."""
        names, other_files = search_folder(root)
        return cls(spec, root, names, other_files, limit=limit, seed=seed)

    @property
    def total(self) -> int:
        """Number of images below the folder."""
        return len(self.names)

    def files(self, numbers: Sequence[int]) -> Sequence[Path | BytesIO | Exception]:
        """Return the paths of images or, from a remote folder, their contents."""
        names = [self.names[number] for number in numbers]
        if isinstance(self.root, RemoteFolder):
            return self.root.read(names)
        return [self.root / name for name in names]

    def name(self, number: int) -> str:
        """Return the path of an image below the folder."""
        # File names are bytes; those that are not UTF-8 cannot be printed as they are.
        return os.fsencode(self.names[number]).decode("utf-8", "replace")


def find_images(root: Path | RemoteFolder) -> tuple[str, ...]:
    """Find all images below ``root`` as ``search_folder`` does, and leave other files out."""
    return search_folder(root)[0]


def search_folder(root: Path | RemoteFolder) -> tuple[tuple[str, ...], dict[str, int]]:
    """Find all images below ``root``: their paths relative to it, sorted, without hidden ones.

    The extension of a file decides whether it is an image. All other files are counted in the second
    value, by extension. Links are followed, and every folder is read once, however many links lead to
    it.

    Raises DataError if there is no image or a folder cannot be listed, and RemoteError for a store
    that does not answer.
    """
    images: list[str] = []
    others: list[str] = []
    for name in root.names(IMAGE_EXTENSIONS) if isinstance(root, RemoteFolder) else _file_names(root):
        kind = images if PurePath(name).suffix.lower() in IMAGE_EXTENSIONS else others
        kind.append(name)
    other_suffixes = Counter(PurePath(name).suffix.lower() or "no extension" for name in others)
    if not images:
        foreign = describe_foreign_names([*others, PurePath(str(root)).name])
        advice = f" {advise_callable(foreign)}" if foreign else ""
        raise DataError(f"{root}: {_describe_contents(other_suffixes)}.{advice}")
    return tuple(sorted(images)), dict(other_suffixes.most_common())


def _file_names(root: Path) -> Iterator[str]:
    for folder, names in _walk_folders(root):
        prefix = os.path.relpath(folder, root)
        yield from names if prefix == "." else (f"{prefix}/{name}" for name in names)


def _walk_folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    visited: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise_data_error):
        # A link may lead back to a folder above it. Device and inode identify a folder.
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        if is_deep(root, Path(folder)):
            raise DataError(
                f"{folder}: expected images in fewer nested folders. Give a folder closer to them."
            )
        # Changed in place: os.walk then descends in this order, and not into hidden folders.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, [name for name in names if not name.startswith(".")]


def _raise_data_error(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be listed: {error.strerror}.") from error


def _describe_contents(other_suffixes: Counter[str]) -> str:
    """Say that there is no image in a folder, and which other files there are."""
    contents = "no files at all"
    if other_suffixes:
        listed = ", ".join(f"{count} × {suffix}" for suffix, count in other_suffixes.most_common(5))
        contents = f"{other_suffixes.total()} other files ({listed})"
    return f"no image ({' '.join(USUAL_EXTENSIONS)} …) in this folder or below it; found {contents}"
