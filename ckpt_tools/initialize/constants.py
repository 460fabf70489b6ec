"""The values of tensors that depend on parameters alone.

Layer scales, positional tables and standardised weights are such tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ckpt_tools.initialize.chain import Elements, elements_of
from ckpt_tools.initialize.mean_field import Signal
from ckpt_tools.walker.dropout_sites import ignores_input_values
from ckpt_tools.walker.graph import Graph, Node, Operand

# Attention masks hold large negative numbers that are added to logits. What is below this counts as
# minus infinity and is left out of the moments.
_MASKED_LOGIT = -50.0
_UNKNOWN = Signal(0.0, 1.0)
_NUMBER_DTYPES = (torch.bool, torch.int64, torch.int32, torch.uint8)


class Constants:
    """Replays the static nodes of a graph on the model's own parameters and buffers.

    Args:
        graph: the recorded forward.
        model: the model that it was recorded from.
        zeroed: the names of parameters that count as zero: the biases that a rewrite will clear.
    """

    def __init__(self, graph: Graph, model: nn.Module, zeroed: Iterable[str] = ()) -> None:
        self._graph = graph
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        self._tensors: Mapping[str, Tensor] = {**parameters, **buffers}
        self._parameter_names = set(parameters)
        self._zeroed = frozenset(zeroed)
        self._storages: dict[tuple[int, int], Tensor | None] = {}
        self._signals: dict[tuple[int, int, tuple[int, ...], int], Signal] = {}
        self._parameter_dependence: dict[int, bool] = {}

    def tensor(self, operand: Operand) -> Tensor | None:
        """The values of a static operand, on the CPU.

        None if they cannot be computed again, as for parameters on the meta device.
        """
        storage = self._storage(operand.node, operand.output)
        if storage is None:
            return None
        try:
            return storage.as_strided(operand.shape, operand.stride, operand.offset)
        except RuntimeError:
            return None

    def is_static(self, operand: Operand) -> bool:
        """Whether an operand depends on neither the input nor random numbers."""
        return self._graph[operand.node].static

    def signal(self, operand: Operand) -> Signal:
        """The moments over the elements of a static operand."""
        key = (operand.node, operand.output, operand.shape, operand.offset)
        if key not in self._signals:
            self._signals[key] = _element_moments(self.tensor(operand))
        return self._signals[key]

    def uniform_value(self, operand: Operand) -> float | None:
        """The number that all elements of a static operand equal.

        None if they differ by more than rounding, or are not known.
        """
        signal = self.signal(operand)
        is_uniform = signal is not _UNKNOWN and signal.deviation <= 1e-6 * abs(signal.mean)
        return signal.mean if is_uniform else None

    def number_or_elements(self, operand: Operand) -> float | Elements:
        """A static operand as one number, or as its elements where they differ."""
        signal, tensor = self.signal(operand), self.tensor(operand)
        is_uniform = signal.deviation <= 1e-6 * abs(signal.mean)
        if is_uniform or tensor is None or not tensor.is_floating_point():
            return signal.mean
        return elements_of(tensor)

    def depends_on_parameter(self, operand: Operand) -> bool:
        """Whether a static operand is computed from a parameter.

        Others are computed from buffers and constants alone, such as a blur filter.
        """
        index = operand.node
        if index not in self._parameter_dependence:
            node = self._graph[index]
            self._parameter_dependence[index] = node.parameter in self._parameter_names or any(
                map(self.depends_on_parameter, node.operands)
            )
        return self._parameter_dependence[index]

    def _storage(self, index: int, output: int) -> Tensor | None:
        if (index, output) not in self._storages:
            node = self._graph[index]
            try:
                results = [self._leaf(node)] if node.func is None else self._run(node)
            # An operation of any library may refuse, with any exception.
            except Exception:  # noqa: BLE001
                results = []
            for position, tensor in enumerate(results):
                self._storages[index, position] = tensor
            self._storages.setdefault((index, output), None)
        return self._storages[index, output]

    def _leaf(self, node: Node) -> Tensor | None:
        value = self._tensors[node.parameter].detach() if node.parameter else node.value
        if value is None or value.is_meta:
            return None
        if node.parameter in self._zeroed:
            value = torch.zeros_like(value)
        return _flatten_storage(value.cpu())

    def _run(self, node: Node) -> list[Tensor | None]:
        make_tensor = _empty_tensor if ignores_input_values(node.op) else self._fresh_copy
        with torch.no_grad():
            args, kwargs = pytree.tree_map_only(Operand, make_tensor, (node.args, dict(node.kwargs)))
            if "device" in kwargs:
                kwargs["device"] = "cpu"
            results = pytree.tree_leaves(node.op(*args, **kwargs))
        return [_flatten_storage(result) for result in results if isinstance(result, Tensor)]

    def _fresh_copy(self, operand: Operand) -> Tensor:
        # The operation may write in place, and through a view: so all of the storage is copied.
        storage = self._storage(operand.node, operand.output)
        if storage is None:
            raise ValueError("unknown")
        return storage.clone().as_strided(operand.shape, operand.stride, operand.offset)


def _empty_tensor(operand: Operand) -> Tensor:
    dtype = torch.float32 if operand.floating else torch.int64
    return torch.empty_strided(operand.shape, operand.stride, dtype=dtype)


def _flatten_storage(tensor: Tensor) -> Tensor:
    # Operands are views of a storage, so all of the storage is kept, whatever part a tensor shows.
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0)


def _element_moments(value: Tensor | None) -> Signal:
    if value is None or not (value.is_floating_point() or value.dtype in _NUMBER_DTYPES):
        return _UNKNOWN
    elements = value.double()
    elements = elements[elements.isfinite() & (elements > _MASKED_LOGIT)]
    if not elements.numel():
        return _UNKNOWN
    return Signal(float(elements.mean()), float(elements.square().mean()))
