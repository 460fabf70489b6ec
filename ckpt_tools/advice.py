"""Advice in messages, in the caller's words: options on the command line, arguments in Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["advise", "caller_gives_options"]

_depth = 0  # of the process, because a command works in several threads


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
