"""The activation that a pointwise operation makes of its operands.

The result is one more link of a chain, a sum or product of independent factors, or a function of
several parts that is integrated numerically.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ckpt_tools.initialize import mean_field
from ckpt_tools.initialize.chain import (
    Elements,
    Variable,
    Z,
    chain_function,
    chain_moments,
    evaluate_chain,
    list_variables,
)
from ckpt_tools.initialize.constants import Constants
from ckpt_tools.initialize.mean_field import Signal
from ckpt_tools.initialize.operations import ARITHMETIC, operation_name
from ckpt_tools.initialize.pointwise_operands import MAX_PARTS, PointwiseOperands
from ckpt_tools.initialize.state import (
    CONSTANT,
    Source,
    State,
    factor_signal,
    replay_node,
)
from ckpt_tools.walker.graph import Graph, Node, Operand

# How many values of the activations meet how many values of the noise.
_SHAPE_WITH_NOISE, _SHAPE_WITHOUT_NOISE = (2**11, 2**8), (2**12, 1)
_NEGLIGIBLE = 1e-9  # share of E[x²] below which a branch counts as zero


@dataclass
class Pointwise:
    """The states of operands, and what pointwise operations make of them.

    `PaperRule` extends it by all other operations.
    """

    graph: Graph
    constants: Constants
    _sources: dict[Variable, State] = field(init=False, default_factory=dict)

    def state(self, operand: Operand) -> State:
        """The state of an operand.

        Subclasses know the states of all nodes that were executed before.
        """
        raise NotImplementedError

    def _new_source(self, source: Source, signal: Signal, source_label: str) -> State:
        """A state that counts as Gaussian, and as independent of all others."""
        variable = Variable(source)
        state = State(signal, source, signal, source_label, joint=variable, parts=frozenset({source}))
        self._sources[variable] = state
        return state

    def _simplify_signal(self, signal: Signal) -> Signal:
        # The paper's rule takes f(z) and W as zero-centred (section 2.1.1).
        return replace(signal, mean=0.0)

    def _is_standardised_input(self, state: State) -> bool:
        # The paper's rule takes the input as standardised, however the model scales it.
        node = self.graph[state.source[0]]
        return node.func is None and not node.static and state.chain == Z

    def _chain_signal(self, state: State) -> Signal:
        moments = chain_moments(state.chain, math.sqrt(state.source_signal.second))
        keep = state.source_signal.keep * state.keep
        return Signal(0.0, moments.forward / state.keep, keep)

    def _apply_pointwise(self, index: int, node: Node) -> State | None:
        """The state behind a pointwise operation; None where it cannot be told."""
        operands = self._sort_operands(node)
        if not operands.activations:
            return _transform_noise(operands)
        is_arithmetic = operands.name in ARITHMETIC
        activation = operands.activations[0]
        if is_arithmetic and len(operands.states) == 1 and self._is_standardised_input(activation):
            return activation
        if operands.extend_a_chain:
            return self._extend_state(operands)
        if operands.need_an_integral and operands.can_be_integrated:
            return self._integrate(index, operands)
        # The moments of a sum or product of independent operands follow from theirs.
        if is_arithmetic and len(node.operands) == 2:
            return self._join_independent(index, operands)
        return self._integrate(index, operands) if operands.can_be_integrated else None

    def _sort_operands(self, node: Node) -> PointwiseOperands:
        live = [operand for operand in node.operands if not self.graph[operand.node].static]
        states = {operand: self.state(operand) for operand in live}
        sources = {state.source for state in states.values() if state.averaged_source is None}
        # An average beside what it averages, as in x / √mean(x²), counts as a number.
        averages = {o: state.average for o, state in states.items() if state.averaged_source in sources}
        states = {operand: state for operand, state in states.items() if operand not in averages}
        return PointwiseOperands(node, operation_name(node.op), states, averages, self.constants)

    def _extend_state(self, operands: PointwiseOperands) -> State:
        """The state with one more link in its chain.

        A dropout mask stands in the chain with its mean; its spread goes into ``keep``.
        """
        state = replace(
            operands.activations[0],
            chain=operands.replay(lambda s: s.signal.mean if s.random else s.chain),
            keep=operands.keep,
            joint=operands.replay_joint(),
            parts=operands.parts,
        )
        if state.averaged_source is None:
            return replace(state, signal=self._chain_signal(state))
        step = chain_function(operands.replay(lambda _: Z))
        average = float(step(torch.tensor([state.average], dtype=torch.float64)))
        return replace(state, average=average, signal=Signal(0.0, average**2 / state.keep, state.keep))

    def _join_independent(self, index: int, operands: PointwiseOperands) -> State:
        """The sum or product of two independent operands.

        At least one is an activation; the other may also be a constant tensor or noise.
        """
        node = operands.node
        first, second = (self.state(operand) for operand in node.operands)
        x, y = factor_signal(first), factor_signal(second)
        if operands.name in ("add", "sub"):
            # Many residual branches start at zero, behind a layer scale or a gain of zero.
            if y.second <= _NEGLIGIBLE * x.second:
                return first
            if operands.name == "add" and x.second <= _NEGLIGIBLE * y.second:
                return second
            y = mean_field.scale(y, float(node.kwargs.get("alpha", 1)))
            signal = mean_field.add(x, y, 1.0 if operands.name == "add" else -1.0)
            label = "a sum"
        else:
            combine = mean_field.multiply if operands.name == "mul" else mean_field.divide
            signal = combine(x, y)
            label = "a product"
        activations = [state for state in (first, second) if state.source_label != CONSTANT]
        has_constant = len(activations) < 2
        if has_constant:
            label = activations[0].activation or label
        state = self._new_source((index, 0, 0), signal, label)
        if has_constant or len(operands.parts) > MAX_PARTS:
            return replace(state, parts=operands.parts or state.parts)
        joint = replay_node(node, lambda operand: self.state(operand).joint)
        return replace(state, parts=operands.parts, joint=joint)

    def _integrate(self, index: int, operands: PointwiseOperands) -> State | None:
        # The parts are independent of each other, but each may occur several times in ``joint``.
        joint = operands.replay_joint()
        variables = list_variables(joint)
        if not variables or len(variables) > MAX_PARTS:
            return None
        has_noise = any(map(self._is_noise, variables))
        shape = _SHAPE_WITH_NOISE if has_noise else _SHAPE_WITHOUT_NOISE
        values = evaluate_chain(joint, self._sample_sources(variables, shape)).view(shape)
        mean, second = float(values.mean()), float(values.square().mean())
        # Averaging over the noise first gives the moment that the activation has without dropout.
        without_dropout = float(values.mean(1).square().mean())
        keep = without_dropout / second if second > 0 else 1.0
        signal = self._simplify_signal(Signal(mean, second, keep))
        state = self._new_source((index, 0, 0), signal, "a joint function")
        return replace(state, parts=operands.parts, joint=joint)

    def _is_noise(self, variable: Variable | Elements) -> bool:
        return isinstance(variable, Variable) and self._sources[variable].random

    def _sample_sources(
        self, variables: Sequence[Variable | Elements], shape: tuple[int, int]
    ) -> dict[Variable | Elements, Tensor]:
        """Quasi-random values of independent sources and constants, as flat tensors.

        Every value of the activations and constants (the first dimension of ``shape``) meets every
        value of the noise (the second).
        """
        noises = [variable for variable in variables if self._is_noise(variable)]
        others = [variable for variable in variables if variable not in noises]
        values = {}
        # Constants of one length belong to the same channels, so they share one dimension.
        keys = {v: len(v.values) if isinstance(v, Elements) else v for v in others}
        dimensions = list(dict.fromkeys(keys.values()))
        points = dict(zip(dimensions, _uniform_points(len(dimensions), shape[0]), strict=True))
        for variable in others:
            u = points[keys[variable]]
            values[variable] = self._quantiles(variable, u)[:, None].expand(shape).reshape(-1)
        for variable, u in zip(noises, _uniform_points(len(noises), shape[1]), strict=True):
            values[variable] = self._quantiles(variable, u).expand(shape).reshape(-1)
        return values

    def _quantiles(self, variable: Variable | Elements, u: Tensor) -> Tensor:
        if isinstance(variable, Elements):
            return variable.quantiles(u)
        source = self._sources[variable]
        if source.noise is not None:
            return source.noise.quantiles(u)
        standard_normal: Tensor = torch.special.ndtri(u)
        return source.source_signal.mean + source.source_signal.deviation * standard_normal


def _transform_noise(operands: PointwiseOperands) -> State | None:
    # Dropout masks are made in several steps, such as floor(keep + u) / keep.
    noises = list(operands.states.values())
    first = noises[0] if noises else None
    if first is None or first.noise is None or len({state.source for state in noises}) > 1:
        return None
    chain = operands.replay(lambda state: state.chain)
    joint = operands.replay_joint()
    return replace(first, chain=chain, joint=joint, signal=first.noise.moments(chain))


def _uniform_points(dimensions: int, count: int) -> Sequence[Tensor]:
    """``count`` points of a Sobol sequence on (0, 1), one tensor for each dimension."""
    if not dimensions:
        return []
    points = torch.quasirandom.SobolEngine(dimensions).draw(count, dtype=torch.float64)
    # The sequence starts at 0, whose normal quantile is infinite; half a step keeps off the ends.
    return list(((points + 0.5 / count) % 1).T)
