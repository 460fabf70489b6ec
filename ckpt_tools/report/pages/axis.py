"""Axes of the charts: at which pixel a value lies, and which values are labelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Round numbers within a decade, from few to many: the last ladder whose labels fit is taken.
_LADDERS: tuple[tuple[float, ...], ...] = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 5, 7),
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
)
_MAX_LABELS = 8


@dataclass(frozen=True)
class LogAxis:
    """A logarithmic axis: ``low`` > 0 lies at the pixel ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    def pixel_of(self, value: float) -> float:
        """Return the pixel of a value; a value beyond the range has the pixel of the nearer end."""
        value = min(max(value, self.low), self.high)
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values within the range to be labelled, as many as fit."""
        ticks = _equal_steps(self.low, self.high) if self.high / self.low < 4 else []
        for ladder in _LADDERS if not ticks else ():
            candidates = _round_values(self.low, self.high, ladder)
            if len(candidates) <= _MAX_LABELS:
                ticks = candidates
        # A range of many decades has too many labels even with one for each of them.
        return ticks or _thin_out(_round_values(self.low, self.high, (1.0,)))


def covering_range(values: Sequence[float], extremes: Sequence[float]) -> tuple[float, float]:
    """Return a range that holds 1, all ``values``, and the ``extremes`` that are not far beyond.

    One channel of many may have changed by a factor of a million. If the axis held it, all layers
    would lie on a line. So an extreme more than tenfold beyond the values is left out, and the
    range is widened so that an arrow towards it has room.
    """
    low, high = min([*values, 1.0]), max([*values, 1.0])
    within = [value for value in extremes if low / 10 <= value <= high * 10]
    beyond = [value for value in extremes if not low / 10 <= value <= high * 10]
    low, high = min([low, *within]), max([high, *within])
    if any(value < low for value in beyond):
        low /= 2
    if any(value > high for value in beyond):
        high *= 2
    # A margin of 5 % of the axis, and at least 2 % of the value where all ratios are alike.
    margin = max((high / low) ** 0.05, 1.02)
    return low / margin, high * margin


def integer_ticks(last: int, count: int) -> list[int]:
    """Return 1 and the multiples of a round step up to ``last``, about ``count`` numbers in all."""
    steps = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    step = next(step for step in steps if last / step <= count)
    return [1, *(number for number in range(step, last + 1, step) if number > 1)]


def _round_values(low: float, high: float, ladder: Sequence[float]) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [
        step * 10.0**decade for decade in decades for step in ladder if low <= step * 10.0**decade <= high
    ]


def _equal_steps(low: float, high: float) -> list[float]:
    """Return multiples of a round step, for a range that is too short for a ladder."""
    for step in (factor * 10.0**power for power in range(-6, 1) for factor in (1, 2, 5)):
        multiples = range(math.ceil(low / step), math.floor(high / step) + 1)
        if len(multiples) <= _MAX_LABELS:
            # Rounded, since 3 * 0.1 is 0.30000000000000004; 0 has no place on a logarithmic axis.
            return [round(step * number, 9) for number in multiples if number > 0]
    return []


def _thin_out(values: list[float]) -> list[float]:
    return values[:: math.ceil(len(values) / _MAX_LABELS)] if values else []
