"""Checks of what a caller gives, and advice in the caller's words.

A wrong type is answered with a sentence. Messages name options on the command line and arguments
in Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real

from ckpt_tools.errors import UsageError

__all__ = [
    "advise",
    "caller_gives_options",
    "check_callable",
    "check_count",
    "check_seed",
    "is_number",
]

_depth = 0  # of the process, because a command works in several threads


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


@contextmanager
def caller_gives_options() -> Iterator[None]:
    """Within this context, messages are for somebody who has typed a command."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def advise(option: str, argument: str) -> str:
    """Return the ``option`` of the command line or the ``argument`` in Python, whichever the caller has."""
    return option if _depth else argument
