"""What a checkpoint says about itself besides tensors, as plain Python values."""

from __future__ import annotations

import argparse
import datetime
import enum
import types
from collections.abc import Mapping
from pathlib import PurePath

import numpy
import torch
from torch import Tensor

__all__ = ["plain_words"]

_DEEPEST = 16  # nobody's settings are nested deeper, and a hostile pickle's must not exhaust the stack


def plain_words(words: Mapping[str, object]) -> dict[str, object]:
    """Copy with only None, bool, int, float, str, bytes, list and dict in it.

    Namespaces become dicts, paths and dtypes strings, dates ISO 8601, one-number tensors numbers; anything
    else becomes the name of its type in angle brackets.
    """
    seen: dict[int, object] = {}
    return {key: _plain(value, seen, 0) for key, value in words.items()}


def _plain(value: object, seen: dict[int, object], depth: int) -> object:
    if value is None or isinstance(value, bool | bytes):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value, seen, depth + 1)
    for kind in (int, float, str):  # subclasses too, such as numpy's float64
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        value = vars(value)
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return _container(value, seen, depth)
    return _leaf(value)


def _container(value: object, seen: dict[int, object], depth: int) -> object:
    # Each container is converted once: pickles may share them, even with themselves.
    if id(value) not in seen:
        seen[id(value)] = "<...>"
        if depth < _DEEPEST:
            seen[id(value)] = _contents(value, seen, depth + 1)
    return seen[id(value)]


def _contents(value: object, seen: dict[int, object], depth: int) -> object:
    if isinstance(value, Mapping):
        return {_key(key): _plain(inner, seen, depth) for key, inner in value.items()}
    assert isinstance(value, list | tuple | set | frozenset)
    return [_plain(inner, seen, depth) for inner in value]


def _key(key: object) -> object:
    return key if isinstance(key, str | int | float | bool | None) else str(_leaf(key))


def _leaf(value: object) -> object:
    if isinstance(value, torch.dtype | torch.device | PurePath):
        return str(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Tensor | numpy.ndarray | numpy.generic) and value.ndim == 0 and _has_value(value):
        return value.item()
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def _has_value(value: object) -> bool:
    return not isinstance(value, Tensor) or (value.device.type == "cpu" and value.layout == torch.strided)
