"""A BN layer that is measured twice on the same images, with dropout on and with dropout off."""

from __future__ import annotations

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
    def training_moments(self) -> Moments:
        """The moments of the current batch under training conditions, over all repeats."""
        return merge_calls(self.training.batch_calls)[0]

    def noise_share(self) -> float | None:
        """The variance that dropout adds to one repeat's result, in units of the images' variance.

        It is that of the logarithm of the current batch's variance, in the median channel. None
        where it cannot be told: from one repeat, or a batch of very few images.
        """
        calls, repeats = self.training.batch_calls, self.repeats
        if repeats < 2 or len(calls) != repeats or not super().calls:
            return None
        logs = torch.stack([call.moments.variance().log() for call in calls])
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
        moments, sums = merge_calls(self.batch_calls)
        training, training_sums = self._mean_of_repeats(self.training.batch_calls)
        if sums.shape != training_sums.shape:  # rows of a call that belong to no single image
            sums, training_sums = sums.sum(1, keepdim=True), training_sums.sum(1, keepdim=True)
        return batch_evidence(moments, torch.cat([sums, training_sums]), training)

    def _mean_of_repeats(self, calls: list[BatchMoments]) -> tuple[Moments, Tensor]:
        """Moments and cluster sums of all repeats, scaled to the weight of a single one.

        Otherwise a batch that is repeated more often would count more under this condition alone.
        """
        moments, sums = merge_calls(calls)
        scaled = Moments(moments.count // self.repeats, moments.mean, moments.m2 / self.repeats)
        return scaled, sums / self.repeats


def paired_statistics(layer: Layer, batch: Moments) -> MeanVariance:
    """What a layer normalises with under test conditions in a paired measurement.

    The mean is that of the same images under training conditions, as the final network keeps the
    mean that training has left. The variance is the batch's own, as in ``batch_variance``.
    """
    assert isinstance(layer, PairedLayer)
    return MeanVariance(layer.training_moments.mean, batch.variance(unbiased=False))
