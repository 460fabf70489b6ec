"""Means with standard errors, and paired differences with a t test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


@dataclass(frozen=True)
class Mean:
    """``error`` is the standard error of ``value``; NaN for fewer than two observations."""

    value: float
    error: float
    count: int

    def text(self, digits: int = 2) -> str:
        """ "1.23 ± 0.04", or "1.23" alone where there is no error."""
        if not math.isfinite(self.value):
            return "diverged"
        return f"{self.value:.{digits}f}" + ("" if math.isnan(self.error) else f" ± {self.error:.{digits}f}")


@dataclass(frozen=True)
class Difference(Mean):
    """A mean paired difference.

    `p` is two-sided, from Student's t with count − 1 degrees of freedom.
    """

    p: float

    def text(self, digits: int = 2) -> str:
        """ "−0.12 ± 0.03 (p = 0.004)"."""
        sign = "+" if self.value > 0 else ""
        p = "" if math.isnan(self.p) else f" (p {'< 0.001' if self.p < 0.001 else f'= {self.p:.3f}'})"
        return (sign + super().text(digits) + p).replace("-", "−")


def mean(values: Sequence[float]) -> Mean:
    """Mean and standard error, s/√n. Raises ValueError for no values."""
    if not values:
        raise ValueError("expected at least one value to take the mean of, found none")
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return Mean(float(array.mean()), error, len(array))


def paired_difference(after: Sequence[float], before: Sequence[float]) -> Difference:
    """Return the mean of after − before, pair by pair.

    Raises ValueError for sequences of different lengths.
    """
    difference = mean([new - old for new, old in zip(after, before, strict=True)])
    if math.isnan(difference.error):
        return Difference(difference.value, difference.error, difference.count, math.nan)
    if difference.error == 0:
        return Difference(difference.value, 0.0, difference.count, 1.0 if difference.value == 0 else 0.0)
    return Difference(
        difference.value,
        difference.error,
        difference.count,
        two_sided(difference.value / difference.error, difference.count - 1),
    )


def two_sided(t: float, freedom: int) -> float:
    """P(\\|T\\| ≥ \\|t\\|) of Student's t.

    With T = √ν·tan θ the density is cos^(ν−1) θ on (−π/2, π/2), which Gauss–Legendre integrates to
    1e-10.
    """
    edge = math.atan(abs(t) / math.sqrt(freedom))
    return _cosine_power(edge, freedom - 1) / _cosine_power(0.0, freedom - 1)


def _cosine_power(low: float, power: int) -> float:
    half = (math.pi / 2 - low) / 2
    return half * float(_WEIGHTS @ np.cos(low + half * (1 + _NODES)) ** power)
