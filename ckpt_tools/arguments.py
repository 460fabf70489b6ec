"""Checks of what a caller gives, so that a wrong type is answered with a sentence."""

from __future__ import annotations

from numbers import Integral, Real

from ckpt_tools.errors import UsageError

__all__ = ["check_callable", "check_count", "check_seed", "is_number"]


def check_count(name: str, value: object) -> None:
    """Raise UsageError unless ``value`` is None, which means no limit, or a whole number from 1 on."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if value is not None and not (is_whole and value >= 1):  # type: ignore[operator]
        raise UsageError(f"{name}={value!r}: expected a whole number of at least 1, or None for no limit.")


def check_seed(value: object) -> None:
    """Raise UsageError unless ``value`` is a whole number."""
    if not isinstance(value, Integral):
        raise UsageError(f"seed={value!r}: expected a whole number.")


def check_callable(name: str, value: object, signature: str) -> None:
    """Raise UsageError unless ``value`` can be called; ``signature`` says how it will be."""
    if not callable(value):
        raise UsageError(f"{name} is a {type(value).__name__}; expected a function {signature}.")


def is_number(value: object) -> bool:
    """Tell whether ``value`` is a real number; a flag is none."""
    return isinstance(value, Real) and not isinstance(value, bool)
