"""Import and call the user's function that returns training data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from ckpt_tools.contract import Split
from ckpt_tools.data.data_modules import is_data_module, open_data_module
from ckpt_tools.data.user_errors import convert_to_data_error, describe_error
from ckpt_tools.errors import DataError
from ckpt_tools.import_path import import_user_module, user_code_for_children

__all__ = ["CallableResult", "import_callable"]


def import_callable(spec: str) -> Callable[[], object]:
    """Import the callable that ``package.module:name`` names, also from the current folder.

    A Lightning DataModule that the module has made stands for a callable that returns it.

    Raises DataError if module or name is missing, the module fails, or the object is no callable.
    """
    module_name, _, name = spec.partition(":")
    module = _import_module(spec, module_name)
    try:
        # The name may lead through a class (module:Class.method), which getattr does not follow.
        function: object = attrgetter(name)(module)
    except AttributeError as error:
        near = get_close_matches(name, dir(module), 1)
        hint = f"Did you mean {module_name}:{near[0]}?" if near else f"It is {module.__file__}."
        raise DataError(f"{spec}: {module_name} has no {name!r}. {hint}") from error
    if is_data_module(function) and not isinstance(function, type):
        return lambda: function
    if not callable(function):
        raise DataError(f"{spec}: expected a callable without arguments, found {type(function).__name__}.")
    return function


def _import_module(spec: str, name: str) -> ModuleType:
    try:
        return import_user_module(name)
    except ModuleNotFoundError as error:
        # error.name is the module itself or a package around it; else the module imports another.
        if error.name and f"{name}.".startswith(f"{error.name}."):
            places = f"{Path.cwd()} or the environment"
            raise DataError(
                f"{spec}: expected a module to import, {error.name!r} is not in {places}."
            ) from error
        raise DataError(f"{spec}: importing {name} failed: {error}. Install what is missing.") from error
    except (Exception, SystemExit) as error:  # a module may call sys.exit when it is imported
        raise DataError(f"{spec}: importing {name} raised {describe_error(error)}.") from error


class CallableResult:
    """The object that the user's callable returned; of a Lightning DataModule, a loader of its.

    An iterator can be read only once, so every pass after the first calls the function again.
    Raises DataError if the call raises, or returns nothing that could hold batches.
    """

    def __init__(self, spec: str, function: Callable[[], object], split: Split = "train") -> None:
        self._spec, self._function, self._split = spec, function, split
        self.latest: Any = self._call()
        self._unread = True

    def unread_iterable(self) -> Iterable[object]:
        """Return an iterable that no pass has used up. Raises DataError if a new call fails."""
        if not self._unread and isinstance(self.latest, Iterator):
            self.latest = self._call()
        self._unread = False
        product: Iterable[object] = self.latest
        return product

    def _call(self) -> object:
        with convert_to_data_error(f"{self._spec}: the call without arguments"), user_code_for_children():
            product = self._function()
            if is_data_module(product):
                product = open_data_module(product, self._split)
        # A tensor or a dict is iterable as well, but it is one batch, and not several.
        readable = isinstance(product, Iterable) or hasattr(product, "__getitem__")
        if not readable or isinstance(product, Tensor | Mapping | str | bytes):
            raise DataError(
                f"{self._spec}: expected an iterable of batches, a torch Dataset or a DataLoader, "
                f"the call returned {type(product).__name__}. For one batch, return a list of it."
            )
        return product
