"""The propagated rule: mean and second moment through the whole graph, so that every pre-activation has variance 1."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ckpt_tools.errors import UsageError
from ckpt_tools.initialize.chain import Call, Z, function, moments, op_name, overlap
from ckpt_tools.initialize.flow import Flow
from ckpt_tools.initialize.kinds import ATTENTIONS, MAXIMA, MEANS, NORMS, SOFTMAXES
from ckpt_tools.initialize.rule import UNKNOWN
from ckpt_tools.initialize.signal import (
    Signal,
    added,
    averaged,
    contracted,
    multiplied,
    normalised,
    scaled,
    softmaxed,
)
from ckpt_tools.initialize.state import State
from ckpt_tools.walker.contractions import contraction, weight_geometry
from ckpt_tools.walker.graph import Node, Operand
from ckpt_tools.walker.weights import WeightUse


class Propagation(Flow):
    """Pooling averages, attention averages tokens, weights that stay count with their values."""

    def _usual(self, signal: Signal) -> Signal:
        return signal

    def _is_input(self, state: State) -> bool:
        return False

    def _unknown_signal(self, states: Sequence[State]) -> Signal:
        second = max((state.signal.second for state in states), default=1.0)
        return Signal(0.0, UNKNOWN * second, 0.0)

    def _signal(self, state: State) -> Signal:
        origin, chain = state.origin, state.chain
        try:
            found = moments(chain, origin.mean, origin.deviation)
        except UsageError:
            if origin.deviation > _NARROW * abs(origin.mean):
                raise
            found = moments(chain, origin.mean, 0.0)  # 1/√x of an average, which the tails alone cannot take
            return Signal(found.mean, found.forward, found.forward, origin.keep * state.keep)
        common = math.sqrt(max(origin.shared - origin.mean**2, 0.0))
        own = math.sqrt(max(origin.second - origin.mean**2 - common**2, 0.0))
        shared = overlap(chain, origin.mean, common, own) if common else found.mean**2
        return Signal(found.mean, found.forward / state.keep, min(shared, found.forward), origin.keep * state.keep)

    def _weight(self, index: int, use: WeightUse) -> State:
        fed = self.state(use.input)
        if use.geometry.kind == "convolution":
            # Two positions have in common only the taps that both keep inside the map.
            inside = _inside(self.graph[index])
            padded = scaled(fed.signal, math.sqrt(inside))
            fed = replace(fed, signal=replace(padded, shared=padded.shared * inside))
        self._fed[index] = fed
        forward = fed.signal.second
        squared = self.seconds.get(use.parameter, forward) + self.backward.get(use.parameter, 0.0)
        scale = 1 / squared if squared > 0 else 1.0
        return self._source((index, 0, 0), Signal(0.0, forward * scale, fed.signal.shared * scale), "")

    def _special(self, index: int, node: Node, name: str) -> State | None:
        signal = self._special_signal(node, name)
        if signal is not None:
            return self._source((index, 0, 0), signal, "a normalisation" if name in NORMS else name)
        return super()._special(index, node, name)

    def _special_signal(self, node: Node, name: str) -> Signal | None:
        states = [self.state(operand) for operand in self.live(node)]
        if not states:
            return None
        first = states[0].signal
        ratio = self.live(node)[0].numel / max(1, math.prod(node.outputs[0]))
        if name in NORMS:
            gain, offset = self._affine(node)
            return normalised(first, gain, offset, units="batch_norm" in name)
        if name in MEANS:
            return averaged(first, _window(node, ratio))
        if name in MAXIMA:
            return _maximum(states[0], round(_window(node, ratio)))
        if name == "sum":
            return scaled(averaged(first, ratio), ratio)
        if name == "linalg_vector_norm":
            return Signal(math.sqrt(ratio * first.second), ratio * first.second, ratio * first.second)
        if name in ("var", "var_mean", "std"):
            spread = first.second - first.shared if name != "std" else math.sqrt(first.second - first.shared)
            return Signal(spread, spread**2, spread**2)
        if name == "glu":
            gate = moments(Call(torch.ops.aten.sigmoid.default, (Z,)), first.mean, first.deviation)
            return multiplied(first, Signal(gate.mean, gate.forward, gate.mean**2))
        if name in SOFTMAXES:
            return softmaxed(first, self.live(node)[0].shape[node.args[1]])
        if name in ATTENTIONS:
            return self._attention(node)
        return self._product(node)

    def _attention(self, node: Node) -> Signal:
        """softmax(q·k·scale)·v."""
        query, key, value = node.args[:3]
        width = query.shape[-1]
        scale = node.kwargs.get("scale") or 1 / math.sqrt(width)
        logits = scaled(contracted(self.state(query).signal, self.state(key).signal, width), scale)
        return contracted(softmaxed(logits, key.shape[-2]), self.state(value).signal, key.shape[-2])

    def _product(self, node: Node) -> Signal | None:
        """A matrix product of two activations."""
        found = contraction(node.op)
        if found is None or any(self.graph[node.args[at].node].static for at in found.factors):
            return None
        one, other = (node.args[at] for at in found.factors)
        return contracted(self.state(one).signal, self.state(other).signal, one.shape[-1])

    def _fixed_weight(self, index: int, node: Node, factors: tuple[int, int]) -> State | None:
        """A weight that stays, by its values."""
        given, weight = (node.args[at] for at in factors)
        swapped = self.graph[given.node].static
        if swapped:
            given, weight = weight, given
        values = self.constants.tensor(weight)
        if values is None:
            return super()._fixed_weight(index, node, factors)
        layout = weight_geometry(node.op, node.args)
        if layout.kind == "linear":
            values = (values if swapped else values.transpose(-1, -2)).reshape(
                -1, values.shape[-1 if swapped else -2], 1
            )
        elif layout.kind == "transposed convolution":
            values = values.transpose(0, 1) / math.sqrt(math.prod(layout.stride))
        signal = _filtered(self.state(given).signal, values.float().flatten(2))
        for operand in node.operands:
            if operand not in (given, weight) and self.graph[operand.node].static:
                signal = added(signal, self.constants.signal(operand))  # its bias
        return self._source((index, 0, 0), signal, "")


def _inside(node: Node) -> float:
    """The share of a convolution's kernel taps that do not fall on its zero padding."""
    given, weight, _, stride, padding, dilation = node.args[:6]
    share = 1.0
    for size, taps, step, pad, gap in zip(
        given.shape[2:],
        weight.shape[2:],
        _each(stride, weight),
        _each(padding, weight),
        _each(dilation, weight),
        strict=False,
    ):
        first = torch.arange(max(1, (size + 2 * pad - gap * (taps - 1) - 1) // step + 1)) * step - pad
        at = first[:, None] + torch.arange(taps) * gap
        share *= float(((at >= 0) & (at < size)).double().mean())
    return share or 1.0


def _each(numbers: Sequence[int], weight: Operand) -> Sequence[int]:
    """A setting for every dimension, given once or one by one."""
    return numbers if len(numbers) > 1 else list(numbers) * (len(weight.shape) - 2)


def _window(node: Node, ratio: float) -> float:
    """How many positions one output of a pooling sees."""
    kernel = node.args[1] if len(node.args) > 1 else None
    name = op_name(node.op)
    if not isinstance(kernel, (list, tuple)) or "pool" not in name or "adaptive" in name:
        return ratio
    dimensions = int(name[name.index("pool") + 4])
    return float(kernel[0] ** dimensions) if len(kernel) == 1 else float(math.prod(kernel))


@functools.lru_cache(maxsize=1024)
def _maximum(state: State, count: int) -> Signal:
    """The largest of ``count`` positions of one unit, by simulation with a fixed seed."""
    origin, generator = state.origin, torch.Generator().manual_seed(0)
    common = max(origin.shared - origin.mean**2, 0.0)
    own = max(origin.second - origin.mean**2 - common, 0.0)
    units = torch.randn(_UNITS, 1, 1, generator=generator, dtype=torch.float64) * math.sqrt(common)
    noise = torch.randn(_UNITS, _DRAWS, min(count, 64), generator=generator, dtype=torch.float64) * math.sqrt(own)
    values = function(state.chain)(origin.mean + units + noise)
    if state.keep < 1:
        mask = torch.rand(values.shape, generator=generator, dtype=torch.float64) < state.keep
        values = values * mask / state.keep
    largest = values.amax(-1)
    half = _DRAWS // 2
    shared = largest[:, :half].mean(1) * largest[:, half:].mean(1)  # independent halves: no bias
    return Signal(float(largest.mean()), float(largest.square().mean()), float(shared.mean()), origin.keep * state.keep)


def _filtered(one: Signal, weight: Tensor) -> Signal:
    """Σ w x for a weight (units, inputs, taps): inputs share only their mean, taps of one input what positions do."""
    squares = float(weight.square().sum((1, 2)).mean())
    inputs = float(weight.sum(2).square().sum(1).mean())
    whole = weight.sum((1, 2))
    shared = inputs * (one.shared - one.mean**2) + float(whole.square().mean()) * one.mean**2
    return Signal(float(whole.mean()) * one.mean, squares * (one.second - one.shared) + shared, shared, one.keep)


_NARROW = 0.3  # deviation / mean below which the mean stands for the whole distribution
_UNITS, _DRAWS = 256, 128
