"""The paper's rule: what every weight layer is fed with, by its nearest neighbours alone.

The rule goes from operation to operation through the graph. A `State` describes an activation as a
pointwise function (``chain``) of a Gaussian ``source``, with dropout between. Sources are the
outputs of weight layers and normalisations, the input, and activations that were joined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ckpt_tools.errors import UsageError
from ckpt_tools.initialize import mean_field, operations
from ckpt_tools.initialize.chain import Variable, Z, chain_moments
from ckpt_tools.initialize.mean_field import STANDARD, ZERO, Signal
from ckpt_tools.initialize.noise import noise_distribution
from ckpt_tools.initialize.operations import is_pointwise, operation_name
from ckpt_tools.initialize.pointwise import Pointwise
from ckpt_tools.initialize.rule import UNKNOWN
from ckpt_tools.initialize.simulation import simulate_second_moment
from ckpt_tools.initialize.state import CONSTANT, State, mask_keep
from ckpt_tools.walker.contractions import contraction
from ckpt_tools.walker.graph import Node, Operand
from ckpt_tools.walker.weights import WeightUse


@dataclass(frozen=True)
class FixedWeight:
    """The factors of a product with a weight that the rewrite leaves as it is.

    ``weight_is_first`` tells in which order the two are multiplied.
    """

    activation: Operand
    weight: Operand
    weight_is_first: bool


@dataclass
class PaperRule(Pointwise):
    """Every activation has mean zero, and every weight layer's output is N(0, 1)."""

    uses: Sequence[WeightUse] = ()
    _states: list[State] = field(init=False, default_factory=list)
    _weight_inputs: dict[int, State] = field(init=False, default_factory=dict)
    # The part of a tensor that was written, for tensors that were made empty or zero; by node.
    _written: dict[int, float] = field(init=False, default_factory=dict)

    def weight_inputs(self) -> dict[int, State]:
        """The state that reaches each weight use, by the use's node.

        It computes the states of all nodes in order; `state` answers for them from then on.
        """
        uses = {use.node: use for use in self.uses}
        for index, node in enumerate(self.graph.nodes):
            self._states.append(self._compute_state(index, node, uses.get(index)))
        return self._weight_inputs

    def state(self, operand: Operand) -> State:
        """An operand's state.

        A view of a part of an activation is a source of its own: the channels of a layer's output
        are independent of each other.
        """
        part = (operand.node, operand.offset, operand.numel)
        if self.graph[operand.node].static:
            signal = self._simplify_signal(self.constants.signal(operand))
            return State(signal, part, signal, CONSTANT)
        state = self._states[operand.node]
        outputs = self.graph[operand.node].outputs  # an input has none
        if not outputs or state.random or math.prod(outputs[operand.output]) == operand.numel:
            return state
        concatenated = _concatenated_operand(self.graph[operand.node], operand)
        if concatenated is not None:
            return self.state(concatenated)
        label = state.source_label if state.chain == Z else state.activation
        return self._new_source(part, state.signal, label)

    def activation_operands(self, node: Node) -> list[Operand]:
        """Operands that carry activations, not constants or indices."""
        live = [operand for operand in node.operands if not self.graph[operand.node].static]
        return [operand for operand in live if operand.floating] or live

    def _compute_state(self, index: int, node: Node, use: WeightUse | None) -> State:
        if node.func is None or node.static:
            return self._new_source((index, 0, 0), STANDARD, "the input")
        if use is not None:
            return self._apply_weight(index, use)
        try:
            state = self._apply_operation(index, node)
        except (UsageError, ArithmeticError, RuntimeError, TypeError, ValueError):
            state = None  # the operation cannot be replayed as a function of one value
        if state is None or not math.isfinite(state.signal.second):
            return self._unknown_state(index, node)
        # Coverage is a quotient of floats, hence the tolerance here and in `_signal_after_write`.
        if node.base is None or node.coverage > 0.999:
            return state
        signal = self._signal_after_write(index, node, node.base, state)
        return self._new_source((index, 0, 0), signal, "a concatenation")

    def _signal_after_write(self, index: int, node: Node, base: Operand, new: State) -> Signal:
        """The moments of a tensor after a part of it was written.

        A tensor that was made empty or zero is filled part by part, and is zero elsewhere.
        """
        written = 0.0 if _is_blank(self.graph[base.node]) else self._written.get(base.node)
        if written is None or written + node.coverage > 1.001:
            old = self.state(base).signal
            return mean_field.mix([(new.signal, node.coverage), (old, 1 - node.coverage)])
        self._written[index] = written + node.coverage
        blank = max(0.0, 1 - written - node.coverage)
        earlier = ZERO
        if written > 0:
            # The base's signal counts its blank part, too. This is that of the written part alone.
            earlier = mean_field.scale(self._states[base.node].signal, 1 / math.sqrt(written))
        return mean_field.mix([(new.signal, node.coverage), (earlier, written), (ZERO, blank)])

    def _apply_operation(self, index: int, node: Node) -> State | None:
        name = operation_name(node.op)
        if node.random and name in operations.NOISES:
            return self._draw_noise(index, node)
        if name == "native_dropout":
            return self._apply_dropout(self.state(node.args[0]), 1.0 - float(node.args[1]))
        if name == "copy":
            return self.state(node.args[1])
        if name in operations.NEUTRAL:
            return self._move_values(index, node)
        if is_pointwise(node.op):
            return self._apply_pointwise(index, node)
        return self._apply_special(index, node, name)

    def _apply_special(self, index: int, node: Node, name: str) -> State | None:
        """The state behind an operation that neither moves values nor is pointwise.

        Pooling is neutral under this rule, as in the paper.
        """
        if name in operations.NORMS:
            gain, offset = self._scale_and_offset(node)
            signal = Signal(0.0, gain + offset.second)
            return self._new_source((index, 0, 0), signal, "a normalisation")
        if name in operations.MEANS:
            return self._average_positions(index, self.state(self.activation_operands(node)[0]))
        if name in operations.MAXIMA:
            return self.state(self.activation_operands(node)[0])
        if name == "embedding":
            signal = self._simplify_signal(self.constants.signal(node.args[0]))
            return self._new_source((index, 0, 0), signal, "an embedding")
        product = contraction(node.op)
        if product is None:
            return None
        first, second = (node.args[position] for position in product.factors)
        if self.graph[first.node].static:
            return self._apply_fixed_weight(index, node, FixedWeight(second, first, True))
        if self.graph[second.node].static:
            return self._apply_fixed_weight(index, node, FixedWeight(first, second, False))
        return None

    def _average_positions(self, index: int, state: State) -> State:
        """The state behind a mean over positions or channels.

        An operation that reads it alone sees the activation itself, since pooling is neutral.
        Beside what was averaged it counts as the number ``average``, as in an RMS norm.
        """
        average = chain_moments(state.chain, math.sqrt(state.source_signal.second)).mean
        source = self._new_source((index, 0, 0), state.signal, state.activation)
        return replace(
            state,
            source=source.source,
            parts=source.parts,
            joint=source.joint,
            averaged_source=state.averaged_source or state.source,
            average=average,
        )

    def _apply_fixed_weight(self, index: int, node: Node, factors: FixedWeight) -> State | None:
        # A weight that is computed from parameters, such as a standardised one, has its scale by
        # design. A constant filter is a pooling, which is neutral.
        if self.constants.depends_on_parameter(factors.weight):
            return self._new_source((index, 0, 0), STANDARD, "")
        return self.state(factors.activation)

    def _scale_and_offset(self, node: Node) -> tuple[float, Signal]:
        """E[γ²] and the moments of β of a normalisation layer."""
        names = [argument.name for argument in node.op._schema.arguments]
        arguments = dict(zip(names, node.args, strict=False))
        weight, bias = arguments.get("weight"), arguments.get("bias")
        gain = self.constants.signal(weight).second if isinstance(weight, Operand) else 1.0
        if not isinstance(bias, Operand):
            return gain, ZERO
        return gain, self._simplify_signal(self.constants.signal(bias))

    def _apply_weight(self, index: int, use: WeightUse) -> State:
        self._weight_inputs[index] = self.state(use.input)
        return self._new_source((index, 0, 0), STANDARD, "")

    def _apply_dropout(self, state: State, keep: float) -> State:
        # The mask of inverted dropout is 0 or 1 / keep: E[m] = 1 and E[m²] = 1 / keep.
        mask = Signal(1.0, 1 / keep)
        mask = replace(mask, keep=mask_keep(mask))
        signal = mean_field.multiply(state.signal, mask)
        return replace(state, keep=state.keep * mask.keep, signal=signal)

    def _unknown_state(self, index: int, node: Node) -> State:
        operands = self.activation_operands(node)
        states = [self.state(operand) for operand in operands]
        if states and all(state.random for state in states):
            return replace(states[0], noise=None)  # pooled or thinned out, it is still noise
        name = operation_name(node.op)
        second, label = None, f"unknown ({name})"
        # Several activations may depend on each other, so that nothing follows from their moments.
        if len(operands) == 1 and operands[0].floating:
            second = simulate_second_moment(node, states[0], self.constants)
        if second is not None and math.isfinite(second):
            label = name
        elif second is not None:
            second, label = None, f"{name}, undefined on N(0, 1)"
        signal = Signal(0.0, UNKNOWN if second is None else second)
        return self._new_source((index, 0, 0), signal, label)

    def _move_values(self, index: int, node: Node) -> State | None:
        # One tensor stays what it is, wherever its values go. Several are mixed by size.
        operands = self.activation_operands(node)[:1]
        if operation_name(node.op) in ("cat", "stack"):
            operands = [operand for operand in node.operands if operand.numel]
        if not operands:
            return None
        states = [self.state(operand) for operand in operands]
        if len(states) == 1:
            return states[0]
        sizes = [math.prod(operand.shape) for operand in operands]
        signals = [state.signal for state in states]
        signal = mean_field.mix(list(zip(signals, sizes, strict=True)))
        names = {state.activation for state in states}
        label = f"concatenation of {len(states)}"
        if len(names) == 1:
            label = f"concatenated {names.pop()}"
        return self._new_source((index, 0, 0), signal, label)

    def _draw_noise(self, index: int, node: Node) -> State:
        statics = (operand for operand in node.operands if self.graph[operand.node].static)
        operand = next(statics, None)
        probability = self.constants.uniform_value(operand) if operand is not None else None
        noise = noise_distribution(node, probability)
        # Of unknown noise the moments are those of Unif[0, 1].
        signal = noise.moments(Z) if noise is not None else Signal(0.5, 1 / 3)
        source = (index, 0, 0)
        state = replace(self._new_source(source, signal, "noise"), noise=noise, random=True)
        self._sources[Variable(source)] = state
        return state


def _is_blank(node: Node) -> bool:
    if not node.static or node.func is None:
        return False
    return operation_name(node.func).removesuffix("_like") in operations.BLANK_MAKERS


def _concatenated_operand(node: Node, view: Operand) -> Operand | None:
    """The one operand of a concatenation that a view of its result shows.

    None if the view shows several, or the node is no concatenation.
    """
    if node.func is None or operation_name(node.func) != "cat":
        return None
    if not isinstance(node.args[0], (list, tuple)):
        return None
    operands: Sequence[Operand] = node.args[0]
    shape = node.outputs[0]
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(shape)
    step = math.prod(shape[dim + 1 :])  # the stride of `dim` in the contiguous result
    start = view.offset // step % shape[dim]
    sizes = [size for size, stride in zip(view.shape, view.stride, strict=True) if stride == step]
    end = start + max((size for size in sizes if start + size <= shape[dim]), default=1)
    position = 0
    for operand in operands:
        # An empty tensor of one dimension may be concatenated with tensors of any shape.
        size = operand.shape[dim] if len(operand.shape) == len(shape) else 0
        if position <= start and end <= position + size:
            return operand
        position += size
    return None
