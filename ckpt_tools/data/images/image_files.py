"""Image files, on disk or in memory, as pixels and as batches."""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
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

__all__ = ["IMAGE_EXTENSIONS", "ImageSource", "image_transforms", "read_images"]

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")

# By content, not by name. PIL knows more formats, and hands some of them (EPS) to other programs.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")


@dataclass(frozen=True)
class ImageSource(ABC):
    """Images that have a number, drawn from all of them at random."""

    spec: str
    limit: int | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    is_preprocessed: bool = field(default=False, init=False)
    sample_shape: None = field(default=None, init=False)

    @property
    @abstractmethod
    def total(self) -> int:
        """Images there are."""

    @abstractmethod
    def samples(self, transform: ImageTransform) -> Samples:
        """What reads images by number."""

    @property
    def count(self) -> int:
        """Images in one pass."""
        return self.total if self.limit is None else min(self.limit, self.total)

    def batches(self, input_spec: InputSpec | None, reading: Reading) -> IndexedStream:
        """Float32 batches (n, C, H, W), normalised. Raises DataError unless ``input_spec`` is an image's."""
        image, scale = image_transforms(self.spec, input_spec)
        return IndexedStream(
            self.samples(image),
            random_order(self.total, limit=self.limit, seed=self.seed),
            reading,
            name=self.spec,
            transform=f"{image}, {scale}",
            finish=scale,
        )


def image_transforms(spec: str, input_spec: InputSpec | None) -> tuple[ImageTransform, PixelScale]:
    """What makes uint8 pixels of an image, and what then makes float32. Raises DataError if there is no telling."""
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
    """Uint8 (n, C, H, W) of those that can be read, and the reasons for the others.

    ``files``: for each number its path, its content, or why there is none; ``name`` gives what to call it.
    """
    images, skipped = [], {}
    for number, file in zip(numbers, files, strict=True):
        try:
            with track_reading(name(number)):
                images.append(_read(file, transform))
        # PIL's plugins raise whatever a broken header leads them to
        except Exception as error:  # noqa: BLE001
            skipped[number] = SkippedSample(name(number), _reason(error, file))
    return Chunk(stack_images(images) if images else None, skipped)


def _read(file: Path | BytesIO | Exception, transform: ImageTransform) -> Tensor:
    if isinstance(file, Exception):
        raise file
    if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for
        raise OSError("no regular file")
    with Image.open(file, formats=_FORMATS) as image, _one_at_a_time(image.size):  # opening reads the header alone
        if image.format == "JPEG" and image.mode == transform.mode == "RGB":
            pixels = decode_jpeg(file, image.size) if transform.accepts_pixels(image.size) else None
            if pixels is not None:
                return transform.transform_pixels(pixels)
        return transform(image)


def _one_at_a_time(size: tuple[int, int]) -> AbstractContextManager[object]:
    """Several threads with an image of 300 MB each are more than a small machine has."""
    pixels = size[0] * size[1]
    if pixels > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{size[0]}×{size[1]} pixels, more than {MAX_PIXELS:,}")
    return _LARGE if pixels > _ALONE else nullcontext()


_ALONE = 1 << 24  # pixels from which on an image is decoded alone
_LARGE = Lock()


def _reason(error: Exception, file: Path | BytesIO | Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        size = file.stat().st_size if isinstance(file, Path) else isinstance(file, BytesIO) and len(file.getbuffer())
        return "no image" if size else "empty file"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return str(error) or type(error).__name__
