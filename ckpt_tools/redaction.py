"""Keep credentials out of everything that is shown or stored.

Nobody can tell from a finished message where a secret ends: passwords hold blanks, quotes and
slashes. So this module remembers the secrets in every URL that the process is given, and what may
be shown of that URL (``urls.py``), and masks them in every text, as the runners of CI
services do. URLs that were never parsed, such as those in names of files, are recognised by their
form alone.

A secret of 1–3 characters cannot be told from ordinary text. It is masked within its URL, and stays
where it stands alone.
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
# Characters; shorter secrets are masked as whole words only, lest "test" be cut out of "latest".
_WORD = 8
_FRAGMENT = 6  # so many characters in a row give away a part of a secret
_CAPACITY = 400  # spellings; the oldest are forgotten, so that a service may open URLs for ever

# Only writers take the lock. Readers take `_ordered`, which is replaced as a whole.
_lock = threading.Lock()
_shown_by_spelling: dict[str, str] = {}  # spellings in lower case
_ordered: tuple[tuple[str, str], ...] = ()  # the same, the longest spellings first

# `user:password@` behind `scheme://`, also with one or three slashes. A port is no secret. A
# password may hold blanks, but none at its start: "s3://bucket: expected …" is a message.
_USER = re.compile(
    r"(:/{2,3}|(?<=[A-Za-z0-9+.-]{2}):/)"
    r"(?:[^\s/?#@:]*:(?!\d+(?:[/?#\s]|$))(?=\S)(?:(?!://)[^\n]){0,200}@|[^\s/?#@]*@)"
)
_QUERY = re.compile(r"(://[^\s'\"<>?#:]*(?::(?!//)[^\s'\"<>?#:]*)*)[?#][^\s'\"<>]*")


def remember_secret(secret: str, shown: str = MASK) -> None:
    """From now on show ``shown`` in place of this text, in any of its usual spellings and case."""
    global _ordered
    with _lock:
        if _shown_by_spelling.get(_fold_case(secret)) == shown:
            return
        for spelling in map(_fold_case, _spellings(secret)):
            if len(spelling) >= _SHORTEST:
                # Removed first, so that it becomes the latest entry.
                _shown_by_spelling.pop(spelling, None)
                _shown_by_spelling[spelling] = shown
        for spelling in list(_shown_by_spelling)[:-_CAPACITY]:
            del _shown_by_spelling[spelling]
        _ordered = _sort_longest_first()


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Forget the secrets that were remembered in the block at its end.

    A process may run many commands, as the tests do: a secret of one is an ordinary word of another.
    """
    global _ordered
    with _lock:
        before = dict(_shown_by_spelling)
    try:
        yield
    finally:
        with _lock:
            _shown_by_spelling.clear()
            _shown_by_spelling.update(before)
            _ordered = _sort_longest_first()


def _sort_longest_first() -> tuple[tuple[str, str], ...]:
    """Order the spellings so that a whole URL is replaced before a password in it."""
    return tuple(sorted(_shown_by_spelling.items(), key=lambda item: -len(item[0])))


def presentable(value: Any) -> Any:
    """Do what ``without_secrets`` does, shorten texts, and escape control characters."""
    if isinstance(value, str):
        return escape_controls(shorten(without_secrets(value), LONGEST_VALUE), keep="\n\t")
    if isinstance(value, Mapping):
        return {presentable(key): presentable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [presentable(item) for item in value]
    return value


def without_secrets(value: Any) -> Any:
    """Mask remembered secrets, and those in URLs, in a plain value: a text, mapping, list, …"""
    if isinstance(value, str):
        value = _mask_secrets(value, _ordered)
        return _QUERY.sub(r"\1", _USER.sub(r"\1", value)) if ":/" in value else value
    if isinstance(value, Mapping):
        return {without_secrets(key): without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return value


def without_fragments(text: str) -> str:
    """Do what ``without_secrets`` does, for text that somebody else wrote.

    The client of a store reads a URL in its own way, and its error may show a part of a secret. So
    any six characters in a row that also occur in a secret are masked, too. In our own results that
    would mask words that only look alike.
    """
    spellings = _ordered
    text = str(without_secrets(text))
    fragments = _fragments(spellings)
    folded, secret = _fold_case(text), bytearray(len(text))
    for start in range(len(text) - _FRAGMENT + 1) if fragments else ():
        if folded[start : start + _FRAGMENT] in fragments:
            secret[start : start + _FRAGMENT] = b"\x01" * _FRAGMENT
    pieces = re.finditer(rb"\x00+|\x01+", bytes(secret))
    return "".join(MASK if match[0][0] else text[match.start() : match.end()] for match in pieces)


def _mask_secrets(text: str, spellings: tuple[tuple[str, str], ...]) -> str:
    folded = _fold_case(text) if spellings else ""
    for spelling, shown in spellings:
        start = folded.find(spelling)
        while start >= 0:
            end = start + len(spelling)
            if len(spelling) >= _WORD or not (
                folded[start - 1 : start].isalnum() or folded[end : end + 1].isalnum()
            ):
                text = f"{text[:start]}{shown}{text[end:]}"
                # Replaced text is not searched again
                folded = f"{folded[:start]}{chr(0) * len(shown)}{folded[end:]}"
                end = start + len(shown)
            start = folded.find(spelling, end)
    return text


@lru_cache(maxsize=4)
def _fragments(spellings: tuple[tuple[str, str], ...]) -> frozenset[str]:
    """Return all fragments of secrets, without those of the text that may be shown."""
    public = {fragment for _, shown in spellings for fragment in _split_fragments(_fold_case(shown))}
    return frozenset(
        {fragment for spelling, _ in spellings for fragment in _split_fragments(spelling)} - public
    )


def _fold_case(text: str) -> str:
    """Return the text in lower case, as clients write hosts, with the same number of characters.

    Positions in the result are positions in the text, although ``str.lower`` makes two characters
    of İ, for example.
    """
    lower = text.lower()
    return (
        lower if len(lower) == len(text) else "".join(low if len(low := c.lower()) == 1 else c for c in text)
    )


def _split_fragments(text: str) -> set[str]:
    return {text[start : start + _FRAGMENT] for start in range(len(text) - _FRAGMENT + 1)}


def _spellings(secret: str) -> dict[str, None]:
    """Return the ways in which clients, Python, JSON and our own escapes write a text."""
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
