"""The verdict of the control layers: on the right data they show the variance that is stored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ckpt_tools.arguments import advise
from ckpt_tools.diagnosis.mismatch import measure
from ckpt_tools.errors import CheckFailed
from ckpt_tools.observation.evidence import Evidence
from ckpt_tools.observation.layer import Layer
from ckpt_tools.observation.training_history import any_counted, is_trained
from ckpt_tools.reestimate.choice import Choice
from ckpt_tools.results import Controls, Measured

_MAX_DEVIATION = math.log(2)  # the variance of a typical control channel is off by a factor of two
_MAX_SHIFT = 0.5  # or its mean by half a standard deviation
# Only the first control layers can refuse data. The weights of an unfinished training move after
# the statistics were taken, and behind those layers this drift adds up to as much as wrong data.
_JUDGED = 3
# A layer whose typical channel is off by more than this, and three standard errors, has moved.
# Final networks are within 3 %; timm's usual crops move all layers by 20 %.
_MAX_DRIFT = 0.05
_STANDARD_ERRORS = 3  # a small sample alone must not look like wrong data


@dataclass(frozen=True)
class _ControlLayer:
    """What one control layer shows.

    Attributes:
        logarithm: ln(stored variance / measured variance), (C,).
        error: its standard error, (C,).
        shift: |measured mean − running mean| in stored standard deviations, (C,).
        shift_error: its standard error, (C,).
    """

    name: str
    logarithm: Tensor
    error: Tensor
    shift: Tensor
    shift_error: Tensor

    @property
    def deviation(self) -> float:
        """|ln(stored / measured)| of the median channel."""
        return float(self.logarithm.abs().median())

    @property
    def excess(self) -> float:
        """The deviation beyond what sampling explains."""
        return self.deviation - _STANDARD_ERRORS * float(self.error.median())

    @property
    def ratio(self) -> Measured:
        """Stored variance / measured variance."""
        return measure(self.logarithm.exp(), self.error, self.error.isfinite())


def judge_controls(
    choice: Choice,
    layers: Mapping[str, Layer],
    evidence: Mapping[str, Evidence],
    *,
    synthetic: bool = False,
) -> Controls:
    """Compare stored and measured statistics of the layers that no dropout reaches.

    Layers whose stored variance is still largely its initial value cannot serve, and ``synthetic``
    inputs resemble no training data, so nothing is judged on them.
    """
    if synthetic:
        return Controls((), None, None, None, "none", "the inputs are synthetic")
    counted = any_counted(layer.module for layer in layers.values())
    usable = [
        name
        for name, layer in layers.items()
        if name in choice.controls and name in evidence and is_trained(layer.module, counted=counted)
    ]
    if not usable:
        reason = "every BN layer is behind dropout"
        if choice.controls:
            reason = (
                "the counters of the control layers do not show enough training batches to "
                "forget the initial variance"
            )
        return Controls((), None, None, None, "none", reason)
    compared = [_compare(layers[name], evidence[name]) for name in usable]
    # Medians over channels: a dead channel, or one that differs by chance, decides nothing.
    if math.isinf(_median_channel(layer.error for layer in compared[:_JUDGED])):
        return Controls((), None, None, None, "none", "from one sample nobody can tell")
    return _judge(compared)


def refuse_disagreement(controls: Controls) -> None:
    """Raise CheckFailed if the control layers say that these are not the training data."""
    if controls.verdict != "disagree":
        return
    raise CheckFailed(
        f"the data does not look like the training data: {controls.reason}. Check "
        + advise(
            "--data and the preprocessing (--mean, --std, --input-size), or pass --force to go on.",
            "the batches and their preprocessing, or pass force=True to go on.",
        )
    )


def _compare(layer: Layer, evidence: Evidence) -> _ControlLayer:
    """Compare the statistics of one layer, blind to differences far below its eps."""
    training = evidence.under_training_conditions() if evidence.training else evidence
    eps = layer.module.eps
    stored, variance = layer.stored.variance + eps, training.moments.variance() + eps
    return _ControlLayer(
        layer.name,
        (stored / variance).log(),
        training.relative_error(layer.stored.mean),
        (training.moments.mean - layer.stored.mean).abs() / stored.sqrt(),
        training.mean_error(layer.stored.mean) / stored.sqrt(),
    )


def _judge(compared: list[_ControlLayer]) -> Controls:
    judged = compared[:_JUDGED]
    deviation = _median_channel(layer.logarithm.abs() for layer in judged)
    shift = _median_channel(layer.shift for layer in judged)
    moved = [layer for layer in compared if layer.excess > _MAX_DRIFT]
    worst = max(compared, key=lambda layer: layer.deviation)
    reasons = _reasons_to_refuse(judged, len(compared), deviation, shift)
    reason = reasons or (_doubt(moved, len(compared)) if moved else "")
    return Controls(
        names=tuple(layer.name for layer in compared),
        deviation=deviation,
        worst=worst.deviation,
        shift=shift,
        verdict="disagree" if reasons else "doubt" if moved else "agree",
        reason=reason,
        worst_layer=worst.name,
        worst_ratio=worst.ratio,
    )


def _reasons_to_refuse(judged: list[_ControlLayer], number: int, deviation: float, shift: float) -> str:
    """Name the numbers that broke their limits, each with its limit; empty if none did."""
    limit = _MAX_DEVIATION + _STANDARD_ERRORS * _median_channel(layer.error for layer in judged)
    shift_limit = _MAX_SHIFT + _STANDARD_ERRORS * _median_channel(layer.shift_error for layer in judged)
    broken = []
    if deviation > limit:
        factors = f"{math.exp(deviation):.3g} (at most {math.exp(limit):.3g} expected)"
        broken.append(f"the stored variance is off by a factor of {factors}")
    if shift > shift_limit:
        deviations = f"{shift:.2g} standard deviations (at most {shift_limit:.2g} expected)"
        broken.append(f"the running mean is off by {deviations}")
    if not broken:
        return ""
    return (
        f"in the median channel of the first {len(judged)} of {number} control layer(s) that no "
        f"dropout reaches (from {judged[0].name} on), {' and '.join(broken)}"
    )


def _doubt(moved: list[_ControlLayer], number: int) -> str:
    worst = max(moved, key=lambda layer: layer.excess)
    ratio = worst.ratio
    measured = f"stored / measured variance {ratio.median:.2f} ± {ratio.error:.2f}"
    # Where some channels rose and others fell, their median hides how far they went.
    if abs(float(worst.logarithm.mean())) < worst.deviation / 2:
        factor, error = math.exp(worst.deviation), float(worst.error.median())
        measured = f"the median channel is off by a factor of {factor:.2f} ± {factor * error:.2f}, up or down"
    return (
        f"{len(moved)} of {number} control layer(s) moved (worst: {worst.name or '(root)'}, {measured}), as "
        "they do with training augmentation, averaged weights, or another sample of the data"
    )


def _median_channel(values: Iterable[Tensor]) -> float:
    """The median over the channels of several layers together."""
    return float(torch.cat(list(values)).median())
