"""What is known of an activation without running the network, and how operations change it.

Mean-field bookkeeping: of every activation x its mean, its second moment E[x²], and E[x x'], the product of the
same unit's values at two positions or samples. E[x x'] is what averaging over positions leaves; for independent
inputs of mean zero it starts at 0 and grows where rectifiers give every unit a mean of its own (Poole et al. 2016,
https://arxiv.org/abs/1606.05340).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Signal:
    """``mean`` E[x], ``second`` E[x²], ``shared`` E[x x'].

    ``keep``: E[x²] without dropout / E[x²]. ``total``: over this many entries of a softmax, which sum to one.
    """

    mean: float
    second: float
    shared: float
    keep: float = 1.0
    total: int = 0

    @property
    def deviation(self) -> float:
        """Standard deviation over units, positions and samples."""
        return math.sqrt(max(self.second - self.mean**2, 0.0))


STANDARD = Signal(0.0, 1.0, 0.0)


def added(one: Signal, other: Signal, sign: float = 1.0) -> Signal:
    """x ± y, independent."""
    cross = 2 * sign * one.mean * other.mean
    second = one.second + other.second + cross
    quiet = one.keep * one.second + other.keep * other.second + cross
    keep = min(1.0, quiet / second) if second > 0 else 1.0
    return Signal(one.mean + sign * other.mean, second, one.shared + other.shared + cross, keep)


def multiplied(one: Signal, other: Signal) -> Signal:
    """x·y, independent. Noise of mean m and second moment q is dropout with keep probability m²/q."""
    return Signal(
        one.mean * other.mean, one.second * other.second, one.shared * other.shared, one.keep * other.keep, one.total
    )


def divided(one: Signal, other: Signal) -> Signal:
    """x / y with y near its root mean square."""
    scale = 1 / max(other.second, 1e-30)
    return Signal(one.mean * math.sqrt(scale), one.second * scale, one.shared * scale, one.keep)


def scaled(one: Signal, factor: float) -> Signal:
    """factor·x."""
    return replace(one, mean=one.mean * factor, second=one.second * factor**2, shared=one.shared * factor**2, total=0)


def mixed(parts: Sequence[tuple[Signal, float]]) -> Signal:
    """A tensor put together from parts of these sizes."""
    total = sum(size for _, size in parts) or 1.0
    second = sum(signal.second * size for signal, size in parts) / total
    quiet = sum(signal.second * signal.keep * size for signal, size in parts) / total
    return Signal(
        sum(signal.mean * size for signal, size in parts) / total,
        second,
        sum(signal.shared * size for signal, size in parts) / total,
        quiet / second if second > 0 else 1.0,
    )


def averaged(one: Signal, count: float) -> Signal:
    """The mean over ``count`` positions."""
    own = (one.second - one.shared) / max(count, 1.0)
    second = one.shared + own
    quiet = one.shared + own * one.keep if one.shared <= one.second * one.keep else second
    return Signal(one.mean, second, one.shared, min(1.0, quiet / second) if second > 0 else 1.0)


def contracted(one: Signal, other: Signal, count: int) -> Signal:
    """Σ x_k y_k over ``count`` entries of two activations; with softmax entries, an average of the other factor."""
    if other.total:
        one, other = other, one
    if one.total:
        own = (other.second - other.shared) * one.second * one.total
        return Signal(other.mean, other.shared + own, other.shared, other.keep)
    cross = count * (count - 1) * (one.mean * other.mean) ** 2
    return Signal(
        count * one.mean * other.mean,
        count * one.second * other.second + cross,
        count * one.shared * other.shared + cross,
    )


def softmaxed(one: Signal, count: int) -> Signal:
    """softmax over ``count`` entries with Gaussian logits: E[a²] = exp(s²)/n² for log-normal weights, at most 1/n."""
    spread = math.exp(min(max(one.second - one.shared, 0.0), 50.0))
    return Signal(1 / count, min(spread / count**2, 1 / count), 1 / count**2, 1.0, count)


def normalised(one: Signal, gain: float, offset: Signal, *, units: bool) -> Signal:
    """A normalisation layer: zero mean, variance one, then E[γ²] = ``gain`` and β.

    ``units``: each unit loses its own mean (batch norm), and with it all that two positions share.
    """
    centred = one.second - one.mean**2
    shared = 0.0 if units or centred <= 0 else max(one.shared - one.mean**2, 0.0) / centred
    return Signal(offset.mean, gain + offset.second, gain * shared + offset.shared)
