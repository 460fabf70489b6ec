"""Random numbers that a forward draws, as distributions.

Dropout masks, stochastic depth and additive noise are all made of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ckpt_tools.initialize.chain import Chain, chain_function
from ckpt_tools.initialize.mean_field import Signal
from ckpt_tools.initialize.operations import operation_name
from ckpt_tools.walker.graph import Node

_POINTS = 2**15


@dataclass(frozen=True)
class Noise:
    """A distribution of independent random numbers.

    "bernoulli" has P(1) = ``a``, "uniform" is on [a, b), "normal" has mean a and deviation b.
    """

    kind: Literal["bernoulli", "uniform", "normal"]
    a: float
    b: float = 1.0

    def moments(self, chain: Chain) -> Signal:
        """The moments of ``chain`` applied to this noise."""
        values, weights = self._points()
        results = chain_function(chain)(values)
        mean, second = float(results @ weights), float(results.square() @ weights)
        return Signal(mean, second)

    def quantiles(self, u: Tensor) -> Tensor:
        """Values of this distribution for uniform u in (0, 1)."""
        if self.kind == "bernoulli":
            return (u < self.a).to(u.dtype)
        if self.kind == "uniform":
            return self.a + (self.b - self.a) * u
        standard_normal: Tensor = torch.special.ndtri(u)
        return self.a + self.b * standard_normal

    def _points(self) -> tuple[Tensor, Tensor]:
        # Values that stand for the distribution, and their probabilities.
        if self.kind == "bernoulli":
            probabilities = torch.tensor([1 - self.a, self.a], dtype=torch.float64)
            return torch.tensor([0.0, 1.0], dtype=torch.float64), probabilities
        u = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
        return self.quantiles(u), torch.full((_POINTS,), 1 / _POINTS, dtype=torch.float64)


def noise_distribution(node: Node, probability: float | None) -> Noise | None:
    """The distribution that a random operation draws from; None if it is not known.

    Args:
        node: the operation.
        probability: the value of the operation's input, which is P(1) in those forms of
            ``bernoulli`` that have no argument p.
    """
    schema = node.op._schema.arguments
    # A dispatched call leaves out arguments that have their default value.
    arguments = {argument.name: argument.default_value for argument in schema}
    arguments |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    arguments |= node.kwargs

    def number(key: str, default: float) -> float:
        value = arguments.get(key, default)
        return float(value) if isinstance(value, (int, float)) else default

    match operation_name(node.op):
        case "bernoulli":
            # Where p is a tensor the distribution is not known; −1 stands for that.
            chance = number("p", -1.0) if "p" in arguments else probability
            return None if chance is None or chance < 0 else Noise("bernoulli", chance)
        case "rand" | "rand_like":
            return Noise("uniform", 0.0, 1.0)
        case "uniform":
            return Noise("uniform", number("from", 0.0), number("to", 1.0))
        case "randn" | "randn_like":
            return Noise("normal", 0.0, 1.0)
        case "normal":
            return Noise("normal", number("mean", 0.0), number("std", 1.0))
    return None
