"""The oracle: PIL. What torchvision decodes is the same, and what it cannot, PIL reads or names."""

import io
import itertools
import sys
import warnings

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.decoder_warnings import silence_decoder_warnings
from ckpt_tools.data.images import image_files, image_folder, jpeg
from ckpt_tools.data.images.transforms import ImageTransform

TRANSFORM = ImageTransform(InputSpec((3, 32, 32), crop_pct=0.875))


def picture(size=(83, 61)):
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def saved(image, **options):
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def read(root, monkeypatch, content, *, pil=False):
    (root / "a.jpg").write_bytes(content)
    with monkeypatch.context() as patch, silence_decoder_warnings():
        if pil:
            patch.setattr(image_files, "decode_jpeg", lambda *_: None)
        source = image_folder.FolderSource.open("a folder", root, limit=None, seed=0)
        return source.samples(TRANSFORM)[[0]]


def fast(path):
    with Image.open(path) as image, silence_decoder_warnings():
        return jpeg.decode_jpeg(path, image.size)


VARIANTS = [
    {"quality": quality, "subsampling": subsampling, "progressive": progressive}
    for quality, subsampling, progressive in itertools.product(
        [30, 95], ["4:4:4", "4:2:2", "4:2:0"], [False, True]
    )
]


@pytest.mark.parametrize("options", VARIANTS)
def test_colour_is_decoded_to_pils_pixels(tmp_path, options):
    for size in [(83, 61), (16, 16), (1, 9), (9, 1)]:
        (tmp_path / "a.jpg").write_bytes(saved(picture(size), **options))
        pixels = fast(tmp_path / "a.jpg")
        assert pixels is not None
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.array(Image.open(tmp_path / "a.jpg")))


def test_a_rotation_in_the_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(saved(picture(), exif=exif))
    assert fast(tmp_path / "a.jpg").shape == (3, 61, 83)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colour_spaces_are_pils(tmp_path, monkeypatch, mode):
    content = saved(picture().convert(mode))
    one, other = read(tmp_path, monkeypatch, content), read(tmp_path, monkeypatch, content, pil=True)
    assert torch.equal(one.samples, other.samples)


def test_damaged_files_are_read_or_skipped_as_pil_does_it(tmp_path, monkeypatch):
    whole = saved(picture(), quality=90)
    rng = np.random.default_rng(0)
    damaged = [whole[:cut] for cut in (2, 20, len(whole) // 3, len(whole) // 2, len(whole) - 1)]
    for _ in range(25):
        bytes_ = bytearray(whole)
        bytes_[rng.integers(len(whole))] = rng.integers(256)
        damaged.append(bytes(bytes_))
    for content in damaged:
        one, other = read(tmp_path, monkeypatch, content), read(tmp_path, monkeypatch, content, pil=True)
        assert one.skipped == other.skipped
        assert (one.samples is None) == (other.samples is None)
        assert one.samples is None or torch.equal(one.samples, other.samples)


def test_a_truncated_file_is_named_as_such(tmp_path, monkeypatch):
    whole = saved(picture())
    assert "truncated" in read(tmp_path, monkeypatch, whole[: len(whole) // 2]).skipped[0].reason


@pytest.mark.parametrize("why", ["not imported", "removed", "broken"])
def test_without_torchvisions_decoder_pil_reads(tmp_path, monkeypatch, why):
    content = saved(picture())
    expected = read(tmp_path, monkeypatch, content, pil=True).samples
    if why == "not imported":
        monkeypatch.delitem(sys.modules, "torchvision.io")
    elif why == "removed":
        monkeypatch.delattr(torchvision.io, "decode_jpeg")
    else:
        monkeypatch.setattr(torchvision.io, "decode_jpeg", lambda *_, **__: int("no"))
    assert torch.equal(read(tmp_path, monkeypatch, content).samples, expected)


def test_only_decoders_are_quiet_and_only_meanwhile():
    before = list(warnings.filters)
    for order in (1, -1):
        passes = [silence_decoder_warnings(), silence_decoder_warnings()]
        for one in passes:
            one.__enter__()
        warnings.warn_explicit("odd EXIF", UserWarning, "TiffImagePlugin.py", 1, module="PIL.TiffImagePlugin")
        with pytest.warns(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)
        for one in passes[::order]:
            one.__exit__(None, None, None)
        assert list(warnings.filters) == before
