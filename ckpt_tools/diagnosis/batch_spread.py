"""Whether the batches of a pass are more unlike each other than chance makes them.

A batch that holds one class of a sorted data set, or the frames of one video, shows only a part of
the variance. `pooled` normalises with that part, and the layers behind get more than they will in
the final network: variances were up to 70 % off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ckpt_tools.moments import Clusters, log_variance_weights, mean_weights
from ckpt_tools.observation.evidence import Evidence
from ckpt_tools.observation.layer import Layer
from ckpt_tools.results import BatchSpread

_MIN_BATCHES = 3
# Chance reaches this many standard deviations in one of 30,000 comparisons, and that only if all
# channels of a layer vary together. The layers of a network are no independent comparisons either.
_LIMIT = 4.0
_MIN_RATIO = 1.3  # of standard deviations; less costs a variance few percent


def measure_batch_spread(layers: Mapping[str, Layer], evidence: Mapping[str, Evidence]) -> BatchSpread | None:
    """Compare how batches scatter with how the clusters of images inside them do.

    It is an analysis of variance of what every image adds to a layer's mean and to its variance. A
    layer behind others that are normalised by batch shows less than the first ones, so that layer
    counts which shows most. None where there are fewer than three batches, or single images.
    """
    measured: list[tuple[float, BatchSpread]] = []
    for name, item in evidence.items():
        moments, centre = item.moments, layers[name].stored.mean
        clusters, batches = item.clusters.of_sums(0, 3), item.batches.of_sums(0, 3)
        if batches.count < _MIN_BATCHES or clusters.count <= batches.count:
            continue
        for weights in (mean_weights(moments, centre), log_variance_weights(moments, centre)):
            ratio = _variance_ratio(clusters, batches, weights)
            if ratio is None:
                continue
            score = _deviations(ratio, batches.count - 1, clusters.count - batches.count)
            unlike = score > _LIMIT and ratio > _MIN_RATIO**2
            measured.append((score, BatchSpread(math.sqrt(ratio), name, batches.count, unlike)))
    # An unlike layer first; without any, the one that is nearest to it.
    return max(measured, key=lambda pair: (pair[1].unlike, pair[0]))[1] if measured else None


def _variance_ratio(clusters: Clusters, batches: Clusters, weights: Tensor) -> float | None:
    """Mean square between batches / within batches, both averaged over the live channels.

    ``weights`` (3, C) are those of a cluster's sums in a total, which is 0 over all clusters.
    """
    total, per_batch = clusters.scatter_of(weights), batches.scatter_of(weights)
    alive = (total > 0) & total.isfinite() & per_batch.isfinite()
    if not bool(alive.any()):
        return None
    between = per_batch * batches.count / clusters.count
    shares = (between / total)[alive].clamp(max=1)  # of a channel's sum of squares
    share = float(shares.mean())
    within = max(1 - share, 1e-6) / (clusters.count - batches.count)  # still frames have none
    return share / (batches.count - 1) / within


def _deviations(ratio: float, between: int, within: int) -> float:
    """How many standard deviations a ratio of mean squares with these degrees of freedom is above 1.

    By the approximation of Paulson (1942, Annals of Mathematical Statistics 13): the cube root of a
    mean square is nearly normal.
    """
    a, b = 2 / (9 * between), 2 / (9 * within)
    root = math.cbrt(ratio)
    return ((1 - b) * root - (1 - a)) / math.sqrt(b * root**2 + a)
