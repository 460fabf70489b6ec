"""The allow-list: which names in a pickle mean data, and how their calls are imitated.

Every other name stands for an OpaqueObject, and so does the result of calling it. The functions
here accept any arguments, as they come from the file. They take what they understand and never call
anything that a file brings.
"""

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
from ckpt_tools.storage.formats.pickles.pickle_limits import LARGEST_INTEGER_KEY, LONGEST_NAME
from ckpt_tools.storage.formats.pickles.python2_strings import bytes_of_string
from ckpt_tools.storage.formats.pickles.tensors import DTYPES, TENSOR_REBUILDERS

__all__ = ["GLOBAL_VALUES", "SET_TYPES", "evaluate_call"]

_LAYOUTS = {str(layout): layout for layout in (torch.strided, torch.sparse_coo, torch.sparse_csr)}


def _make_list(items: object = ()) -> list[object]:
    return list(items) if isinstance(items, list | tuple | set | frozenset) else []


def _make_tuple(items: object = ()) -> tuple[object, ...]:
    return tuple(_make_list(items))


def _make_dict(items: object = None, *_: object) -> dict[object, object]:
    if isinstance(items, dict):
        return dict(items)
    pairs = [pair for pair in _make_list(items) if isinstance(pair, tuple | list) and len(pair) == 2]
    # Other keys could be chosen to share one hash; nobody pickles them this way.
    return {key: value for key, value in pairs if isinstance(key, str | None) or _is_small_integer(key)}


def _is_small_integer(key: object) -> bool:
    return isinstance(key, int) and abs(key) <= LARGEST_INTEGER_KEY


def _make_default_dict(_factory: object = None, items: object = None) -> dict[object, object]:
    return _make_dict(items)


def _make_bytes(value: object = b"", *_: object) -> bytes:
    if isinstance(value, str):  # how protocols 0 to 2 spell bytes
        return bytes_of_string(value)
    return bytes(value) if isinstance(value, bytes | bytearray) else b""


def _make_bytearray(value: object = b"", *_: object) -> bytearray:
    return bytearray(_make_bytes(value))


def _number_maker(kind: Callable[..., object]) -> Callable[..., object]:
    def make_number(*parts: object) -> object:
        if all(isinstance(part, int | float) for part in parts):
            return kind(*parts)
        return OpaqueObject(kind.__name__, parts)

    return make_number


def _make_slice(*parts: object) -> object:
    if all(isinstance(part, int | None) for part in parts):
        return slice(*parts)
    return OpaqueObject("builtins.slice", parts)


def _make_device(*parts: object) -> object:
    if all(isinstance(part, str | int) for part in parts):
        with suppress(RuntimeError):  # a kind of device that this torch does not know
            return torch.device(*parts)  # type: ignore[call-overload]
    return OpaqueObject("torch.device", parts)


def _make_layout(name: object = None) -> object:
    return _LAYOUTS.get(name) if isinstance(name, str) else None


def _path_maker(kind: Callable[..., object]) -> Callable[..., object]:
    def make_path(*parts: object) -> str:
        return str(kind(*(part for part in parts if isinstance(part, str))))

    return make_path


def _time_maker(kind: Callable[..., Any]) -> Callable[..., object]:
    """Return the maker of dates or times from the bytes that their own pickling writes."""

    def make_time(raw: object = b"", zone: object = None, *_: object) -> object:
        raw = bytes_of_string(raw) if isinstance(raw, str) else raw
        if not isinstance(raw, bytes) or not isinstance(zone, datetime.timezone | None):
            return OpaqueObject(f"datetime.{kind.__name__}", (raw, zone))
        # datetime takes a day of 99 from such bytes; replace() raises ValueError for it.
        return kind(raw, *([zone] if zone else [])).replace()

    return make_time


def _make_timedelta(*parts: object) -> object:
    if all(isinstance(part, int | float) for part in parts):
        return datetime.timedelta(*parts)  # type: ignore[arg-type]
    return OpaqueObject("datetime.timedelta", parts)


def _make_timezone(offset: object = None, name: object = None, *_: object) -> object:
    if not isinstance(offset, datetime.timedelta):
        return OpaqueObject("datetime.timezone", (offset, name))
    return datetime.timezone(offset, *([name] if isinstance(name, str) else []))


def _name_attribute(owner: object = None, name: object = None, *_: object) -> OpaqueObject:
    """Return the global that ``getattr(owner, name)`` means, by its name alone.

    Nested classes and some enum members are pickled as such a call.
    """
    if type(owner) is not OpaqueObject or owner.args is not None or not isinstance(name, str):
        return OpaqueObject("builtins.getattr", (owner, name))
    if len(owner.name) + len(name) >= LONGEST_NAME:
        return OpaqueObject("builtins.getattr", (owner, name))
    return OpaqueObject(f"{owner.name}.{name}")


def evaluate_call(function: object, args: tuple[object, ...]) -> object:
    """Return what stands for the result of a call.

    This is data where ``GLOBAL_CALLS`` has the function's name, and an OpaqueObject in all other
    cases.
    """
    if type(function) is not OpaqueObject:
        return OpaqueObject(f"{type(function).__module__}.{type(function).__qualname__}", args)
    imitation = GLOBAL_CALLS.get(function.name) if function.args is None else None
    if imitation:
        # The errors of arguments that the class has not taken so far.
        with suppress(TypeError, ValueError, ArithmeticError):
            return imitation(*args)
    return OpaqueObject(function.name, args)


def _name_builtin(name: str, function: Callable[..., object]) -> dict[str, Callable[..., object]]:
    """Return a built-in under its names in Python 3 and Python 2."""
    return {f"builtins.{name}": function, f"__builtin__.{name}": function}


# Paths become strings, so that one from Windows can be read on Linux. Python 3.13 has `_local`.
_PATHS = {
    "PosixPath": _path_maker(PurePosixPath),
    "PurePosixPath": _path_maker(PurePosixPath),
    "WindowsPath": _path_maker(PureWindowsPath),
    "PureWindowsPath": _path_maker(PureWindowsPath),
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
    "collections.OrderedDict": _make_dict,
    "collections.Counter": _make_dict,
    "collections.defaultdict": _make_default_dict,
    "collections.deque": lambda items=(), *_: _make_list(items),
    **_name_builtin("dict", _make_dict),
    **_name_builtin("list", _make_list),
    **_name_builtin("tuple", _make_tuple),
    **_name_builtin("set", lambda items=(): set(_make_list(items))),
    **_name_builtin("frozenset", lambda items=(): frozenset(_make_list(items))),
    **_name_builtin("bytes", _make_bytes),
    **_name_builtin("bytearray", _make_bytearray),
    **_name_builtin("int", _number_maker(int)),
    **_name_builtin("float", _number_maker(float)),
    **_name_builtin("complex", _number_maker(complex)),
    **_name_builtin("bool", _number_maker(bool)),
    # A range of any length is a few bytes of a file, so that nobody gets it to iterate over.
    **_name_builtin("range", lambda *parts: OpaqueObject("builtins.range", parts)),
    **_name_builtin("slice", _make_slice),
    **_name_builtin("getattr", _name_attribute),
    "_codecs.encode": _make_bytes,
    "argparse.Namespace": lambda: argparse.Namespace(),
    "types.SimpleNamespace": lambda: types.SimpleNamespace(),
    "datetime.datetime": _time_maker(datetime.datetime),
    "datetime.date": _time_maker(datetime.date),
    "datetime.time": _time_maker(datetime.time),
    "datetime.timedelta": _make_timedelta,
    "datetime.timezone": _make_timezone,
    **{f"pathlib.{kind}": make for kind, make in _PATHS.items()},
    **{f"pathlib._local.{kind}": make for kind, make in _PATHS.items()},
    "torch.device": _make_device,
    "torch.Size": _make_tuple,
    "torch.serialization._get_layout": _make_layout,
    # numpy 1 and 2 keep the same functions in `core` and `_core`.
    **{f"numpy.{core}.multiarray.scalar": read_numpy_scalar for core in ("core", "_core")},
    **{
        f"numpy.{core}.multiarray._reconstruct": lambda *args: OpaqueObject(NUMPY_ARRAY, args)
        for core in ("core", "_core")
    },
}
