"""``--model-kwargs name=value`` as Python values."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from ckpt_tools.errors import UsageError


def parse_model_kwargs(pairs: Iterable[str]) -> dict[str, object]:
    """``["drop_rate=0.2", "norm=bn"]`` → ``{"drop_rate": 0.2, "norm": "bn"}``. Raises UsageError.

    Values are Python literals; what is none is taken as a plain string.
    """
    found: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise UsageError(f"--model-kwargs: expected name=value such as drop_rate=0.2, found {pair!r}.")
        if name in found:
            raise UsageError(f"--model-kwargs: {name} is given twice. Give it once.")
        found[name] = _value(text.strip())
    return found


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
