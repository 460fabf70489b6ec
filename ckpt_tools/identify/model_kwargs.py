"""Parses `--model-kwargs name=value` into Python values."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from ckpt_tools.errors import UsageError


def parse_model_kwargs(pairs: Iterable[str]) -> dict[str, object]:
    """Turn `["drop_rate=0.2", "norm=bn"]` into `{"drop_rate": 0.2, "norm": "bn"}`.

    A value that is no Python literal is taken as a plain string. Raises UsageError for a pair
    without a name or an equals sign, and for a name that is given twice.
    """
    model_kwargs: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise UsageError(f"--model-kwargs: expected name=value such as drop_rate=0.2, found {pair!r}.")
        if name in model_kwargs:
            raise UsageError(f"--model-kwargs: {name} is given twice. Give it once.")
        model_kwargs[name] = _parse_value(text.strip())
    return model_kwargs


def _parse_value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        # `literal_eval` documents all of these; the last two come from deeply nested text.
        return text
