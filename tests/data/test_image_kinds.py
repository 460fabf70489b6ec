"""Every kind of image that PIL reads by itself is an image, and other files are counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ckpt_tools.contract import InputSpec
from ckpt_tools.data import open_source
from ckpt_tools.data.data_source import count_other_files
from ckpt_tools.data.images.image_files import IMAGE_EXTENSIONS, USUAL_EXTENSIONS
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.errors import DataError

SPEC = InputSpec((3, 16, 16))
LOSSLESS = (
    ".png",
    ".apng",
    ".bmp",
    ".dib",
    ".tga",
    ".tiff",
    ".ppm",
    ".pnm",
    ".pcx",
    ".qoi",
    ".sgi",
    ".ico",
)
LOSSY = (".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".avif", ".jp2", ".j2k", ".gif", ".dds", ".icns", ".mpo")


def read_all(folder: Path) -> list[np.ndarray]:
    stream = open_source(str(folder)).batches(SPEC, Reading(64, workers=0))
    return [image.mul(255).round().numpy() for batch in stream for image in batch]


def test_images_of_all_usual_kinds_are_read(tmp_path: Path) -> None:
    pixels = np.full((16, 16, 3), (200, 100, 40), np.uint8)
    for extension in (*LOSSLESS, *LOSSY):
        assert extension in IMAGE_EXTENSIONS
        Image.fromarray(pixels).save(tmp_path / f"a{extension}")
        Image.fromarray(pixels).save(tmp_path / f"b{extension.upper()}")
    images = read_all(tmp_path)
    assert len(images) == 2 * len((*LOSSLESS, *LOSSY))
    for image in images:
        np.testing.assert_allclose(image, pixels.transpose(2, 0, 1), atol=12)


def test_extensions_are_those_of_pil_less_what_it_does_not_read_by_itself() -> None:
    excluded = {
        ".eps",
        ".ps",
        ".h5",
        ".hdf",
        ".mpg",
        ".mpeg",
        ".pdf",
        ".wmf",
        ".emf",
        ".iim",
        ".grib",
        ".bufr",
    }
    excluded |= {".fit", ".fits", ".pcd", ".palm"}
    opened = {name for name, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    assert set(IMAGE_EXTENSIONS) == (opened | {".mpo"}) - excluded
    assert IMAGE_EXTENSIONS[: len(USUAL_EXTENSIONS)] == USUAL_EXTENSIONS
    assert len(set(IMAGE_EXTENSIONS)) == len(IMAGE_EXTENSIONS)


def test_other_files_are_counted_by_extension(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    for name in ("b.heic", "sub/c.HEIC", "sub/d.xml", "README", ".hidden.xml"):
        (tmp_path / name).write_text("")
    counts = count_other_files(open_source(str(tmp_path)))
    assert counts == {".heic": 2, ".xml": 1, "no extension": 1}
    assert next(iter(counts)) == ".heic"


@pytest.mark.parametrize("count", [2, 3, 99])
def test_one_unreadable_image_is_skipped_however_few_there_are(tmp_path: Path, count: int) -> None:
    for number in range(count):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n")
    stream = open_source(str(tmp_path)).batches(SPEC, Reading(64, workers=0))
    assert sum(map(len, stream)) == count - 1
    assert [sample.name for sample in stream.skipped_samples] == ["1.png"]


@pytest.mark.parametrize(("unreadable", "count"), [(2, 99), (2, 3), (1, 1), (2, 2)])
def test_several_or_all_unreadable_images_are_refused(tmp_path: Path, unreadable: int, count: int) -> None:
    for number in range(count):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
    for number in range(unreadable):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(DataError, match=rf"{unreadable} of {count} samples are unreadable"):
        read_all(tmp_path)
