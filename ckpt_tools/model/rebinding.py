"""Functions in a copied model that still refer to the original: a wrapped forward, a hook.

``copy.deepcopy`` returns functions as they are, so their closures and defaults are replaced here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

_CALLABLES = (FunctionType, MethodType, partial)


def rebind_functions(twin: nn.Module, copies: dict[int, Any]) -> None:
    """Let the functions among the attributes and hooks of a copied model refer to copies.

    ``copies`` has the copy of every object under the ``id`` of the original. It is extended by the
    functions that are replaced.
    """
    rebinder = _Rebinder(copies)
    # A dict that could not be copied is shared with the original, which must not change.
    own_objects = {id(copied) for copied in copies.values()}
    for module in twin.modules():
        attributes = vars(module)
        dicts = [value for value in attributes.values() if isinstance(value, dict)]
        for functions in [attributes, *(each for each in dicts if id(each) in own_objects)]:
            for name, value in list(functions.items()):
                if isinstance(value, _CALLABLES):
                    functions[name] = rebinder.rebind(value)


class _Rebinder:
    def __init__(self, copies: dict[int, Any]) -> None:
        self._copies = copies

    def rebind(self, value: Any) -> Any:
        """Return the copy of a value, or a function like ``value`` that refers to copies.

        Where nothing that it refers to was copied, this is ``value`` itself.
        """
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, FunctionType):
            return self._rebind_function(value)
        if isinstance(value, MethodType):
            parts = self._rebind_all((value.__func__, value.__self__))
            return MethodType(*parts) if parts else value
        if isinstance(value, partial):
            parts = self._rebind_all((value.func, *value.args, *value.keywords.values()))
            if parts:
                function, *arguments = parts
                count = len(value.args)
                keywords = dict(zip(value.keywords, arguments[count:], strict=True))
                return partial(function, *arguments[:count], **keywords)
        return value

    def _rebind_all(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Rebind all values; the result is empty if that changes none of them."""
        new = tuple(map(self.rebind, values))
        return () if all(a is b for a, b in zip(new, values, strict=True)) else new

    def _rebind_function(self, function: FunctionType) -> FunctionType:
        old_cells = function.__closure__ or ()
        new_cells = tuple(CellType() for _ in old_cells)
        code, names = function.__code__, function.__globals__
        new = FunctionType(code, names, function.__name__, function.__defaults__, new_cells)
        # Before the cells are filled: a function that calls itself stands in one of them.
        self._copies[id(function)] = new
        defaults = self._rebind_all(function.__defaults__ or ())
        changed = bool(defaults)
        for old_cell, new_cell in zip(old_cells, new_cells, strict=True):
            with suppress(ValueError):  # the cell is empty
                new_cell.cell_contents = self.rebind(old_cell.cell_contents)
                changed |= new_cell.cell_contents is not old_cell.cell_contents
        if not changed:
            self._copies[id(function)] = function
            return function
        # The rest of what FunctionType does not take: keyword defaults, and attributes.
        new.__defaults__ = defaults or function.__defaults__
        new.__kwdefaults__, new.__dict__ = function.__kwdefaults__, dict(function.__dict__)
        return new
