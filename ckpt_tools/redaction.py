"""Reports and messages are passed around: credentials and query strings of URLs do not go with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SCHEME = r"([A-Za-z][A-Za-z0-9+.-]*://)"
# A secret may hold slashes, as Amazon's do; a port is no secret.
_USER = re.compile(_SCHEME + r"(?:[^\s/?#@:]*:(?!\d+(?:[/?#\s]|$))(?:(?!://)\S)*@|[^\s/?#]*@)")
_QUERY = re.compile(_SCHEME + r"([^\s'\"<>?#]*)[?#][^\s'\"<>]*")


def presentable(value: Any) -> Any:
    """``without_secrets``, and characters that would not show, or turn the line around, as their escapes."""
    if isinstance(value, str):
        clean = without_secrets(value)
        if clean.isprintable():  # nearly all are
            return clean
        return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in clean)
    if isinstance(value, Mapping):
        return {presentable(key): presentable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [presentable(item) for item in value]
    return value


def without_secrets(value: Any) -> Any:
    """The same plain value (text, mapping, list, …) with ``user:secret@`` and ``?query#fragment`` cut from its URLs."""
    if isinstance(value, str):
        return _QUERY.sub(r"\1\2", _USER.sub(r"\1", value)) if "://" in value else value
    if isinstance(value, Mapping):
        return {without_secrets(key): without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return value
