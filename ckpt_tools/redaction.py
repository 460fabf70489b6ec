"""Credentials do not go into what is shown or stored.

Nobody can tell from a finished message where a secret ends: passwords hold blanks, quotes and slashes. So every URL
that this process is given is remembered with what may be shown of it and with the secrets in it
(``urls.py``), and every text loses what was remembered, as the runners of CI services do it. URLs that were
never parsed, such as those in names of files, are found by their form alone.

A secret of 1–3 characters cannot be told from ordinary text. It goes with its URL, and is left where it stands alone.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from ckpt_tools.plain_text import LONGEST_VALUE, escape_controls, shorten

__all__ = ["presentable", "remember_secret", "remembering", "without_fragments", "without_secrets"]

MASK = "***"
_SHORTEST = 4  # characters of a secret that is masked
_WORD = 8  # shorter secrets are masked as whole words only, lest "test" be cut out of "latest"
_FRAGMENT = 6  # characters in a row that tell something of a secret
_MOST = 400  # spellings that are remembered; the oldest are forgotten, so that a service may open URLs for ever

_lock = threading.Lock()
_shown_by_spelling: dict[str, str] = {}  # spellings in lower case
_ordered: tuple[tuple[str, str], ...] = ()  # the same, the longest spellings first

# `user:password@` behind `scheme://`, also with one or three slashes. A port is no secret. A password may hold blanks,
# but none at its start: "s3://bucket: expected …" is a message.
_USER = re.compile(
    r"(:/{2,3}|(?<=[A-Za-z0-9+.-]{2}):/)"
    r"(?:[^\s/?#@:]*:(?!\d+(?:[/?#\s]|$))(?=\S)(?:(?!://)[^\n]){0,200}@|[^\s/?#@]*@)"
)
_QUERY = re.compile(r"(://[^\s'\"<>?#:]*(?::(?!//)[^\s'\"<>?#:]*)*)[?#][^\s'\"<>]*")


def remember_secret(secret: str, shown: str = MASK) -> None:
    """Show ``shown`` from now on wherever this text stands, in each of its usual spellings and in any case."""
    global _ordered
    with _lock:
        if _shown_by_spelling.get(_folded(secret)) == shown:
            return
        for spelling in map(_folded, _spellings(secret)):
            if len(spelling) >= _SHORTEST:
                _shown_by_spelling.pop(spelling, None)  # to be the latest
                _shown_by_spelling[spelling] = shown
        for spelling in list(_shown_by_spelling)[:-_MOST]:
            del _shown_by_spelling[spelling]
        _ordered = _longest_first()


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Forget at the end of the block what was remembered in it."""
    global _ordered
    with _lock:
        before = dict(_shown_by_spelling)
    try:
        yield
    finally:
        with _lock:
            _shown_by_spelling.clear()
            _shown_by_spelling.update(before)
            _ordered = _longest_first()


def _longest_first() -> tuple[tuple[str, str], ...]:
    """A whole URL is replaced before a password in it is."""
    return tuple(sorted(_shown_by_spelling.items(), key=lambda item: -len(item[0])))


def presentable(value: Any) -> Any:
    """The same as ``without_secrets``; texts are cut at a length, and show escapes for control characters."""
    if isinstance(value, str):
        return escape_controls(shorten(without_secrets(value), LONGEST_VALUE), keep="\n\t")
    if isinstance(value, Mapping):
        return {presentable(key): presentable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [presentable(item) for item in value]
    return value


def without_secrets(value: Any) -> Any:
    """The same plain value (text, mapping, list, …) without the secrets that are known, or that URLs in it hold."""
    if isinstance(value, str):
        value = _without_known(value, _ordered)
        return _QUERY.sub(r"\1", _USER.sub(r"\1", value)) if ":/" in value else value
    if isinstance(value, Mapping):
        return {without_secrets(key): without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return value


def without_fragments(text: str) -> str:
    """The same for a text that somebody else wrote, such as the error of a store's client.

    A client may show a part of a secret, since it reads a URL in its own way. So whatever has six characters in a row
    in common with a secret is masked, too. In our own results that would cut words which only look alike.
    """
    known = _ordered
    text = str(without_secrets(text))
    fragments = _fragments(known)
    folded, secret = _folded(text), bytearray(len(text))
    for start in range(len(text) - _FRAGMENT + 1) if fragments else ():
        if folded[start : start + _FRAGMENT] in fragments:
            secret[start : start + _FRAGMENT] = b"\x01" * _FRAGMENT
    pieces = re.finditer(rb"\x00+|\x01+", bytes(secret))
    return "".join(MASK if match[0][0] else text[match.start() : match.end()] for match in pieces)


def _without_known(text: str, known: tuple[tuple[str, str], ...]) -> str:
    folded = _folded(text) if known else ""
    for spelling, shown in known:
        start = folded.find(spelling)
        while start >= 0:
            end = start + len(spelling)
            if len(spelling) >= _WORD or not (folded[start - 1 : start].isalnum() or folded[end : end + 1].isalnum()):
                text = f"{text[:start]}{shown}{text[end:]}"
                folded = f"{folded[:start]}{chr(0) * len(shown)}{folded[end:]}"  # what is shown is not looked at again
                end = start + len(shown)
            start = folded.find(spelling, end)
    return text


@lru_cache(maxsize=4)
def _fragments(known: tuple[tuple[str, str], ...]) -> frozenset[str]:
    """All fragments of what is remembered, without those of what may be shown."""
    public = {fragment for _, shown in known for fragment in _cut(_folded(shown))}
    return frozenset({fragment for spelling, _ in known for fragment in _cut(spelling)} - public)


def _folded(text: str) -> str:
    """The text in lower case, as clients write hosts, with as many characters as before."""
    lower = text.lower()
    return lower if len(lower) == len(text) else "".join(low if len(low := c.lower()) == 1 else c for c in text)


def _cut(text: str) -> set[str]:
    return {text[start : start + _FRAGMENT] for start in range(len(text) - _FRAGMENT + 1)}


def _spellings(secret: str) -> dict[str, None]:
    """The ways in which clients, Python, JSON and our own escapes write a text."""
    plain = unquote(secret)
    # urlsplit drops these; yarl, below aiohttp, quotes what RFC 3986 does not allow.
    stripped = re.sub(r"[\t\r\n]", "", plain)
    encodable = [text.encode("utf-8", "backslashreplace").decode() for text in (secret, plain, stripped)]
    texts = dict.fromkeys((secret, plain, stripped, *encodable))
    for text in tuple(encodable):
        for safe in ("", "/", "!$&'()*+,;=:@/?-._~", "!$&'()*+,;=-._~"):
            texts |= dict.fromkeys((quote(text, safe=safe), quote_plus(text, safe=safe)))
    for text in tuple(texts):
        json_text = json.dumps(text)[1:-1]
        texts |= dict.fromkeys((repr(text)[1:-1], json_text, json.dumps(text, ensure_ascii=False)[1:-1]))
        texts |= dict.fromkeys((ascii(text)[1:-1], escape_controls(text), " ".join(text.split())))
    return texts
