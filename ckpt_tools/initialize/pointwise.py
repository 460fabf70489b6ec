"""What pointwise operations make of activations: links of a chain, sums, products, functions of independent parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ckpt_tools.initialize.chain import Variable, Z, evaluate, function, moments, op_name
from ckpt_tools.initialize.constants import Constants
from ckpt_tools.initialize.signal import Signal, added, divided, multiplied, scaled
from ckpt_tools.initialize.state import Source, State, call_of, is_dropout, masked_signal, variables
from ckpt_tools.walker.graph import Graph, Node, Operand

_MOST_PARTS = 4  # of an expression that is integrated over all of them at once
_NOISY, _QUIET = (2**11, 2**8), (2**12, 1)  # values of the activations, values of the noise
_NOTHING = 1e-9
_HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu_kernel", "mul", "div", "neg", "abs"})


@dataclass
class Pointwise:
    """The states of operands, and what pointwise operations make of them; ``state`` says where they come from."""

    graph: Graph
    constants: Constants
    _numbers: dict[Operand, float] = field(init=False, default_factory=dict)
    _sources: dict[Variable, State] = field(init=False, default_factory=dict)

    def state(self, operand: Operand) -> State:
        """An operand's state."""
        raise NotImplementedError

    def _source(self, source: Source, signal: Signal, what: str) -> State:
        state = State(signal, source, signal, what, joint=Variable(source), parts=frozenset({source}))
        self._sources[Variable(source)] = state
        return state

    def _usual(self, signal: Signal) -> Signal:
        """Signals as this rule sees them: f(z) and W are zero-centred (section 2.1.1)."""
        return replace(signal, mean=0.0, shared=0.0)

    def _pointwise(self, index: int, node: Node) -> State | None:
        live = [operand for operand in node.operands if not self.graph[operand.node].static]
        states = {operand: self.state(operand) for operand in live}
        sources = {state.source for state in states.values() if state.over is None}
        self._numbers = {operand: state.average for operand, state in states.items() if state.over in sources}
        states = {operand: state for operand, state in states.items() if operand not in self._numbers}
        signals = [state for state in states.values() if not state.random]
        if not signals:
            return self._noisy(node, states)
        statics = [operand for operand in node.operands if operand not in states]
        name = op_name(node.op)
        arithmetic = name in ("add", "sub", "mul", "div")
        if arithmetic and len(states) == 1 and self._is_input(signals[0]):
            return signals[0]
        plain = not arithmetic or all(self._is_number(operand) for operand in statics)
        masks = [state for state in states.values() if state.random]
        thinned = min(state.keep for state in signals) < 1
        uneven = thinned and (name not in _HOMOGENEOUS or len({state.keep for state in signals}) > 1)
        alone = len({state.source for state in signals}) == 1
        if alone and plain and not uneven and (not masks or is_dropout(name, masks)):
            return self._chained(node, states, masks)
        parts = [state.parts for state in states.values()]
        union = frozenset().union(*parts)
        if ((uneven and alone) or sum(map(len, parts)) > len(union)) and len(union) <= _MOST_PARTS and plain:
            return self._integrated(index, node, states, union)
        operands = node.operands
        if not arithmetic or len(operands) != 2:
            return self._integrated(index, node, states, union) if len(union) <= _MOST_PARTS and plain else None
        return self._joined(index, node, name, [self.state(operand) for operand in operands], union)

    def _chained(self, node: Node, states: Mapping[Operand, State], masks: Sequence[State]) -> State:
        """One more link of the chain; a dropout mask counts with its mean, its spread goes into ``keep``."""
        signals = [state for state in states.values() if not state.random]
        first = signals[0]
        kept = math.prod(mask.signal.mean**2 / mask.signal.second for mask in masks)
        keep = min(state.keep for state in signals) * kept

        def link(operand: Operand) -> Any:
            state = states.get(operand)
            if state is None:
                return self.number(operand)
            return state.signal.mean if state.random else state.chain

        state = replace(
            first,
            chain=call_of(node, link),
            keep=keep,
            joint=call_of(node, lambda o: states[o].joint if o in states else self.number(o)),
            parts=frozenset().union(*(state.parts for state in states.values())),
        )
        if state.over is not None:
            step = call_of(node, lambda o: Z if o in states else self.number(o))
            state = replace(state, average=float(function(step)(torch.tensor([state.average], dtype=torch.float64))))
        return replace(state, signal=self._signal(state))

    def _signal(self, state: State) -> Signal:
        origin = state.origin
        found = moments(state.chain, 0.0, math.sqrt(origin.second))
        return Signal(0.0, found.forward / state.keep, 0.0, origin.keep * state.keep)

    def _dropped(self, state: State, mask: Signal) -> State:
        keep = state.keep * mask.mean**2 / mask.second
        return replace(
            state, keep=keep, signal=multiplied(state.signal, replace(mask, keep=mask.mean**2 / mask.second))
        )

    def _noisy(self, node: Node, states: Mapping[Operand, State]) -> State | None:
        """A function of noise: floor(keep + u), a mask, a scaled mask."""
        found = list(states.values())
        if len({state.source for state in found}) != 1 or found[0].noise is None:
            return None
        chain = call_of(node, lambda o: states[o].chain if o in states else self.number(o))
        joint = call_of(node, lambda o: states[o].joint if o in states else self.number(o))
        return replace(found[0], chain=chain, joint=joint, signal=found[0].noise.moments(chain))

    def _joined(
        self, index: int, node: Node, name: str, states: Sequence[State], union: frozenset[Source]
    ) -> State | None:
        """Two independent activations, or an activation and a constant tensor or noise, added or multiplied."""
        one, other = (masked_signal(state) for state in states)
        factor = node.kwargs.get("alpha", 1)
        if name in ("add", "sub"):
            if other.second <= _NOTHING * one.second:
                return states[0]  # a branch that starts at zero
            if one.second <= _NOTHING * other.second and name == "add":
                return states[1]
            signal = added(one, scaled(other, float(factor)), 1.0 if name == "add" else -1.0)
            what = "a sum"
        else:
            signal = multiplied(one, other) if name == "mul" else divided(one, other)
            what = "a product"
        constant = [state for state in states if state.what == "a constant"]
        if constant:
            what = next(state.activation for state in states if state.what != "a constant") or what
        state = self._source((index, 0, 0), signal, what)
        live = {operand: s for operand, s in zip(node.operands, states, strict=True) if s.what != "a constant"}
        if constant or len(union) > _MOST_PARTS:
            return replace(state, parts=union or state.parts)
        return replace(state, parts=union, joint=call_of(node, lambda o: live[o].joint))

    def _integrated(
        self, index: int, node: Node, states: Mapping[Operand, State], union: frozenset[Source]
    ) -> State | None:
        """A function of several independent parts, some of which may stand in it more than once."""
        joint = call_of(node, lambda o: states[o].joint if o in states else self.number(o))
        found_in = variables(joint)
        if not found_in or len(found_in) > _MOST_PARTS:
            return None
        shape = _NOISY if any(self._sources[variable].random for variable in found_in) else _QUIET
        found = evaluate(joint, self._samples(found_in, shape)).view(shape)
        mean, second, quiet = float(found.mean()), float(found.square().mean()), float(found.mean(1).square().mean())
        keep = quiet / second if second > 0 else 1.0
        state = self._source((index, 0, 0), self._usual(Signal(mean, second, mean**2, keep)), "a joint function")
        return replace(state, parts=union, joint=joint)

    def _samples(self, of: Sequence[Variable], shape: tuple[int, int]) -> dict[Variable, Tensor]:
        """Quasi-random values of independent parts: every value of the activations meets every value of the noise."""
        values = {}
        for noisy, count in zip((False, True), shape, strict=True):
            chosen = [variable for variable in of if self._sources[variable].random is noisy]
            if not chosen:
                continue
            points = (torch.quasirandom.SobolEngine(len(chosen)).draw(count, dtype=torch.float64) + 0.5 / count) % 1
            for variable, u in zip(chosen, points.T, strict=True):
                state = self._sources[variable]
                normal = state.origin.mean + state.origin.deviation * torch.special.ndtri(u)
                value = state.noise.quantiles(u) if state.noise is not None else normal
                values[variable] = (value if noisy else value[:, None]).expand(shape).reshape(-1)
        return values

    def _is_number(self, operand: Operand) -> bool:
        return operand in self._numbers or self.constants.uniform(operand) is not None

    def _is_input(self, state: State) -> bool:
        """Whether it is the input, which this rule takes as standardised, however the model scales it."""
        node = self.graph[state.source[0]]
        return node.func is None and not node.static and state.chain == Z

    def number(self, operand: Operand) -> float:
        """A constant operand as one number, its mean."""
        if operand in self._numbers:
            return self._numbers[operand]
        return self.constants.signal(operand).mean
