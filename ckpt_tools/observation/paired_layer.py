"""A BN layer that is measured twice on the same images, with dropout on and with dropout off."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.moments import BatchMoments, Moments
from ckpt_tools.observation.evidence import Evidence
from ckpt_tools.observation.layer import (
    Layer,
    MeanVariance,
    Observation,
    Rule,
    batch_evidence,
    batch_statistics,
    current_statistics,
    merge_calls,
)

_FEWEST_IMAGES = 2  # of which a variance over clusters can be told


class PairedLayer(Layer):
    """A BN layer under observation in a model and in a copy of it that is in training mode.

    The layer normalises with batch statistics under both conditions, as training does, whether it
    is going to be rewritten or not; a ``frozen`` one normalises with its stored statistics.

    Args:
        name: of the layer.
        module: the layer in the model, which runs under test conditions.
        twin: the same layer in the copy, which runs under training conditions.
        rewritten: whether the layer is going to be rewritten.
        frozen: whether training leaves the layer in evaluation mode.
    """

    paired = True

    def __init__(
        self, name: str, module: _BatchNorm, twin: _BatchNorm, *, rewritten: bool, frozen: bool
    ) -> None:
        super().__init__(name, module, rewritten=rewritten)
        self.frozen = frozen
        self.repeats = 1  # how often the current batch is run under training conditions
        self.training = Layer(name, twin, rewritten=True)

    def begin_pass(self, rule: Rule) -> None:
        """Discard all evidence; ``rule`` is that of the test conditions."""
        super().begin_pass(rule)
        self._rule = current_statistics if self.frozen else rule
        self.training.begin_pass(current_statistics if self.frozen else batch_statistics)

    def begin_batch(self, *, per_image: bool) -> None:
        """Prepare for a forward; with ``per_image`` every image is also measured by itself."""
        super().begin_batch(per_image=per_image)
        self.training.begin_batch(per_image=False)

    @property
    def calls(self) -> int:
        """How often a forward of the current batch has run this layer, under either condition."""
        return max(super().calls, -(-self.training.calls // self.repeats))

    @property
    def training_mean(self) -> Tensor:
        """The mean (C,) under training conditions of what was observed last under test conditions.

        That is of the same call of the current batch, over all repeats, or over all calls where the
        numbers of calls differ. A layer that only test conditions reach keeps its stored mean.
        """
        repeats, call = self._repeats(), len(self.batch_calls) - 1
        if not repeats:
            return self.stored.mean
        if any(len(calls) <= call for calls in repeats):
            return merge_calls(self.training.batch_calls)[0].mean
        return merge_calls([calls[call] for calls in repeats])[0].mean

    def _repeats(self) -> list[list[BatchMoments]]:
        """The calls under training conditions, those of each repeat by themselves.

        All stand in one list if the repeats have run the layer differently often; there is no list
        if none has run it.
        """
        calls = self.training.batch_calls
        if not calls:
            return []
        number, rest = divmod(len(calls), self.repeats)
        if rest:
            return [calls]
        return [calls[start : start + number] for start in range(0, len(calls), number)]

    def noise_share(self) -> float | None:
        """The variance that dropout adds to one repeat's result, in units of the images' variance.

        It is that of the logarithm of the current batch's variance, in the median channel. None
        where it cannot be told: from one repeat, or a batch of very few images.
        """
        repeats = self.repeats
        calls = [merge_calls(_align_calls(calls, self.stored.mean))[0] for calls in self._repeats()]
        if repeats < 2 or len(calls) != repeats or not super().calls:
            return None
        logs = torch.stack([moments.variance().log() for moments in calls])
        noise = logs.var(0)
        evidence = self._paired_evidence()
        if evidence.clusters.count < _FEWEST_IMAGES:
            return None
        both = evidence.relative_error(self.stored.mean).square()
        images = (both - noise / repeats).clamp_min(0.1 * both)
        share = noise / images
        usable = share.isfinite()
        return float(share[usable].median()) if bool(usable.any()) else None

    def take_observation(self) -> Observation | None:
        """What the current batch has shown under both conditions; None if one did not reach it."""
        training_calls = self.training.batch_calls
        if not self.batch_calls or not training_calls:
            self.discard_batch()
            return None
        evidence = self._paired_evidence()
        observation = super().take_observation()
        assert observation is not None
        return replace(observation, evidence=evidence)

    def _paired_evidence(self) -> Evidence:
        moments, sums = merge_calls(_align_calls(self.batch_calls, self.stored.mean))
        repeats = [merge_calls(_align_calls(calls, self.stored.mean)) for calls in self._repeats()]
        training, training_sums = self._mean_of_repeats(itertools.starmap(BatchMoments, repeats))
        if sums.shape != training_sums.shape:  # rows of a call that belong to no single image
            sums, training_sums = sums.sum(1, keepdim=True), training_sums.sum(1, keepdim=True)
        return batch_evidence(moments, torch.cat([sums, training_sums]), training)

    def _mean_of_repeats(self, calls: Iterable[BatchMoments]) -> tuple[Moments, Tensor]:
        """Moments and cluster sums of all repeats, scaled to the weight of a single one.

        Otherwise a batch that is repeated more often would count more under this condition alone.
        """
        moments, sums = merge_calls(list(calls))
        scaled = Moments(moments.count // self.repeats, moments.mean, moments.m2 / self.repeats)
        return scaled, sums / self.repeats


def paired_statistics(layer: Layer, batch: Moments) -> MeanVariance:
    """What a layer normalises with under test conditions in a paired measurement.

    The mean is that of the same images in the same call under training conditions, as the final
    network keeps the mean that training has left. The variance is that of the batch, as in
    ``batch_variance``.
    """
    assert isinstance(layer, PairedLayer)
    return MeanVariance(layer.training_mean, batch.variance(unbiased=False))


def _align_calls(calls: list[BatchMoments], centre: Tensor) -> list[BatchMoments]:
    """The calls of one forward, each moved to the mean of all, and its variance made unbiased.

    In training each call is normalised, and counts in the running variance, by itself. So what the
    calls differ in as a whole (the two inputs of a siamese net, the depths of a recursion) is no
    part of the stored variance, nor of the two that are compared here. Each value x of a call
    becomes m + s·(x − mean), with the mean m of all calls, and s² such that the variance of all is
    the mean of the calls' unbiased ones. ``centre`` (C,) is that of the clusters' sums.
    """
    if len(calls) < 2:
        return calls
    total = merge_calls(calls)[0]
    aligned = []
    for call in calls:
        moments, (count, sums, squares) = call.moments, call.sums
        factor = moments.count / max(1, moments.count - 1) * (total.count - 1) / total.count
        before, after = moments.mean - centre, total.mean - centre
        deviation = math.sqrt(factor) * (sums - before * count)
        square = factor * (squares - 2 * before * sums + before.square() * count)
        new_squares = square + 2 * after * deviation + after.square() * count
        new_sums = torch.stack([count, deviation + after * count, new_squares])
        new_moments = Moments(moments.count, total.mean, factor * moments.m2)
        aligned.append(BatchMoments(new_moments, new_sums))
    return aligned
