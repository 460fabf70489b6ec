"""Functions in a copied model that still close over the original, as copying leaves them: a wrapped forward, a hook."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

_CALLABLES = (FunctionType, MethodType, partial)


def rebind_functions(twin: nn.Module, copies: dict[int, Any]) -> None:
    """Let functions in a copy's attributes and hooks close over ``copies``, which are by the original's identity."""
    bound, own = _Bound(copies), {id(copied) for copied in copies.values()}  # what cannot be copied is shared
    for module in twin.modules():
        attributes = vars(module)
        for held in [
            attributes,
            *(value for value in attributes.values() if isinstance(value, dict) and id(value) in own),
        ]:
            for name, value in list(held.items()):
                if isinstance(value, _CALLABLES) and (new := bound(value)) is not value:
                    held[name] = new


class _Bound:
    """A value over copies of what it refers to; the value itself where that is nothing that was copied."""

    def __init__(self, copies: dict[int, Any]) -> None:
        self._copies = copies

    def __call__(self, value: Any) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            parts = (value.__func__, value.__self__)
            return MethodType(*new) if (new := self._all(parts)) else value
        if isinstance(value, partial):
            parts = (value.func, *value.args, *value.keywords.values())
            if new := self._all(parts):
                count = 1 + len(value.args)
                return partial(new[0], *new[1:count], **dict(zip(value.keywords, new[count:], strict=True)))
        return value

    def _all(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """All of them over copies; nothing if none is another."""
        new = tuple(map(self, values))
        return () if all(a is b for a, b in zip(new, values, strict=True)) else new

    def _function(self, function: FunctionType) -> FunctionType:
        """With cells of its own if it closes over anything that was copied."""
        old, arguments = function.__closure__ or (), function.__defaults__ or ()
        cells = tuple(CellType() for _ in old)
        new = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
        self._copies[id(function)] = new  # before its cells are looked into: it may stand in one
        defaults = self._all(arguments)
        changed = bool(defaults)
        for cell, own in zip(old, cells, strict=True):
            with suppress(ValueError):  # an empty one
                own.cell_contents = self(cell.cell_contents)
                changed |= own.cell_contents is not cell.cell_contents
        if not changed:
            self._copies[id(function)] = function
            return function
        new.__defaults__ = defaults or function.__defaults__
        new.__kwdefaults__, new.__dict__ = function.__kwdefaults__, dict(function.__dict__)
        return new
