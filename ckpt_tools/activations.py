"""E[f(z)²] and E[f'(z)²] of a pointwise nonlinearity f for z ~ N(0, 1), by quadrature.

The corrective scalars of Hendrycks & Gimpel 2016, sections 2.1 and 2.2 (their Table 1). f is any function of a
tensor; its derivative comes from autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ckpt_tools.errors import UsageError
from ckpt_tools.model.preserving import preserve_models

Rule = tuple[Tensor, Tensor]  # nodes on [−1, 1] and their weights

_REACH = 12.0  # the density beyond is below 1e-32
_PRECISION = 1e-12
_MOST = 5_000  # intervals under way: a kink needs two, a function that never settles takes all there are
_HALVINGS = 60  # an interval of length 1 is then below the spacing of doubles


@dataclass(frozen=True)
class ActivationMoments:
    """``forward``: E[f(z)²]; ``backward``: E[f'(z)²]; ``mean``: E[f(z)]; all for z ~ N(0, 1)."""

    forward: float
    backward: float
    mean: float


@torch.inference_mode(False)  # in that mode nothing has a slope
def activation_moments(f: Callable[[Tensor], Tensor]) -> ActivationMoments:
    """Moments of a pointwise nonlinearity under a standard normal input.

    Adaptive quadrature in float64: intervals are halved until a Gauss–Legendre and a Gauss–Lobatto rule agree to
    1e-12, so that kinks and jumps, wherever they are, cost no accuracy.

    Args:
        f: maps a float64 tensor to one of the same shape, each value by itself: ``torch.tanh``,
            ``nn.GELU(approximate="tanh")``, ``lambda x: x * torch.sigmoid(x)``. In-place functions are welcome.
            A module comes back as it was.

    Raises:
        UsageError: f is not pointwise, is random, or its moments are not finite.
    """
    with preserve_models(f):
        return _moments(f)


def _moments(f: Callable[[Tensor], Tensor]) -> ActivationMoments:
    _require_pointwise(f)
    low = torch.arange(-_REACH, _REACH, dtype=torch.float64)
    high = low + 1
    first = _integrals(f, low, high, _GAUSS)
    # An integrand that still counts at 11 standard deviations belongs to moments that do not exist.
    if not bool((first[:, [0, -1]].abs() <= 1e-9 * (1 + first.abs().sum())).all()):
        raise UsageError(f"{_name(f)}: its moments under N(0, 1) are not finite; expected a tamer function.")
    total = torch.zeros(3, dtype=torch.float64)
    for _ in range(_HALVINGS):
        coarse, fine = _integrals(f, low, high, _LOBATTO), _integrals(f, low, high, _GAUSS)
        done = ((fine - coarse).abs() <= _PRECISION * (high - low + fine.abs())).all(0)
        total += fine[:, done].sum(1)
        low, high = low[~done], high[~done]
        if not len(low):
            break
        if len(low) > _MOST:
            raise UsageError(f"{_name(f)}: no quadrature converges on it; expected a piecewise smooth function.")
        middle = (low + high) / 2
        low, high = torch.cat([low, middle]), torch.cat([middle, high])
    else:
        total += _integrals(f, low, high, _GAUSS).sum(1)  # slivers around jumps, of no weight
    forward, backward, mean = total.tolist()
    return ActivationMoments(forward, backward, mean)


def _gauss(order: int) -> Rule:
    nodes, weights = np.polynomial.legendre.leggauss(order)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def _lobatto(order: int) -> Rule:
    """Nodes on the ends of the interval, too: a jump just inside an end escapes any rule without them."""
    basis = np.polynomial.legendre.Legendre.basis(order - 1)
    nodes = np.concatenate([[-1.0], basis.deriv().roots().real, [1.0]])
    return torch.from_numpy(nodes), torch.from_numpy(2 / (order * (order - 1) * basis(nodes) ** 2))


_GAUSS, _LOBATTO = _gauss(21), _lobatto(12)


def _integrals(f: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, rule: Rule) -> Tensor:
    """∫ φ·(f², f'², f) over every interval: (3, intervals)."""
    nodes, weights = rule
    half = (high - low) / 2
    z = ((low + high) / 2)[:, None] + half[:, None] * nodes
    value, slope = _value_and_slope(f, z)
    density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    moments = torch.stack([value.square(), slope.square(), value])
    return torch.matmul(moments * density, weights) * half


def _value_and_slope(f: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = f(z * 1)  # a copy that f may overwrite
        if not value.requires_grad:  # piecewise constant: a step, a sign
            return value, torch.zeros_like(value)
        (slope,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), slope


def _require_pointwise(f: Callable[[Tensor], Tensor]) -> None:
    z = torch.linspace(-3, 3, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = f(z.clone())
        if not isinstance(whole, Tensor) or whole.shape != z.shape:
            raise UsageError(f"{_name(f)}: expected a pointwise function, found one that changes the shape.")
        if not torch.equal(f(z.clone()), whole):
            raise UsageError(f"{_name(f)}: expected a pointwise function, found a random one. Pass it without dropout.")
        same = torch.allclose(f(z[::2].clone()), whole[::2]) and torch.allclose(f(z.flip(0)), whole.flip(0))
    if not same:
        raise UsageError(f"{_name(f)}: expected a pointwise function, found one that mixes values (as softmax does).")


def _name(f: Callable[[Tensor], Tensor]) -> str:
    return getattr(f, "__name__", None) or type(f).__name__
