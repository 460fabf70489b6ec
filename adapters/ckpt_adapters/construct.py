"""Calling constructors that belong to others: what they take, what they refuse, models without memory."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ckpt_tools.construction import count_construction
from ckpt_tools.errors import ArchitectureError

Constructor = Callable[..., object]

_REFUSAL = re.compile(
    r"(?:unexpected keyword argument(?:\(s\):)?|multiple values for (?:keyword )?argument) \[?'(\w+)'"
)
_PROBED_RATE = 0.2


def construct(architecture: str, make: Constructor, kwargs: Mapping[str, object]) -> nn.Module:
    """Call ``make(**kwargs)``. Raises ArchitectureError naming what the constructor did not like."""
    shapes_only = torch.get_default_device().type == "meta"
    try:
        with count_construction(), _Unfilled() if shapes_only else contextlib.nullcontext():
            model = make(**kwargs)
    except (Exception, SystemExit) as error:  # a module that ends the process when imported is no reason to end
        raise ArchitectureError(_complaint(architecture, make, kwargs, error)) from error
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"{architecture}: expected a callable that returns a torch.nn.Module, it returned {_kind(model)}. "
            "Name a function or a class that builds the model."
        )
    return model


class _Unfilled(TorchFunctionMode):
    """Initialisations of tensors without values, most of a constructor's time, do nothing."""

    _FILLS = frozenset(
        {function for name, function in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")}
        | {getattr(Tensor, name) for name in ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "clamp_")}
    )

    def __torch_function__(
        self, func: Constructor, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if func in self._FILLS and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)


def construct_skeleton(make: Constructor, kwargs: Mapping[str, object]) -> nn.Module:
    """The model on the meta device, or on the CPU where its constructor needs values."""
    try:
        with torch.device("meta"):
            return construct("", make, kwargs)
    except ArchitectureError as error:
        if find_refused_keyword(error.__cause__, kwargs):
            raise
        return construct("", make, kwargs)


def find_refused_keyword(error: BaseException | None, kwargs: Mapping[str, object]) -> str | None:
    """Which of the keyword arguments a TypeError complains about."""
    match = _REFUSAL.search(str(error)) if isinstance(error, TypeError) else None
    return match[1] if match and match[1] in kwargs else None


def keyword_parameters(make: Constructor) -> dict[str, inspect.Parameter]:
    """Keyword parameters of a constructor and, where it hands ``**kwargs`` on, of the class it returns."""
    own, passes_on = _parameters(make)
    if not passes_on or isinstance(make, type):
        return own
    try:
        model = construct_skeleton(make, {})
    except ArchitectureError:
        return own
    return own | _of_class(type(model))


def rate_keywords(make: Constructor) -> tuple[str, ...]:
    """Keyword arguments that are drop rates and that the constructor really takes."""
    rates = [name for name, parameter in keyword_parameters(make).items() if _is_rate(parameter)]
    while rates:
        kwargs = dict.fromkeys(rates, _PROBED_RATE)
        try:
            construct_skeleton(make, kwargs)
        except ArchitectureError as error:
            name = find_refused_keyword(error.__cause__, kwargs)
            if name is None:
                break  # it wants more than rates; the signature has to do
            rates.remove(name)
        else:
            break
    return tuple(rates)


def suggest_names(name: str, known: Iterable[str]) -> str:
    """`` Did you mean …?``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _of_class(cls: type) -> dict[str, inspect.Parameter]:
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        own, passes_on = _parameters(base)
        found = own | found
        if not passes_on:
            break
    return found


def _parameters(make: Constructor) -> tuple[dict[str, inspect.Parameter], bool]:
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):  # a callable written in C
        return {}, False
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    own = {name: parameter for name, parameter in parameters.items() if parameter.kind in named}
    return own, any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _is_rate(parameter: inspect.Parameter) -> bool:
    if "drop" not in parameter.name and "stochastic_depth" not in parameter.name:
        return False
    default = parameter.default
    if isinstance(default, int | float) and not isinstance(default, bool):
        return 0 <= default <= 1  # drop_block_size is no rate
    unset = default is None or default is inspect.Parameter.empty
    return unset and not parameter.name.endswith(("_size", "_layer", "_type", "_mode"))


def _complaint(architecture: str, make: Constructor, kwargs: Mapping[str, object], error: BaseException) -> str:
    name = find_refused_keyword(error, kwargs)
    if name is None:
        told = f"{type(error).__name__}: {error}".rstrip(": ")
        more = " Give them as --model-kwargs name=value." if "required" in told else ""
        return f"{architecture}: building it with {_shown(kwargs)} failed with {told}.{more}"
    if "multiple values" in str(error):
        return (
            f"{architecture}: {name} is fixed by this architecture and cannot be given. Leave it out, or name the "
            "model's class as package.module:Class."
        )
    return unknown_keyword_message(architecture, name, keyword_parameters(make) if architecture else ())


def unknown_keyword_message(architecture: str, name: str, taken: Iterable[str]) -> str:
    """The message for a keyword argument that a constructor does not take."""
    known = sorted(set(taken) - {name})
    return (
        f"{architecture}: expected keyword arguments that the constructor takes, found {name!r}."
        f"{suggest_names(name, known)} It takes: {', '.join(known) or 'none'}."
    )


def _shown(kwargs: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in kwargs.items()) or "no arguments"


def _kind(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
