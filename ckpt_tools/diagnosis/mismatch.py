"""Do the stored statistics describe the inputs that the layers get under training conditions?

A layer's mismatch is its stored variance divided by the variance of its input, measured with
dropout on while all layers normalise with batch statistics. On data that is distributed as it was
in training it is 1, up to sampling. Together with the shift of the means it says whether the
paper's estimate (section 3), which takes the data for that of the training, may be believed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ckpt_tools.observation.evidence import Evidence
from ckpt_tools.observation.layer import Layer
from ckpt_tools.observation.training_history import any_counted, initial_weight, is_trained
from ckpt_tools.results import Measured, Verdict

# The largest score of data that agrees. On small nets it is 0.003 at most for data as in training
# (70 nets), and from 0.026 on for plain images after augmentation (175 nets; scripts/bench/results/
# evidence.jsonl).
AGREEMENT_LIMIT = 0.02
# Of statistics that trail behind the weights. Half-way through a training with data as in training,
# the first layer's distance is 0.04 at most and the others' means have moved by 0.05 to 0.1. Plain
# images after augmentation are 0.1 away in the first layer, and half of the classes move no means.
_FIRST_LAYER_LIMIT = 0.05
_MOVED_MEANS = 0.03
_FEWEST_IMAGES = 32  # fewer say nothing


@dataclass(frozen=True)
class LayerMismatch:
    """How one layer's input differs from its stored statistics, each (C,) in float64.

    Attributes:
        log_variance: ln(stored variance / variance under training conditions).
        log_variance_error: its standard error.
        shift: measured mean − running mean in stored standard deviations.
        shift_error: its standard error.
    """

    name: str
    log_variance: Tensor
    log_variance_error: Tensor
    shift: Tensor
    shift_error: Tensor

    @property
    def moved_mean(self) -> float:
        """The mean squared shift beyond what sampling explains; a channel counts 1 at most."""
        excess = self.shift.square().clamp(max=1) - self.shift_error.square()
        return float(excess.nan_to_num(1.0).mean())

    @property
    def excess(self) -> float:
        """The mean squared distance beyond what sampling explains.

        The distance of two normal distributions in Fisher's metric is √(Δ² + λ²/2) for a small
        shift Δ and a small logarithm λ of the ratio of variances. A channel counts 1 at most.
        """
        distance = self.shift.square() + self.log_variance.square() / 2
        expected = self.shift_error.square() + self.log_variance_error.square() / 2
        return float((distance.clamp(max=1) - expected).nan_to_num(1.0).mean())


def compare_layer(layer: Layer, evidence: Evidence) -> LayerMismatch:
    """Compare a layer's stored statistics with what was measured under training conditions."""
    training = evidence.under_training_conditions() if evidence.training else evidence
    # The stored variance of a dead channel may be nothing but what is left of the initial one.
    eps = layer.module.eps + 3 * initial_weight(layer.module)
    stored, variance = layer.stored.variance + eps, training.moments.variance() + eps
    error = training.relative_error(layer.stored.mean) * training.moments.variance() / variance
    return LayerMismatch(
        layer.name,
        (stored / variance).log(),
        error,
        (training.moments.mean - layer.stored.mean) / stored.sqrt(),
        training.mean_error(layer.stored.mean) / stored.sqrt(),
    )


def compare_layers(layers: Mapping[str, Layer], evidence: Mapping[str, Evidence]) -> list[LayerMismatch]:
    """Compare all trained layers that were measured, in the order of the forward.

    Frozen layers remember other data than that of the last training, so they are no witnesses.
    """
    counted = any_counted(layer.module for layer in layers.values())
    return [
        compare_layer(layer, evidence[name])
        for name, layer in layers.items()
        if name in evidence and is_trained(layer.module, counted=counted) and not layer.frozen
    ]


def judge_mismatch(compared: Sequence[LayerMismatch], images: int) -> Verdict:
    """Say whether the data agrees with the stored statistics of these layers."""
    if images < _FEWEST_IMAGES:
        return Verdict("none", f"{images} samples are too few to compare them with the training data")
    if not compared:
        reason = "the counters of the BN layers do not show enough training batches"
        return Verdict("none", f"{reason} to forget the initial statistics")
    score = mismatch_score(compared)
    measured = (
        f"distance {score:.3f} from the stored statistics over {len(compared)} BN layers, on {images} samples"
    )
    if score <= AGREEMENT_LIMIT:
        reason = f"{measured}, within the {AGREEMENT_LIMIT} of training data"
        return Verdict("agree", reason, score, AGREEMENT_LIMIT, images)
    reason = f"{measured}, expected {AGREEMENT_LIMIT} at most; {_describe_difference(compared)}"
    return Verdict("doubt", reason, score, AGREEMENT_LIMIT, images)


def trail_behind_weights(compared: Sequence[LayerMismatch]) -> bool:
    """Whether the stored statistics are rather those of earlier weights than those of other data.

    Little but the data decides what the first layer gets. Where that agrees and the means of later
    layers have moved, the weights have: the training goes on, or ended at a high learning rate.
    """
    first, *others = compared
    if mismatch_score([first]) > _FIRST_LAYER_LIMIT or not others:
        return False
    return _root_mean([layer.moved_mean for layer in others]) > _MOVED_MEANS


def _describe_difference(compared: Sequence[LayerMismatch]) -> str:
    if trail_behind_weights(compared):
        moved = _root_mean([layer.moved_mean for layer in compared[1:]])
        return (
            f"the first BN layer agrees ({mismatch_score(compared[:1]):.3f}), and the means of the others "
            f"have moved by {moved:.2f} standard deviations: the statistics trail behind the weights, as "
            "before the end of a training"
        )
    worst = max(compared, key=lambda layer: layer.excess)
    factor = math.exp(float(worst.log_variance.median()))
    return (
        f"most in {worst.name}, where stored / measured variance is {factor:.2f} in the median channel. "
        "Training augmentation, averaged weights or another sample of the data explain such a difference"
    )


def mismatch_score(layers: Sequence[LayerMismatch]) -> float:
    """The root of the mean excess over layers; 0 where sampling explains everything."""
    return _root_mean([layer.excess for layer in layers])


def _root_mean(squares: Sequence[float]) -> float:
    return math.sqrt(max(0.0, sum(squares) / len(squares)))


def measure(values: Tensor, relative_error: Tensor, usable: Tensor) -> Measured:
    """Median, range and the median channel's standard error of the usable channels (C,)."""
    usable = usable & values.isfinite()
    if not bool(usable.any()):
        usable = torch.ones_like(usable)
    values, error = values[usable], (values * relative_error)[usable]
    return Measured(float(values.median()), float(values.min()), float(values.max()), float(error.median()))
