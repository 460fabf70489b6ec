import numpy as np
import pytest
import torch
from PIL import Image

from ckpt_tools.contract import InputSpec
from ckpt_tools.data import open_source
from ckpt_tools.data.images.image_folder import find_images
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.errors import DataError, UsageError

SPEC = InputSpec((3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))


def draw(path, size=(20, 24), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **options)


def many(root, count):
    draw(root / "000.png")
    for number in range(1, count):
        (root / f"{number:03}.png").write_bytes((root / "000.png").read_bytes())
    return root


def samples(source, **options):
    options = {"batch_size": 8, "workers": 0} | options
    return torch.cat(list(source.batches(SPEC, Reading(**options))))


def test_any_structure_any_case_no_hidden_files(tmp_path):
    for name in [
        "flat.JPG",
        "cat/a.png",
        "cat/b.Bmp",
        "dog/deep/er/c.webp",
        "dog/d.tif",
        "e.gif",
        "f.ppm",
        "g.pgm",
    ]:
        draw(tmp_path / name, mode="L" if name.endswith("pgm") else "RGB")
    draw(tmp_path / ".hidden.png")
    draw(tmp_path / ".cache/x.png")
    (tmp_path / "labels.csv").write_text("a,b")
    assert find_images(tmp_path) == (
        "cat/a.png", "cat/b.Bmp", "dog/d.tif", "dog/deep/er/c.webp", "e.gif", "f.ppm", "flat.JPG", "g.pgm",
    )  # fmt: skip
    source = open_source(str(tmp_path))
    assert (source.kind, source.count, source.sample_shape, source.is_preprocessed) == (
        "folder",
        8,
        None,
        False,
    )
    assert samples(source).shape == (8, 3, 16, 16)


def test_links_are_followed_once_and_without_loops(tmp_path):
    draw(tmp_path / "data/a/1.png")
    draw(tmp_path / "elsewhere/2.png")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/3.png").symlink_to(tmp_path / "elsewhere/2.png")
    assert find_images(tmp_path / "data") == ("3.png", "a/1.png", "again/2.png")


def test_values_are_those_of_the_transform(tmp_path):
    draw(tmp_path / "a.png", size=(16, 16))
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)
    expected = (pixels / 255 - torch.tensor(SPEC.mean)[:, None, None]) / 0.2
    batch = samples(open_source(str(tmp_path)))
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch[0], expected)


def test_modes_and_odd_files_raise_no_warning(tmp_path):
    for mode in ["L", "RGBA", "P", "1"]:
        draw(tmp_path / f"{mode}.png", mode=mode)
    draw(tmp_path / "transparent.png", mode="P", transparency=b"\x00\x7f")
    draw(tmp_path / "cmyk.jpg", mode="CMYK")
    (tmp_path / "named.jpg").write_bytes((tmp_path / "L.png").read_bytes())
    assert samples(open_source(str(tmp_path))).shape[0] == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_lie_in_memory_as_convolutions_like_them(tmp_path, workers):
    many(tmp_path, 40)
    batch = next(iter(open_source(str(tmp_path)).batches(SPEC, Reading(batch_size=40, workers=workers))))
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_limit_do_not_depend_on_workers_or_batch_size(tmp_path, workers):
    for number in range(40):
        draw(tmp_path / f"{'x' * (number + 1)}.png", size=(16, 16))
    everything = samples(open_source(str(tmp_path), seed=3))
    few = open_source(str(tmp_path), seed=3, limit=20)
    assert few.count == 20
    assert torch.equal(samples(few, workers=workers, batch_size=20), everything[:20])
    assert open_source(str(tmp_path), limit=1000).count == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_and_named(tmp_path, workers):
    many(tmp_path, 300)
    whole = (tmp_path / "000.png").read_bytes()
    (tmp_path / "007.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "100.png").write_bytes(b"")
    (tmp_path / "299.png").write_bytes(b"no image at all")
    stream = open_source(str(tmp_path)).batches(SPEC, Reading(batch_size=100, workers=workers))
    for _ in range(2):
        assert sum(map(len, stream)) == 297
    reasons = {what.name: what.reason for what in stream.skipped_samples}
    assert set(reasons) == {"007.png", "100.png", "299.png"}
    assert (reasons["100.png"], reasons["299.png"]) == ("empty file", "no image")
    assert stream.count == 300


def test_a_decompression_bomb_is_unreadable(tmp_path, monkeypatch):
    many(tmp_path, 100)
    draw(tmp_path / "050.png", size=(200, 200))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    stream = open_source(str(tmp_path)).batches(SPEC, Reading(batch_size=100, workers=0))
    list(stream)
    assert [what.name for what in stream.skipped_samples] == ["050.png"]


def test_over_one_percent_unreadable_is_refused(tmp_path):
    many(tmp_path, 100)
    for number in (1, 2):
        (tmp_path / f"{number:03}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 100 samples are unreadable .*00[12]\.png \(empty file\)"):
        samples(open_source(str(tmp_path)), batch_size=100)


def test_formats_that_start_other_programs_are_not_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(DataError, match="no image"):
        samples(open_source(str(tmp_path)))


def test_a_folder_without_images_says_what_is_there(tmp_path):
    with pytest.raises(DataError, match="no files at all"):
        open_source(str(tmp_path))
    (tmp_path / "sub").mkdir()
    for name in ["a.txt", "sub/b.txt", "sub/c.tar"]:
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=r"3 other files \(2 × \.txt, 1 × \.tar\)"):
        open_source(str(tmp_path))


def test_a_data_sets_folder_gets_a_hint(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=f"give cifar10:{tmp_path}"):
        open_source(str(tmp_path))


def test_images_need_an_input_spec(tmp_path):
    draw(tmp_path / "a.png")
    with pytest.raises(DataError, match="--input-size"):
        open_source(str(tmp_path)).batches(None, Reading(batch_size=1))


def test_names_that_are_not_utf8_can_be_printed(tmp_path):
    many(tmp_path, 100)
    (tmp_path / b"\xff.png".decode("utf-8", "surrogateescape")).write_bytes(b"")
    stream = open_source(str(tmp_path)).batches(SPEC, Reading(batch_size=200, workers=0))
    list(stream)
    stream.skipped_samples[0].name.encode("utf-8")


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("", "empty --data"),
        ("{0}/trian", r"Did you mean .*/train\?"),
        ("{0}/no/such/thing", "does not exist either"),
        ("{0}/train/note.txt", "array file"),
        ("{0}/dangling", "link to"),
        ("cifar1:{0}/x", r"Did you mean cifar10:\?"),
        ("CIFAR10:{0}/x", r"Did you mean cifar10:\?"),
        ("cifar10:{0}/trian", r"Did you mean .*/train\?"),
        ("cifar10:", "cifar10:DIR"),
        ("cifr10:data", "Did you mean cifar10:data"),
        ("~nobody-of-that-name/x", "no such file"),
    ],
)
def test_specs_that_lead_nowhere(tmp_path, spec, word):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/note.txt").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=word):
        open_source(spec.format(tmp_path))


def test_a_limit_below_one_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="--limit"):
        open_source(str(tmp_path), limit=0)
