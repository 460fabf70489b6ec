"""Strings that Python 2 pickled: bytes, which may be text or the contents of an array."""

from __future__ import annotations

__all__ = ["Python2String", "bytes_of_string", "decode_python2_string"]


class Python2String(str):
    """The text of a string with bytes beyond ASCII. ``raw`` are the bytes as they stand in the file."""

    raw: bytes


def decode_python2_string(raw: bytes) -> str:
    """Return the text of a string: in UTF-8, as torch.load reads it, else in Latin-1."""
    if raw.isascii():
        return raw.decode("ascii")
    try:
        text = Python2String(raw.decode())
    except UnicodeDecodeError:
        text = Python2String(raw.decode("latin-1"))
    text.raw = raw
    return text


def bytes_of_string(text: str) -> bytes:
    """Return the bytes that a text of a pickle stands for.

    Protocols 0 to 2 of Python 3 write bytes as texts, each of whose characters is a byte.
    """
    return text.raw if isinstance(text, Python2String) else text.encode("latin-1")
