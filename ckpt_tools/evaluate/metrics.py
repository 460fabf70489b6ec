"""Error, NLL and expected calibration error of a classifier, and the change of each, with standard errors.

Before and after see the same images, so the standard error of a change is the one of the differences image by image,
which is much smaller than what two separate errors would give.
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
BINS = 15  # of the calibration error, of equal width (Guo et al. 2017)


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, infinite where one image does not tell it."""

    value: float
    error: float


def require_torchmetrics() -> None:
    """Raise CkptToolsError, naming the extra, if torchmetrics is not installed.

    It is not imported yet: that takes seconds and brings torchvision, and with it another JPEG decoder, along.
    """
    if importlib.util.find_spec("torchmetrics") is None:
        raise CkptToolsError(
            "an evaluation needs torchmetrics, which is not installed. Run: pip install 'ckpt-tools[evaluate]'"
        )


def measure(outcomes: Outcomes) -> dict[Metric, Estimate]:
    """``error`` and ``error5`` (top-1, top-5) in percent, ``nll`` in nats an image, ``ece`` in percent.

    The calibration error is torchmetrics' l1 over 15 bins; its standard error is the jackknife's.
    """
    values = _values(outcomes)
    return {metric: Estimate(values[metric], _error(terms)) for metric, terms in per_image(outcomes).items()}


def changes(before: Outcomes, after: Outcomes) -> dict[Metric, Estimate]:
    """After minus before, with paired standard errors. Both are of the same images in the same order."""
    old, new = per_image(before), per_image(after)
    was, now = _values(before), _values(after)
    return {
        metric: Estimate(now[metric] - was[metric], _error(new[metric] - old[metric]))
        for metric in METRICS
        if metric in old and metric in new
    }


def per_image(outcomes: Outcomes) -> dict[Metric, Tensor]:
    """What each image contributes to each metric, (N,) float64: their spread over √N is its standard error."""
    terms: dict[Metric, Tensor] = {"error": 100.0 * (~outcomes.correct).double()}
    if outcomes.among_five is not None:
        terms["error5"] = 100.0 * (~outcomes.among_five).double()
    return {**terms, "nll": outcomes.nll, "ece": 100.0 * _pseudovalues(outcomes)}


def _values(outcomes: Outcomes) -> Mapping[Metric, float]:
    count = len(outcomes)
    found: dict[Metric, float] = {"error": 100 * int((~outcomes.correct).sum()) / count}
    if outcomes.among_five is not None:
        found["error5"] = 100 * int((~outcomes.among_five).sum()) / count
    return {**found, "nll": float(outcomes.nll.mean()), "ece": 100 * _calibration_error(outcomes)}


def _calibration_error(outcomes: Outcomes) -> float:
    """Σ over bins of share · |accuracy − confidence|. Of the top label it is the binary one of confidence and hit."""
    from torchmetrics.functional.classification import binary_calibration_error

    return float(binary_calibration_error(outcomes.confidence, outcomes.correct.long(), n_bins=BINS, norm="l1"))


def _pseudovalues(outcomes: Outcomes) -> Tensor:
    """The jackknife's, N·ECE − (N−1)·ECE without the image, in closed form.

    Their standard error was right on simulated overconfident networks (1 to 1.4 times the true one), and up to 1.6
    times too large on calibrated ones, where the signs of the gaps are chance (300 draws each of 300 and 2,000 images).

    With d = hit − confidence of an image and D their sum over its bin, N·ECE is the sum of |D|, and leaving the image
    out turns one |D| into |D − d|: the pseudovalue is |D| − |D − d|.
    """
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    bins = torch.bucketize(outcomes.confidence, edges, right=True) - 1
    gaps = outcomes.correct.double() - outcomes.confidence
    sums = torch.zeros(BINS + 1, dtype=torch.float64).scatter_add_(0, bins, gaps)[bins]
    return sums.abs() - (sums - gaps).abs()


def _error(terms: Tensor) -> float:
    return float(terms.std()) / math.sqrt(len(terms)) if len(terms) > 1 else math.inf
