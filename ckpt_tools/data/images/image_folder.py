"""A folder of images: what is in it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePath
from typing import Literal

from ckpt_tools.data.images.image_files import IMAGE_EXTENSIONS, ImageSource, read_images
from ckpt_tools.data.images.remote_image_folder import RemoteFolder
from ckpt_tools.data.images.transforms import ImageTransform
from ckpt_tools.data.stream import Chunk
from ckpt_tools.errors import DataError
from ckpt_tools.paths import is_deep

__all__ = ["FolderSource", "find_images"]


@dataclass(frozen=True)
class FolderSource(ImageSource):
    """All images below a folder, whatever its structure; folder names are no labels here."""

    root: Path | RemoteFolder
    names: tuple[str, ...]  # relative to root, sorted
    kind: Literal["folder"] = field(default="folder", init=False)

    @classmethod
    def open(cls, spec: str, root: Path | RemoteFolder, *, limit: int | None, seed: int) -> FolderSource:
        """Lists the images without reading one. Raises DataError if there is none."""
        return cls(spec, root, find_images(root), limit=limit, seed=seed)

    @property
    def total(self) -> int:
        """Images below the folder."""
        return len(self.names)

    def samples(self, transform: ImageTransform) -> FolderImages:
        """What reads images by number."""
        return FolderImages(self.root, self.names, transform)


@dataclass(frozen=True)
class FolderImages:
    """Reads images by number."""

    root: Path | RemoteFolder
    names: tuple[str, ...]
    transform: ImageTransform

    def __getitem__(self, indices: list[int]) -> Chunk:
        """Uint8 (n, C, H, W) of those that can be read, and the reasons for the others."""
        return read_images(indices, self._files(indices), lambda index: _printable(self.names[index]), self.transform)

    def name(self, index: int) -> str:
        """The file below the folder."""
        return _printable(self.names[index])

    def _files(self, indices: list[int]) -> Sequence[Path | BytesIO | Exception]:
        names = [self.names[index] for index in indices]
        if isinstance(self.root, RemoteFolder):
            return self.root.read(names)
        return [self.root / name for name in names]


def _printable(name: str) -> str:
    # file names are bytes; those that are not UTF-8 cannot be printed as they are
    return os.fsencode(name).decode("utf-8", "replace")


def find_images(root: Path | RemoteFolder) -> tuple[str, ...]:
    """Paths of all images below ``root``, relative to it and sorted; hidden files and folders are left out.

    Links are followed, and every folder is read once, however many links lead to it. Raises DataError if
    there is no image, or a folder cannot be listed, RemoteError for a store that does not answer.
    """
    images: list[str] = []
    others: Counter[str] = Counter()
    for name in root.names(IMAGE_EXTENSIONS) if isinstance(root, RemoteFolder) else _names(root):
        suffix = PurePath(name).suffix.lower()
        if suffix in IMAGE_EXTENSIONS:
            images.append(name)
        else:
            others[suffix or "no extension"] += 1
    if not images:
        raise DataError(_no_images(root, others))
    return tuple(sorted(images))


def _names(root: Path) -> Iterator[str]:
    for folder, names in _walk(root):
        prefix = os.path.relpath(folder, root)
        yield from names if prefix == "." else (f"{prefix}/{name}" for name in names)


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_refuse):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if is_deep(root, Path(folder)):
            raise DataError(f"{folder}: expected images in fewer folders within folders. Give a folder closer to them.")
        # in place: os.walk then descends in this order, and not into what was removed
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, [name for name in names if not name.startswith(".")]


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be listed: {error.strerror}.") from error


def _no_images(root: Path | RemoteFolder, others: Counter[str]) -> str:
    if others:
        listed = ", ".join(f"{number} × {suffix}" for suffix, number in others.most_common(5))
        found = f"{others.total()} other files ({listed})"
    else:
        found = "no files at all"
    return f"{root}: no image ({' '.join(sorted(IMAGE_EXTENSIONS))}) in this folder or below it; found {found}."
