"""Reports are passed around: credentials and query strings of URLs do not go with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>[^\s'\"<>]*)")
_USER = re.compile(r"[^/?#@]*@")
_USER_AND_SECRET = re.compile(r"[^/?#@:]*:(?!\d+(?:[/?#]|$))[^\s]*@")  # a secret may hold slashes, as Amazon's do


def without_secrets(value: Value) -> Value:
    """The same plain value (text, mapping, list, …) with ``user:secret@`` and ``?query#fragment`` cut from every URL."""
    if isinstance(value, str):
        return _URL.sub(_bare, value)  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {without_secrets(key): without_secrets(item) for key, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, (list, tuple)):
        return type(value)(without_secrets(item) for item in value)  # type: ignore[return-value, call-arg]
    return value


def _bare(found: re.Match[str]) -> str:
    rest = found["rest"]
    user = _USER_AND_SECRET.match(rest) or _USER.match(rest)
    if user:
        rest = rest[user.end() :]
    return found["scheme"] + re.split(r"[?#]", rest, maxsplit=1)[0]
