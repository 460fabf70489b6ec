"""The operations that multiply activations with a weight.

A convolution or a matrix product sums products of its two factors. This module knows where the
factors and the bias stand among the arguments, and how the dimensions of a weight map inputs to
units (output channels or neurons).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from ckpt_tools.results import Geometry


@dataclass(frozen=True)
class Contraction:
    """Where an operation that sums products has its factors and its bias among its arguments.

    The second factor of a convolution is its weight. In a matrix product either may be the weight.
    """

    factors: tuple[int, int]
    bias: int | None


_ATEN = torch.ops.aten
# The "add" forms of the matrix products take the bias as their first argument.
_CONTRACTIONS: dict[OpOverload | None, Contraction] = {
    _ATEN.convolution.default: Contraction((0, 1), bias=2),
    _ATEN.mm.default: Contraction((0, 1), bias=None),
    _ATEN.bmm.default: Contraction((0, 1), bias=None),
    _ATEN.addmm.default: Contraction((1, 2), bias=0),
    _ATEN.baddbmm.default: Contraction((1, 2), bias=0),
}


def contraction(func: OpOverload | None) -> Contraction | None:
    """Return the positions of the factors of a convolution or matrix product.

    Any other operation, and a leaf of the graph (``func`` is None), gives None.
    """
    return _CONTRACTIONS.get(func)


def weight_geometry(func: OpOverload, args: Sequence[Any]) -> Geometry:
    """Return how the weight of a contraction maps inputs to units, given the operation's arguments.

    Matrix products have the geometry "linear", which is the default.
    """
    if func is not _ATEN.convolution.default:
        return Geometry()
    # aten::convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding,
    # groups) serves every number of spatial dimensions, transposed or not.
    stride, dilation, transposed, groups = args[3], args[5], args[6], args[8]
    if not transposed:
        return Geometry("convolution", groups)
    return Geometry("transposed convolution", groups, tuple(stride), tuple(dilation))
