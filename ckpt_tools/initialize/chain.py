"""The pointwise function that stands between two layers, taken from the recorded operations.

A chain is an expression: a variable, or a ``Call`` of a recorded operation on chains and constants.
Replaying it on quadrature nodes gives the moments of any nonlinearity, hand-written ones among
them, so no table of activation names is needed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

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
class Elements:
    """The elements of a constant tensor, such as a PReLU's slopes, one for each channel.

    Every value of an activation meets each of them equally often.
    """

    values: tuple[float, ...]

    def quantiles(self, u: Tensor) -> Tensor:
        """An element for each of the uniform numbers u in (0, 1)."""
        values = torch.tensor(self.values, dtype=u.dtype)
        return values[(u * len(values)).long()]


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

_MAX_ELEMENTS = 1024  # of a constant tensor; more are averaged in groups
_GRID, _REACH = 1024, 8.0  # points of the midpoint rule, and standard deviations that it covers
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

_IDENTITIES = {("add", 0.0), ("sub", 0.0), ("mul", 1.0), ("div", 1.0)}


def elements_of(tensor: Tensor) -> Elements:
    """The elements of a constant tensor in order; of very many the means of groups of similar ones."""
    values = tensor.double().flatten()
    if len(values) > _MAX_ELEMENTS:
        values = torch.stack([group.mean() for group in values.sort().values.tensor_split(_MAX_ELEMENTS)])
        # Other tensors of as many elements must not be paired by size.
        values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    return Elements(tuple(values.tolist()))


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


def evaluate_chain(chain: Chain, values: Mapping[Variable | Elements, Tensor]) -> Tensor:
    """The value of a chain for these values of its variables.

    All values are tensors of one shape and dtype; so is the result. Elements that have no values
    count with their mean.
    """
    # Parts that occur several times are computed once.
    any_value = next(iter(values.values()))
    results: dict[int, Tensor] = {}

    def value(part: Any) -> Any:
        if isinstance(part, Variable):
            return values[part]
        if isinstance(part, Elements):
            return values[part] if part in values else sum(part.values) / len(part.values)
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
def chain_moments(chain: Chain, deviation: float = 1.0) -> ActivationMoments:
    """E[f(u)²], E[f'(u)²] and E[f(u)] of the chain f for u ~ N(0, deviation²).

    Where f differs between channels they are averages over the channels.

    Raises:
        UsageError: the moments do not exist, or f is not pointwise.
    """
    if chain == Z:
        return ActivationMoments(deviation**2, 1.0, 0.0)
    elements = [part for part in list_variables(chain) if isinstance(part, Elements)]
    if elements:
        return _average_over_elements(chain, elements, deviation)
    f = chain_function(chain)
    if deviation == 1.0:
        return activation_moments(f)
    if deviation == 0.0:
        value = float(f(torch.zeros(1, dtype=torch.float64)))
        return ActivationMoments(value**2, 0.0, value)
    standardised = activation_moments(lambda z: f(deviation * z))
    # The slope of z → f(deviation·z) is deviation·f'.
    return ActivationMoments(standardised.forward, standardised.backward / deviation**2, standardised.mean)


def _average_over_elements(chain: Chain, elements: Sequence[Elements], deviation: float) -> ActivationMoments:
    # Every z of a midpoint rule meets every row, that is, one value of each tensor of elements.
    # Tensors of one length belong to the same channels. Those of different lengths are paired by the
    # golden ratio, so that all combinations occur.
    lengths = list(dict.fromkeys(len(part.values) for part in elements))
    rows = lengths[0] if len(lengths) == 1 else _MAX_ELEMENTS
    row = torch.arange(rows, dtype=torch.float64) + 0.5
    u_of_length = {
        length: row / rows if not k else row * _GOLDEN_RATIO**k % 1 for k, length in enumerate(lengths)
    }
    step = 2 * _REACH / _GRID
    z = (torch.arange(_GRID, dtype=torch.float64) + 0.5) * step - _REACH
    density = torch.exp(-z.square() / 2) * step / math.sqrt(2 * math.pi) / rows
    values: dict[Variable | Elements, Tensor] = {
        part: part.quantiles(u_of_length[len(part.values)])[:, None].expand(rows, _GRID) for part in elements
    }
    with torch.enable_grad():
        u = (deviation * z).expand(rows, _GRID).clone().requires_grad_()
        result = evaluate_chain(chain, {Z: u * 1, **values})
        slope = torch.autograd.grad(result.sum(), u)[0] if result.requires_grad else torch.zeros_like(u)
    moments = [float((m.detach() * density).sum()) for m in (result.square(), slope.square(), result)]
    if not all(map(math.isfinite, moments)):
        raise UsageError(f"{chain_label(chain)}: its moments under N(0, {deviation:g}²) are not finite.")
    return ActivationMoments(*moments)


def list_variables(chain: Any) -> list[Variable | Elements]:
    """The variables of an expression and the elements of its constants, each once.

    The search visits a part that occurs several times only once, so it takes linear time.
    """
    variables: dict[Variable | Elements, None] = {}
    stack, visited = [chain], set()
    while stack:
        part = stack.pop()
        if isinstance(part, (Variable, Elements)):
            variables[part] = None
        elif isinstance(part, Call) and id(part) not in visited:
            visited.add(id(part))
            stack += part.args
    return list(variables)


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
