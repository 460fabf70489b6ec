"""What a checkpoint says about itself besides tensors, as plain Python values."""

from __future__ import annotations

import argparse
import datetime
import enum
import re
import types
import uuid
from collections.abc import Mapping
from pathlib import PurePath

import numpy
import torch
from torch import Tensor

from ckpt_tools.redaction import without_secrets
from ckpt_tools.storage.formats.module_trees import module_class_name
from ckpt_tools.storage.formats.pickles import OpaqueObject
from ckpt_tools.urls import redact_url

__all__ = ["plain_words"]

_DEEPEST = 16  # nobody's settings are nested deeper, and a hostile pickle's must not exhaust the stack
_MOST = 200_000  # values, written out: sharing lets a few bytes unfold to any number
_LONGEST_INT = 1024  # bits; Python refuses to print very long ones
_CUT = "<...>"
_A_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(//|/[^/]*:[^@]*@|:.*:/)")  # one slash: of a URL that was made a path


def plain_words(words: Mapping[str, object]) -> dict[str, object]:
    """Copy with only None, bool, int, float, str, bytes, list and dict in it.

    Namespaces and objects of foreign classes become dicts of their attributes, enum members their values, paths and
    dtypes strings, dates ISO 8601, one-number tensors numbers; anything else becomes the name of its type in
    angle brackets. What is nested too deeply or unfolds to too much becomes "<...>".
    """
    copy, left = _Copy(), _MOST
    plain = {}
    for key, value in words.items():
        found, size = copy.plain(value, 0)
        left -= size
        plain[str(_text(key))] = found if left >= 0 else _CUT
    return plain


class _Copy:
    """Plain copies and how many values each has. Every container is copied once: pickles may share them."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[object, int]] = {}

    def plain(self, value: object, depth: int) -> tuple[object, int]:
        """A plain copy of a value, and its size."""
        value = _unwrap_value(value)
        if isinstance(value, Mapping | list | tuple | set | frozenset):
            return self._container(value, depth)
        return _leaf(value), 1

    def _container(self, value: Mapping[object, object] | object, depth: int) -> tuple[object, int]:
        if id(value) not in self._seen:
            self._seen[id(value)] = (_CUT, 1)  # what it is to itself
            if depth < _DEEPEST:
                contents, size = self._contents(value, depth + 1)
                self._seen[id(value)] = (contents, size) if size <= _MOST else (_CUT, 1)
        return self._seen[id(value)]

    def _contents(self, value: object, depth: int) -> tuple[object, int]:
        if isinstance(value, Mapping):
            pairs = [(_key(key), self.plain(inner, depth)) for key, inner in value.items()]
            return {key: plain for key, (plain, _) in pairs}, 1 + sum(size for _, (_, size) in pairs)
        assert isinstance(value, list | tuple | set | frozenset)
        items = [self.plain(inner, depth) for inner in value]
        return [plain for plain, _ in items], 1 + sum(size for _, size in items)


def _unwrap_value(value: object) -> object:
    """What an object holds, for those that are mere holders."""
    for _ in range(_DEEPEST):
        if isinstance(value, argparse.Namespace | types.SimpleNamespace):
            return vars(value)
        if type(value) is not OpaqueObject:
            return value.value if isinstance(value, enum.Enum) else value
        held = _unwrap_opaque(value)
        if held is value:
            return value
        value = held
    return value


def _unwrap_opaque(value: OpaqueObject) -> object:
    state = value.state
    if value.args is None or module_class_name(value):  # a class; a network
        return value
    if isinstance(state, dict) and value.name.startswith("omegaconf."):
        return state.get("_content", state.get("_val", value))
    if isinstance(state, dict) and value.name == "uuid.UUID":
        return _uuid(state)
    if isinstance(state, dict) or value.items:
        return state if isinstance(state, dict) else value.items
    # An enum member, or something as simple. A function is no class: its argument says nothing.
    is_class = value.name.rpartition(".")[2][:1].isupper()
    return (
        value.args[0] if is_class and len(value.args) == 1 and isinstance(value.args[0], str | int | float) else value
    )


def _uuid(state: Mapping[object, object]) -> object:
    number = state.get("int")
    return str(uuid.UUID(int=number)) if isinstance(number, int) and 0 <= number < 1 << 128 else "<uuid.UUID>"


def _key(key: object) -> object:
    return _leaf(key) if isinstance(key, str | int | float | bool | None) else str(_leaf(key))


def _leaf(value: object) -> object:
    if value is None or isinstance(value, bool | bytes):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() <= _LONGEST_INT else f"<int of {value.bit_length():,} bits>"
    if isinstance(value, float):  # subclasses too, such as numpy's float64
        return float(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, torch.dtype | torch.device | PurePath):
        return _text(str(value))
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Tensor | numpy.ndarray | numpy.generic) and value.ndim == 0 and _has_value(value):
        return value.item()
    if type(value) is OpaqueObject:
        return _text(repr(value))
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def _text(value: str) -> str:
    """The same text without credentials, and with escapes for what is no Unicode and could not be printed.

    Training scripts record where their data was, with the keys to it. A value that is a URL is one from its beginning
    to its end, blanks and quotes in the password included. So it loses them here, before it is cut or quoted.
    """
    text = str(value).encode("utf-8", "backslashreplace").decode()
    if ":/" not in text and "::" not in text:
        return text
    return redact_url(text) if _A_URL.match(text) else str(without_secrets(text))


def _has_value(value: object) -> bool:
    return not isinstance(value, Tensor) or (value.device.type == "cpu" and value.layout == torch.strided)
