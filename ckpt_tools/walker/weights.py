"""The weight layers of a recorded forward: where an operation multiplies activations with a parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ckpt_tools.results import Geometry, WeightLayer
from ckpt_tools.walker.contractions import contraction, weight_geometry
from ckpt_tools.walker.graph import Graph, Node, Operand

_TABLE_WORDS = {"pos", "position", "positional", "rel", "relative"}


@dataclass(frozen=True)
class WeightUse:
    """One use of a weight. ``view`` is the part of the parameter used, laid out as ``weight_geometry`` says."""

    node: int
    parameter: str
    geometry: Geometry
    view: Operand
    input: Operand
    bias: str = ""


def weight_uses(graph: Graph, trainable: Iterable[str]) -> tuple[WeightUse, ...]:
    """Every use of one of the ``trainable`` parameters as a weight, in order of execution."""
    tables = {graph[operand.node].parameter for node in graph.nodes if _embeds(node) for operand in node.operands}
    names = frozenset(name for name in trainable if not _is_table(name) and name not in tables)
    found = {index: use for index in range(len(graph)) if (use := _use(graph, index, names)) is not None}
    made = _weight_makers(graph)
    mixed = {use.parameter for index, use in found.items() if index in made}
    return tuple(use for use in found.values() if use.parameter not in mixed)


def weight_layers(graph: Graph, model: nn.Module) -> tuple[WeightLayer, ...]:
    """The weight layers in order of execution, and for each the nearest ones before and behind it."""
    parameters = dict(model.named_parameters())
    uses = weight_uses(graph, parameters)
    inputs = _inputs(graph, uses)
    order = list(dict.fromkeys(use.parameter for use in uses))
    kinds = {use.parameter: use.geometry.kind for use in uses}
    return tuple(
        WeightLayer(
            name=layer_name(name),
            parameter=name,
            kind=kinds[name],
            shape=tuple(parameters[name].shape),
            inputs=tuple(other for other in order if other in inputs[name]),
            consumers=tuple(other for other in order if name in inputs[other]),
        )
        for name in order
    )


def reason_not_rewritten(graph: Graph, parameter: str, tensor: Tensor) -> str:
    """Why a parameter is no weight that an init rewrite sets."""
    readers = [index for index, node in enumerate(graph.nodes) if node.parameter == parameter and node.func is None]
    operations = [graph[reader] for index in readers for reader in graph.readers[index]]
    names = list(dict.fromkeys(node.func._schema.name.partition("::")[2] for node in operations if node.func))
    if not tensor.requires_grad:
        return "is not trained"
    if not names:
        return "is never read by the forward"
    if "embedding" in names:
        return "is an embedding"
    if _is_table(parameter):
        return "is a positional table"
    if any(node.static for node in operations):
        return "is not used as it is: a tensor computed from it is"
    if any(node.func is not None and contraction(node.func) for node in operations):
        return "multiplies constants only, or makes the weights of another layer"
    return f"is used by {', '.join(names[:3])}, not as a weight"


def layer_name(parameter: str) -> str:
    """The module's name where the parameter is its ``weight``, else the whole key."""
    return parameter.removesuffix(".weight")


def _inputs(graph: Graph, uses: Iterable[WeightUse]) -> dict[str, frozenset[str]]:
    """For each weight the weights whose outputs reach it without passing through another one."""
    at = {use.node: use for use in uses}
    behind: list[frozenset[str]] = []  # of each node: the nearest weights before it
    found: dict[str, frozenset[str]] = {}
    for index, node in enumerate(graph.nodes):
        reads = [*node.operands, *([node.base] if node.base is not None else [])]
        nearest = frozenset().union(*(behind[operand.node] for operand in reads))
        if index in at:
            name = at[index].parameter
            found[name] = found.get(name, frozenset()) | behind[at[index].input.node]
            nearest = frozenset({name})
        behind.append(nearest)
    return found


def _use(graph: Graph, index: int, names: frozenset[str]) -> WeightUse | None:
    node = graph[index]
    found = contraction(node.func) if node.func is not None else None
    if found is None:
        return None
    for weight_at, input_at in _roles(node, found.factors):
        weight, given = node.args[weight_at], node.args[input_at]
        name = graph[weight.node].parameter
        if name not in names or graph[given.node].static:
            continue
        layout = weight_geometry(node.op, node.args)
        view = weight if layout.kind != "linear" else _units_first(weight, transposed=weight_at == found.factors[1])
        bias = node.args[found.bias] if found.bias is not None and len(node.args) > found.bias else None
        return WeightUse(index, name, layout, view, given, _parameter(graph, bias))
    return None


def _is_table(name: str) -> bool:
    """Relative positions are multiplied with queries as weights are; bare parameters tell by their names."""
    words = re.split(r"[._]", name)
    return words[-1] != "weight" and not _TABLE_WORDS.isdisjoint(words)


def _embeds(node: Node) -> bool:
    return node.func is not None and "embedding" in node.func._schema.name


def _weight_makers(graph: Graph) -> set[int]:
    """Operations whose result is the weight of a convolution: a mixture of kernels by the input."""
    found: set[int] = set()
    for node in graph.nodes:
        if (
            node.func is None
            or contraction(node.func) is None
            or weight_geometry(node.func, node.args).kind == "linear"
        ):
            continue
        at = node.args[1].node
        while not graph[at].static and at not in found:
            found.add(at)
            if len(graph[at].operands) == 1:
                at = graph[at].operands[0].node
    return found


def _roles(node: Node, factors: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Which factor may be the weight and which the input; of a matrix product, either."""
    first, second = factors
    yield second, first
    if weight_geometry(node.op, node.args).kind == "linear":
        yield first, second


def _units_first(weight: Operand, *, transposed: bool) -> Operand:
    """The view (…, units, fan-in) of a matrix; a dimension that only repeats the matrix is dropped."""
    shape, stride = list(weight.shape), list(weight.stride)
    if transposed:
        shape[-2:], stride[-2:] = reversed(shape[-2:]), reversed(stride[-2:])
    if len(shape) == 3 and stride[0] == 0:
        del shape[0], stride[0]
    return replace(weight, shape=tuple(shape), stride=tuple(stride))


def _parameter(graph: Graph, operand: Operand | None) -> str:
    return graph[operand.node].parameter if isinstance(operand, Operand) else ""
