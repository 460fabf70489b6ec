"""What follows a weight layer: the nonlinearity and the dropout between its output and whoever uses it."""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_tools.errors import UsageError
from ckpt_tools.initialize.chain import Chain, Z, function, label, moments, op_name
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
    part: tuple[int, int] | None = None  # of the layer's output: offset and size; None for all of it
    average: float | None = None  # what it comes to where it is a function of an average


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
        step = _through(flow, flow.graph[index], reached)
        if step is not None:
            reached[index] = step
            for reader in _value_readers(flow.graph, index):
                heapq.heappush(waiting, reader)
    ends: dict[_Reached, None] = {}
    for index, found in reached.items():
        readers = _value_readers(flow.graph, index)
        outside = [flow.graph[reader] for reader in readers if reader not in reached]
        if not readers or any(_stops(node) for node in outside):
            ends[found] = None
        if not all(_stops(node) for node in outside):
            ends[_Reached(None, found.keep)] = None
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
    before = [reached[operand.node] for operand in live]
    parts = {_part(flow.graph, operand, one) for operand, one in zip(live, before, strict=True)}
    if len(parts) > 1 or any(one.chain is None for one in before):
        return None  # two halves of a layer's output are independent
    (which,) = parts
    first = before[0]
    if name in _TRANSPARENT:
        keep = 1.0 - float(node.args[1]) if name == "native_dropout" else 1.0
        average = moments(first.chain).mean if name in MEANS and first.chain is not None else first.average
        return _Reached(first.chain, first.keep * keep, which, average)
    masks = [state for state in map(flow.state, operands) if state.random]
    if not is_pointwise(node.op) or (masks and not is_dropout(name, masks)):
        return None
    averages = [one.average for one in before]
    alone = None not in averages  # made of averages only

    def part(operand: Operand) -> Any:
        one = reached.get(operand.node)
        if one is not None:
            return one.chain if alone or one.average is None else one.average
        return flow.state(operand).signal.mean if flow.state(operand).random else flow.number(operand)

    keep = min(one.keep for one in before)
    keep *= math.prod(mask.signal.mean**2 / mask.signal.second for mask in masks)
    average = None
    if alone:
        step = call_of(node, lambda operand: Z if operand.node in reached else part(operand))
        average = float(function(step)(torch.tensor([averages[0]], dtype=torch.float64)))
    return _Reached(call_of(node, part), keep, which, average)


def _part(graph: Graph, operand: Operand, reached: _Reached) -> tuple[int, int] | None:
    """Which part of the layer's output an operand shows."""
    outputs = graph[operand.node].outputs
    if reached.part is not None or not outputs or math.prod(outputs[operand.output]) == operand.numel:
        return reached.part
    return (operand.offset, operand.numel)


def _value_readers(graph: Graph, index: int) -> list[int]:
    found = [(reader, graph[reader]) for reader in graph.readers[index]]
    return [reader for reader, node in found if node.func is not None and not node.static and not node.random]


def _stops(node: Node) -> bool:
    """Whether z goes into the operation as it is: a weight, or a join with other activations."""
    func = node.func
    return func is not None and (contraction(func) is not None or is_pointwise(func) or op_name(func) in NEUTRAL)
