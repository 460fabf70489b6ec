"""From operation to operation through the graph: what every weight layer is fed with.

A ``State`` describes an activation as a pointwise function (``chain``) of a Gaussian ``source``, with dropout between.
Sources are the outputs of weight layers and normalisations, the input, and what several activations were joined into.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt_tools.errors import UsageError
from ckpt_tools.initialize.chain import Variable, Z, moments, op_name
from ckpt_tools.initialize.kinds import MAXIMA, MEANS, NEUTRAL, NORMS, is_pointwise
from ckpt_tools.initialize.noise import NOISES, noise_of
from ckpt_tools.initialize.pointwise import Pointwise
from ckpt_tools.initialize.rule import UNKNOWN
from ckpt_tools.initialize.signal import STANDARD, Signal, mixed, scaled
from ckpt_tools.initialize.state import State
from ckpt_tools.walker.contractions import contraction
from ckpt_tools.walker.graph import Node, Operand
from ckpt_tools.walker.weights import WeightUse

_BLANK = frozenset({"empty", "new_empty", "empty_strided", "new_empty_strided", "zeros", "new_zeros"})


@dataclass
class Flow(Pointwise):
    """The paper's rule: each layer's factors from its neighbours alone, every activation's mean taken as zero.

    ``seconds``: E[x²] by parameter where it is used more than once, averaged over the uses; ``backward``: the backward
    term by parameter. They tell how large a layer's output will be.
    """

    uses: Sequence[WeightUse] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    backward: Mapping[str, float] = field(default_factory=dict)

    def inputs(self) -> dict[int, State]:
        """What reaches each weight use, by its node."""
        self._uses = {use.node: use for use in self.uses}
        self._states: list[State] = []
        self._filled: dict[int, float] = {}
        self._fed: dict[int, State] = {}
        for index, node in enumerate(self.graph.nodes):
            self._states.append(self._made(index, node))
        return self._fed

    def state(self, operand: Operand) -> State:
        """An operand's state; a part of an activation is independent of its other parts."""
        if self.graph[operand.node].static:
            signal = self._usual(self.constants.signal(operand))
            return State(signal, (operand.node, operand.offset, operand.numel), signal, "a constant")
        state = self._states[operand.node]
        outputs = self.graph[operand.node].outputs  # an input has none
        if not outputs or state.random or math.prod(outputs[operand.output]) == operand.numel:
            return state
        if (parts := self._concatenated(operand)) is not None:
            return parts
        what = state.what if state.chain == Z else state.activation
        return self._source((operand.node, operand.offset, operand.numel), state.signal, what)

    def _concatenated(self, operand: Operand) -> State | None:
        """The one part of a concatenation that a view shows; None if it shows several or no concatenation."""
        node = self.graph[operand.node]
        if node.func is None or op_name(node.func) != "cat" or not isinstance(node.args[0], (list, tuple)):
            return None
        shape = node.outputs[0]
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(shape)
        step = math.prod(shape[dim + 1 :])
        start = operand.offset // step % shape[dim]
        along = [size for size, stride in zip(operand.shape, operand.stride, strict=True) if stride == step]
        end = start + max((size for size in along if start + size <= shape[dim]), default=1)
        at = 0
        for part in node.args[0]:
            size = part.shape[dim] if len(part.shape) == len(shape) else 0
            if at <= start and end <= at + size:
                return self.state(part)
            at += size
        return None

    # What each kind of operation makes.

    def _made(self, index: int, node: Node) -> State:
        if node.func is None or node.static:
            return self._source((index, 0, 0), STANDARD, "the input")
        if index in self._uses:
            return self._weight(index, self._uses[index])
        try:
            state = self._operation(index, node)
        except (UsageError, ArithmeticError, RuntimeError, TypeError, ValueError):
            state = None  # an operation that cannot be replayed as a function of one value
        if state is None or not math.isfinite(state.signal.second):
            return self._unknown(index, node)
        if node.base is None or node.coverage > 0.999:
            return state
        return self._source((index, 0, 0), self._overwritten(index, node, node.base, state), "a concatenation")

    def _overwritten(self, index: int, node: Node, base: Operand, new: State) -> Signal:
        """A tensor after a part of it was written; one that was made empty or zero is filled part by part."""
        before = self.graph[base.node]
        blank = before.static and before.func is not None and op_name(before.func).removesuffix("_like") in _BLANK
        filled = 0.0 if blank else self._filled.get(base.node)
        if filled is None or filled + node.coverage > 1.001:
            return mixed([(new.signal, node.coverage), (self.state(base).signal, 1 - node.coverage)])
        self._filled[index] = filled + node.coverage
        nothing = Signal(0.0, 0.0, 0.0)
        parts = [(new.signal, node.coverage), (nothing if blank else self._states[base.node].signal, filled)]
        rest = max(0.0, 1 - filled - node.coverage)
        if blank or filled == 0.0:
            return mixed([*parts, (nothing, rest)])
        whole = scaled(self._states[base.node].signal, 1 / math.sqrt(filled))  # of what was written before
        return mixed([(new.signal, node.coverage), (whole, filled), (nothing, rest)])

    def _operation(self, index: int, node: Node) -> State | None:
        name = op_name(node.op)
        if node.random and name in NOISES:
            return self._noise(index, node)
        if name == "native_dropout":
            state, keep = self.state(node.args[0]), 1.0 - float(node.args[1])
            return self._dropped(state, Signal(1.0, 1 / keep, 1.0))
        if name == "copy":
            return self.state(node.args[1])
        if name in NEUTRAL:
            return self._moved(index, node)
        if is_pointwise(node.op):
            return self._pointwise(index, node)
        return self._special(index, node, name)

    def _special(self, index: int, node: Node, name: str) -> State | None:
        """Neither moved values nor a pointwise function: this rule knows normalisations and leaves pooling neutral."""
        if name in NORMS:
            gain, offset = self._affine(node)
            return self._source((index, 0, 0), Signal(0.0, gain + offset.second, 0.0), "a normalisation")
        if name in MEANS:
            return self._pooled(index, self.state(self.live(node)[0]))
        if name in MAXIMA:
            return self.state(self.live(node)[0])
        if name == "embedding":
            return self._source((index, 0, 0), self._usual(self.constants.signal(node.args[0])), "an embedding")
        found = contraction(node.op)
        if found is None or all(not self.graph[node.args[at].node].static for at in found.factors):
            return None
        return self._fixed_weight(index, node, found.factors)

    def _pooled(self, index: int, state: State) -> State:
        """Neutral for whoever reads it alone; beside what was averaged it is the number that averages come to."""
        average = moments(state.chain, 0.0, math.sqrt(state.origin.second)).mean
        source = (index, 0, 0)
        self._source(source, state.signal, state.activation)
        parts, joint = frozenset({source}), Variable(source)
        over = state.over or state.source
        return replace(state, source=source, parts=parts, joint=joint, over=over, average=average)

    def _fixed_weight(self, index: int, node: Node, factors: tuple[int, int]) -> State | None:
        """A weight that stays. One computed from parameters has its scale by design; a constant filter is a pooling."""
        weight, given = (node.args[at] for at in reversed(factors))
        if self.graph[given.node].static:
            weight, given = given, weight
        if self.constants.trained(weight):
            return self._source((index, 0, 0), STANDARD, "")
        return self.state(given)

    def _affine(self, node: Node) -> tuple[float, Signal]:
        """E[γ²] and β of a normalisation layer."""
        names = [argument.name for argument in node.op._schema.arguments]
        given = dict(zip(names, node.args, strict=False))
        weight, bias = (given.get(name) for name in ("weight", "bias"))
        gain = self.constants.signal(weight).second if isinstance(weight, Operand) else 1.0
        return gain, self._usual(self.constants.signal(bias)) if isinstance(bias, Operand) else Signal(0.0, 0.0, 0.0)

    def _weight(self, index: int, use: WeightUse) -> State:
        fed = self.state(use.input)
        self._fed[index] = fed
        return self._source((index, 0, 0), STANDARD, "")

    def _unknown(self, index: int, node: Node) -> State:
        states = [self.state(operand) for operand in self.live(node)]
        if states and all(state.random for state in states):
            return replace(states[0], noise=None)  # pooled or thinned out, it is still noise
        return self._source((index, 0, 0), self._unknown_signal(states), f"unknown ({op_name(node.op)})")

    def _unknown_signal(self, states: Sequence[State]) -> Signal:
        return Signal(0.0, UNKNOWN, 0.0)

    def live(self, node: Node) -> list[Operand]:
        """Operands that carry activations, not constants or indices."""
        live = [operand for operand in node.operands if not self.graph[operand.node].static]
        return [operand for operand in live if operand.floating] or live

    def _moved(self, index: int, node: Node) -> State | None:
        """Values in other places: one tensor stays what it is, several are averaged by size."""
        joined = op_name(node.op) in ("cat", "stack")
        operands = [o for o in node.operands if o.numel] if joined else self.live(node)[:1]
        if not operands:
            return None
        states = [self.state(operand) for operand in operands]
        if len(states) == 1:
            return states[0]
        sizes = [math.prod(operand.shape) for operand in operands]
        signal = mixed([(state.signal, size) for state, size in zip(states, sizes, strict=True)])
        names = list(dict.fromkeys(state.activation for state in states))
        what = f"concatenated {names[0]}" if len(names) == 1 else f"concatenation of {len(states)}"
        return self._source((index, 0, 0), signal, what)

    def _noise(self, index: int, node: Node) -> State:
        given = next((operand for operand in node.operands if self.graph[operand.node].static), None)
        noise = noise_of(node, self.constants.uniform(given) if given is not None else None)
        signal = noise.moments(Z) if noise is not None else Signal(0.5, 1 / 3, 0.25)
        source = (index, 0, 0)
        state = replace(self._source(source, signal, "noise"), noise=noise, random=True)
        self._sources[Variable(source)] = state
        return state
