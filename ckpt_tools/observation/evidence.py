"""What passes have shown of a layer's input, and how sure that is."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ckpt_tools.moments import Clusters, Moments, log_variance_weights, mean_weights

_MIN_BATCHES = 4  # that show how alike the images of a batch are


@dataclass(frozen=True)
class Evidence:
    """Moments of a layer's input, and how clusters of images and whole batches scatter.

    In a paired measurement the same images are run twice, and ``training`` holds the moments under
    training conditions beside those under test conditions. Then ``clusters`` and ``batches`` hold
    six sums, those of the test conditions first. What an image has of its own is in both, so it
    cancels in the error of a ratio.
    """

    moments: Moments
    clusters: Clusters
    batches: Clusters
    training: Moments | None = None

    def merge(self, other: Evidence) -> Evidence:
        """The evidence of the union of both samples, which were measured alike."""
        training = None
        if self.training is not None and other.training is not None:
            training = self.training.merge(other.training)
        return Evidence(
            self.moments.merge(other.moments),
            self.clusters.merge(other.clusters),
            self.batches.merge(other.batches),
            training,
        )

    def relative_error(self, centre: Tensor) -> Tensor:
        """Relative standard error (C,) of the variance, or of the ratio of both variances.

        ``centre`` (C,) is the mean around which the evidence was gathered: the stored one.
        """
        weights = log_variance_weights(self.moments, centre)
        if self.training is not None:
            weights = torch.cat([weights, -log_variance_weights(self.training, centre)])
        error = self.clusters.spread_of(weights)
        if self.batches.count < _MIN_BATCHES:
            return error
        return error * _batch_dependence(error, self.batches.spread_of(weights), self.batches.count)

    def mean_error(self, centre: Tensor) -> Tensor:
        """Standard error (C,) of the pooled mean."""
        return self.clusters.of_sums(0, 3).spread_of(mean_weights(self.moments, centre))

    def under_training_conditions(self) -> Evidence:
        """The part of a paired measurement that belongs to the training conditions."""
        assert self.training is not None
        return Evidence(self.training, self.clusters.of_sums(3, 6), self.batches.of_sums(3, 6))


def merge_all(parts: Iterable[Evidence | None]) -> Evidence | None:
    """The evidence of the union of all samples; None if all parts are None.

    The parts are merged in their order, so that equal runs give equal bits.
    """
    evidence = [part for part in parts if part is not None]
    return functools.reduce(Evidence.merge, evidence) if evidence else None


def _batch_dependence(error: Tensor, between: Tensor, batches: int) -> float:
    """How many times larger a layer's error is than if images were independent.

    Behind a layer that is normalised by each batch's own variance, what one batch has too much of
    is divided away: there the true errors are 0.5 to 0.8 of ``error`` (C,), from single clusters of
    images. Errors ``between`` (C,) whole batches contain this effect, but batches are few. The
    ratio over all channels of a layer is steady enough from four batches on, with half a batch's
    weight on a ratio of 1. It is above 1 where the images of a batch resemble each other.
    """
    usable = (error > 0) & error.isfinite() & between.isfinite()
    if not bool(usable.any()):
        return 1.0
    ratio = float((between[usable] / error[usable]).square().mean())
    return math.sqrt(((batches - 1) * ratio + 0.5) / (batches - 0.5))
