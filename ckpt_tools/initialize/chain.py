"""The pointwise function that stands between two layers, taken from the recorded operations.

A chain is an expression: a variable, or a ``Call`` of a recorded operation on chains and constants.
Replaying it on quadrature nodes gives the moments of any nonlinearity, hand-written ones among
them, so no table of activation names is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload

from ckpt_tools.errors import UsageError
from ckpt_tools.initialize.activations import ActivationMoments, activation_moments
from ckpt_tools.initialize.operations import operation_name


@dataclass(frozen=True)
class Variable:
    """The pre-activation z. ``of`` tells several variables of one expression apart."""

    of: Hashable = None


@dataclass(frozen=True)
class Call:
    """A recorded operation on chains and plain constants."""

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # The hash is computed once, from the hashes of the parts. Otherwise an expression that uses
        # its variable twice at every level would take exponential time to hash.
        object.__setattr__(self, "_hash", hash((self.func, self.args, self.kwargs)))

    def __hash__(self) -> int:
        return self._hash


Chain: TypeAlias = Variable | Call
Z = Variable()

_IDENTITIES = {("add", 0.0), ("sub", 0.0), ("mul", 1.0), ("div", 1.0)}


def extend_chain(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Chain:
    """The chain ``func(*args, **kwargs)``.

    Adding zero and multiplying by one give the first argument itself.
    """
    first = args[0] if len(args) == 2 else None
    if isinstance(first, (Variable, Call)) and (operation_name(func), args[1]) in _IDENTITIES:
        return first
    named = tuple((name, _to_hashable(kwargs[name])) for name in sorted(kwargs))
    return Call(func, tuple(map(_to_hashable, args)), named)


def chain_function(chain: Chain) -> Callable[[Tensor], Tensor]:
    """A chain over the one variable Z as a function of a tensor."""

    def f(z: Tensor) -> Tensor:
        return evaluate_chain(chain, {Z: z})

    f.__name__ = chain_label(chain)
    return f


def evaluate_chain(chain: Chain, values: Mapping[Variable, Tensor]) -> Tensor:
    """The value of a chain for these values of its variables.

    All values are tensors of one shape and dtype; so is the result.
    """
    # Parts that occur several times are computed once.
    any_value = next(iter(values.values()))
    results: dict[int, Tensor] = {}

    def value(part: Any) -> Any:
        if isinstance(part, Variable):
            return values[part]
        if isinstance(part, Call):
            if id(part) not in results:
                results[id(part)] = _run(part, [value(arg) for arg in part.args], any_value)
            return results[id(part)]
        return part

    result: Tensor = value(chain)
    return result.to(any_value.dtype)


def chain_label(chain: Chain) -> str:
    """The operations by name, in the order in which they run: ``sigmoid·mul``.

    Of more than four names the first three and the last are shown.
    """
    names = list(dict.fromkeys(_operation_names(chain, set())))
    if len(names) > 4:
        names[3:-1] = ["…"]
    return "·".join(names) or "identity"


@functools.lru_cache(maxsize=4096)
def chain_moments(chain: Chain, mean: float = 0.0, deviation: float = 1.0) -> ActivationMoments:
    """E[f(u)²], E[f'(u)²] and E[f(u)] of the chain f for u ~ N(mean, deviation²).

    Raises:
        UsageError: the moments do not exist, or f is not pointwise.
    """
    if chain == Z:
        return ActivationMoments(mean**2 + deviation**2, 1.0, mean)
    f = chain_function(chain)
    if (mean, deviation) == (0.0, 1.0):
        return activation_moments(f)
    if deviation == 0.0:
        value = float(f(torch.tensor([mean], dtype=torch.float64)))
        return ActivationMoments(value**2, 0.0, value)
    standardised = activation_moments(lambda z: f(mean + deviation * z))
    # The slope of z → f(mean + deviation·z) is deviation·f'.
    slope = standardised.backward / deviation**2
    return ActivationMoments(standardised.forward, slope, standardised.mean)


@functools.lru_cache(maxsize=4096)
def shared_moment(chain: Chain, mean: float, common: float, independent: float) -> float:
    """E[f(u) f(u')] for two correlated Gaussians u and u' and the chain f.

    u and u' are N(mean, common² + independent²) with covariance common². The result is
    E_b[E_w[f(mean + common·b + independent·w)]²] by Gauss–Hermite quadrature, about 1 % off at
    kinks.
    """
    b, outer_weights = _normal_quadrature(48)
    w, inner_weights = _normal_quadrature(96)
    values = chain_function(chain)((mean + common * b)[:, None] + independent * w)
    return float(((values @ inner_weights).square() * outer_weights).sum())


@functools.cache
def _normal_quadrature(order: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def _run(part: Call, args: list[Any], z: Tensor) -> Tensor:
    if operation_name(part.func) == "copy":  # x.copy_(y)
        return args[1] if isinstance(args[1], Tensor) else torch.full_like(z, args[1])
    kinds = [argument.type.kind() for argument in part.func._schema.arguments]
    # The chain may hold a number where the operation had a tensor, such as a parameter whose
    # elements are all equal. The operation needs a tensor again.
    args = [
        torch.full_like(z, arg) if kind == "TensorType" and isinstance(arg, (int, float)) else arg
        for arg, kind in zip(args, kinds, strict=False)
    ]
    if part.func._schema.is_mutable:
        args[0] = args[0].clone()
    kwargs = {name: list(v) if isinstance(v, tuple) else v for name, v in part.kwargs}
    result = part.func(*args, **kwargs)
    if isinstance(result, (tuple, list)):
        result = result[0]
    if not isinstance(result, Tensor):
        raise UsageError(
            f"{operation_name(part.func)}: expected a pointwise function, found one that returns no tensor."
        )
    return result


def _operation_names(chain: Any, visited: set[int]) -> Iterator[str]:
    if isinstance(chain, Call) and id(chain) not in visited:
        visited.add(id(chain))
        for arg in chain.args:
            yield from _operation_names(arg, visited)
        yield operation_name(chain.func)


def _to_hashable(value: Any) -> Any:
    return tuple(map(_to_hashable, value)) if isinstance(value, (list, tuple)) else value
