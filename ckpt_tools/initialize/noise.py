"""Random numbers that a forward draws, as distributions: dropout masks, stochastic depth, additive noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ckpt_tools.initialize.chain import Chain, function, op_name
from ckpt_tools.initialize.signal import Signal
from ckpt_tools.walker.graph import Node

NOISES = frozenset(["bernoulli", "rand", "rand_like", "uniform", "randn", "randn_like", "normal"])
_POINTS = 2**15


@dataclass(frozen=True)
class Noise:
    """A distribution: "bernoulli" with P(1) = ``a``, "uniform" on [a, b), or "normal" with mean a and deviation b."""

    kind: Literal["bernoulli", "uniform", "normal"]
    a: float
    b: float = 1.0

    def moments(self, chain: Chain) -> Signal:
        """Of ``chain`` applied to this noise."""
        values, weights = self._points()
        found = function(chain)(values)
        mean, second = float(found @ weights), float(found.square() @ weights)
        return Signal(mean, second, mean**2)

    def quantiles(self, u: Tensor) -> Tensor:
        """Values of this distribution for uniform u in (0, 1)."""
        if self.kind == "bernoulli":
            return (u < self.a).to(u.dtype)
        return self.a + self.b * torch.special.ndtri(u) if self.kind == "normal" else self.a + (self.b - self.a) * u

    def _points(self) -> tuple[Tensor, Tensor]:
        if self.kind == "bernoulli":
            return torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor(
                [1 - self.a, self.a], dtype=torch.float64
            )
        u = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
        return self.quantiles(u), torch.full((_POINTS,), 1 / _POINTS, dtype=torch.float64)


def noise_of(node: Node, probability: float | None) -> Noise | None:
    """The distribution that a random operation draws from; None if it is none of these.

    ``probability``: the value of a Bernoulli operation's input where it gives the probabilities.
    """
    name = op_name(node.op)
    schema = node.op._schema.arguments
    arguments = {argument.name: argument.default_value for argument in schema}  # a dispatched call leaves defaults out
    arguments |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)} | dict(node.kwargs)

    def number(key: str, default: float) -> float:
        value: Any = arguments.get(key, default)
        return float(value) if isinstance(value, (int, float)) else default

    if name == "bernoulli":
        chance = number("p", -1.0) if "p" in arguments else probability
        return None if chance is None or chance < 0 else Noise("bernoulli", chance)
    if name in ("rand", "rand_like"):
        return Noise("uniform", 0.0, 1.0)
    if name == "uniform":
        return Noise("uniform", number("from", 0.0), number("to", 1.0))
    if name in ("randn", "randn_like"):
        return Noise("normal", 0.0, 1.0)
    if name == "normal":
        return Noise("normal", number("mean", 0.0), number("std", 1.0))
    return None
