"""E[f(z)²] and E[f'(z)²] of a pointwise nonlinearity f for z ~ N(0, 1), by quadrature.

These are the corrective scalars of Hendrycks & Gimpel 2016, sections 2.1 and 2.2 (their Table 1).
f is any function of a tensor; its derivative comes from autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ckpt_tools.arguments import check_callable
from ckpt_tools.errors import UsageError
from ckpt_tools.model.preserving import preserve_models

Function = Callable[[Tensor], Tensor]
QuadratureRule = tuple[Tensor, Tensor]  # nodes on [−1, 1] and their weights

_REACH = 12.0  # the normal density beyond is below 1e-31
_PRECISION = 1e-12
# A kink needs two intervals at a time. A function that never settles takes all that there are.
_MAX_INTERVALS = 20_000
# The nodes of so fine a first grid are at most 1/1,000 apart: no spike wider than that is missed.
_INTERVALS_PER_UNIT = 128
_MAX_HALVINGS = 53  # an interval is then below the spacing of doubles
_SLIVER = 1e-6  # what is left around jumps is a far smaller share of the moments than this


@dataclass(frozen=True)
class ActivationMoments:
    """Moments of a nonlinearity f for z ~ N(0, 1).

    ``forward`` is E[f(z)²], ``backward`` is E[f'(z)²], ``mean`` is E[f(z)].
    """

    forward: float
    backward: float
    mean: float


@torch.inference_mode(False)  # autograd gives no slopes in inference mode
def activation_moments(f: Function) -> ActivationMoments:
    """Moments of a pointwise nonlinearity under a standard normal input.

    Adaptive quadrature in float64: intervals are halved until a Gauss–Legendre and a Gauss–Lobatto
    rule agree to 1e-12, so that kinks and jumps, wherever they are, cost no accuracy. A spike is
    found if it is wider than 1/1,000.

    Args:
        f: maps a float64 tensor to one of the same shape, each value by itself: ``torch.tanh``,
            ``nn.GELU(approximate="tanh")``, ``lambda x: x * torch.sigmoid(x)``. Functions that work
            in place are allowed. A module is copied, and is used on the CPU in float64.

    Raises:
        UsageError: f is not pointwise (as a PReLU with one slope for each channel), is random, is
            undefined for some numbers (as ``torch.sqrt``), or its moments are not finite (as those
            of 1/x).
    """
    check_callable("f", f, "of a tensor, such as torch.tanh")
    with preserve_models(f):
        if isinstance(f, nn.Module):
            # Its parameters (PReLU's slope) must be where the quadrature's nodes are, in their dtype.
            f = copy.deepcopy(f).to("cpu", torch.float64)
        _require_pointwise(f)
        return _integrate_adaptively(f)


def _integrate_adaptively(f: Function) -> ActivationMoments:
    low = torch.arange(-_REACH, _REACH, 1 / _INTERVALS_PER_UNIT, dtype=torch.float64)
    high = low + 1 / _INTERVALS_PER_UNIT
    _require_finite_moments(f, low, _integrals(f, low, high, _GAUSS))
    total = torch.zeros(3, dtype=torch.float64)
    for _ in range(_MAX_HALVINGS):
        coarse, fine = _integrals(f, low, high, _LOBATTO), _integrals(f, low, high, _GAUSS)
        tolerance = _PRECISION * (high - low + fine.abs())
        done = ((fine - coarse).abs() <= tolerance).all(0)
        total += fine[:, done].sum(1)
        low, high = low[~done], high[~done]
        if not len(low):
            break
        if len(low) > _MAX_INTERVALS:
            raise _infinite_moments(f)
        middle = (low + high) / 2
        low, high = torch.cat([low, middle]), torch.cat([middle, high])
    else:
        # What is left are slivers around jumps, too narrow to matter. Around a pole they do.
        slivers = _integrals(f, low, high, _GAUSS).sum(1)
        if not bool((slivers.abs() <= _SLIVER * (1 + total.abs())).all()):
            raise _infinite_moments(f)
        total += slivers
    forward, backward, mean = total.tolist()
    return ActivationMoments(forward, backward, mean)


def _gauss_legendre(order: int) -> QuadratureRule:
    nodes, weights = np.polynomial.legendre.leggauss(order)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def _gauss_lobatto(order: int) -> QuadratureRule:
    # It has nodes on both ends of the interval. A rule without them misses a jump just inside an
    # end, and two such rules would agree on the wrong value.
    basis = np.polynomial.legendre.Legendre.basis(order - 1)
    nodes = np.concatenate([[-1.0], basis.deriv().roots().real, [1.0]])
    weights = 2 / (order * (order - 1) * basis(nodes) ** 2)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


_GAUSS, _LOBATTO = _gauss_legendre(21), _gauss_lobatto(12)


def _integrals(f: Function, low: Tensor, high: Tensor, rule: QuadratureRule) -> Tensor:
    """∫ φ·(f², f'², f) over every interval, where φ is the normal density.

    Shape (3, intervals).
    """
    nodes, weights = rule
    half_width = (high - low) / 2
    z = ((low + high) / 2)[:, None] + half_width[:, None] * nodes
    value, slope = _value_and_slope(f, z)
    density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    integrands = torch.stack([value.square(), slope.square(), value])
    return torch.matmul(integrands * density, weights) * half_width


def _value_and_slope(f: Function, z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = f(z * 1)  # f may work in place, which autograd forbids on the leaf itself
        if not value.requires_grad:  # f is piecewise constant: a step, a sign
            return value, torch.zeros_like(value)
        (slope,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), slope


def _require_finite_moments(f: Function, low: Tensor, integrals: Tensor) -> None:
    if bool(integrals.isnan().any()):
        raise UsageError(
            f"{_name(f)}: expected a function that is defined for every z from N(0, 1), found NaN for "
            "some. Clamp its input, or say what it gives there."
        )
    # An integrand that still counts beyond 11 standard deviations has moments that do not exist.
    tails = integrals[:, (low < 1 - _REACH) | (low >= _REACH - 1)].abs().sum(1)
    if not bool((tails <= 1e-9 * (1 + integrals.abs().sum())).all()):
        raise _infinite_moments(f)


def _infinite_moments(f: Function) -> UsageError:
    return UsageError(
        f"{_name(f)}: its moments under N(0, 1) are not finite, or no quadrature finds them; expected "
        "a piecewise smooth function without poles (1/x, log x) or growth beyond all bounds (exp x²)."
    )


def _require_pointwise(f: Function) -> None:
    z = torch.linspace(-3, 3, 24, dtype=torch.float64)
    expected = f"{_name(f)}: expected a pointwise function, found"
    with torch.no_grad():
        try:
            values = f(z.clone())
        except Exception as error:
            raise UsageError(
                f"{expected} one that fails on a vector of 24 numbers: {error}. A function that "
                "differs between channels has moments for each; pass one channel's."
            ) from error
        if not isinstance(values, Tensor) or values.shape != z.shape:
            raise UsageError(f"{expected} one that changes the shape.")
        if not _agree(f(z.clone()), values, exactly=True):
            raise UsageError(f"{expected} a random one. Pass it without dropout, or in evaluation mode.")
        agrees_on_a_part = _agree(f(z[::2].clone()), values[::2])
        if not (agrees_on_a_part and _agree(f(z.flip(0)), values.flip(0))):
            raise UsageError(f"{expected} one that mixes values (as softmax does).")


def _agree(values: Tensor, others: Tensor, *, exactly: bool = False) -> bool:
    # Where a function is undefined, it is NaN each time.
    tolerance = 0.0 if exactly else 1e-5
    return torch.allclose(values, others, rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True)


def _name(f: Function) -> str:
    return getattr(f, "__name__", None) or type(f).__name__
