"""What a checkpoint's pickle may name besides tensors, and the stand-ins that take its place.

``torch.load(weights_only=True)`` knows tensors, dtypes and Python's containers. Training scripts add a few
harmless things: an ``argparse.Namespace``, a path, a date, a metric that happens to be a numpy number. Where
the real class can do more than hold data (``numpy.dtype.__setstate__`` can turn floats into pointers), the name
is bound to a stand-in below instead, so that nothing outside this file and torch's own list is ever called.
"""

from __future__ import annotations

import argparse
import datetime
import re
import types
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath

import numpy

__all__ = ["ALLOWED"]


class NumpyDtype:
    """Stands for ``numpy.dtype`` of plain numbers and strings; anything else stays opaque."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code if re.fullmatch(r"[biufcUS][0-9]{1,6}", str(code)) else None
        self.order = "="

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if state[1] in ("<", ">"):
            self.order = str(state[1])

    def number(self, raw: object) -> object:
        """The Python value of one item stored as bytes, None if this type holds none."""
        if self.code is None or not isinstance(raw, bytes):
            return None
        return numpy.frombuffer(raw, numpy.dtype(self.order + self.code))[0].item()


class NumpyArray:
    """Stands for a numpy array (a random state, say). Its content is dropped: state dicts hold tensors."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class PlainDict:
    """Stands for a dict subclass; what comes out is an ordinary dict."""

    def __new__(cls, *_: object) -> dict[object, object]:  # type: ignore[misc]
        """Return a new empty dict, which the unpickler then fills."""
        return {}


def _numpy_scalar(dtype: NumpyDtype, raw: object = None) -> object:
    return dtype.number(raw)


def _posix_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


def _frozenset(items: object = ()) -> list[object]:
    return list(items) if isinstance(items, list | tuple | set) else []


def _first(value: object, *_: object) -> object:
    return value


ALLOWED: tuple[tuple[Callable[..., object], str], ...] = (
    (argparse.Namespace, "argparse.Namespace"),
    (types.SimpleNamespace, "types.SimpleNamespace"),
    (datetime.datetime, "datetime.datetime"),
    (datetime.date, "datetime.date"),
    (datetime.timedelta, "datetime.timedelta"),
    (datetime.timezone, "datetime.timezone"),
    # Factories of a defaultdict, and the containers that torch's list lacks.
    (list, "builtins.list"),
    (dict, "builtins.dict"),
    (int, "builtins.int"),
    (float, "builtins.float"),
    (_frozenset, "builtins.frozenset"),
    (_frozenset, "collections.deque"),
    (PlainDict, "collections.defaultdict"),
    (PlainDict, "lightning.fabric.utilities.data.AttributeDict"),
    (PlainDict, "lightning_fabric.utilities.data.AttributeDict"),
    (PlainDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    # Paths become strings, so that one from Windows can be read on Linux. Python 3.13 has `_local`.
    *((_posix_path, f"pathlib.{p}{c}") for p in ("", "_local.") for c in ("PosixPath", "PurePosixPath")),
    *((_windows_path, f"pathlib.{p}{c}") for p in ("", "_local.") for c in ("WindowsPath", "PureWindowsPath")),
    # numpy 1 and 2 keep the same functions in `core` and `_core`.
    (NumpyDtype, "numpy.dtype"),
    (NumpyArray, "numpy.ndarray"),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((NumpyArray, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (_first, "torchvision.transforms.functional.InterpolationMode"),
)
