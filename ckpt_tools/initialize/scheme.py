"""Random weights whose units have fan-in vectors of (expected) squared norm 1.

They are the W of Hendrycks & Gimpel 2016. Every weight is seen as views of shape (blocks, units,
*inputs). The units of a block share their inputs. A unit's entries are the coefficients of its sum,
so inputs with second moment 1 give outputs with variance 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import ceil, gcd, prod
from typing import get_args

import torch
from torch import Tensor

from ckpt_tools.contract import Scheme
from ckpt_tools.errors import UsageError
from ckpt_tools.initialize.rule import check_choice
from ckpt_tools.results import Geometry

Shape = tuple[int, int, int]  # blocks, units, fan-in


def fans(shape: Sequence[int], geometry: Geometry) -> tuple[int, int]:
    """Fan-in and fan-out of a weight.

    An output position of a transposed convolution meets only one tap in prod(stride), on average.
    Its fan-in is rounded and at least 1.

    Raises:
        UsageError: the shape does not fit the geometry, has fewer than 2 dimensions or no elements.
    """
    _check_geometry(shape, geometry)
    if geometry.kind == "linear":
        return shape[-1], shape[-2]
    taps = prod(shape[2:])
    if geometry.kind == "convolution":
        return shape[1] * taps, shape[0] // geometry.groups * taps
    fan_in = round(shape[0] // geometry.groups * taps / prod(geometry.stride))
    return max(1, fan_in), shape[1] * taps


def fill(
    weight: Tensor,
    geometry: Geometry,
    scheme: Scheme,
    generator: torch.Generator,
    *,
    divisor: float = 1.0,
) -> None:
    """Overwrite ``weight`` with random values.

    Its fan-in vectors get the expected squared norm 1 / divisor². By ``scheme``:

    * hypersphere: each unit's fan-in vector is uniform on the sphere.
    * orthonormal: the vectors of one block (group) are orthonormal, uniformly (Haar). A block with
      more units than inputs is a stack of such blocks, and only vectors of the same one are
      orthogonal.
    * uniform: entries are Unif[−1, 1]·√(3 / fan-in).
    * normal: entries are N(0, 1 / fan-in).

    A unit of a transposed convolution has one fan-in vector per output phase: the taps that meet
    there. Var(z) is then the same at every output position, except those that no tap reaches (a
    stride longer than the kernel).

    Args:
        weight: floating point, any device and strides. A view is written through.
        geometry: what the dimensions of ``weight`` mean.
        scheme: the distribution.
        generator: a CPU generator. Values are drawn in float32 and rounded once, to the weight's
            dtype.
        divisor: every value is divided by it after drawing.

    Raises:
        UsageError: the weight is not floating point, does not fit the geometry, has fewer than 2
            dimensions or no elements; the scheme is unknown; the generator is not on the CPU.
    """
    check_choice(scheme, "scheme", get_args(Scheme))
    _check_geometry(weight.shape, geometry)
    if not weight.is_floating_point():
        raise UsageError(f"weight: expected floating point values, found {weight.dtype}. Convert it first.")
    if generator.device.type != "cpu":
        raise UsageError(
            f"generator: expected one on the CPU, found {generator.device}. Pass torch.Generator()."
        )
    with torch.no_grad():
        for view in _views(weight, geometry):
            blocks, units, *inputs = view.shape
            values = _DRAW[scheme]((blocks, units, prod(inputs)), generator)
            view.copy_(values.div_(divisor).view(view.shape))


def _views(weight: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """Views of shape (blocks, units, *inputs) that cover the weight, one per phase."""
    if geometry.kind == "linear":
        yield weight if weight.dim() == 3 else weight[None]
        return
    grouped = weight.unflatten(0, (geometry.groups, -1))
    if geometry.kind == "convolution":
        yield grouped
        return
    # Tap k of input i lands on output i·stride + k·dilation, so taps meet if they differ by a
    # multiple of `step`.
    kernel = weight.shape[2:]
    ones = (1,) * len(kernel)
    stride, dilation = geometry.stride or ones, geometry.dilation or ones
    steps = [s // gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    for starts in product(*(range(min(pair)) for pair in zip(steps, kernel, strict=True))):
        taps = (slice(start, None, step) for start, step in zip(starts, steps, strict=True))
        yield grouped.transpose(1, 2)[(..., *taps)]


def _hypersphere(shape: Shape, generator: torch.Generator) -> Tensor:
    vectors = _gaussian(shape, generator)
    # Draws in float32 do hit 0. With a fan-in of 1 that is a vector without a direction.
    vectors[~vectors.any(-1)] = 1.0
    return vectors.div_(vectors.norm(dim=-1, keepdim=True))


def _orthonormal(shape: Shape, generator: torch.Generator) -> Tensor:
    blocks, units, fan_in = shape
    size = min(units, fan_in)
    stacks = ceil(units / size)
    q, r = torch.linalg.qr(_gaussian((blocks * stacks, fan_in, size), generator))
    # QR alone is not uniform: LAPACK chooses the signs of R's diagonal (Mezzadri, math-ph/0609050).
    q *= torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None]
    vectors: Tensor = q.mT.reshape(blocks, stacks * size, fan_in)
    return vectors[:, :units].contiguous()


def _uniform(shape: Shape, generator: torch.Generator) -> Tensor:
    bound = (3 / shape[-1]) ** 0.5  # the variance of Unif[−b, b] is b²/3
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    return values.uniform_(-bound, bound, generator=generator)


def _normal(shape: Shape, generator: torch.Generator) -> Tensor:
    return _gaussian(shape, generator).div_(shape[-1] ** 0.5)


def _gaussian(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device="cpu", generator=generator)


_DRAW: dict[Scheme, Callable[[Shape, torch.Generator], Tensor]] = {
    "hypersphere": _hypersphere,
    "orthonormal": _orthonormal,
    "uniform": _uniform,
    "normal": _normal,
}


def _check_geometry(shape: Sequence[int], geometry: Geometry) -> None:
    name = f"weight of shape {tuple(shape)}"
    if len(shape) < 2 or not prod(shape):
        raise UsageError(
            f"{name}: expected at least 2 dimensions and no empty one. It has no fan-in; leave it out."
        )
    if geometry.kind == "linear":
        if len(shape) > 3:
            raise UsageError(
                f"{name}: expected (units, fan-in) or (blocks, units, fan-in) of a linear weight, "
                f"found {len(shape)} dimensions. Flatten the blocks, or pass a convolution's "
                "geometry."
            )
        return
    if geometry.groups < 1 or shape[0] % geometry.groups:
        raise UsageError(
            f"{name}: expected groups that divide {shape[0]}, found {geometry.groups}. Pass the layer's."
        )
    if geometry.kind == "transposed convolution":
        dimensions = len(shape) - 2
        for setting, numbers in (("stride", geometry.stride), ("dilation", geometry.dilation)):
            if numbers and (len(numbers) != dimensions or min(numbers) < 1):
                raise UsageError(
                    f"{name}: expected {dimensions} numbers above 0 as {setting}, found {numbers}."
                )
