"""Error, NLL and calibration error of a classifier, and their changes, with standard errors.

The model before and the model after see the same images. So the standard error of a change is that
of the differences image by image, which is much smaller than the one that two separate errors would
give.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ckpt_tools.errors import CkptToolsError
from ckpt_tools.evaluate.outcomes import Outcomes

Metric = Literal["error", "error5", "nll", "ece"]
METRICS: tuple[Metric, ...] = get_args(Metric)
BINS = 15  # bins of equal width for the calibration error, as in Guo et al. 2017


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error.

    The error is infinite for a single image, which has no spread.
    """

    value: float
    error: float


def require_torchmetrics() -> None:
    """Raise CkptToolsError, naming the extra, if torchmetrics is not installed.

    This does not import it yet: that takes seconds, and imports torchvision with another JPEG
    decoder, too.
    """
    if importlib.util.find_spec("torchmetrics") is None:
        raise CkptToolsError(
            "an evaluation needs torchmetrics, which is not installed. Run: pip install "
            "'ckpt-tools[evaluate]'"
        )


def measure(outcomes: Outcomes) -> dict[Metric, Estimate]:
    """Compute ``error`` (top-1), ``error5`` (top-5), ``nll`` and ``ece`` with standard errors.

    All are in percent, but ``nll`` in nats an image. ``error5`` is left out for heads with fewer
    than six outputs. The calibration error is torchmetrics' l1 over 15 bins; its standard error is
    that of the jackknife.
    """
    values = _values(outcomes)
    return {metric: Estimate(values[metric], _error(terms)) for metric, terms in per_image(outcomes).items()}


def changes(before: Outcomes, after: Outcomes) -> dict[Metric, Estimate]:
    """Return the metrics after minus those before, with paired standard errors.

    Both must be outcomes of the same images in the same order.
    """
    old, new = per_image(before), per_image(after)
    was, now = _values(before), _values(after)
    return {
        metric: Estimate(now[metric] - was[metric], _error(new[metric] - old[metric]))
        for metric in METRICS
        if metric in old and metric in new
    }


def per_image(outcomes: Outcomes) -> dict[Metric, Tensor]:
    """Return what each image contributes to each metric, as (N,) float64.

    The standard deviation of these terms, divided by √N, is the standard error of the metric.
    """
    terms: dict[Metric, Tensor] = {"error": 100.0 * (~outcomes.correct).double()}
    if outcomes.among_five is not None:
        terms["error5"] = 100.0 * (~outcomes.among_five).double()
    return {**terms, "nll": outcomes.nll, "ece": 100.0 * _pseudovalues(outcomes)}


def _values(outcomes: Outcomes) -> Mapping[Metric, float]:
    count = len(outcomes)
    values: dict[Metric, float] = {"error": 100 * int((~outcomes.correct).sum()) / count}
    if outcomes.among_five is not None:
        values["error5"] = 100 * int((~outcomes.among_five).sum()) / count
    return {**values, "nll": float(outcomes.nll.mean()), "ece": 100 * _calibration_error(outcomes)}


def _calibration_error(outcomes: Outcomes) -> float:
    """Return Σ over bins of share · |accuracy − confidence|.

    For the label with the largest logit this is the calibration error of a binary classifier: its
    confidence is the probability, and ``correct`` is the outcome.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    return float(
        binary_calibration_error(outcomes.confidence, outcomes.correct.long(), n_bins=BINS, norm="l1")
    )


def _pseudovalues(outcomes: Outcomes) -> Tensor:
    """Return the jackknife's pseudovalue of each image, N·ECE − (N−1)·(ECE without the image).

    Let d = correct − confidence of an image and D the sum of d over its bin. N·ECE is the sum of
    |D| over the bins, and leaving the image out turns one |D| into |D − d|. So the pseudovalue is
    |D| − |D − d|.

    On simulated overconfident networks the standard error of these values was right (1 to 1.4 times
    the true one). On calibrated networks, where the signs of the gaps are chance, it was up to 1.6
    times too large (300 draws each of 300 and of 2,000 images).
    """
    # One bin more than there are edges to pass, for a confidence of exactly 1.
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    bins = torch.bucketize(outcomes.confidence, edges, right=True) - 1
    gaps = outcomes.correct.double() - outcomes.confidence
    sums = torch.zeros(BINS + 1, dtype=torch.float64).scatter_add_(0, bins, gaps)[bins]
    return sums.abs() - (sums - gaps).abs()


def _error(terms: Tensor) -> float:
    return float(terms.std()) / math.sqrt(len(terms)) if len(terms) > 1 else math.inf
