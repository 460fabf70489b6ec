"""Which operations multiply activations with a weight, and how the weight's dimensions map inputs to units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from ckpt_tools.results import Geometry

_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.bmm.default: (0, 1),
    _ATEN.baddbmm.default: (1, 2),
}
"""Matrix products and the positions of their two factors; a bias stands in front of them."""


@dataclass(frozen=True)
class Contraction:
    """Where an operation that sums products has its two factors and its bias, as positions among its arguments.

    Of a convolution the second factor is the weight; of a matrix product it may be either.
    """

    factors: tuple[int, int]
    bias: int | None


def contraction(func: OpOverload) -> Contraction | None:
    """The factors of a convolution or a matrix product; None for any other operation."""
    if func is _ATEN.convolution.default:
        return Contraction((0, 1), 2)
    if func in _PRODUCTS:
        first, second = _PRODUCTS[func]
        return Contraction((first, second), 0 if first == 1 else None)
    return None


def weight_geometry(func: OpOverload, args: Sequence[Any]) -> Geometry:
    """How the weight of a contraction maps inputs to units."""
    if func is not _ATEN.convolution.default:
        return Geometry()
    stride, dilation, transposed, groups = args[3], args[5], args[6], args[8]
    if not transposed:
        return Geometry("convolution", groups)
    return Geometry("transposed convolution", groups, tuple(stride), tuple(dilation))
