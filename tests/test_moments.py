"""Moments and their errors against numpy on the concatenated values, for any split."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools.moments import BatchMoments, Clusters, Moments, _pool, batch_moments, log_variance_weights


def split(x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    return [part for part in torch.split(x, sizes) if len(part)]


def pooled(parts: list[BatchMoments]) -> Moments:
    return functools.reduce(Moments.merge, (part.moments for part in parts))


def clustered(parts: list[BatchMoments]) -> Clusters:
    return functools.reduce(Clusters.merge, (Clusters.of(part.sums) for part in parts))


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    spatial=st.sampled_from([(), (3,), (2, 2), (2, 1, 3)]),
    offset=st.sampled_from([0.0, 3.0, -600.0]),
)
def test_any_split_gives_the_moments_of_the_whole(
    sizes: list[int], spatial: tuple[int, ...], offset: float
) -> None:
    x = torch.randn(sum(sizes) + 1, 4, *spatial) + offset
    sizes = [*sizes, 1]
    centre = torch.zeros(4, dtype=torch.float64) + offset
    found = pooled([batch_moments(part, centre, len(part)) for part in split(x, sizes)])
    values = x.double().numpy().swapaxes(0, 1).reshape(4, -1)
    np.testing.assert_allclose(found.mean, values.mean(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.variance(), values.var(1, ddof=1), rtol=1e-4)
    np.testing.assert_allclose(found.variance(unbiased=False), values.var(1), rtol=1e-4)


def test_merging_is_associative_and_commutative() -> None:
    centre = torch.zeros(3, dtype=torch.float64)
    a, b, c = (batch_moments(torch.randn(n, 3, 5) + n, centre, n) for n in (2, 7, 30))
    for left, right in [([a, b, c], [c, b, a]), ([a, b, c], [b, c, a])]:
        one, other = pooled(left), pooled(right)
        torch.testing.assert_close(one.m2, other.m2, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            clustered(left).comoments, clustered(right).comoments, rtol=1e-9, atol=1e-9
        )


def test_large_means_keep_their_digits() -> None:
    x = torch.randn(64, 1, 16) + 600
    found = batch_moments(x, torch.full((1,), 600.0, dtype=torch.float64), 64).moments
    np.testing.assert_allclose(found.variance(), x.double().numpy().var(ddof=1), rtol=1e-5)


def jackknife(values: np.ndarray, group: int) -> np.ndarray:
    """The oracle: leave a group of images out, recompute the variance (Efron & Tibshirani 1993, ch. 11)."""
    groups = len(values) // group
    starts = range(0, len(values), group)
    rest = [np.delete(values, slice(at, at + group), 0).swapaxes(0, 1).reshape(2, -1).var(1) for at in starts]
    errors = np.sqrt((groups - 1) / groups * ((np.stack(rest) - np.mean(rest, 0)) ** 2).sum(0))
    return errors / values.swapaxes(0, 1).reshape(2, -1).var(1)


def test_error_equals_the_jackknife() -> None:
    x = (torch.randn(800, 2, 6) * torch.rand(800, 1, 1) + torch.randn(800, 1, 1)).double()
    zero = torch.zeros(2, dtype=torch.float64)
    for batch, group in ((2, 1), (8, 2), (100, 4), (200, 7)):
        parts = [batch_moments(part, zero, batch) for part in x.split(batch)]
        found = clustered(parts)
        assert found.count == sum(-(-batch // group) for _ in parts)
        error = found.spread_of(log_variance_weights(pooled(parts), zero))
        if batch % group == 0:
            np.testing.assert_allclose(error, jackknife(x.numpy(), group), rtol=0.03)
        np.testing.assert_allclose(error, jackknife(x.numpy(), 1), rtol=0.3)


def test_intervals_cover() -> None:
    """±1.96 standard errors hold the true variance in 92–98 % of 300 samples of 128 correlated images."""
    g = torch.Generator().manual_seed(3)
    truth, hits = 1.0 + 1.0, 0
    zero = torch.zeros(1, dtype=torch.float64)
    for _ in range(300):
        x = torch.randn(128, 1, 1, generator=g) + torch.randn(128, 1, 9, generator=g)
        found = batch_moments(x, zero, 128)
        variance = found.moments.variance()
        error = Clusters.of(found.sums).spread_of(log_variance_weights(found.moments, zero)) * variance
        hits += int((variance - truth).abs() <= 1.96 * error)
    assert 0.92 <= hits / 300 <= 0.98


def test_rows_of_one_image_are_one_cluster() -> None:
    frames = torch.randn(12, 3, 4)  # 4 videos of 3 frames, folded into the batch
    found = batch_moments(frames, torch.zeros(3, dtype=torch.float64), 4)
    assert found.sums.shape == (3, 4, 3)
    assert found.sums[0].unique().tolist() == [12]
    assert batch_moments(frames, torch.zeros(3, dtype=torch.float64), 5).sums.shape == (3, 1, 3)


def test_constant_channels_have_no_error() -> None:
    found = batch_moments(torch.ones(8, 2, 3), torch.zeros(2, dtype=torch.float64), 8)
    weights = log_variance_weights(found.moments, torch.zeros(2, dtype=torch.float64))
    error = Clusters.of(found.sums).spread_of(weights)
    assert found.moments.variance().tolist() == [0, 0]
    assert error.tolist() == [0, 0]


def test_threads_of_the_statistics_add_in_one_order() -> None:
    """A thread that split its part over others would make the last bits depend on who computes it."""
    with ThreadPoolExecutor(1) as elsewhere:  # the pool sets what later threads start with
        pool = elsewhere.submit(_pool, 3).result()
    together = threading.Barrier(3)

    def threads(_: int) -> int:
        together.wait()
        torch.ones(100_000).sum()
        return torch.get_num_threads()

    assert list(pool.map(threads, range(3))) == [1, 1, 1]
