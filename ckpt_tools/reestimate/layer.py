"""One BN layer during a pass: what it normalises with, and what it learns from its input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.errors import DataError
from ckpt_tools.moments import BatchMoments, Clusters, Evidence, Moments, batch_moments, image_sums


@dataclass(frozen=True)
class Scale:
    """The statistics a BN layer normalises with, each (C,)."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Seen:
    """What one forward has shown of a layer, before it counts.

    ``energy`` (clusters,), and ``images`` (images,) where it was asked for: the logarithm of the squared distance from
    the stored mean in units of the stored variance, averaged over values, its mean over channels.
    """

    evidence: Evidence
    energy: Tensor
    images: Tensor | None = None


_ENOUGH_BATCHES = 4
_LEAST = 1e-6  # of the stored variance: less is as good as nothing

Rule = Callable[["Layer", Moments], Scale]
"""Which statistics a rewritten layer uses on a batch with these moments."""


def stored(layer: Layer, batch: Moments) -> Scale:
    """The statistics as they stand: the layer behaves as in the final network."""
    return layer.scale


def kept_mean(layer: Layer, batch: Moments) -> Scale:
    """The kept running mean and the batch's biased variance, as in training.

    Measured at batch 64 on trained nets, the unbiased one leaves 1.4 times the worst error.
    """
    return Scale(layer.scale.mean, batch.variance(unbiased=False))


def batch_only(layer: Layer, batch: Moments) -> Scale:
    """Mean and biased variance of the batch, as in training."""
    return Scale(batch.mean, batch.variance(unbiased=False))


class Layer:
    """A BN layer under observation. ``scale`` starts as the stored statistics in float64."""

    def __init__(self, name: str, module: _BatchNorm, *, rewritten: bool) -> None:
        assert module.running_mean is not None
        assert module.running_var is not None
        self.name, self.module, self.rewritten = name, module, rewritten
        self.stored = Scale(module.running_mean.detach().double(), module.running_var.detach().double())
        self.scale = self.stored
        self.rule: Rule = stored
        self.seen: Evidence | None = None  # in this pass; by other ranks, too, once it is exchanged
        self._calls: list[BatchMoments] = []
        self._images: list[Tensor] | None = None  # the sums of every image, while somebody asks for them

    def begin_pass(self, rule: Rule) -> None:
        """Forget what was measured; layers that are not rewritten always follow ``stored``."""
        self.rule = rule if self.rewritten else stored
        self.seen = None
        self.begin_batch(closely=False)

    def begin_batch(self, *, closely: bool) -> None:
        """Forget what no ``take`` has asked for; ``closely``: measure every image by itself, too."""
        self._calls, self._images = [], [] if closely else None

    def observe(self, x: Tensor, images: int) -> None:
        """Measure an input (N, C, …) of this many images."""
        if x.numel() == 0:  # no proposals, no tokens: nothing to learn from
            return
        if x.numel() == x.shape[1]:
            raise DataError(
                f"{self.name}: a batch holds one value per channel (shape {tuple(x.shape)}); a variance needs "
                "two. Use larger batches (--batch-size) or larger inputs (--input-size)."
            )
        self._calls.append(batch_moments(x, self.stored.mean, images))
        if self._images is not None:
            self._images.append(image_sums(x, self.stored.mean, images))

    def normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """The output for the input that was observed last, by the rule of this pass."""
        mean, variance = self.module.running_mean, self.module.running_var
        assert mean is not None
        assert variance is not None
        if x.numel():
            scale = self.rule(self, self._calls[-1].moments)
            mean, variance = scale.mean.to(mean), scale.variance.to(variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @property
    def moments(self) -> Moments | None:
        """Of all that this pass has shown; None before the first batch."""
        return None if self.seen is None else self.seen.moments

    @property
    def clusters(self) -> Clusters | None:
        """How its images, or groups of them, scatter."""
        return None if self.seen is None else self.seen.clusters

    @property
    def calls(self) -> int:
        """How often the forward under way has run this layer."""
        return len(self._calls)

    def forget_batch(self) -> None:
        """Drop what the forward under way has shown: it did not come to an end."""
        self.begin_batch(closely=self._images is not None)

    def take(self) -> Seen | None:
        """What the calls of one forward saw, which counts once it is added; None if there was no call."""
        calls, images = self._calls, self._images
        self.forget_batch()
        if not calls:
            return None
        batch, sums = _together(calls)
        new = Evidence(batch, Clusters.of(sums), Clusters.of(sums.sum(1, keepdim=True)))
        return Seen(new, self._energy(sums), self._energy(_added(images)) if images else None)

    def _energy(self, sums: Tensor) -> Tensor:
        scale = self.stored.variance + self.module.eps
        return (sums[2] / sums[0] / scale).clamp_min(_LEAST).log().mean(1)

    def add(self, new: Evidence) -> None:
        """Count what a forward saw."""
        self.seen = new if self.seen is None else self.seen.merge(new)

    def end_batch(self) -> Moments | None:
        """Count what the calls of one forward saw; their moments together, None if there was no call."""
        new = self.take()
        if new is None:
            return None
        self.add(new.evidence)
        return new.evidence.moments

    def relative_error(self) -> Tensor:
        """Relative standard error (C,) of the pooled variance so far."""
        assert self.seen is not None
        moments, batches = self.seen.moments, self.seen.batches
        error = self.seen.clusters.relative_error(moments, self.stored.mean)
        if batches.count < _ENOUGH_BATCHES:
            return error
        between = batches.relative_error(moments, self.stored.mean)
        return error * dependence(error, between, batches.count)


def dependence(error: Tensor, between: Tensor, batches: int) -> float:
    """How many times larger the error of a layer is than it would be if images came one by one.

    Behind a layer that is normalised by each batch's own variance, what one batch has too much of is divided away:
    there the true errors are 0.5 to 0.8 of ``error`` (C,), from single clusters of images. Errors ``between`` (C,)
    whole batches hold this, but batches are few; the ratio over all channels of a layer is steady enough from four
    on, with half a batch's weight on a ratio of 1. It is above 1 where the images of a batch are alike.
    """
    known = (error > 0) & error.isfinite() & between.isfinite()
    if not bool(known.any()):
        return 1.0
    ratio = float((between[known] / error[known]).square().mean())
    return math.sqrt(((batches - 1) * ratio + 0.5) / (batches - 0.5))


def _together(calls: list[BatchMoments]) -> tuple[Moments, Tensor]:
    """Moments and the clusters' sums of several calls in one forward, as with a reused layer."""
    batch = calls[0].moments
    for seen in calls[1:]:
        batch = batch.merge(seen.moments)
    return batch, _added([seen.sums for seen in calls])


def _added(calls: list[Tensor]) -> Tensor:
    """The sums (3, clusters, C) of several calls; where one has fewer clusters, all count as one."""
    groups = min(sums.shape[1] for sums in calls)
    added = torch.zeros_like(calls[0][:, :groups])
    for sums in calls:
        added = added + (sums if sums.shape[1] == groups else sums.sum(1, keepdim=True))
    return added
