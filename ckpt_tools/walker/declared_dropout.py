"""Dropout behind or before named modules, in a model that has none of its own there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ckpt_tools.errors import UsageError
from ckpt_tools.results import DeclaredDropout, DropoutSite
from ckpt_tools.walker.dropout_patterns import check_declared_rates, match_modules, split_side

# They have no forward of their own, so nothing comes out of them.
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def resolve_declared_dropout(model: nn.Module, dropout: Mapping[str, float]) -> tuple[DeclaredDropout, ...]:
    """Return the modules that the patterns of ``dropout`` mean, each with its rate.

    Where two patterns match one module, the later one counts. Raises UsageError for a pattern that
    matches no module, and for a rate outside of 0 to 1.
    """
    check_declared_rates(dropout)
    first_names: dict[int, str] = {}
    names: dict[str, str] = {}  # every name of a module, and the one by which a walk calls it
    for name, module in model.named_modules(remove_duplicate=False):
        first_name = first_names.setdefault(id(module), name)
        if not isinstance(module, _LISTS):
            names[name] = first_name
    declared: dict[tuple[str, bool], DeclaredDropout] = {}
    for pattern, rate in dropout.items():
        _, on_input = split_side(pattern)
        for name in match_modules(list(names), pattern):
            module_name = names[name]
            declared[module_name, on_input] = DeclaredDropout(module_name, rate, on_input, pattern)
    return tuple(declared.values())


def add_declared_dropout(model: nn.Module, declared: Sequence[DeclaredDropout]) -> Callable[[], None]:
    """Add dropout to the forward of the named modules, which is on in every mode of the model.

    Modules that the model does not have are left out. Returns a function that takes it off again.
    """
    modules, originals = dict(model.named_modules()), []
    for dropout in declared:
        module = modules.get(dropout.module)
        if module is not None:
            originals.append((vars(module), vars(module).get("forward")))
            module.forward = _add_dropout(module.forward, dropout)

    def remove() -> None:
        for attributes, forward in reversed(originals):
            if forward is None:
                del attributes["forward"]
            else:
                attributes["forward"] = forward

    return remove


def require_declared_sites(declared: Sequence[DeclaredDropout], sites: Mapping[str, DropoutSite]) -> None:
    """Raise UsageError for a pattern of which no module ran, so that it would declare nothing."""
    ran = {name.partition(":")[0] for name in sites}
    for pattern in dict.fromkeys(dropout.pattern for dropout in declared):
        names = [dropout.module for dropout in declared if dropout.pattern == pattern]
        if not ran.intersection(names):
            raise UsageError(
                f"--dropout {pattern} (dropout={{{pattern!r}: …}} in Python): expected modules that a "
                "forward runs on floating-point values, found that it runs none of "
                f"{', '.join(names[:3])}. Name the module in front of the dropout of the original "
                "network, or NAME:input for the module behind it."
            )


def _add_dropout(forward: Callable[..., Any], dropout: DeclaredDropout) -> Callable[..., Any]:
    def drop(value: object) -> object:
        is_activation = isinstance(value, Tensor) and value.is_floating_point()
        return F.dropout(value, dropout.rate, True) if is_activation else value  # type: ignore[arg-type]

    def run(*args: Any, **kwargs: Any) -> Any:
        if dropout.on_input:
            args, kwargs = pytree.tree_map(drop, (args, kwargs))
            return forward(*args, **kwargs)
        return pytree.tree_map(drop, forward(*args, **kwargs))

    return run
