"""Axes of the charts: where a value lies, and which values are written beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_LADDERS: tuple[tuple[float, ...], ...] = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 5, 7),
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
)
_MOST = 8  # labels on an axis


@dataclass(frozen=True)
class LogAxis:
    """A range of positive values on a line of pixels; ``start`` is where ``low`` lies."""

    low: float
    high: float
    start: float
    end: float

    def pixel_of(self, value: float) -> float:
        """The pixel of a value; what lies beyond the range is put at its edge."""
        value = min(max(value, self.low), self.high)
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the range: as many as fit without crowding."""
        best = _steps(self.low, self.high) if self.high / self.low < 4 else []
        for ladder in _LADDERS if not best else ():
            found = _ladder(self.low, self.high, ladder)
            best = found if len(found) <= _MOST else best
        return best or _thin_out(_ladder(self.low, self.high, (1.0,)))


def covering_range(values: Sequence[float], extremes: Sequence[float]) -> tuple[float, float]:
    """A range that holds all ``values`` and 1, and of the ``extremes`` what is no more than tenfold beyond."""
    low, high = min([*values, 1.0]), max([*values, 1.0])
    reach = [value for value in extremes if low / 10 <= value <= high * 10]
    beyond = [value for value in extremes if not low / 10 <= value <= high * 10]
    low, high = min([low, *reach]), max([high, *reach])
    low = low / 2 if any(value < low for value in beyond) else low
    high = high * 2 if any(value > high for value in beyond) else high
    margin = max((high / low) ** 0.05, 1.02)
    return low / margin, high * margin


def integer_ticks(most: int, count: int) -> list[int]:
    """1, and round numbers up to ``most``: about ``count`` of them, without one that crowds the first."""
    step = next(
        step for power in range(12) for step in (10**power, 2 * 10**power, 5 * 10**power) if most / step <= count
    )
    return [1, *(number for number in range(step, most + 1, step) if number > max(1, step / 2))]


def _ladder(low: float, high: float, ladder: Sequence[float]) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**decade for decade in decades for step in ladder if low <= step * 10.0**decade <= high]


def _steps(low: float, high: float) -> list[float]:
    """Equal steps, for a range so short that a ladder would leave one value."""
    for power in range(-6, 1):
        for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power):
            found = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
            if len(found) <= _MOST:
                return [round(value, 9) for value in found if value > 0]
    return []


def _thin_out(values: list[float]) -> list[float]:
    return values[:: math.ceil(len(values) / _MOST)] if values else []
