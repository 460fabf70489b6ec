"""What a pass says should be stored, and the damped steps by which `exact` goes there."""

from __future__ import annotations

import torch
from torch import Tensor

from ckpt_tools.contract import Statistics
from ckpt_tools.reestimate.layer import Layer, Scale

DAMPING = 0.7  # weight of the new value in a log-space step; undamped passes diverge


def measured(layer: Layer, statistics: Statistics) -> Scale:
    """What the last pass says should be stored: unbiased variance, or precise BN's population statistics."""
    moments = layer.moments
    assert moments is not None
    if statistics == "variance":
        return Scale(layer.stored.mean, moments.variance())
    return Scale(moments.mean, moments.variance(unbiased=False))


def step(current: Scale, target: Scale) -> Scale:
    """From the statistics in force towards what a pass has measured with them."""
    return Scale(
        torch.lerp(current.mean, target.mean, DAMPING),
        _log_step(current.variance, target.variance, DAMPING),
    )


def change(layer: Layer, target: Scale) -> float:
    """Largest relative change of a variance, and of a mean in standard deviations."""
    current, floor = layer.scale, 1e-6 * layer.module.eps
    larger = torch.maximum(current.variance, target.variance).clamp_min(floor)
    variance = (current.variance - target.variance).abs() / larger
    mean = (current.mean - target.mean).abs() / larger.sqrt()
    return float(torch.maximum(variance, mean).max())


def _log_step(current: Tensor, target: Tensor, weight: float) -> Tensor:
    """``current^(1−weight) · target^weight``, the damped fixed-point step; zeros are taken over at once."""
    blended = torch.exp((1 - weight) * current.log() + weight * target.log())
    return torch.where((current > 0) & (target > 0), blended, target)
