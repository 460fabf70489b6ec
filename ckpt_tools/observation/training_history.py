"""What a BN layer says about its training: how many batches it has seen, and what they left."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

# Weight that the initial variance of 1 may still have in the running average of a trained layer.
_MAX_INITIAL_WEIGHT = 0.01
# Frozen layers subtract their eps, at most 1e-3, from the initial variance. Half precision rounds it.
INITIAL_ERROR = 2e-3


def is_trained(module: _BatchNorm, *, counted: bool = True) -> bool:
    """Whether this layer's statistics stem from training: the initial ones have no weight left.

    ``counted=False`` says that no layer has counted a batch, so that the counters mean nothing.
    Then any difference from the initial mean 0 and variance 1 is taken for training.
    """
    if not counted:
        assert module.running_mean is not None
        assert module.running_var is not None
        return moved_from_start(module.running_mean, module.running_var)
    return batches_seen(module) > 0 and initial_weight(module) < _MAX_INITIAL_WEIGHT


def moved_from_start(mean: Tensor | None, variance: Tensor | None) -> bool:
    """Whether running statistics differ from those of a new layer, mean 0 and variance 1.

    A frozen layer of torchvision or detectron2 starts with a variance of 1 - eps.
    """
    mean_moved = mean is not None and bool(mean.any())
    return mean_moved or (variance is not None and bool(((variance - 1).abs() > INITIAL_ERROR).any()))


def any_counted(modules: Iterable[_BatchNorm]) -> bool:
    """Whether one of the layers has counted a batch. If none has, counters of 0 say nothing."""
    return any(batches_seen(module) for module in modules)


def initial_weight(module: _BatchNorm) -> float:
    """The weight that the initial mean 0 and variance 1 still have in the running statistics.

    0 if the layer has not counted its batches, or computes a plain average (``momentum=None``).
    """
    batches = batches_seen(module)
    if not batches or module.momentum is None:
        return 0.0
    return float((1 - module.momentum) ** batches)


def batches_seen(module: _BatchNorm) -> int:
    """How many batches a layer has counted in training; 0 if it did not count.

    A module that is built without ``track_running_stats`` has no counter. Converted checkpoints
    may have counters of 0 beside real statistics.
    """
    return 0 if module.num_batches_tracked is None else int(module.num_batches_tracked)
