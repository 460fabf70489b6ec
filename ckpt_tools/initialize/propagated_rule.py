"""The propagated rule: carry moments through the whole graph, to give every z a variance of 1.

The paper's rule looks at the nearest neighbours of a layer and takes all means as zero. This rule
carries mean, second moment and shared moment from the input to the output.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ckpt_tools.errors import UsageError
from ckpt_tools.initialize import mean_field, operations
from ckpt_tools.initialize.chain import Call, Z, chain_function, chain_moments, shared_moment
from ckpt_tools.initialize.mean_field import Signal
from ckpt_tools.initialize.operations import operation_name
from ckpt_tools.initialize.paper_rule import FixedWeight, PaperRule
from ckpt_tools.initialize.rule import UNKNOWN
from ckpt_tools.initialize.state import State
from ckpt_tools.walker.contractions import contraction, weight_geometry
from ckpt_tools.walker.graph import Node
from ckpt_tools.walker.weights import WeightUse

# A distribution whose deviation is below this share of its mean may be replaced by its mean.
_NARROW = 0.3
# The simulation of a maximum: this many units, and this many windows of each.
_UNITS, _WINDOWS = 256, 128
_MAX_WINDOW = 64  # a larger window is simulated with so many positions


class PropagatedRule(PaperRule):
    """Pooling averages, attention averages tokens, and fixed weights count with their values."""

    def _simplify_signal(self, signal: Signal) -> Signal:
        return signal

    def _is_standardised_input(self, state: State) -> bool:
        return False

    def _unknown_signal(self, states: Sequence[State]) -> Signal:
        second = max((state.signal.second for state in states), default=1.0)
        return Signal(0.0, UNKNOWN * second, 0.0)

    def _chain_signal(self, state: State) -> Signal:
        source, chain = state.source_signal, state.chain
        keep = source.keep * state.keep
        try:
            moments = chain_moments(chain, source.mean, source.deviation)
        except UsageError:
            if source.deviation > _NARROW * abs(source.mean):
                raise
            # 1/√x of an average is such a chain: only the tails of the Gaussian, where x ≤ 0, make
            # its moments infinite, and an average does not reach them.
            moments = chain_moments(chain, source.mean, 0.0)
            return Signal(moments.mean, moments.forward, moments.forward, keep)
        common = math.sqrt(max(source.shared - source.mean**2, 0.0))
        independent = math.sqrt(max(source.second - source.mean**2 - common**2, 0.0))
        shared = moments.mean**2
        if common:
            shared = shared_moment(chain, source.mean, common, independent)
        # The quadrature of the shared moment is less exact, and must not exceed the second moment.
        shared = min(shared, moments.forward)
        return Signal(moments.mean, moments.forward / state.keep, shared, keep)

    def _apply_weight(self, index: int, use: WeightUse) -> State:
        state = self.state(use.input)
        if use.geometry.kind == "convolution":
            state = _pad_with_zeros(state, _share_inside(self.graph[index]))
        self._weight_inputs[index] = state
        second = state.signal.second
        # The rewrite will divide the weight by √divisor_square.
        divisor_square = self.seconds.get(use.parameter, second)
        divisor_square += self.backward.get(use.parameter, 0.0)
        scale = 1 / divisor_square if divisor_square > 0 else 1.0
        signal = Signal(0.0, second * scale, state.signal.shared * scale)
        return self._new_source((index, 0, 0), signal, "")

    def _apply_special(self, index: int, node: Node, name: str) -> State | None:
        signal = self._special_signal(node, name)
        if signal is None:
            return super()._apply_special(index, node, name)
        label = "a normalisation" if name in operations.NORMS else name
        return self._new_source((index, 0, 0), signal, label)

    def _special_signal(self, node: Node, name: str) -> Signal | None:
        # The operations are those about which this rule knows more than the paper's.
        operands = self.activation_operands(node)
        if not operands:
            return None
        state = self.state(operands[0])
        x = state.signal
        if name in operations.SOFTMAXES:
            return mean_field.softmax(x, operands[0].shape[node.args[1]])
        if name in operations.ATTENTIONS:
            return self._attention_signal(node)
        if name in operations.NORMS:
            gain, offset = self._scale_and_offset(node)
            return mean_field.normalise(x, gain, offset, per_unit="batch_norm" in name)
        if name == "glu":
            # One half of the input is multiplied with the sigmoid of the other half.
            gate = chain_moments(Call(torch.ops.aten.sigmoid.default, (Z,)), x.mean, x.deviation)
            return mean_field.multiply(x, Signal(gate.mean, gate.forward, gate.mean**2))
        count = operands[0].numel / max(1, math.prod(node.outputs[0]))  # inputs of one output
        if name in operations.MEANS:
            return mean_field.average(x, _window_size(node, count))
        if name in operations.MAXIMA:
            return _maximum_signal(state, round(_window_size(node, count)))
        return _reduction_signal(name, x, count) or self._product_signal(node)

    def _attention_signal(self, node: Node) -> Signal:
        """The moments of softmax(q·k·scale)·v."""
        query, key, value = node.args[:3]
        width, tokens = query.shape[-1], key.shape[-2]
        scale = node.kwargs.get("scale") or 1 / math.sqrt(width)
        logits = mean_field.contract(self.state(query).signal, self.state(key).signal, width)
        weights = mean_field.softmax(mean_field.scale(logits, scale), tokens)
        return mean_field.contract(weights, self.state(value).signal, tokens)

    def _product_signal(self, node: Node) -> Signal | None:
        # Only a product of two activations is meant; None for any other operation.
        product = contraction(node.op)
        if product is None:
            return None
        first, second = (node.args[position] for position in product.factors)
        if self.graph[first.node].static or self.graph[second.node].static:
            return None
        x, y = self.state(first).signal, self.state(second).signal
        return mean_field.contract(x, y, first.shape[-1])

    def _apply_fixed_weight(self, index: int, node: Node, factors: FixedWeight) -> State | None:
        # Under this rule the values of a weight that stays are known, so its output's moments are.
        values = self.constants.tensor(factors.weight)
        if values is None:
            return super()._apply_fixed_weight(index, node, factors)
        layout = weight_geometry(node.op, node.args)
        if layout.kind == "linear":
            if not factors.weight_is_first:
                values = values.transpose(-1, -2)
            values = values.reshape(-1, values.shape[-1], 1)
        elif layout.kind == "transposed convolution":
            # One tap in prod(stride) meets in an output position, on average.
            values = values.transpose(0, 1) / math.sqrt(math.prod(layout.stride))
        signal = _filter_signal(self.state(factors.activation).signal, values.float().flatten(2))
        biases = set(node.operands) - {factors.activation, factors.weight}
        for bias in biases:
            if self.graph[bias.node].static:
                signal = mean_field.add(signal, self.constants.signal(bias))
        return self._new_source((index, 0, 0), signal, "")


def _reduction_signal(name: str, x: Signal, count: float) -> Signal | None:
    """The moments of a sum, norm or variance of x over ``count`` positions; None for others."""
    if name == "sum":
        return mean_field.scale(mean_field.average(x, count), count)
    # The others come to about the same number at every position, so E[x x'] is E[x²].
    if name == "linalg_vector_norm":
        square = count * x.second
        return Signal(math.sqrt(square), square, square)
    if name in ("var", "var_mean", "std"):
        spread = x.second - x.shared
        if name == "std":
            spread = math.sqrt(spread)
        return Signal(spread, spread**2, spread**2)
    return None


def _pad_with_zeros(state: State, share_inside: float) -> State:
    signal = mean_field.scale(state.signal, math.sqrt(share_inside))
    # Two positions have in common only the taps that both keep inside the map.
    signal = dataclasses.replace(signal, shared=signal.shared * share_inside)
    return dataclasses.replace(state, signal=signal)


def _share_inside(node: Node) -> float:
    """The share of a convolution's kernel taps that do not fall on its zero padding."""
    maps, weight, _, *settings = node.args[:6]
    dimensions = len(weight.shape) - 2
    stride, padding, dilation = (_one_per_dimension(numbers, dimensions) for numbers in settings)
    share = 1.0
    for size, taps, step, pad, gap in zip(
        maps.shape[2:], weight.shape[2:], stride, padding, dilation, strict=False
    ):
        outputs = max(1, (size + 2 * pad - gap * (taps - 1) - 1) // step + 1)
        first_tap = torch.arange(outputs) * step - pad
        position = first_tap[:, None] + torch.arange(taps) * gap
        share *= float(((position >= 0) & (position < size)).double().mean())
    return share or 1.0


def _one_per_dimension(numbers: Sequence[int], dimensions: int) -> Sequence[int]:
    return numbers if len(numbers) > 1 else list(numbers) * dimensions


def _window_size(node: Node, inputs_per_output: float) -> float:
    """The number of positions that one output of a pooling sees.

    That of a pooling with a kernel is the kernel's size: its windows may overlap.
    """
    kernel = node.args[1] if len(node.args) > 1 else None
    name = operation_name(node.op)
    if not isinstance(kernel, (list, tuple)) or "pool" not in name or "adaptive" in name:
        return inputs_per_output
    dimensions = int(name[name.index("pool") + 4])  # max_pool2d_with_indices → 2
    return float(kernel[0] ** dimensions) if len(kernel) == 1 else float(math.prod(kernel))


@functools.lru_cache(maxsize=1024)
def _maximum_signal(state: State, count: int) -> Signal:
    """The moments of the largest of ``count`` positions of one unit.

    They are simulated with a fixed seed, so that equal models get equal divisors.
    """
    source, generator = state.source_signal, torch.Generator().manual_seed(0)
    # The positions of a unit have a part in common and an independent part.
    common = max(source.shared - source.mean**2, 0.0)
    independent = max(source.second - source.mean**2 - common, 0.0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    units = normal(_UNITS, 1, 1) * math.sqrt(common)
    noise = normal(_UNITS, _WINDOWS, min(count, _MAX_WINDOW)) * math.sqrt(independent)
    values = chain_function(state.chain)(source.mean + units + noise)
    if state.keep < 1:
        uniform = torch.rand(values.shape, generator=generator, dtype=torch.float64)
        values = values * (uniform < state.keep) / state.keep
    largest = values.amax(-1)
    # The product of two independent halves estimates a unit's squared mean without bias.
    half = _WINDOWS // 2
    shared = largest[:, :half].mean(1) * largest[:, half:].mean(1)
    return Signal(
        float(largest.mean()),
        float(largest.square().mean()),
        float(shared.mean()),
        source.keep * state.keep,
    )


def _filter_signal(x: Signal, weight: Tensor) -> Signal:
    """The moments of Σ w x for a weight of shape (units, inputs, taps).

    Different inputs share only their mean. The taps of one input share what two positions share.
    """
    squares = float(weight.square().sum((1, 2)).mean())
    tap_sums = float(weight.sum(2).square().sum(1).mean())
    totals = weight.sum((1, 2))
    shared = tap_sums * (x.shared - x.mean**2) + float(totals.square().mean()) * x.mean**2
    second = squares * (x.second - x.shared) + shared
    return Signal(float(totals.mean()) * x.mean, second, shared, x.keep)
