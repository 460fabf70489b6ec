"""What is kept from one pass to the next is what was read, in memory, on disk or nowhere."""

import numpy as np
import pytest
import torch
from PIL import Image

from ckpt_tools.contract import InputSpec
from ckpt_tools.data import open_source
from ckpt_tools.data.sample_cache import PixelCache
from ckpt_tools.data.sample_order import Reading, random_order
from ckpt_tools.data.stream import Chunk, IndexedStream, SkippedSample
from ckpt_tools.machine.memory import available_bytes

RNG = np.random.default_rng(0)
PIXELS = torch.from_numpy(RNG.integers(0, 256, (90, 4, 5, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
ROW = 60  # bytes of a sample


class Counted:
    """Rows of PIXELS; remembers which were read."""

    def __init__(self, unreadable=()):
        self.read, self.unreadable = [], unreadable

    def __getitem__(self, indices):
        self.read += indices
        skipped = {index: SkippedSample(f"#{index}", "torn") for index in indices if index in self.unreadable}
        left = [index for index in indices if index not in skipped]
        return Chunk(PIXELS[left] if left else None, skipped)


def stream(samples, cache, *, workers=0, batch_size=20):
    return IndexedStream(
        samples,
        random_order(len(PIXELS), limit=None, seed=0),
        Reading(batch_size=batch_size, workers=workers),
        name="pixels",
        transform="",
        finish=torch.Tensor.float,
        cache=cache,
    )


def same(one, other):
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(one, other, strict=True))


# 18 samples a batch: room for everything, one batch in memory and one on disk, all on disk, nothing at all
@pytest.mark.parametrize(
    ("memory", "disk", "again"),
    [(10**6, 0, 0), (18 * ROW, 19 * ROW, 54), (0, 10**6, 0), (0, 0, 90), (None, None, 0)],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_later_passes_give_the_same_bits_and_read_only_what_was_not_kept(memory, disk, again, workers):
    samples = Counted()
    batches = stream(samples, PixelCache(memory=memory, disk=disk), workers=workers)
    plain = list(stream(Counted(), None))
    for expected in (90, again, again):
        samples.read.clear()
        assert same(list(batches), plain)
        assert len(samples.read) == expected


def test_a_pass_that_is_broken_off_leaves_nothing_wrong():
    samples = Counted()
    batches = stream(samples, PixelCache(memory=25 * ROW))
    plain = list(stream(Counted(), None))
    for stop in (1, 3, 5, 5):
        for number, batch in enumerate(batches, 1):
            assert torch.equal(batch, plain[number - 1])
            if number == stop:
                break
    assert same(list(batches), plain)


def test_skipped_samples_stay_skipped_and_are_named_once():
    batches = stream(Counted({7}), PixelCache())
    batches.count = 1000  # one of ninety would be too many
    assert [sum(map(len, batches)) for _ in range(3)] == [89, 89, 89]
    assert [what.name for what in batches.skipped_samples] == ["#7"]


def test_a_full_disk_is_no_error(monkeypatch):
    cache = PixelCache(memory=0, disk=10**6)
    cache.keep(0, PIXELS[:4])
    monkeypatch.setattr(cache._file, "write", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    cache.keep(1, PIXELS[4:8])
    assert (0 in cache, 1 in cache) == (True, False)
    assert torch.equal(cache.read(0), PIXELS[:4])


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    cache = PixelCache(memory=0)
    cache.keep(0, PIXELS)
    assert 0 in cache
    assert not list(tmp_path.iterdir())


def test_floats_and_arrays_at_the_models_size_are_not_kept(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS.numpy())
    for spec, kept in [(InputSpec((3, 4, 5)), False), (InputSpec((3, 8, 8)), True)]:
        batches = open_source(str(tmp_path / "a.npy")).batches(
            spec, Reading(batch_size=20, workers=0, cached=True)
        )
        assert (batches._cache is not None) is kept


def test_a_folder_is_decoded_once(tmp_path):
    for number in range(6):
        Image.fromarray(PIXELS[number].permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    batches = open_source(str(tmp_path)).batches(
        InputSpec((3, 8, 8)), Reading(batch_size=4, workers=2, cached=True)
    )
    first = list(batches)
    for path in tmp_path.iterdir():
        path.unlink()
    assert same(list(batches), first)


def test_available_memory_is_some():
    assert 0 <= available_bytes() < 2**62
