"""Importing and calling what the user wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from ckpt_tools.data.user_errors import convert_to_data_error, describe_error
from ckpt_tools.errors import DataError
from ckpt_tools.import_path import import_user_module, user_code_for_children

__all__ = ["CallableResult", "import_callable"]


def import_callable(spec: str) -> Callable[[], object]:
    """The callable that ``package.module:name`` names; modules of the current folder are found too.

    Raises DataError if the module or the name is not there, the module fails, or the object is no callable.
    """
    module_name, _, name = spec.partition(":")
    module = _module(spec, module_name)
    try:
        found: object = attrgetter(name)(module)
    except AttributeError as error:
        near = get_close_matches(name, dir(module), 1)
        hint = f"Did you mean {module_name}:{near[0]}?" if near else f"It is {module.__file__}."
        raise DataError(f"{spec}: {module_name} has no {name!r}. {hint}") from error
    if not callable(found):
        raise DataError(f"{spec}: expected a callable without arguments, found {type(found).__name__}.")
    return found


def _module(spec: str, name: str) -> ModuleType:
    try:
        return import_user_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise DataError(
                f"{spec}: expected a module to import, {error.name!r} is not in {Path.cwd()} or the environment."
            ) from error
        raise DataError(f"{spec}: importing {name} failed: {error}. Install what is missing.") from error
    except (Exception, SystemExit) as error:
        raise DataError(f"{spec}: importing {name} raised {describe_error(error)}.") from error


class CallableResult:
    """What the callable returned. An iterator can be read once, so every pass after the first calls again.

    Raises DataError if the call raises, or returns nothing that could hold batches.
    """

    def __init__(self, spec: str, function: Callable[[], object]) -> None:
        self._spec, self._function = spec, function
        self.latest: Any = self._call()
        self._unread = True

    def unread_iterable(self) -> Iterable[object]:
        """An iterable that no pass has used up."""
        if not self._unread and isinstance(self.latest, Iterator):
            self.latest = self._call()
        self._unread = False
        product: Iterable[object] = self.latest
        return product

    def _call(self) -> object:
        with convert_to_data_error(f"{self._spec}: the call without arguments"), user_code_for_children():
            product = self._function()
        readable = isinstance(product, Iterable) or hasattr(product, "__getitem__")
        if not readable or isinstance(product, Tensor | Mapping | str | bytes):
            raise DataError(
                f"{self._spec}: expected an iterable of batches, a torch Dataset or a DataLoader, the call "
                f"returned {type(product).__name__}. For one batch, return a list that holds it."
            )
        return product
