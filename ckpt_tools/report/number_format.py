"""Numbers as a reader wants them: as many digits as mean something, and never ``nan``."""

from __future__ import annotations

import math

from ckpt_tools.report.page_content import Cell, Tone

UNKNOWN = "–"


def finite_number(value: object) -> float | None:
    """A finite number, or None for whatever else stands in the facts."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return found if math.isfinite(found) else None


def ratio_text(value: object) -> str:
    """``1.039``, ``0.0021``, ``12,400``."""
    found = finite_number(value)
    if found is None:
        return UNKNOWN
    if found == 0 or 0.1 <= abs(found) < 100:
        return f"{found:.3f}"
    return f"{found:,.0f}" if 100 <= abs(found) < 1e6 else f"{found:.2g}"


def percent_text(value: object) -> str:
    """``4.4 %`` of 0.044."""
    found = finite_number(value)
    if found is None:
        return UNKNOWN
    return f"{100 * found:,.1f} %" if 0.01 <= abs(found) < 1e6 else f"{100 * found:.2g} %"


def deviation_text(logarithm: object) -> str:
    """``4.4 %`` of the logarithm of 1.044."""
    found = finite_number(logarithm)
    return UNKNOWN if found is None else percent_text(math.expm1(min(found, 700)))  # e^710 is no float


def seconds_text(value: object) -> str:
    """``2.6 s``, ``4 min 10 s``, ``3 h 5 min``."""
    found = finite_number(value)
    if found is None:
        return UNKNOWN
    if found < 99.5:
        return f"{found:.1f} s"
    minutes, seconds = divmod(round(found), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def value_with_error_text(entry: object, *, signed: bool = False) -> str:
    """``3.20 ± 0.10`` of ``{"value": 3.2, "standard_error": 0.1}`` or of a plain number; two digits of the error."""
    value, error = value_and_error(entry)
    if value is None:
        return UNKNOWN
    sign = "+" if signed else ""
    if not error or error < 0:
        return f"{value:{sign}.4g}".replace("-", "−")
    digits = min(max(0, 1 - math.floor(math.log10(error))), 8)
    return f"{value:{sign},.{digits}f}".replace("-", "−") + f" ± {error:,.{digits}f}"


def value_and_error(entry: object) -> tuple[float | None, float | None]:
    """Value and standard error of a metric."""
    if isinstance(entry, dict):
        return finite_number(entry.get("value")), finite_number(entry.get("standard_error"))
    return finite_number(entry), None


def number_cell(value: object, text: str | None = None, tone: Tone = "") -> Cell:
    """A cell that sorts by its value and shows it as text."""
    found = finite_number(value)
    return Cell(text if text is not None else integer_text(value), found, tone if found is not None else "quiet")


def integer_text(value: object) -> str:
    """``1,024``."""
    found = finite_number(value)
    return UNKNOWN if found is None else f"{found:,.0f}"
