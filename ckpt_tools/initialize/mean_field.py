"""The moments of an activation that are known without running the network, and their arithmetic.

This is mean-field bookkeeping: of every activation x it carries the mean and the second moment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Signal:
    """The moments of one activation x over units, positions and samples.

    ``mean`` is E[x], ``second`` is E[x²]. ``keep`` is E[x²] without dropout divided by E[x²] with
    it.
    """

    mean: float
    second: float
    keep: float = 1.0

    @property
    def deviation(self) -> float:
        """Standard deviation over units, positions and samples."""
        # Rounding can leave a tiny negative variance.
        return math.sqrt(max(self.second - self.mean**2, 0.0))


STANDARD = Signal(0.0, 1.0)
ZERO = Signal(0.0, 0.0)


def add(x: Signal, y: Signal, sign: float = 1.0) -> Signal:
    """The moments of x + sign·y for independent x and y."""
    cross = 2 * sign * x.mean * y.mean
    second = x.second + y.second + cross
    without_dropout = x.keep * x.second + y.keep * y.second + cross
    keep = min(1.0, without_dropout / second) if second > 0 else 1.0
    return Signal(x.mean + sign * y.mean, second, keep)


def multiply(x: Signal, y: Signal) -> Signal:
    """The moments of x·y for independent x and y.

    Noise of mean m and second moment q is dropout with keep probability m²/q.
    """
    return Signal(x.mean * y.mean, x.second * y.second, x.keep * y.keep)


def divide(x: Signal, y: Signal) -> Signal:
    """The moments of x / y, where y counts as constant at its root mean square.

    Divisors are norms and deviations, which hardly vary.
    """
    square = max(y.second, 1e-30)  # y may be zero everywhere
    return Signal(x.mean / math.sqrt(square), x.second / square, x.keep)


def scale(x: Signal, factor: float) -> Signal:
    """The moments of factor·x."""
    return replace(x, mean=x.mean * factor, second=x.second * factor**2)


def mix(parts: Sequence[tuple[Signal, float]]) -> Signal:
    """The moments of a tensor that is put together from parts.

    Args:
        parts: the signal of each part and its size, in any unit.
    """
    total = sum(size for _, size in parts) or 1.0
    second = sum(signal.second * size for signal, size in parts) / total
    without_dropout = sum(signal.second * signal.keep * size for signal, size in parts) / total
    mean = sum(signal.mean * size for signal, size in parts) / total
    return Signal(mean, second, without_dropout / second if second > 0 else 1.0)
