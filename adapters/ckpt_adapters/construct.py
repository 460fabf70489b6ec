"""Calls the constructors of other libraries.

It finds out which keyword arguments they take, turns their errors into ArchitectureError, and
builds models without memory for their tensors.
"""

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

# How Python and the libraries complain about a keyword argument.
_REFUSAL = re.compile(
    r"(?:unexpected keyword argument(?:\(s\):)?|multiple values for (?:keyword )?argument) "
    r"\[?'(\w+)'"
)
_PROBE_RATE = 0.2


def construct(architecture: str, make: Constructor, kwargs: Mapping[str, object]) -> nn.Module:
    """Call `make(**kwargs)` and return the model.

    Raises ArchitectureError if the call fails, with the argument that the constructor refused, and
    if it returns no module. The construction counts against the limits of
    `ckpt_tools.construction`.
    """
    on_meta_device = torch.get_default_device().type == "meta"
    try:
        with (
            count_construction(),
            _SkipMetaInitialisation() if on_meta_device else contextlib.nullcontext(),
        ):
            model = make(**kwargs)
    # SystemExit, too: a user's module that ends the process when it is imported must not end this
    # one.
    except (Exception, SystemExit) as error:
        raise ArchitectureError(_describe_failure(architecture, make, kwargs, error)) from error
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"{architecture}: expected a callable that returns a torch.nn.Module, it returned "
            f"{_type_name(model)}. Name a function or a class that builds the model."
        )
    return model


class _SkipMetaInitialisation(TorchFunctionMode):
    """Skips the initialisation of tensors on the meta device.

    They have no values, and yet the calls take most of a constructor's time.
    """

    _INITIALISERS = frozenset(
        {
            function
            for name, function in vars(nn.init).items()
            if name.endswith("_") and not name.startswith("_")
        }
        | {getattr(Tensor, name) for name in ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "clamp_")}
    )

    def __torch_function__(
        self,
        func: Constructor,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if func in self._INITIALISERS and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


def construct_skeleton(make: Constructor, kwargs: Mapping[str, object]) -> nn.Module:
    """Build a model without memory for its tensors, on the meta device.

    A constructor that needs values runs on the CPU instead. Raises ArchitectureError.
    """
    try:
        with torch.device("meta"):
            return construct("", make, kwargs)
    except ArchitectureError as error:
        if find_refused_keyword(error.__cause__, kwargs):
            raise  # The CPU would not change that.
        return construct("", make, kwargs)


def find_refused_keyword(error: BaseException | None, kwargs: Mapping[str, object]) -> str | None:
    """Return the keyword argument that a TypeError complains about, or None for another error."""
    match = _REFUSAL.search(str(error)) if isinstance(error, TypeError) else None
    return match[1] if match and match[1] in kwargs else None


def keyword_parameters(make: Constructor) -> dict[str, inspect.Parameter]:
    """Return the keyword parameters that a constructor takes, by name.

    A function that hands `**kwargs` on takes those of the class that it returns, too. To know that
    class, the function is called.
    """
    parameters, passes_on = _signature_parameters(make)
    if not passes_on or isinstance(make, type):
        return parameters
    try:
        model = construct_skeleton(make, {})
    except ArchitectureError:
        return parameters
    return parameters | _class_parameters(type(model))


def rate_keywords(make: Constructor) -> tuple[str, ...]:
    """Return the keyword arguments that are drop rates and that the constructor really takes.

    A signature may list a rate that the class behind it refuses. So the model is built with all of
    them, and each one that is refused is dropped.
    """
    rates = [name for name, parameter in keyword_parameters(make).items() if _is_rate(parameter)]
    while rates:
        kwargs = dict.fromkeys(rates, _PROBE_RATE)
        try:
            construct_skeleton(make, kwargs)
        except ArchitectureError as error:
            name = find_refused_keyword(error.__cause__, kwargs)
            if name is None:
                break  # The constructor requires other arguments as well; trust the signature.
            rates.remove(name)
        else:
            break
    return tuple(rates)


def suggest_names(name: str, candidates: Iterable[str]) -> str:
    """Return the sentence " Did you mean …?" with similar names, or "" if there are none."""
    close = difflib.get_close_matches(name, list(candidates), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _class_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the keyword parameters of a class, and of the bases that get its `**kwargs`."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        base_parameters, passes_on = _signature_parameters(base)
        parameters = base_parameters | parameters
        if not passes_on:
            break
    return parameters


def _signature_parameters(make: Constructor) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the keyword parameters in a callable's signature, and whether it takes `**kwargs`."""
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return {}, False  # A callable that is written in C may have no signature.
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    by_name = {name: item for name, item in parameters.items() if item.kind in kinds}
    return by_name, any(item.kind is item.VAR_KEYWORD for item in parameters.values())


def _is_rate(parameter: inspect.Parameter) -> bool:
    if "drop" not in parameter.name and "stochastic_depth" not in parameter.name and parameter.name != "p":
        return False
    default = parameter.default
    if isinstance(default, int | float) and not isinstance(default, bool):
        return 0 <= default <= 1  # `drop_block_size`, for one, is no rate.
    has_no_default = default is None or default is inspect.Parameter.empty
    # Without a number to judge by, the name has to tell: `drop_layer` takes a class.
    return has_no_default and not parameter.name.endswith(("_size", "_layer", "_type", "_mode"))


def _describe_failure(
    architecture: str, make: Constructor, kwargs: Mapping[str, object], error: BaseException
) -> str:
    name = find_refused_keyword(error, kwargs)
    if name is None:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        hint = " Give them as --model-kwargs name=value." if "required" in reason else ""
        arguments = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
        return f"{architecture}: building it with {arguments or 'no arguments'} failed with {reason}.{hint}"
    if "multiple values" in str(error):
        return (
            f"{architecture}: {name} is fixed by this architecture and cannot be given. Leave it "
            "out, or name the model's class as package.module:Class."
        )
    return unknown_keyword_message(architecture, name, keyword_parameters(make) if architecture else ())


def unknown_keyword_message(architecture: str, name: str, accepted: Iterable[str]) -> str:
    """Return the message for a keyword argument that a constructor does not take."""
    accepted = sorted(set(accepted) - {name})
    return (
        f"{architecture}: expected keyword arguments that the constructor takes, found {name!r}."
        f"{suggest_names(name, accepted)} It takes: {', '.join(accepted) or 'none'}."
    )


def _type_name(value: object) -> str:
    cls = type(value)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"
