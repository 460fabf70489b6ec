"""What a few names mean as data. Every other name stands for an Opaque, and so does what it makes."""

from __future__ import annotations

import argparse
import datetime
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import torch

from ckpt_tools.storage.formats.pickles.numpy_arrays import NUMPY_ARRAY, read_numpy_scalar
from ckpt_tools.storage.formats.pickles.opaque_object import OpaqueObject
from ckpt_tools.storage.formats.pickles.pickle_limits import LARGEST_INTEGER_KEY
from ckpt_tools.storage.formats.pickles.tensors import DTYPES, TENSOR_REBUILDERS

__all__ = ["GLOBAL_VALUES", "SET_TYPES", "evaluate_call"]

_LAYOUTS = {str(layout): layout for layout in (torch.strided, torch.sparse_coo, torch.sparse_csr)}


def _list(items: object = ()) -> list[object]:
    return list(items) if isinstance(items, list | tuple | set | frozenset) else []


def _tuple(items: object = ()) -> tuple[object, ...]:
    return tuple(_list(items))


def _dict(items: object = None, *_: object) -> dict[object, object]:
    if isinstance(items, dict):
        return dict(items)
    pairs = [pair for pair in _list(items) if isinstance(pair, tuple | list) and len(pair) == 2]
    return {key: value for key, value in pairs if isinstance(key, str | None) or _is_small(key)}


def _is_small(key: object) -> bool:
    return isinstance(key, int) and abs(key) <= LARGEST_INTEGER_KEY


def _factory_dict(_factory: object = None, items: object = None) -> dict[object, object]:
    return _dict(items)


def _bytes(value: object = b"", *_: object) -> bytes:
    if isinstance(value, str):  # how protocols 0 to 2 spell bytes
        return value.encode("latin-1")
    return bytes(value) if isinstance(value, bytes | bytearray) else b""


def _bytearray(value: object = b"", *_: object) -> bytearray:
    return bytearray(_bytes(value))


def _number(kind: Callable[..., object]) -> Callable[..., object]:
    def make(*parts: object) -> object:
        return (
            kind(*parts)
            if all(isinstance(part, int | float) for part in parts)
            else OpaqueObject(kind.__name__, parts)
        )

    return make


def _slice(*parts: object) -> object:
    return (
        slice(*parts)
        if all(isinstance(part, int | None) for part in parts)
        else OpaqueObject("builtins.slice", parts)
    )


def _device(*parts: object) -> object:
    if all(isinstance(part, str | int) for part in parts):
        with suppress(RuntimeError):  # a kind of device that this torch does not know
            return torch.device(*parts)  # type: ignore[call-overload]
    return OpaqueObject("torch.device", parts)


def _layout(name: object = None) -> object:
    return _LAYOUTS.get(name) if isinstance(name, str) else None


def _path(kind: Callable[..., object]) -> Callable[..., object]:
    def make(*parts: object) -> str:
        return str(kind(*(part for part in parts if isinstance(part, str))))

    return make


def _moment(kind: Callable[..., Any]) -> Callable[..., object]:
    """Dates and times from the bytes that their own pickling leaves, which are checked no earlier than here."""

    def make(raw: object = b"", zone: object = None, *_: object) -> object:
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw
        if not isinstance(raw, bytes) or not isinstance(zone, datetime.timezone | None):
            return OpaqueObject(f"datetime.{kind.__name__}", (raw, zone))
        return kind(raw, *([zone] if zone else [])).replace()

    return make


def _timedelta(*parts: object) -> object:
    if all(isinstance(part, int | float) for part in parts):
        return datetime.timedelta(*parts)  # type: ignore[arg-type]
    return OpaqueObject("datetime.timedelta", parts)


def _timezone(offset: object = None, name: object = None, *_: object) -> object:
    if not isinstance(offset, datetime.timedelta):
        return OpaqueObject("datetime.timezone", (offset, name))
    return datetime.timezone(offset, *([name] if isinstance(name, str) else []))


def _attribute(owner: object = None, name: object = None, *_: object) -> OpaqueObject:
    """``getattr`` is how nested classes and some enum members are pickled; only the name is kept."""
    if (
        type(owner) is OpaqueObject
        and owner.args is None
        and isinstance(name, str)
        and len(owner.name) + len(name) < 2000
    ):
        return OpaqueObject(f"{owner.name}.{name}")
    return OpaqueObject("builtins.getattr", (owner, name))


def evaluate_call(function: object, args: tuple[object, ...]) -> object:
    """What calling a value gives: data where the table below has its name, an Opaque in all other cases."""
    if type(function) is not OpaqueObject:
        return OpaqueObject(f"{type(function).__module__}.{type(function).__qualname__}", args)
    known = GLOBAL_CALLS.get(function.name) if function.args is None else None
    if known:
        with suppress(
            TypeError, ValueError, ArithmeticError
        ):  # other arguments than the class has taken so far
            return known(*args)
    return OpaqueObject(function.name, args)


def _both(name: str, function: Callable[..., object]) -> dict[str, Callable[..., object]]:
    """A built-in under the names of Python 3 and of Python 2."""
    return {f"builtins.{name}": function, f"__builtin__.{name}": function}


# Paths become strings, so that one from Windows can be read on Linux. Python 3.13 has `_local`.
_PATHS = {
    "PosixPath": _path(PurePosixPath),
    "PurePosixPath": _path(PurePosixPath),
    "WindowsPath": _path(PureWindowsPath),
    "PureWindowsPath": _path(PureWindowsPath),
}

GLOBAL_VALUES: dict[str, object] = {
    **DTYPES,
    **{f"{module}.Ellipsis": ... for module in ("builtins", "__builtin__")},
    **{f"{module}.NotImplemented": None for module in ("builtins", "__builtin__")},
}

SET_TYPES = frozenset(
    f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset")
)

GLOBAL_CALLS: dict[str, Callable[..., object]] = {
    **TENSOR_REBUILDERS,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _factory_dict,
    "collections.deque": lambda items=(), *_: _list(items),
    **_both("dict", _dict),
    **_both("list", _list),
    **_both("tuple", _tuple),
    **_both("set", lambda items=(): set(_list(items))),
    **_both("frozenset", lambda items=(): frozenset(_list(items))),
    **_both("bytes", _bytes),
    **_both("bytearray", _bytearray),
    **_both("int", _number(int)),
    **_both("float", _number(float)),
    **_both("complex", _number(complex)),
    **_both("bool", _number(bool)),
    **_both("range", lambda *parts: OpaqueObject("builtins.range", parts)),
    **_both("slice", _slice),
    **_both("getattr", _attribute),
    "_codecs.encode": _bytes,
    "argparse.Namespace": lambda: argparse.Namespace(),
    "types.SimpleNamespace": lambda: types.SimpleNamespace(),
    "datetime.datetime": _moment(datetime.datetime),
    "datetime.date": _moment(datetime.date),
    "datetime.time": _moment(datetime.time),
    "datetime.timedelta": _timedelta,
    "datetime.timezone": _timezone,
    **{
        f"pathlib.{place}{kind}": make for place in ("", "_local.") for kind, make in _PATHS.items()
    },
    "torch.device": _device,
    "torch.Size": _tuple,
    "torch.serialization._get_layout": _layout,
    # numpy 1 and 2 keep the same functions in `core` and `_core`.
    **{f"numpy.{core}.multiarray.scalar": read_numpy_scalar for core in ("core", "_core")},
    **{
        f"numpy.{core}.multiarray._reconstruct": lambda *args: OpaqueObject(NUMPY_ARRAY, args)
        for core in ("core", "_core")
    },
}
