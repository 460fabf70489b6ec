"""The values of what depends on parameters alone: layer scales, positional tables, standardised weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ckpt_tools.initialize.signal import Signal
from ckpt_tools.walker.dropout_sites import ignores_input_values
from ckpt_tools.walker.graph import Graph, Node, Operand

_MASKED = -50.0  # added to logits, it means minus infinity
_UNKNOWN = Signal(0.0, 1.0, 1.0)


class Constants:
    """Replays the static nodes of a graph on the model's own parameters and buffers.

    ``zeroed``: parameters that count as zero, the biases that a rewrite is about to clear.
    """

    def __init__(self, graph: Graph, model: nn.Module, zeroed: Iterable[str] = ()) -> None:
        self._graph = graph
        self._named: Mapping[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._trained: dict[int, bool] = {}
        self._zeroed = frozenset(zeroed)
        self._memory: dict[tuple[int, int], Tensor | None] = {}
        self._signals: dict[tuple[int, int, tuple[int, ...], int], Signal] = {}

    def tensor(self, operand: Operand) -> Tensor | None:
        """What a static operand holds, on the CPU; None if it cannot be computed again."""
        whole = self._storage(operand.node, operand.output)
        if whole is None:
            return None
        try:
            return whole.as_strided(operand.shape, operand.stride, operand.offset)
        except RuntimeError:
            return None

    def signal(self, operand: Operand) -> Signal:
        """Mean and second moment over the elements of a static operand; every sample sees the same."""
        key = (operand.node, operand.output, operand.shape, operand.offset)
        if key not in self._signals:
            value = self.tensor(operand)
            self._signals[key] = _UNKNOWN if value is None or not value.numel() else _signal(value)
        return self._signals[key]

    def uniform(self, operand: Operand) -> float | None:
        """The number that all its elements have; None if they differ."""
        found = self.signal(operand)
        return found.mean if found is not _UNKNOWN and found.deviation <= 1e-6 * abs(found.mean) else None

    def trained(self, operand: Operand) -> bool:
        """Whether a static operand depends on a parameter."""
        index = operand.node
        if index not in self._trained:
            node = self._graph[index]
            self._trained[index] = node.parameter in self._parameters or any(map(self.trained, node.operands))
        return self._trained[index]

    def _storage(self, index: int, output: int) -> Tensor | None:
        if (index, output) not in self._memory:
            node = self._graph[index]
            try:
                made = [self._leaf(node)] if node.func is None else self._run(node)
            except Exception:  # noqa: BLE001 - any operation of any library may refuse; then the value is unknown
                made = []
            for position, tensor in enumerate(made):
                self._memory[index, position] = tensor
            self._memory.setdefault((index, output), None)
        return self._memory[index, output]

    def _leaf(self, node: Node) -> Tensor | None:
        value = self._named[node.parameter].detach() if node.parameter else node.value
        if value is None or value.is_meta:
            return None
        value = torch.zeros_like(value) if node.parameter in self._zeroed else value
        return _flat(value.cpu())

    def _run(self, node: Node) -> list[Tensor | None]:
        with torch.no_grad():
            given = _empty if ignores_input_values(node.op) else self._fresh
            args, kwargs = pytree.tree_map_only(Operand, given, (node.args, dict(node.kwargs)))
            if "device" in kwargs:
                kwargs["device"] = "cpu"
            made = node.op(*args, **kwargs)
        return [_flat(leaf) for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]

    def _fresh(self, operand: Operand) -> Tensor:
        """A copy of the whole storage, seen as the operand: the operation may write to it."""
        whole = self._storage(operand.node, operand.output)
        if whole is None:
            raise ValueError("unknown")
        return whole.clone().as_strided(operand.shape, operand.stride, operand.offset)


def _empty(operand: Operand) -> Tensor:
    return torch.empty_strided(operand.shape, operand.stride, dtype=torch.float32 if operand.floating else torch.int64)


def _flat(tensor: Tensor) -> Tensor:
    """All of a tensor's storage in one dimension."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0)


def _signal(value: Tensor) -> Signal:
    if not (value.is_floating_point() or value.dtype in (torch.bool, torch.int64, torch.int32, torch.uint8)):
        return _UNKNOWN
    wide = value.double()
    finite = wide[wide.isfinite() & (wide > _MASKED)]
    if not finite.numel():
        return _UNKNOWN
    second = float(finite.square().mean())
    return Signal(float(finite.mean()), second, second)
