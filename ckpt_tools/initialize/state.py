"""An activation in terms of the independent Gaussians and the noise that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from ckpt_tools.initialize.chain import Chain, Z, chain_label, extend_chain
from ckpt_tools.initialize.mean_field import Signal
from ckpt_tools.initialize.noise import Noise
from ckpt_tools.walker.graph import Node, Operand

Source: TypeAlias = tuple[int, int, int]  # a node, and offset and size of the part of its output

CONSTANT = "a constant"  # the `source_label` of operands that depend on no activation


@dataclass(frozen=True)
class State:
    """What is known of an activation at one place of the graph.

    It is ``chain`` applied to ``source``, whose own moments are ``source_signal`` and whose name is
    ``source_label`` ("" for a weight layer's output), behind dropout with keep probability
    ``keep``. ``signal`` has the moments of the result.

    ``joint`` is the same activation as an expression over all independent ``parts`` that it is made
    of, the random masks included.

    ``noise`` and ``random`` describe an activation that is made of noise alone. ``noise`` is None
    where its distribution is not known.

    ``averaged_source`` is set where the activation is a function of an average over that source,
    such as the mean square in an RMS norm; its value is then about ``average`` at every position.
    """

    signal: Signal
    source: Source
    source_signal: Signal
    source_label: str
    chain: Chain = Z
    keep: float = 1.0
    joint: Chain = Z
    parts: frozenset[Source] = frozenset()
    noise: Noise | None = None
    random: bool = False
    averaged_source: Source | None = None
    average: float = 0.0

    @property
    def activation(self) -> str:
        """The nonlinearity in words."""
        if not self.source_label:
            return chain_label(self.chain)
        if self.chain == Z:
            return self.source_label
        return f"{chain_label(self.chain)} of {self.source_label}"


def is_dropout(name: str, masks: Sequence[State]) -> bool:
    """Whether an operation with noise among its factors is dropout of the other factor.

    Noise of mean zero is no dropout: it would leave a keep probability of zero.
    """
    return name in ("mul", "div") and all(abs(mask.signal.mean) > 1e-3 for mask in masks)


def mask_keep(mask: Signal) -> float:
    """The keep probability of a random mask m: E[m]² / E[m²]."""
    return mask.mean**2 / mask.second


def factor_signal(state: State) -> Signal:
    """The signal of one factor of a product.

    Noise comes with its keep probability, because it thins out the other factor.
    """
    if not state.random or state.signal.second == 0:  # noise that is 0 keeps nothing
        return state.signal
    return replace(state.signal, keep=mask_keep(state.signal))


def replay_node(node: Node, replacement: Callable[[Operand], Any]) -> Chain:
    """A recorded operation with ``replacement(operand)`` in place of each operand."""

    def convert(value: Any) -> Any:
        if isinstance(value, Operand):
            return replacement(value)
        return [convert(item) for item in value] if isinstance(value, (list, tuple)) else value

    kwargs = {name: convert(value) for name, value in node.kwargs.items()}
    return extend_chain(node.op, tuple(map(convert, node.args)), kwargs)
