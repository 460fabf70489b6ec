"""The verdict of the control layers: on the right data they show the variance that is stored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ckpt_tools.errors import CheckFailed
from ckpt_tools.observation.evidence import Evidence
from ckpt_tools.observation.layer import Layer
from ckpt_tools.observation.training_history import is_trained
from ckpt_tools.reestimate.choice import Choice
from ckpt_tools.results import Controls

_MAX_DEVIATION = math.log(2)  # the variance of a typical control channel is off by a factor of two
_MAX_SHIFT = 0.5  # or its mean by half a standard deviation
# Only the first control layers are judged. The weights of an unfinished training move after the
# statistics were taken, and behind those layers this drift adds up to as much as wrong data.
_JUDGED = 3


def judge_controls(choice: Choice, layers: Mapping[str, Layer], evidence: Mapping[str, Evidence]) -> Controls:
    """Compare stored and measured statistics of the layers that no dropout reaches.

    Layers whose stored variance is still largely its initial value cannot serve.
    """
    evidence = {
        name: item.under_training_conditions() if item.training else item for name, item in evidence.items()
    }
    usable = [
        name
        for name, layer in layers.items()
        if name in choice.controls and name in evidence and is_trained(layer.module)
    ]
    if not usable:
        reason = "every BN layer is behind dropout"
        if choice.controls:
            reason = (
                "the counters of the control layers do not show enough training batches to "
                "forget the initial variance"
            )
        return Controls((), None, None, None, "none", reason)

    # Medians over channels: a dead channel, or one that differs by chance, decides nothing.
    judged = usable[:_JUDGED]
    errors = [evidence[name].relative_error(layers[name].stored.mean) for name in judged]
    noise = _median_channel(errors)
    if math.isinf(noise):
        return Controls((), None, None, None, "none", "from one sample nobody can tell")
    deviations = {name: _deviation(layers[name], evidence[name]) for name in usable}
    deviation = _median_channel(deviations[name] for name in judged)
    shift = _median_channel(_shift(layers[name], evidence[name]) for name in judged)
    shift_noise = _median_channel(_shift_error(layers[name], evidence[name]) for name in judged)
    worst = max(float(channels.median()) for channels in deviations.values())
    # Three standard errors: a small sample alone must not look like wrong data.
    disagree = deviation > _MAX_DEVIATION + 3 * noise or shift > _MAX_SHIFT + 3 * shift_noise
    return Controls(tuple(usable), deviation, worst, shift, "disagree" if disagree else "agree")


def refuse_disagreement(controls: Controls) -> None:
    """Raise CheckFailed if the control layers say that these are not the training data."""
    if controls.verdict != "disagree" or controls.deviation is None or controls.shift is None:
        return
    factor = math.exp(controls.deviation)
    number = len(controls.names)
    raise CheckFailed(
        f"the data does not look like the training data: in the median channel of the first "
        f"{min(_JUDGED, number)} of {number} control layer(s) that no dropout reaches (from "
        f"{controls.names[0]} on), the stored variance is off by a factor of {factor:.3g} and the "
        f"running mean by {controls.shift:.2g} standard deviations; expected less than 2 and "
        f"{_MAX_SHIFT}. Check --data and the preprocessing (--mean, --std, --input-size), "
        "or pass --force (force=True) to go on."
    )


def _median_channel(values: Iterable[Tensor]) -> float:
    """The median over the channels of several layers together."""
    return float(torch.cat(list(values)).median())


def _deviation(layer: Layer, evidence: Evidence) -> Tensor:
    """|ln(stored / measured)| (C,), blind to differences far below the layer's eps."""
    eps = layer.module.eps
    return ((layer.stored.variance + eps) / (evidence.moments.variance() + eps)).log().abs()


def _shift(layer: Layer, evidence: Evidence) -> Tensor:
    """|measured mean − running mean| (C,) in stored standard deviations."""
    difference = (evidence.moments.mean - layer.stored.mean).abs()
    return difference / (layer.stored.variance + layer.module.eps).sqrt()


def _shift_error(layer: Layer, evidence: Evidence) -> Tensor:
    """Standard error (C,) of the shift."""
    error = evidence.mean_error(layer.stored.mean)
    return error / (layer.stored.variance + layer.module.eps).sqrt()
