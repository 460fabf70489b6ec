from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.data.sample_order import Reading, balanced_batch_sizes, default_workers, random_order
from ckpt_tools.data.stream import Chunk, IndexedStream, SkippedSample, first_not_finite
from ckpt_tools.errors import DataError, UsageError


@dataclass(frozen=True)
class Numbers:
    """Sample i is the number i; some are unreadable, and one can be made to break its reader."""

    unreadable: frozenset = frozenset()
    broken: int = -1

    def __getitem__(self, indices):
        if self.broken in indices:
            raise RuntimeError("a bug")
        read = [float(i) for i in indices if i not in self.unreadable]
        skipped = {i: SkippedSample(f"#{i}", "torn") for i in indices if i in self.unreadable}
        return Chunk(torch.tensor(read) if read else None, skipped)


def stream(samples=Numbers(), count=100, *, batch_size=32, workers=0, limit=None, seed=0):
    order = random_order(count, limit=limit, seed=seed)
    return IndexedStream(
        samples,
        order,
        Reading(batch_size=batch_size, workers=workers),
        name="numbers",
        transform="",
        finish=torch.Tensor.float,
    )


@given(st.integers(1, 2000), st.integers(1, 300))
def test_balanced_batches_are_few_full_and_alike(count, size):
    sizes = balanced_batch_sizes(count, size)
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    if size == 2 and count % 2 and count > 1:  # no batch of one sample, which may have no variance
        assert max(sizes) == 3
        return
    assert len(sizes) == -(-count // size)
    assert max(sizes) <= size
    assert min(sizes) > 1 or 1 in (count, size)


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 5), st.none() | st.integers(1, 400))
def test_every_sample_comes_once_and_passes_repeat(count, batch_size, seed, limit):
    batches = stream(count=count, batch_size=batch_size, seed=seed, limit=limit)
    first, second = list(batches), list(batches)
    seen = torch.cat(first).int().tolist()
    assert len(seen) == len(set(seen)) == batches.count == min(count, limit or count)
    assert len(first) == batches.batch_count
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_order_depends_on_the_seed_alone():
    plain = torch.cat(list(stream()))
    assert torch.equal(plain, torch.cat(list(stream(workers=2, batch_size=50))))
    assert not torch.equal(plain, torch.cat(list(stream(seed=1))))
    assert torch.equal(plain[:10], torch.cat(list(stream(limit=10))))


def test_the_users_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(stream(workers=1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_samples_are_skipped_counted_once_and_named(workers):
    batches = stream(Numbers(frozenset({7, 160})), 200, workers=workers)
    first, second = list(batches), list(batches)
    assert sum(map(len, first)) == 198
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert {what.name for what in batches.skipped_samples} == {"#7", "#160"}
    assert len(batches.skipped_samples) == 2


def test_a_batch_of_unreadable_samples_is_left_out():
    first = int(random_order(300, limit=None, seed=0)[0])
    assert len(list(stream(Numbers(frozenset({first})), 300, batch_size=1))) == 299


def test_more_than_one_percent_unreadable_is_refused_as_soon_as_it_is_certain():
    bad = random_order(200, limit=None, seed=0)[:10].tolist()
    batches = stream(Numbers(frozenset(bad)), 200, batch_size=50)
    with pytest.raises(DataError, match=r"10 of 200 samples .* #\d+ \(torn\)"):
        next(iter(batches))


def test_samples_that_turn_unreadable_between_passes_are_refused():
    samples = {}

    class Turning(Numbers):
        def __getitem__(self, indices):
            return Numbers(frozenset(samples)).__getitem__(indices)

    batches = stream(Turning(), 200)
    assert sum(map(len, batches)) == 200
    samples[5] = True
    with pytest.raises(DataError, match="first pass"):
        list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reader_that_raises_is_a_data_error(workers):
    batches = stream(Numbers(broken=50), workers=workers)
    with pytest.raises(DataError, match=r"reading failed .*a bug.*--workers 0"):
        list(batches)


def test_a_pass_can_be_left_and_started_again():
    batches = stream(workers=2, batch_size=20)
    next(iter(batches))
    assert sum(map(len, batches)) == 100


def test_every_sample_of_a_pass_has_a_name():
    class Named(Numbers):
        def name(self, index):
            return f"number {index}"

    batches = stream(Named(frozenset({7})), batch_size=10)
    for _ in range(2):
        for number, batch in enumerate(batches):
            for row, value in enumerate(batch.flatten().tolist()):
                assert batches.sample_name(number, row) == f"number {value:.0f}"


def test_first_not_finite():
    assert first_not_finite(torch.zeros(3, 2)) is None
    assert first_not_finite(torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [float("nan"), 0.0]])) == 1
    assert first_not_finite(torch.tensor([1.0, float("inf")])) == 1
    assert first_not_finite(torch.arange(3)) is None


def test_sizes_that_mean_nothing_are_usage_errors():
    with pytest.raises(UsageError, match="--batch-size"):
        stream(batch_size=0)
    with pytest.raises(UsageError, match="--workers"):
        stream(workers=-1)


def test_default_workers():
    assert 1 <= default_workers() <= 8
