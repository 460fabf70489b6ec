"""What follows a weight layer: the nonlinearity and the dropout between its output and whoever uses it."""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ckpt_tools.errors import UsageError
from ckpt_tools.initialize.chain import Chain, Z, label, moments, op_name
from ckpt_tools.initialize.flow import Flow
from ckpt_tools.initialize.kinds import MAXIMA, MEANS, NEUTRAL, NORMS, is_pointwise
from ckpt_tools.initialize.rule import UNKNOWN
from ckpt_tools.initialize.state import call_of, is_dropout
from ckpt_tools.walker.contractions import contraction
from ckpt_tools.walker.graph import Graph, Node, Operand

_TRANSPARENT = (NEUTRAL | MEANS | MAXIMA | NORMS | {"native_dropout", "copy"}) - {"cat", "stack"}


@dataclass(frozen=True)
class Follower:
    """``slope`` E[f'(z)²] and keep probability ``keep`` of what follows a layer, averaged over its consumers."""

    activation: str
    slope: float
    keep: float


@dataclass(frozen=True)
class _Reached:
    """A function of z alone; None for the chain: one that cannot be replayed."""

    chain: Chain | None
    keep: float


def follower(flow: Flow, start: int) -> Follower:
    """The function of z = the output of node ``start`` that its consumers see, z ~ N(0, 1).

    Normalisations and pooling count as neutral, as in the paper; another weight, a join with other activations and the
    model's output end it. Behind anything else the slope is unknown, 0.5.
    """
    reached = {start: _Reached(Z, 1.0)}
    waiting, seen = _value_readers(flow.graph, start), {start}
    while waiting:
        index = heapq.heappop(waiting)  # in order of execution, so that what it reads is decided already
        if index in seen:
            continue
        seen.add(index)
        found = _through(flow, flow.graph[index], reached)
        if found is not None:
            reached[index] = found
            for reader in _value_readers(flow.graph, index):
                heapq.heappush(waiting, reader)
    ends: dict[_Reached, None] = {}
    for index, function in reached.items():
        readers = _value_readers(flow.graph, index)
        outside = [flow.graph[reader] for reader in readers if reader not in reached]
        if not readers or any(_stops(node) for node in outside):
            ends[function] = None
        if not all(_stops(node) for node in outside):
            ends[_Reached(None, function.keep)] = None
    return _average(ends)


def _average(ends: Iterable[_Reached]) -> Follower:
    found = []
    for end in ends:
        try:
            slope = UNKNOWN if end.chain is None else moments(end.chain).backward
            name = "unknown" if end.chain is None else label(end.chain)
        except (UsageError, ArithmeticError, RuntimeError, TypeError):
            slope, name = UNKNOWN, "unknown"
        found.append((name, slope, end.keep))
    names = list(dict.fromkeys(name for name, _, _ in found))
    slopes, keeps = [slope for _, slope, _ in found], [keep for _, _, keep in found]
    return Follower(" | ".join(names[:3]), statistics.fmean(slopes), statistics.fmean(keeps))


def _through(flow: Flow, node: Node, reached: dict[int, _Reached]) -> _Reached | None:
    """The operation as one more step of a function of z; None where it is none."""
    name = op_name(node.op)
    operands = [operand for operand in node.operands if not flow.graph[operand.node].static]
    operands = operands if is_pointwise(node.op) else flow.live(node)
    live = [operand for operand in operands if not flow.state(operand).random]
    if not live or any(operand.node not in reached for operand in live):
        return None
    first = reached[live[0].node]
    if name in _TRANSPARENT:
        keep = 1.0 - float(node.args[1]) if name == "native_dropout" else 1.0
        return _Reached(first.chain, first.keep * keep)
    if not is_pointwise(node.op) or first.chain is None:
        return None
    masks = [state for state in map(flow.state, operands) if state.random]
    if masks and not is_dropout(name, masks):
        return None
    keep = min(reached[operand.node].keep for operand in live)
    keep *= math.prod(mask.signal.mean**2 / mask.signal.second for mask in masks)

    def part(operand: Operand) -> Any:
        if operand.node in reached:
            return reached[operand.node].chain
        return flow.state(operand).signal.mean if flow.state(operand).random else flow.number(operand)

    return _Reached(call_of(node, part), keep)


def _value_readers(graph: Graph, index: int) -> list[int]:
    found = [(reader, graph[reader]) for reader in graph.readers[index]]
    return [reader for reader, node in found if node.func is not None and not node.static and not node.random]


def _stops(node: Node) -> bool:
    """Whether z goes into the operation as it is: a weight, or a join with other activations."""
    func = node.func
    return func is not None and (contraction(func) is not None or is_pointwise(func) or op_name(func) in NEUTRAL)
