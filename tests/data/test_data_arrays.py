import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ckpt_tools.contract import InputSpec
from ckpt_tools.data import open_source
from ckpt_tools.data.sample_order import Reading, random_order
from ckpt_tools.errors import DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
SPEC = InputSpec((3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def write(path, array):
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, images=array, labels=np.zeros(len(array), np.int64))
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(array), path)
    else:
        save_file({"images": torch.from_numpy(array)}, path)
    return str(path)


def read(spec, input_spec=SPEC, **options):
    """All samples in stored order."""
    source = open_source(spec, **options)
    batches = torch.cat(list(source.batches(input_spec, Reading(batch_size=5, workers=0))))
    assert batches.dtype == torch.float32
    if options:
        return batches
    return batches[random_order(source.count, limit=None, seed=0).argsort()]


def normalised(pixels):
    mean, std = (torch.tensor(v)[:, None, None] for v in (SPEC.mean, SPEC.std))
    return (torch.from_numpy(pixels) / 255 - mean) / std


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_are_taken_as_they_are(tmp_path, suffix, dtype):
    array = RNG.normal(size=(12, 3, 8, 8)).astype(dtype)
    spec = write(tmp_path / f"a{suffix}", array)
    source = open_source(spec)
    assert (source.kind, source.count, source.sample_shape, source.is_preprocessed) == (
        "array",
        12,
        (3, 8, 8),
        True,
    )
    assert source.batches(None, Reading(batch_size=4)).transform == "floats, taken as they are"
    assert torch.equal(read(spec), torch.from_numpy(array).float())
    assert torch.equal(read(spec, None), torch.from_numpy(array).float())


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_uint8_of_the_models_size_is_only_scaled_and_normalised(tmp_path, suffix):
    spec = write(tmp_path / f"a{suffix}", PIXELS)
    source = open_source(spec)
    assert (source.count, source.sample_shape, source.is_preprocessed) == (12, (3, 8, 8), False)
    torch.testing.assert_close(read(spec), normalised(PIXELS))


def test_uint8_of_another_size_is_resized_like_a_file(tmp_path):
    big = RNG.integers(0, 256, (30, 3, 20, 14), dtype=np.uint8)
    spec = write(tmp_path / "a.npy", big)
    for number, image in enumerate(big):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{number:02}.png")
    # same number, same seed, hence the same order
    files = torch.cat(list(open_source(str(tmp_path)).batches(SPEC, Reading(batch_size=7, workers=0))))
    for workers in (0, 2):
        stream = open_source(spec).batches(SPEC, Reading(batch_size=7, workers=workers))
        assert torch.equal(torch.cat(list(stream)), files)


def test_channels_last_and_missing_channels_are_understood(tmp_path):
    last = write(tmp_path / "last.npy", np.ascontiguousarray(PIXELS.transpose(0, 2, 3, 1)))
    assert open_source(last).sample_shape == (3, 8, 8)
    torch.testing.assert_close(read(last), normalised(PIXELS))
    grey = write(tmp_path / "grey.npy", PIXELS[:, 0])
    assert open_source(grey).sample_shape == (1, 8, 8)
    torch.testing.assert_close(read(grey), normalised(PIXELS[:, :1].repeat(3, axis=1)))
    # both axes could be the channels: taken as the documented layout
    assert open_source(write(tmp_path / "odd.npy", PIXELS[..., :3])).sample_shape == (3, 8, 3)


def test_colour_becomes_grey_as_pil_does_it(tmp_path):
    spec = write(tmp_path / "a.npy", PIXELS)
    grey = read(spec, InputSpec((1, 8, 8)))
    expected = np.array(Image.fromarray(PIXELS[4].transpose(1, 2, 0)).convert("L"))
    torch.testing.assert_close(grey[4, 0], torch.from_numpy(expected) / 255)


def test_flat_samples_and_videos(tmp_path):
    flat = write(tmp_path / "flat.npy", PIXELS.reshape(12, -1))
    assert open_source(flat).sample_shape == (192,)
    torch.testing.assert_close(read(flat, InputSpec((192,))), torch.from_numpy(PIXELS.reshape(12, -1)) / 255)
    video = PIXELS.reshape(4, 3, 3, 8, 8)
    spec = write(tmp_path / "video.npy", video)
    mean = InputSpec((3, 3, 8, 8), mean=(0.5, 0.4, 0.3))
    expected = torch.from_numpy(video) / 255 - torch.tensor(mean.mean).reshape(3, 1, 1, 1)
    torch.testing.assert_close(read(spec, mean), expected)


def test_limit_takes_a_random_part(tmp_path):
    spec = write(tmp_path / "a.npy", np.arange(100, dtype=np.float32)[:, None])
    part = read(spec, None, limit=10, seed=1)[:, 0].tolist()
    assert len(set(part)) == 10
    assert part != sorted(part)
    assert part == read(spec, None, seed=1)[:10, 0].tolist()


def test_foreign_byte_order_long_double_and_bfloat16(tmp_path):
    values = RNG.normal(size=(6, 4)).astype(np.float32)
    for name, array in [("big", values.astype(">f4")), ("long", values.astype(np.longdouble))]:
        assert torch.equal(read(write(tmp_path / f"{name}.npy", array), None), torch.from_numpy(values))
    torch.save(torch.from_numpy(values).bfloat16(), tmp_path / "b.pt")
    assert torch.equal(read(str(tmp_path / "b.pt"), None), torch.from_numpy(values).bfloat16().float())


def test_which_array_of_several(tmp_path):
    a, b = np.zeros((4, 5), np.float32), np.ones((4, 5), np.float32)
    labels = np.arange(4)
    for name in ["X", "images", "data", "x_train"]:
        np.savez(tmp_path / "a.npz", **{"other": a, name: b})
        assert read(str(tmp_path / "a.npz"), None).sum() == 20
    np.savez(tmp_path / "a.npz", b, a)
    assert read(str(tmp_path / "a.npz"), None).sum() == 20
    np.savez(tmp_path / "a.npz", samples=b, labels=labels)
    assert read(str(tmp_path / "a.npz"), None).sum() == 20
    torch.save({"pixels": torch.from_numpy(b), "y": torch.from_numpy(labels)}, tmp_path / "a.pt")
    assert read(str(tmp_path / "a.pt"), None).sum() == 20
    torch.save((torch.from_numpy(b), torch.from_numpy(labels)), tmp_path / "a.pt")
    assert read(str(tmp_path / "a.pt"), None).sum() == 20
    np.savez(tmp_path / "a.npz", first=a, second=b)
    with pytest.raises(DataError, match=r"first \(4, 5\) float32, second \(4, 5\) float32.*'images'"):
        open_source(str(tmp_path / "a.npz"))


def test_a_checkpoint_given_as_data_lists_only_a_few_tensors(tmp_path):
    torch.save({f"layer{i}.weight": torch.zeros(2, 2) for i in range(30)}, tmp_path / "m.pt")
    with pytest.raises(DataError, match="and 20 more"):
        open_source(str(tmp_path / "m.pt"))


def test_opening_reads_no_values(tmp_path):
    spec = write(tmp_path / "a.npy", PIXELS)
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:-100])
    source = open_source(spec)
    with pytest.raises(DataError, match="values cannot be read"):
        source.batches(SPEC, Reading(batch_size=4))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite_have_a_name(tmp_path, value):
    array = np.zeros((30, 4))
    array[17, 2] = value
    stream = open_source(write(tmp_path / "a.npy", array)).batches(None, Reading(batch_size=10))
    for number, batch in enumerate(stream):
        for row in (~batch.isfinite()).any(1).nonzero().flatten().tolist():
            assert stream.sample_name(number, row) == "row 17"


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64", "uint16"])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt"])
def test_other_types_are_refused(tmp_path, dtype, suffix):
    with pytest.raises(DataError, match="expected floats"):
        open_source(write(tmp_path / f"a{suffix}", np.ones((3, 4), dtype)))


class Attack:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_objects_are_not_made(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[object(), 1]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="found object"):
        open_source(str(tmp_path / "a.npy"))
    torch.save(
        {"images": torch.ones(2, 2), "path": tmp_path, "x": Attack(tmp_path / "executed")}, tmp_path / "a.pt"
    )
    assert read(str(tmp_path / "a.pt"), None).sum() == 4
    torch.save(Attack(tmp_path / "executed"), tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"found posix\.mkdir"):
        open_source(str(tmp_path / "a.pt"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"PK\x03\x04 torn"])
def test_damaged_files_are_refused(tmp_path, suffix, content):
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(DataError, match="a" + suffix):
        open_source(str(tmp_path / f"a{suffix}"))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_truncated_files_are_refused(tmp_path, suffix):
    spec = write(tmp_path / f"a{suffix}", PIXELS)
    content = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cannot be read|damaged"):
        open_source(spec).batches(SPEC, Reading(batch_size=4))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (4, 0)])
def test_empty_arrays_are_refused(tmp_path, shape):
    with pytest.raises(DataError, match="empty"):
        open_source(write(tmp_path / "a.npy", np.zeros(shape, np.float32)))


def test_arrays_without_samples_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"samples \(N, …\)"):
        open_source(write(tmp_path / "a.npy", np.zeros(5, np.float32)))


@pytest.mark.parametrize(
    ("array", "shape", "word"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), (3, 8, 8), "not rearranged"),
        (np.zeros((4, 192), np.float32), (3, 8, 8), "not rearranged"),
        (np.zeros((4, 5, 9, 9), np.uint8), (5, 8, 8), "1 or 3 channels"),
        (np.zeros((4, 100), np.uint8), (3, 8, 8), "1 or 3 channels"),
        (np.zeros((4, 3, 8, 8), np.uint8), (500,), "--input-size"),
    ],
)
def test_samples_that_do_not_fit_the_model_are_refused(tmp_path, array, shape, word):
    source = open_source(write(tmp_path / "a.npy", array))
    with pytest.raises(DataError, match=word):
        source.batches(InputSpec(shape), Reading(batch_size=2))


def test_pixels_need_an_input_spec(tmp_path):
    source = open_source(write(tmp_path / "a.npy", PIXELS))
    with pytest.raises(DataError, match="--input-size 3,8,8"):
        source.batches(None, Reading(batch_size=2))
