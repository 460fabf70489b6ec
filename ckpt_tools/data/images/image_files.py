"""Decode image files, on disk or in memory, and make batches of them."""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from threading import Lock

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.images.jpeg import decode_jpeg
from ckpt_tools.data.images.transforms import MAX_PIXELS, ImageTransform, PixelScale, stack_images
from ckpt_tools.data.prefetch import track_reading
from ckpt_tools.data.sample_order import Reading, random_order
from ckpt_tools.data.stream import Chunk, IndexedStream, Samples, SkippedSample
from ckpt_tools.errors import DataError

__all__ = ["IMAGE_EXTENSIONS", "USUAL_EXTENSIONS", "ImageSource", "image_transforms", "read_images"]

USUAL_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
"""The extensions that messages name."""

# Formats that PIL registers and that are not read here. It hands EPS to another program, which a file
# must not be able to start; an IPTC file may hold an image of any format, EPS included. For BUFR,
# GRIB, HDF5, MPEG and WMF it has no decoder on every system. FITS holds measurements, which may be
# compressed without bound, and what is called .pcd is a cloud of points as a rule, and no Photo CD.
_EXCLUDED_FORMATS = frozenset({"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PCD", "PDF", "WMF"})


def _registered_formats() -> dict[str, str]:
    """Return the format of every file name extension of images that PIL reads by itself."""
    Image.init()  # imports the plugins of all formats
    # PIL opens a file of several JPEG images (MPO) as JPEG, and shows the first one.
    formats = {**Image.registered_extensions(), ".mpo": "JPEG"}
    return {
        extension: formats[extension]
        # The usual ones come first: they are tried first, and of several images in a sample of a
        # shard the first is taken.
        for extension in sorted(formats, key=[*USUAL_EXTENSIONS, *sorted(formats)].index)
        if formats[extension] in Image.OPEN and formats[extension] not in _EXCLUDED_FORMATS
    }


_FORMAT_BY_EXTENSION = _registered_formats()

IMAGE_EXTENSIONS = tuple(_FORMAT_BY_EXTENSION)
"""File name extensions of images, in lower case with their dot: those that PIL registers."""

# Files are recognised by content, not by name.
_FORMATS = tuple(dict.fromkeys(_FORMAT_BY_EXTENSION.values()))


@dataclass(frozen=True)
class ImageSource(ABC):
    """Images that are numbered from 0, and read in random order.

    A subclass says how many there are, how to read their files, and what messages call them.
    """

    spec: str
    limit: int | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    is_preprocessed: bool = field(default=False, init=False)
    sample_shape: None = field(default=None, init=False)

    @property
    @abstractmethod
    def total(self) -> int:
        """Number of images, before the limit."""

    @abstractmethod
    def files(self, numbers: Sequence[int], /) -> Iterable[Path | BytesIO | Exception]:
        """Return for each number the path or the content of the image, or why there is none."""

    @abstractmethod
    def name(self, number: int, /) -> str:
        """Return the name of an image as messages show it."""

    def samples(self, transform: ImageTransform) -> Samples:
        """Return an object that reads and transforms images by number.

        Several threads may use it at the same time.
        """
        return _TransformedImages(self, transform)

    @property
    def count(self) -> int:
        """Number of images in one pass."""
        return self.total if self.limit is None else min(self.limit, self.total)

    def batches(self, input_spec: InputSpec | None, reading: Reading) -> IndexedStream:
        """Return a stream of normalised float32 batches (n, C, H, W).

        Raises DataError unless ``input_spec`` describes images.
        """
        image, scale = image_transforms(self.spec, input_spec)
        return IndexedStream(
            self.samples(image),
            random_order(self.total, limit=self.limit, seed=self.seed),
            reading,
            name=self.spec,
            transform=f"{image}, {scale}",
            finish=scale,
        )


@dataclass(frozen=True)
class _TransformedImages:
    source: ImageSource
    transform: ImageTransform

    def __getitem__(self, indices: list[int]) -> Chunk:
        return read_images(indices, self.source.files(indices), self.source.name, self.transform)

    def name(self, index: int) -> str:
        return self.source.name(index)


def image_transforms(spec: str, input_spec: InputSpec | None) -> tuple[ImageTransform, PixelScale]:
    """Return what turns an image into uint8 pixels, and what turns those into float32.

    Raises DataError if it is not known how an image becomes an input.
    """
    if input_spec is None:
        raise DataError(
            f"{spec}: how an image becomes an input of this model is unknown. "
            f"Give --input-size 3,224,224 with --mean and --std as in training."
        )
    return ImageTransform(input_spec), PixelScale(input_spec)


def read_images(
    numbers: Iterable[int],
    files: Iterable[Path | BytesIO | Exception],
    name: Callable[[int], str],
    transform: ImageTransform,
) -> Chunk:
    """Decode images to uint8 (n, C, H, W); the chunk also names those that cannot be read.

    ``files`` has for each number the path or the content of the image, or why there is none.
    ``name`` returns the name of an image as messages show it.
    """
    images, skipped = [], {}
    for number, file in zip(numbers, files, strict=True):
        try:
            with track_reading(name(number)):
                images.append(_decode_image(file, transform))
        # PIL's plugins raise whatever a broken header leads them to.
        except Exception as error:  # noqa: BLE001
            skipped[number] = SkippedSample(name(number), _describe_failure(error, file))
    return Chunk(stack_images(images) if images else None, skipped)


def _decode_image(file: Path | BytesIO | Exception, transform: ImageTransform) -> Tensor:
    if isinstance(file, Exception):
        raise file
    if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):  # reading a pipe could wait forever
        raise OSError("no regular file")
    # Image.open reads the header alone; the pixels are decoded under the lock.
    with Image.open(file, formats=_FORMATS) as image, _memory_guard(image.size):
        if image.format == "JPEG" and image.mode == transform.mode == "RGB":
            pixels = decode_jpeg(file, image.size) if transform.accepts_pixels(image.size) else None
            if pixels is not None:
                return transform.transform_pixels(pixels)
        return transform(image)


def _memory_guard(size: tuple[int, int]) -> AbstractContextManager[object]:
    """Return a lock for a large image, so that one thread at a time decodes such an image.

    Several threads with an image of 300 MB each need more memory than a small machine has.
    Raises PIL's DecompressionBombError for an image that is larger still.
    """
    pixels = size[0] * size[1]
    if pixels > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{size[0]}×{size[1]} pixels, more than {MAX_PIXELS:,}")
    return _LARGE_IMAGE_LOCK if pixels > _LARGE_IMAGE_PIXELS else nullcontext()


_LARGE_IMAGE_PIXELS = 1 << 24
_LARGE_IMAGE_LOCK = Lock()


def _describe_failure(error: Exception, file: Path | BytesIO | Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text quotes the file or a memory address
        size = (
            file.stat().st_size
            if isinstance(file, Path)
            else isinstance(file, BytesIO) and len(file.getbuffer())
        )
        return "no image" if size else "empty file"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return str(error) or type(error).__name__
