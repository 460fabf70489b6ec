"""The weight layers of a recorded forward: where activations are multiplied with a parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ckpt_tools.results import Geometry, WeightLayer
from ckpt_tools.walker.contractions import contraction, weight_geometry
from ckpt_tools.walker.graph import Graph, Node, Operand

# Words in the names of tables of positions, which are multiplied with queries just as weights are.
_TABLE_WORDS = {"pos", "position", "positional", "rel", "relative"}


@dataclass(frozen=True)
class WeightUse:
    """One operation that multiplies its input with a weight.

    ``view`` is the part of the parameter that it uses, laid out as ``Geometry`` says. ``bias`` is
    the name of the parameter that it adds, empty if there is none.
    """

    node: int
    parameter: str
    geometry: Geometry
    view: Operand
    input: Operand
    bias: str = ""


def weight_uses(graph: Graph, trainable: Iterable[str]) -> tuple[WeightUse, ...]:
    """Return every use of a ``trainable`` parameter as a weight, in order of execution.

    Left out are tables of positions, embeddings (also where a tied output layer multiplies with
    them), and parameters of which the forward computes the weights of another layer.
    """
    # A tied output layer multiplies with the embedding, whose values an init rewrite must not set.
    lookups = [node for node in graph.nodes if _is_embedding(node)]
    embeddings = {graph[operand.node].parameter for node in lookups for operand in node.operands}
    names = frozenset(name for name in trainable if not _is_table(name) and name not in embeddings)
    uses = [use for index in range(len(graph)) if (use := _weight_use(graph, index, names))]
    makers = _operations_that_make_weights(graph)
    mixed = {use.parameter for use in uses if use.node in makers}
    return tuple(use for use in uses if use.parameter not in mixed)


def weight_layers(graph: Graph, model: nn.Module) -> tuple[WeightLayer, ...]:
    """Return the weight layers in order of execution.

    ``inputs`` and ``consumers`` of each are the nearest weight layers before and behind it.
    """
    parameters = dict(model.named_parameters())
    uses = weight_uses(graph, parameters)
    inputs = _nearest_weights_before(graph, uses)
    kinds = {use.parameter: use.geometry.kind for use in uses}
    order = list(dict.fromkeys(use.parameter for use in uses))
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
    """Return why an init rewrite leaves a parameter alone; it completes the sentence "NAME …"."""
    leaves = [index for index, node in enumerate(graph.nodes) if node.parameter == parameter]
    operations = [graph[reader] for leaf in leaves for reader in graph.readers[leaf]]
    names = list(dict.fromkeys(node.op._schema.name.partition("::")[2] for node in operations))
    # Several reasons may hold; the most telling one comes first.
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
    if any(contraction(node.func) for node in operations):
        return "multiplies constants only, or makes the weights of another layer"
    return f"is used by {', '.join(names[:3])}, not as a weight"


def layer_name(parameter: str) -> str:
    """Return the module's name where the parameter is its ``weight``, else the parameter's name."""
    return parameter.removesuffix(".weight")


def _nearest_weights_before(graph: Graph, uses: Iterable[WeightUse]) -> dict[str, frozenset[str]]:
    """Return for each weight those whose outputs reach it without passing through another one."""
    use_at = {use.node: use for use in uses}
    reaching: list[frozenset[str]] = []  # for each node the nearest weights before it
    inputs: dict[str, frozenset[str]] = {}
    for index, node in enumerate(graph.nodes):
        # An operation in place keeps the part of its base that it does not overwrite.
        sources = [*node.operands, *([node.base] if node.base is not None else [])]
        nearest = frozenset().union(*(reaching[operand.node] for operand in sources))
        use = use_at.get(index)
        if use is not None:
            before = inputs.get(use.parameter, frozenset())
            inputs[use.parameter] = before | reaching[use.input.node]
            nearest = frozenset({use.parameter})
        reaching.append(nearest)
    return inputs


def _weight_use(graph: Graph, index: int, names: frozenset[str]) -> WeightUse | None:
    """Return the use of a weight that an operation is; None if it is none.

    The weight must be one of ``names``, and the other factor must depend on the model's input.
    """
    node = graph[index]
    positions = contraction(node.func)
    if positions is None:
        return None
    geometry = weight_geometry(node.op, node.args)
    first, second = positions.factors
    # In a matrix product, either factor may be the weight.
    roles = [(second, first), (first, second)] if geometry.kind == "linear" else [(second, first)]
    for weight_position, input_position in roles:
        weight, input_operand = node.args[weight_position], node.args[input_position]
        # A product of two activations, as in attention, has no parameter among its factors.
        name = graph[weight.node].parameter
        if name not in names or graph[input_operand.node].static:
            continue
        if geometry.kind == "linear":
            weight = _put_units_first(weight, transposed=weight_position == second)
        bias = _bias_name(graph, node, positions.bias)
        return WeightUse(index, name, geometry, weight, input_operand, bias)
    return None


def _is_table(name: str) -> bool:
    # A module's own ``weight`` is never taken for a table; a bare parameter tells by its name.
    words = re.split(r"[._]", name)
    return words[-1] != "weight" and not _TABLE_WORDS.isdisjoint(words)


def _is_embedding(node: Node) -> bool:
    return node.func is not None and "embedding" in node.func._schema.name


def _operations_that_make_weights(graph: Graph) -> set[int]:
    """Return the operations whose result is the weight of a convolution.

    A dynamic convolution mixes several kernels with shares that it computes from the input.
    """
    makers: set[int] = set()
    for node in graph.nodes:
        if not contraction(node.func) or weight_geometry(node.op, node.args).kind == "linear":
            continue
        index = node.args[1].node
        while not graph[index].static and index not in makers:
            makers.add(index)
            # Go back through reshapes and the like, as far as it is clear what the weight is.
            if len(graph[index].operands) == 1:
                index = graph[index].operands[0].node
    return makers


def _put_units_first(weight: Operand, *, transposed: bool) -> Operand:
    """Return the view (…, units, fan-in) of the matrix in a matrix product.

    A dimension that only repeats the matrix, as ``expand`` makes it, is dropped.
    """
    shape, stride = list(weight.shape), list(weight.stride)
    if transposed:
        shape[-2:], stride[-2:] = reversed(shape[-2:]), reversed(stride[-2:])
    if len(shape) == 3 and stride[0] == 0:
        del shape[0], stride[0]
    return replace(weight, shape=tuple(shape), stride=tuple(stride))


def _bias_name(graph: Graph, node: Node, position: int | None) -> str:
    bias = node.args[position] if position is not None and len(node.args) > position else None
    return graph[bias.node].parameter if isinstance(bias, Operand) else ""
