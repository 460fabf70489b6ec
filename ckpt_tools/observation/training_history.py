"""What a BN layer says about its training: how many batches it has seen, and what they left."""

from __future__ import annotations

from torch.nn.modules.batchnorm import _BatchNorm

# Weight that the initial variance of 1 may still have in the running average of a trained layer.
_MAX_INITIAL_WEIGHT = 0.01


def is_trained(module: _BatchNorm, *, counted: bool = True) -> bool:
    """Whether this layer's statistics stem from training: the initial ones have no weight left.

    ``counted=False`` says that the checkpoint had no counters, so that those of the module mean
    nothing. Then any difference from the initial mean 0 and variance 1 is taken for training.
    """
    if not counted:
        assert module.running_mean is not None
        assert module.running_var is not None
        return bool((module.running_mean != 0).any()) or bool((module.running_var != 1).any())
    return batches_seen(module) > 0 and initial_weight(module) < _MAX_INITIAL_WEIGHT


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
