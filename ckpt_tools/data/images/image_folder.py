"""Find the images in a folder and its subfolders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePath
from typing import Literal

from ckpt_tools.data.images.image_files import IMAGE_EXTENSIONS, ImageSource
from ckpt_tools.data.images.remote_image_folder import RemoteFolder
from ckpt_tools.errors import DataError
from ckpt_tools.paths import is_deep

__all__ = ["FolderSource", "find_images"]


@dataclass(frozen=True)
class FolderSource(ImageSource):
    """All images below a folder, whatever its structure. Names of subfolders are no labels here."""

    root: Path | RemoteFolder
    names: tuple[str, ...]  # relative to root, sorted
    kind: Literal["folder"] = field(default="folder", init=False)

    @classmethod
    def open(cls, spec: str, root: Path | RemoteFolder, *, limit: int | None, seed: int) -> FolderSource:
        """List the images without reading one. Raises DataError if there is none."""
        return cls(spec, root, find_images(root), limit=limit, seed=seed)

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
    """Find all images below ``root``: their paths relative to it, sorted, without hidden ones.

    Links are followed, and every folder is read once, however many links lead to it.

    Raises DataError if there is no image or a folder cannot be listed, and RemoteError for a store
    that does not answer.
    """
    images: list[str] = []
    other_suffixes: Counter[str] = Counter()
    for name in root.names(IMAGE_EXTENSIONS) if isinstance(root, RemoteFolder) else _file_names(root):
        suffix = PurePath(name).suffix.lower()
        if suffix in IMAGE_EXTENSIONS:
            images.append(name)
        else:
            other_suffixes[suffix or "no extension"] += 1
    if not images:
        raise _no_images_error(root, other_suffixes)
    return tuple(sorted(images))


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


def _no_images_error(root: Path | RemoteFolder, other_suffixes: Counter[str]) -> DataError:
    contents = "no files at all"
    if other_suffixes:
        listed = ", ".join(f"{count} × {suffix}" for suffix, count in other_suffixes.most_common(5))
        contents = f"{other_suffixes.total()} other files ({listed})"
    extensions = " ".join(sorted(IMAGE_EXTENSIONS))
    return DataError(f"{root}: no image ({extensions}) in this folder or below it; found {contents}.")
