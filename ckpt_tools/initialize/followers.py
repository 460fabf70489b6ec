"""What follows a weight layer: the nonlinearity and dropout between its output and its readers."""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ckpt_tools.errors import UsageError
from ckpt_tools.initialize import operations
from ckpt_tools.initialize.chain import Chain, Elements, Z, chain_function, chain_label, chain_moments
from ckpt_tools.initialize.operations import is_pointwise, operation_name
from ckpt_tools.initialize.paper_rule import PaperRule
from ckpt_tools.initialize.rule import UNKNOWN
from ckpt_tools.initialize.state import State, is_dropout, mask_keep, replay_node
from ckpt_tools.walker.contractions import contraction
from ckpt_tools.walker.graph import Graph, Node, Operand


@dataclass(frozen=True)
class Follower:
    """What follows a layer, averaged over the consumers of its output.

    ``activation`` names the functions, ``slope`` is E[f'(z)²], ``keep`` the keep probability.
    """

    activation: str
    slope: float
    keep: float


@dataclass(frozen=True)
class _FunctionOfZ:
    """An activation that is a function of the layer's output z alone.

    ``chain`` is None where it cannot be replayed. ``part`` is the offset and size of the part of
    the output that it is a function of, or None for all of it. ``average`` is its value where it is
    a function of an average over z, else None.
    """

    chain: Chain | None
    keep: float
    part: tuple[int, int] | None = None
    average: float | None = None


def find_follower(states: PaperRule, layer: int) -> Follower:
    """The functions of z ~ N(0, 1), the output of a layer, that its consumers see.

    Normalisations and pooling count as neutral. Another weight, a join with other activations and
    the model's output end a function. Behind any other operation the slope is unknown, 0.5.

    Args:
        states: the graph under the paper's rule, after `PaperRule.weight_inputs`.
        layer: the node of the weight use.
    """
    functions = _functions_of_z(states, layer)
    return _average_functions(_final_functions(states.graph, functions))


def _functions_of_z(states: PaperRule, layer: int) -> dict[int, _FunctionOfZ]:
    """All activations that are functions of the layer's output alone, by node.

    The search starts at the layer and goes on behind every operation whose result is one.
    """
    graph = states.graph
    functions = {layer: _FunctionOfZ(Z, 1.0)}
    waiting, visited = _value_readers(graph, layer), {layer}
    while waiting:
        # Nodes come in order of execution, so all that a node reads is decided before it.
        index = heapq.heappop(waiting)
        if index in visited:
            continue
        visited.add(index)
        function = _function_behind(states, graph[index], functions)
        if function is not None:
            functions[index] = function
            for reader in _value_readers(graph, index):
                heapq.heappush(waiting, reader)
    return functions


def _final_functions(graph: Graph, functions: dict[int, _FunctionOfZ]) -> list[_FunctionOfZ]:
    """The functions of z that the rest of the model reads, each once.

    A weight or a join reads the function as it is; the model's output has no reader. Any other
    operation outside turns it into a function that is not known.
    """
    final: dict[_FunctionOfZ, None] = {}
    for index, function in functions.items():
        readers = _value_readers(graph, index)
        outside = [graph[reader] for reader in readers if reader not in functions]
        unchanged = [_reads_unchanged(node) for node in outside]
        if any(unchanged) or not readers:
            final[function] = None
        if not all(unchanged):
            final[_FunctionOfZ(None, function.keep)] = None
    return list(final)


def _average_functions(functions: Iterable[_FunctionOfZ]) -> Follower:
    names, slopes, keeps = [], [], []
    for function in functions:
        name, slope = "unknown", UNKNOWN
        if function.chain is not None:
            try:
                slope = chain_moments(function.chain).backward
                name = chain_label(function.chain)
            except (UsageError, ArithmeticError, RuntimeError, TypeError):
                pass
        names.append(name)
        slopes.append(slope)
        keeps.append(function.keep)
    label = " | ".join(list(dict.fromkeys(names))[:3])
    return Follower(label, statistics.fmean(slopes), statistics.fmean(keeps))


def _function_behind(
    states: PaperRule, node: Node, functions: dict[int, _FunctionOfZ]
) -> _FunctionOfZ | None:
    """The function of z behind an operation; None where its result is no function of z alone."""
    operands = states.activation_operands(node)
    if is_pointwise(node.op):
        operands = [operand for operand in node.operands if not states.graph[operand.node].static]
    masks = [state for state in map(states.state, operands) if state.random]
    operands = [operand for operand in operands if not states.state(operand).random]
    if not operands or any(operand.node not in functions for operand in operands):
        return None  # noise, or a join with other activations
    inputs = [_view(states.graph, operand, functions[operand.node]) for operand in operands]
    if len({function.part for function in inputs}) > 1:
        return None  # two parts of a layer's output are independent
    if any(function.chain is None for function in inputs):
        return None
    name = operation_name(node.op)
    if name in operations.TRANSPARENT:
        return _pass_through(node, name, inputs[0])
    if is_pointwise(node.op) and (not masks or is_dropout(name, masks)):
        return _apply_pointwise(states, node, functions, inputs, masks)
    return None


def _pass_through(node: Node, name: str, function: _FunctionOfZ) -> _FunctionOfZ:
    if name == "native_dropout":
        return replace(function, keep=function.keep * (1.0 - float(node.args[1])))
    if name in operations.MEANS and function.chain is not None:
        return replace(function, average=chain_moments(function.chain).mean)
    return function


def _apply_pointwise(
    states: PaperRule,
    node: Node,
    functions: dict[int, _FunctionOfZ],
    inputs: Sequence[_FunctionOfZ],
    masks: Sequence[State],
) -> _FunctionOfZ:
    # A function of averages alone, such as √(mean(x²) + ε), is an average, too.
    averages = [function.average for function in inputs]
    averages_only = None not in averages

    def number(operand: Operand) -> float | Elements:
        # All activations among the operands are functions of z, so this one is noise or a constant.
        state = states.state(operand)
        return state.signal.mean if state.random else states.constants.number_or_elements(operand)

    def link(operand: Operand) -> Any:
        if operand.node not in functions:
            return number(operand)
        function = functions[operand.node]
        # Beside what was averaged, an average is a number.
        is_number = function.average is not None and not averages_only
        return function.average if is_number else function.chain

    average = None
    if averages_only:
        step = replay_node(node, lambda o: Z if o.node in functions else number(o))
        average = float(chain_function(step)(torch.tensor([averages[0]], dtype=torch.float64)))
    keep = min(function.keep for function in inputs)
    keep *= math.prod(mask_keep(mask.signal) for mask in masks)
    return _FunctionOfZ(replay_node(node, link), keep, inputs[0].part, average)


def _view(graph: Graph, operand: Operand, function: _FunctionOfZ) -> _FunctionOfZ:
    outputs = graph[operand.node].outputs
    if function.part is not None or not outputs:
        return function
    if math.prod(outputs[operand.output]) == operand.numel:
        return function
    return replace(function, part=(operand.offset, operand.numel))


def _value_readers(graph: Graph, index: int) -> list[int]:
    # Operations that draw noise or are static read only the shape of the node.
    return [
        reader
        for reader in graph.readers[index]
        if graph[reader].func is not None and not graph[reader].static and not graph[reader].random
    ]


def _reads_unchanged(node: Node) -> bool:
    """Whether z enters the operation as it is, at a weight or in a join with other activations."""
    is_neutral = operation_name(node.op) in operations.NEUTRAL
    return is_neutral or is_pointwise(node.op) or contraction(node.op) is not None
