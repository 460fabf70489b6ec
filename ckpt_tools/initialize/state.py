"""An activation in terms of the independent Gaussians and the noise it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from ckpt_tools.initialize.chain import Call, Chain, Variable, Z, call, label
from ckpt_tools.initialize.noise import Noise
from ckpt_tools.initialize.signal import Signal
from ckpt_tools.walker.graph import Node, Operand

Source: TypeAlias = tuple[int, int, int]  # node, offset and size of the part of it


@dataclass(frozen=True)
class State:
    """An activation: ``chain`` of ``source`` (whose own signal is ``origin``), after dropout that keeps ``keep``.

    ``joint`` is the same as an expression over the independent ``parts`` it is made of.
    """

    signal: Signal
    source: Source
    origin: Signal
    what: str  # the source in words, "" for a weight layer's output
    chain: Chain = Z
    keep: float = 1.0
    joint: Chain = Z
    parts: frozenset[Source] = frozenset()
    noise: Noise | None = None
    random: bool = False  # made of noise alone
    over: Source | None = None  # it is a function of an average over this source, and comes to ``average``
    average: float = 0.0

    @property
    def activation(self) -> str:
        """The nonlinearity in words."""
        name = label(self.chain)
        return name if not self.what else self.what if self.chain == Z else f"{name} of {self.what}"


def is_dropout(name: str, masks: Sequence[State]) -> bool:
    """Whether an operation with noise among its factors thins out what it multiplies."""
    return name in ("mul", "div") and all(abs(mask.signal.mean) > 1e-3 for mask in masks)


def masked_signal(state: State) -> Signal:
    """The signal of a factor; of noise with its keep probability."""
    signal = state.signal
    if not state.random or signal.second == 0:
        return signal
    return replace(signal, keep=signal.mean**2 / signal.second)


def call_of(node: Node, part: Callable[[Operand], Any]) -> Chain:
    """A recorded operation with ``part(operand)`` in place of its operands."""

    def convert(value: Any) -> Any:
        if isinstance(value, Operand):
            return part(value)
        return [convert(item) for item in value] if isinstance(value, (list, tuple)) else value

    return call(node.op, tuple(convert(arg) for arg in node.args), {k: convert(v) for k, v in node.kwargs.items()})


def variables(chain: Any) -> list[Variable]:
    """The variables of an expression."""
    found: dict[Variable, None] = {}
    stack, seen = [chain], set()
    while stack:
        part = stack.pop()
        if isinstance(part, Variable):
            found[part] = None
        elif isinstance(part, Call) and id(part) not in seen:
            seen.add(id(part))
            stack += part.args
    return list(found)
