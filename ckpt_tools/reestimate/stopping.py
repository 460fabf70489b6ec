"""How sure a pass is so far, and when that is enough to stop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ckpt_tools.observation.layer import Layer

# Below so many images the stated errors are too small: at 32 images, intervals of ±1.96 standard
# errors contain the true variance in 87 to 92 % of the channels instead of 95 %.
MIN_IMAGES = 128


@dataclass(frozen=True)
class Progress:
    """What a caller's ``progress`` is called with after every batch.

    ``bound`` is the largest, over the layers to rewrite, of the 95th percentile over channels of
    the relative standard error. ``residual`` is the largest relative change in the last pass of the
    `exact` estimator.
    """

    pass_number: int
    images: int
    bound: float
    residual: float | None = None


def error_bound(layers: Iterable[Layer]) -> float:
    """The ``bound`` of Progress; infinite before the first batch.

    A percentile instead of the maximum: on a DenseNet the worst channel needs 7 times as many
    images as the median one for the same error.
    """
    errors = [
        torch.quantile(layer.relative_error(), 0.95)
        for layer in layers
        if layer.rewritten and layer.moments is not None
    ]
    return float(torch.stack(errors).max()) if errors else float("inf")


def is_precise_enough(bound: float, images: int, tolerance: float) -> bool:
    """Whether a pass over so many images may stop at this error bound."""
    return images >= MIN_IMAGES and bound <= tolerance
