"""Temperature scaling (Guo et al. 2017).

All logits are divided by one number, the temperature, that is fitted by maximum likelihood.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ckpt_tools.errors import DataError
from ckpt_tools.evaluate.outcomes import Outcomes

# For a network that is right about every image the likelihood grows for ever as the temperature
# falls to 0.
LOWEST, HIGHEST = 0.01, 100.0
_ROWS = 4096  # images at a time, so that never all logits are copied to float64
_STEPS = 100
_PRECISION = 1e-9  # of log T


@dataclass(frozen=True, eq=False)
class Calibration:
    """The temperature of all images, and its effect on images that it was not fitted on.

    ``halves``: the temperatures of two random halves of the images. ``held_out``: outcomes of all
    images, where the logits of each image are divided by the temperature of the half that it is not
    in.
    """

    temperature: float
    halves: tuple[float, float]
    held_out: Outcomes


def calibrate(logits: Tensor, labels: Tensor, *, seed: int = 0) -> Calibration:
    """Fit a temperature on each half of the images and judge it on the other half.

    ``logits`` has shape (N, C), ``labels`` (N,) and int64. ``seed`` decides how the images are
    halved. Raises DataError for fewer than two images.
    """
    count = len(labels)
    if count < 2:
        raise DataError(
            f"--calibrate: expected at least two images to fit and judge a temperature, found {count}."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    halves = order[: count // 2], order[count // 2 :]
    first, second = (fit_temperature(logits[half], labels[half]) for half in halves)
    parts = []
    for half, temperature in zip(halves, (second, first), strict=True):
        for indices in half.split(_ROWS):
            parts.append(Outcomes.of(logits[indices].double() / temperature, labels[indices]))
    # The parts stand in the shuffled order.
    shuffled, back = Outcomes.concatenate(parts), order.argsort()
    five = shuffled.among_five
    held_out = Outcomes(
        shuffled.correct[back],
        None if five is None else five[back],
        shuffled.nll[back],
        shuffled.confidence[back],
    )
    return Calibration(fit_temperature(logits, labels), (first, second), held_out)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the T in [0.01, 100] that minimises the NLL of softmax(logits / T), in float64.

    This is Newton's method on u = −log T, kept within a bracket that shrinks: the NLL is convex in
    1/T, so the sign of its slope tells on which side the minimum lies.
    """
    low, high = -math.log(HIGHEST), -math.log(LOWEST)
    if _derivatives(logits, labels, low)[0] >= 0:
        return HIGHEST
    if _derivatives(logits, labels, high)[0] <= 0:
        return LOWEST
    u = 0.0  # a temperature of 1
    for _ in range(_STEPS):
        slope, curvature = _derivatives(logits, labels, u)
        low, high = (u, high) if slope < 0 else (low, u)
        step = u - slope / curvature if curvature > 0 else math.nan
        next_u = step if low < step < high else (low + high) / 2  # NaN is in no interval
        if abs(next_u - u) < _PRECISION:
            break
        u = next_u
    return math.exp(-u)


def _derivatives(logits: Tensor, labels: Tensor, u: float) -> tuple[float, float]:
    """Return the first and second derivative of the mean NLL with respect to u.

    The logits are multiplied by β = exp(u).

    With respect to β, and for one image with logits z and label y, they are E_p[z] − z_y and
    Var_p[z], where p is the softmax of βz. The chain rule does the rest.
    """
    beta = math.exp(u)
    first = second = 0.0
    for rows, targets in zip(logits.split(_ROWS), labels.split(_ROWS), strict=True):
        z = rows.double()
        z = z - z.amax(1, keepdim=True)  # the softmax stays the same, and no exponential overflows
        p = (beta * z).softmax(1)
        mean = (p * z).sum(1)
        first += float((mean - z.gather(1, targets[:, None])[:, 0]).sum())
        second += float((p * (z - mean[:, None]).square()).sum())
    first, second = first / len(labels), second / len(labels)
    return beta * first, beta * first + beta**2 * second
