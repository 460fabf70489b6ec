"""The moments of an activation that are known without running the network, and their arithmetic.

This is mean-field bookkeeping. Of every activation x it carries the mean, the second moment E[x²],
and the shared moment E[x x'], the product of the same unit's values at two positions or samples.
E[x x'] is what averaging over positions leaves. For independent inputs of mean zero it starts at 0,
and it grows where rectifiers give every unit a mean of its own (Poole et al. 2016,
https://arxiv.org/abs/1606.05340).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Signal:
    """The moments of one activation x over units, positions and samples.

    ``mean`` is E[x], ``second`` is E[x²], ``shared`` is E[x x']. ``keep`` is E[x²] without dropout
    divided by E[x²] with it. ``total`` is 0, or the number of entries of the softmax that x comes
    from: that many values sum to one.
    """

    mean: float
    second: float
    shared: float
    keep: float = 1.0
    total: int = 0

    @property
    def deviation(self) -> float:
        """Standard deviation over units, positions and samples."""
        # Rounding can leave a tiny negative variance.
        return math.sqrt(max(self.second - self.mean**2, 0.0))


STANDARD = Signal(0.0, 1.0, 0.0)
ZERO = Signal(0.0, 0.0, 0.0)


def add(x: Signal, y: Signal, sign: float = 1.0) -> Signal:
    """The moments of x + sign·y for independent x and y."""
    cross = 2 * sign * x.mean * y.mean
    second = x.second + y.second + cross
    without_dropout = x.keep * x.second + y.keep * y.second + cross
    keep = min(1.0, without_dropout / second) if second > 0 else 1.0
    return Signal(x.mean + sign * y.mean, second, x.shared + y.shared + cross, keep)


def multiply(x: Signal, y: Signal) -> Signal:
    """The moments of x·y for independent x and y.

    Noise of mean m and second moment q is dropout with keep probability m²/q.
    """
    return Signal(x.mean * y.mean, x.second * y.second, x.shared * y.shared, x.keep * y.keep, x.total)


def divide(x: Signal, y: Signal) -> Signal:
    """The moments of x / y, where y counts as constant at its root mean square.

    Divisors are norms and deviations, which hardly vary.
    """
    scale = 1 / max(y.second, 1e-30)  # y may be zero everywhere
    return Signal(x.mean * math.sqrt(scale), x.second * scale, x.shared * scale, x.keep)


def scale(x: Signal, factor: float) -> Signal:
    """The moments of factor·x."""
    square = factor**2
    return replace(x, mean=x.mean * factor, second=x.second * square, shared=x.shared * square, total=0)


def mix(parts: Sequence[tuple[Signal, float]]) -> Signal:
    """The moments of a tensor that is put together from parts.

    Args:
        parts: the signal of each part and its size, in any unit.
    """
    total = sum(size for _, size in parts) or 1.0
    second = sum(signal.second * size for signal, size in parts) / total
    without_dropout = sum(signal.second * signal.keep * size for signal, size in parts) / total
    return Signal(
        sum(signal.mean * size for signal, size in parts) / total,
        second,
        sum(signal.shared * size for signal, size in parts) / total,
        without_dropout / second if second > 0 else 1.0,
    )


def average(x: Signal, count: float) -> Signal:
    """The moments of the mean of x over ``count`` positions.

    What two positions share stays as it is; the rest of E[x²] shrinks by ``count``.
    """
    independent = (x.second - x.shared) / max(count, 1.0)
    second = x.shared + independent
    without_dropout = second
    if x.shared <= x.second * x.keep:
        without_dropout = x.shared + independent * x.keep
    keep = min(1.0, without_dropout / second) if second > 0 else 1.0
    return Signal(x.mean, second, x.shared, keep)


def contract(x: Signal, y: Signal, count: int) -> Signal:
    """The moments of Σ x_k y_k over ``count`` entries of two activations.

    Where one factor comes from a softmax, the sum is a weighted average of the other factor.
    """
    if y.total:
        x, y = y, x
    if x.total:
        independent = (y.second - y.shared) * x.second * x.total
        return Signal(y.mean, y.shared + independent, y.shared, y.keep)
    cross = count * (count - 1) * (x.mean * y.mean) ** 2
    return Signal(
        count * x.mean * y.mean,
        count * x.second * y.second + cross,
        count * x.shared * y.shared + cross,
    )


def softmax(logits: Signal, count: int) -> Signal:
    """The moments of a softmax over ``count`` entries with Gaussian logits of variance s².

    Its weights are log-normal then: E[a²] = exp(s²)/n², and at most 1/n because they sum to one.
    """
    # exp(50) is far above every count, so the limit changes no result; it prevents an overflow.
    spread = math.exp(min(max(logits.second - logits.shared, 0.0), 50.0))
    return Signal(1 / count, min(spread / count**2, 1 / count), 1 / count**2, 1.0, count)


def normalise(x: Signal, gain: float, offset: Signal, *, per_unit: bool) -> Signal:
    """The moments behind a normalisation layer: mean 0, variance 1, then γ and β.

    Args:
        x: the input.
        gain: E[γ²].
        offset: the moments of β.
        per_unit: each unit loses its own mean, as in batch norm, and with it all that two
            positions share.
    """
    variance = x.second - x.mean**2
    shared = 0.0
    if not per_unit and variance > 0:
        shared = max(x.shared - x.mean**2, 0.0) / variance
    return Signal(offset.mean, gain + offset.second, gain * shared + offset.shared)
