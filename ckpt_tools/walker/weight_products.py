"""The weight of a product, recognised while a forward or a backward pass runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef

from ckpt_tools.walker.contractions import contraction


class WeightNames:
    """The parameters of a model, recognised by their storage.

    A view of a parameter, such as a part of a packed weight, shares the parameter's storage.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {
            StorageWeakRef(tensor.untyped_storage()): name for name, tensor in model.named_parameters()
        }

    def find_product(self, func: OpOverload, args: Sequence[Any]) -> tuple[str, int] | None:
        """The parameter that a forward operation multiplies with, and the position of its input.

        None for an operation that multiplies with no parameter.
        """
        # Of a matrix product either factor may be the weight, of a convolution only the second.
        for weight, other in list(factor_roles(func))[: 1 if _is_convolution(func) else 2]:
            name = self.find(args[weight])
            if name is not None:
                return name, other
        return None

    def find(self, tensor: Tensor) -> str | None:
        """The name of the parameter that a tensor is a view of, or None."""
        return self._names.get(StorageWeakRef(tensor.untyped_storage()))


def factor_roles(func: OpOverload) -> Iterator[tuple[int, int]]:
    """The positions of a product's two factors, as (weight, other factor), the likelier first."""
    product = contraction(func)
    if product is not None:
        first, second = product.factors
        yield second, first
        yield first, second


def _is_convolution(func: OpOverload) -> bool:
    return func is torch.ops.aten.convolution.default
