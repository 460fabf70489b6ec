"""Numbers as a reader wants them: as many digits as mean something, and never ``nan``."""

from __future__ import annotations

import math

from ckpt_tools.report.page_content import Cell

UNKNOWN = "–"


def finite_number(value: object) -> float | None:
    """Return a finite number as a float, and None for any other value that stands in the facts."""
    # bool is a subclass of int: without the first test True would be read as 1.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def ratio_text(value: object) -> str:
    """Return ``1.039``, ``0.0021``, ``12,400``."""
    number = finite_number(value)
    if number is None:
        return UNKNOWN
    if number == 0 or 0.1 <= abs(number) < 100:
        return f"{number:.3f}"
    return f"{number:,.0f}" if 100 <= abs(number) < 1e6 else f"{number:.2g}"


def percent_text(value: object) -> str:
    """Return ``4.4 %`` for 0.044."""
    number = finite_number(value)
    if number is None:
        return UNKNOWN
    return f"{100 * number:,.1f} %" if 0.01 <= abs(number) < 1e6 else f"{100 * number:.2g} %"


def deviation_text(logarithm: object) -> str:
    """Return ``4.4 %`` for the logarithm of 1.044."""
    number = finite_number(logarithm)
    if number is None:
        return UNKNOWN
    return percent_text(math.expm1(min(number, 700)))  # e^710 is no float


def seconds_text(value: object) -> str:
    """Return ``2.6 s``, ``4 min 10 s``, ``3 h 5 min``."""
    number = finite_number(value)
    if number is None:
        return UNKNOWN
    if number < 99.5:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def value_with_error_text(entry: object, *, signed: bool = False) -> str:
    """Return ``3.20 ± 0.10`` for ``{"value": 3.2, "standard_error": 0.1}``, ``3.2`` for 3.2.

    The error has two digits, and the value as many decimals as its error. ``signed`` shows a plus,
    for changes.
    """
    value, error = value_and_error(entry)
    if value is None:
        return UNKNOWN
    sign = "+" if signed else ""
    if not error or error < 0:
        return f"{value:{sign}.4g}".replace("-", "−")
    digits = min(max(0, 1 - math.floor(math.log10(error))), 8)
    # The minus sign is as wide as the plus; a hyphen could be taken for a range.
    return f"{value:{sign},.{digits}f}".replace("-", "−") + f" ± {error:,.{digits}f}"


def value_and_error(entry: object) -> tuple[float | None, float | None]:
    """Return value and standard error of a metric; a plain number has no error."""
    if isinstance(entry, dict):
        return finite_number(entry.get("value")), finite_number(entry.get("standard_error"))
    return finite_number(entry), None


def number_cell(value: object, text: str | None = None) -> Cell:
    """Return a cell that is sorted by its value and shows ``text``, or the value as an integer."""
    number = finite_number(value)
    return Cell(integer_text(value) if text is None else text, number, "quiet" if number is None else "")


def integer_text(value: object) -> str:
    """Return ``1,024``."""
    number = finite_number(value)
    return UNKNOWN if number is None else f"{number:,.0f}"
