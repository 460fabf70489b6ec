"""Temperature scaling (Guo et al. 2017): one number that logits are divided by, fitted by maximum likelihood."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ckpt_tools.errors import DataError
from ckpt_tools.evaluate.outcomes import Outcomes

LOWEST, HIGHEST = 0.01, 100.0  # a network that is right about every image wants 0
_ROWS = 4096  # at a time, so that float64 copies of all logits are never needed
_STEPS = 100
_PRECISION = 1e-9  # of log T


@dataclass(frozen=True, eq=False)
class Calibration:
    """The temperature of all images, and an honest account of what one does.

    ``halves``: the temperatures of two random halves. ``held_out``: outcomes of all images, each with its logits
    divided by the temperature of the half that it is not in.
    """

    temperature: float
    halves: tuple[float, float]
    held_out: Outcomes


def calibrate(logits: Tensor, labels: Tensor, *, seed: int = 0) -> Calibration:
    """Fit on each half of the images and judge on the other. Logits (N, C), labels (N,) int64.

    Raises DataError for fewer than two images.
    """
    count = len(labels)
    if count < 2:
        raise DataError(f"--calibrate: expected at least two images to fit and judge a temperature, found {count}.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    halves = order[: count // 2], order[count // 2 :]
    first, second = (fit_temperature(logits[half], labels[half]) for half in halves)
    parts = [
        Outcomes.of(rows / temperature, labels[some])
        for half, temperature in zip(halves, (second, first), strict=True)
        for some, rows in ((some, logits[some].double()) for some in half.split(_ROWS))
    ]
    shuffled, back = Outcomes.joined(parts), order.argsort()
    five = shuffled.among_five
    held_out = Outcomes(
        shuffled.correct[back], None if five is None else five[back], shuffled.nll[back], shuffled.confidence[back]
    )
    return Calibration(fit_temperature(logits, labels), (first, second), held_out)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in [0.01, 100] that minimises the NLL of softmax(logits / T), in float64.

    Newton's method on u = −log T, kept within a bracket that shrinks: the NLL is convex in 1/T, so the sign of its
    slope tells on which side the minimum lies.
    """
    low, high = -math.log(HIGHEST), -math.log(LOWEST)
    if _derivatives(logits, labels, low)[0] >= 0:
        return HIGHEST
    if _derivatives(logits, labels, high)[0] <= 0:
        return LOWEST
    u = 0.0
    for _ in range(_STEPS):
        slope, curvature = _derivatives(logits, labels, u)
        low, high = (u, high) if slope < 0 else (low, u)
        step = u - slope / curvature if curvature > 0 else math.nan
        following = step if low < step < high else (low + high) / 2
        if abs(following - u) < _PRECISION:
            break
        u = following
    return math.exp(-u)


def _derivatives(logits: Tensor, labels: Tensor, u: float) -> tuple[float, float]:
    """First and second derivative of the mean NLL in u, where logits are multiplied by β = exp(u).

    In β they are E_p[z] − z_y and Var_p[z], p the softmax of βz.
    """
    beta = math.exp(u)
    first = second = 0.0
    for rows, wanted in zip(logits.split(_ROWS), labels.split(_ROWS), strict=True):
        z = rows.double()
        z = z - z.amax(1, keepdim=True)
        p = (beta * z).softmax(1)
        mean = (p * z).sum(1)
        first += float((mean - z.gather(1, wanted[:, None])[:, 0]).sum())
        second += float((p * (z - mean[:, None]).square()).sum())
    first, second = first / len(labels), second / len(labels)
    return beta * first, beta * first + beta**2 * second
