"""The values that a checkpoint records beside its tensors, such as settings, as plain data."""

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

# Nobody's settings are nested deeper, and a hostile pickle's must not exhaust the stack.
_MAX_DEPTH = 16
_MAX_VALUES = 200_000  # written out: containers that are shared let a few bytes unfold to any number
_MAX_INTEGER_BITS = 1024  # Python refuses to print very long integers
_CUT = "<...>"
# A URL, also one with a single slash, as it is left when a URL was made a path.
_A_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(//|/[^/]*:[^@]*@|:.*:/)")


def plain_words(words: Mapping[str, object]) -> dict[str, object]:
    """Return a copy with only None, bool, int, float, str, bytes, list and dict in it.

    Namespaces and objects of foreign classes become dicts of their attributes, enum members their
    values, paths and dtypes strings, dates ISO 8601, one-number tensors numbers; anything else
    becomes the name of its type in angle brackets. What is nested too deeply or unfolds to too much
    becomes "<...>".
    """
    copier, left = _Copier(), _MAX_VALUES
    copies = {}
    for key, value in words.items():
        copy, size = copier.copy(value, 0)
        left -= size
        copies[str(_clean_text(key))] = copy if left >= 0 else _CUT
    return copies


class _Copier:
    """Makes plain copies and counts the values in each.

    Every container is copied once: pickles may share them.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[object, int]] = {}  # by the identity of the container

    def copy(self, value: object, depth: int) -> tuple[object, int]:
        """Return a plain copy of a value, and how many values it has written out."""
        value = _unwrap_value(value)
        if isinstance(value, Mapping | list | tuple | set | frozenset):
            return self._copy_container(value, depth)
        return _copy_leaf(value), 1

    def _copy_container(self, value: object, depth: int) -> tuple[object, int]:
        if id(value) not in self._copies:
            # A container that contains itself meets this entry, and its copy is cut there.
            self._copies[id(value)] = (_CUT, 1)
            if depth < _MAX_DEPTH:
                contents, size = self._copy_contents(value, depth + 1)
                self._copies[id(value)] = (contents, size) if size <= _MAX_VALUES else (_CUT, 1)
        return self._copies[id(value)]

    def _copy_contents(self, value: object, depth: int) -> tuple[object, int]:
        if isinstance(value, Mapping):
            pairs = [(_copy_key(key), self.copy(inner, depth)) for key, inner in value.items()]
            size = 1 + sum(size for _, (_, size) in pairs)
            return {key: copy for key, (copy, _) in pairs}, size
        assert isinstance(value, list | tuple | set | frozenset)
        items = [self.copy(inner, depth) for inner in value]
        return [copy for copy, _ in items], 1 + sum(size for _, size in items)


def _unwrap_value(value: object) -> object:
    """Return the content of a namespace, an enum member or an object that only wraps a value.

    Objects can wrap each other. Other values are returned as they are.
    """
    for _ in range(_MAX_DEPTH):
        if isinstance(value, argparse.Namespace | types.SimpleNamespace):
            return vars(value)
        if type(value) is not OpaqueObject:
            return value.value if isinstance(value, enum.Enum) else value
        content = _unwrap_opaque(value)
        if content is value:
            return value
        value = content
    return value


def _unwrap_opaque(value: OpaqueObject) -> object:
    state = value.state
    # A class has no content, and that of a network is its weights.
    if value.args is None or module_class_name(value):
        return value
    if isinstance(state, dict) and value.name.startswith("omegaconf."):
        return state.get("_content", state.get("_val", value))
    if isinstance(state, dict) and value.name == "uuid.UUID":
        return _format_uuid(state)
    if isinstance(state, dict) or value.items:
        return state if isinstance(state, dict) else value.items
    # An enum member, or something as simple. A function is no class: its argument says nothing.
    is_class = value.name.rpartition(".")[2][:1].isupper()
    if is_class and len(value.args) == 1 and isinstance(value.args[0], str | int | float):
        return value.args[0]
    return value


def _format_uuid(state: Mapping[object, object]) -> str:
    number = state.get("int")
    if isinstance(number, int) and 0 <= number < 1 << 128:
        return str(uuid.UUID(int=number))
    return "<uuid.UUID>"


def _copy_key(key: object) -> object:
    copy = _copy_leaf(key)
    return copy if isinstance(key, str | int | float | bool | None) else str(copy)


def _copy_leaf(value: object) -> object:
    if value is None or isinstance(value, bool | bytes):
        return value
    if isinstance(value, int):
        if value.bit_length() > _MAX_INTEGER_BITS:
            return f"<int of {value.bit_length():,} bits>"
        return int(value)
    if isinstance(value, float):  # also numpy's float64, which is a subclass
        return float(value)
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, torch.dtype | torch.device | PurePath):
        return _clean_text(str(value))
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Tensor | numpy.ndarray | numpy.generic) and value.ndim == 0 and _has_value(value):
        return value.item()
    if type(value) is OpaqueObject:
        return _clean_text(repr(value))
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def _clean_text(value: str) -> str:
    """Return a text without credentials, and with escapes for what is no Unicode.

    Training scripts record the URLs of their data, with passwords in them. Here it is still known
    that the text as a whole is a URL, even where the password has blanks or quotes in it. Once a
    message has cut or quoted the text, nobody can tell where the URL ends.
    """
    text = str(value).encode("utf-8", "backslashreplace").decode()
    if ":/" not in text and "::" not in text:
        return text
    return redact_url(text) if _A_URL.match(text) else str(without_secrets(text))


def _has_value(value: object) -> bool:
    return not isinstance(value, Tensor) or (value.device.type == "cpu" and value.layout == torch.strided)
