"""The pointwise function that stands between two layers, taken from the recorded operations and replayed.

A chain is an expression: a variable, or a ``Call`` of a recorded operation on chains and constants. Replaying it on
quadrature nodes gives the moments of any nonlinearity, hand-written ones among them, without a table of names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload

from ckpt_tools.activations import ActivationMoments, activation_moments
from ckpt_tools.errors import UsageError


@dataclass(frozen=True)
class Variable:
    """The pre-activation z; ``of`` tells several apart."""

    of: Hashable = None


@dataclass(frozen=True)
class Call:
    """An operation on chains and plain constants."""

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Once and from the hashes of the parts: a variable that is used twice at every level costs nothing extra.
        object.__setattr__(self, "_hash", hash((self.func, self.args, self.kwargs)))

    def __hash__(self) -> int:
        return self._hash


Chain: TypeAlias = Variable | Call
Z = Variable()

_IDENTITIES = {("add", 0.0), ("sub", 0.0), ("mul", 1.0), ("div", 1.0)}


def call(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Chain:
    """The chain ``func(*args, **kwargs)``; adding zero and multiplying by one leave the first argument."""
    if len(args) == 2 and isinstance(args[0], (Variable, Call)) and (op_name(func), args[1]) in _IDENTITIES:
        return args[0]
    return Call(func, tuple(map(_hashable, args)), tuple((name, _hashable(kwargs[name])) for name in sorted(kwargs)))


def op_name(func: OpOverload) -> str:
    """``aten::relu_`` → ``relu``."""
    return func._schema.name.rpartition("::")[2].strip("_")


def function(chain: Chain) -> Callable[[Tensor], Tensor]:
    """A chain over the one variable Z as a function of a tensor."""

    def f(z: Tensor) -> Tensor:
        return evaluate(chain, {Z: z})

    f.__name__ = label(chain)
    return f


def evaluate(chain: Chain, values: Mapping[Variable, Tensor]) -> Tensor:
    """The chain with tensors of one shape in place of its variables."""
    like = next(iter(values.values()))
    done: dict[int, Tensor] = {}

    def value(part: Any) -> Any:
        if isinstance(part, Variable):
            return values[part]
        if isinstance(part, Call):
            if id(part) not in done:
                done[id(part)] = _run(part, [value(arg) for arg in part.args], like)
            return done[id(part)]
        return part

    result: Tensor = value(chain)
    return result.to(like.dtype)


def label(chain: Chain) -> str:
    """The operations by name, in the order in which they run: ``sigmoid·mul``."""
    names = list(dict.fromkeys(_names(chain, set())))
    return "identity" if not names else "·".join(names if len(names) <= 4 else [*names[:3], "…", names[-1]])


@functools.lru_cache(maxsize=4096)
def moments(chain: Chain, mean: float = 0.0, deviation: float = 1.0) -> ActivationMoments:
    """E[f(u)²], E[f'(u)²] and E[f(u)] for u ~ N(mean, deviation²). Raises UsageError if they do not exist."""
    if chain == Z:
        return ActivationMoments(mean**2 + deviation**2, 1.0, mean)
    f = function(chain)
    if (mean, deviation) == (0.0, 1.0):
        return activation_moments(f)
    if deviation == 0.0:
        value = float(f(torch.tensor([mean], dtype=torch.float64)))
        return ActivationMoments(value**2, 0.0, value)
    found = activation_moments(lambda z: f(mean + deviation * z))
    return ActivationMoments(found.forward, found.backward / deviation**2, found.mean)


@functools.lru_cache(maxsize=4096)
def overlap(chain: Chain, mean: float, common: float, own: float) -> float:
    """E[f(u) f(u')] for two u ~ N(mean, common² + own²) with covariance common²: E_b[E_w[f(mean + common·b + own·w)]²].

    By Gauss–Hermite quadrature, about 1 % off at kinks.
    """
    b, outer = _normal_rule(48)
    w, inner = _normal_rule(96)
    values = function(chain)((mean + common * b)[:, None] + own * w)
    return float(((values @ inner).square() * outer).sum())


@functools.cache
def _normal_rule(order: int) -> tuple[Tensor, Tensor]:
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def _run(part: Call, args: list[Any], z: Tensor) -> Tensor:
    if op_name(part.func) == "copy":  # x.copy_(y)
        return args[1] if isinstance(args[1], Tensor) else torch.full_like(z, args[1])
    kinds = [argument.type.kind() for argument in part.func._schema.arguments]
    # A number where the operation had a tensor (a uniform parameter, say) becomes one.
    args = [
        torch.full_like(z, arg) if kind == "TensorType" and isinstance(arg, (int, float)) else arg
        for arg, kind in zip(args, kinds, strict=False)
    ]
    if part.func._schema.is_mutable:
        args[0] = args[0].clone()
    found = part.func(*args, **{name: list(v) if isinstance(v, tuple) else v for name, v in part.kwargs})
    result = found[0] if isinstance(found, (tuple, list)) else found
    if not isinstance(result, Tensor):
        raise UsageError(f"{op_name(part.func)}: expected a pointwise function, found one that returns no tensor.")
    return result


def _names(chain: Any, seen: set[int]) -> Iterator[str]:
    if isinstance(chain, Call) and id(chain) not in seen:
        seen.add(id(chain))
        for arg in chain.args:
            yield from _names(arg, seen)
        yield op_name(chain.func)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
