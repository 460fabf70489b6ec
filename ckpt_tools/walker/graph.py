"""The operations of one recorded forward as a graph: what each of them read and what it made.

A node stands for the contents of a storage at one time: a parameter, an input, the result of an operation. An
operation in place makes a new node for the same storage. Views are no nodes; an operand tells which part of its node it
saw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from ckpt_tools.walker.dropout_sites import draws_random_numbers, ignores_input_values


@dataclass(frozen=True)
class Operand:
    """A tensor as an operation saw it: this view of output number ``output`` of a node."""

    node: int
    output: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    floating: bool

    @property
    def numel(self) -> int:
        """Elements of memory that it covers; broadcast dimensions count once."""
        return math.prod(size for size, step in zip(self.shape, self.stride, strict=True) if step or size == 0)


@dataclass(frozen=True)
class Node:
    """One operation with Operands in place of the tensors among its arguments, or a leaf (``func`` is None).

    ``parameter``: the leaf is this parameter or buffer. ``value``: the leaf is a tensor that came from outside.
    ``static``: it depends on neither the input nor random numbers. ``outputs``: shapes. An operation in place has the
    contents before as ``base`` and overwrites the part ``coverage`` of them.
    """

    func: OpOverload | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[tuple[int, ...], ...] = ()
    module: str = ""
    parameter: str = ""
    value: Tensor | None = None
    static: bool = False
    random: bool = False
    base: Operand | None = None
    coverage: float = 1.0

    @property
    def op(self) -> OpOverload:
        """The operation of a node that is no leaf."""
        assert self.func is not None
        return self.func

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        """The tensors among the arguments, in order."""
        return tuple(leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Operand))


class Graph:
    """The nodes in order of execution; leaves stand before their first use."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def __getitem__(self, index: int) -> Node:
        return self.nodes[index]

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def readers(self) -> list[list[int]]:
        """For each node the operations that read it, in order."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes):
            for read in {operand.node for operand in node.operands}:
                found[read].append(index)
        return found


class Recorder:
    """Builds a Graph while a forward runs under a dispatch mode."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.graph = Graph()
        self._current: dict[StorageWeakRef, tuple[int, int]] = {}
        for name, tensor in _named_tensors(model):
            if _key(tensor) not in self._current:
                self._leaf(tensor, Node(None, parameter=name, static=True))
        for tensor in inputs:
            self._leaf(tensor, Node(None))

    def to_operands(self, tree: Any) -> Any:
        """The arguments of an operation with Operands in place of tensors; call it before the operation runs."""
        return pytree.tree_map_only(Tensor, self._operand, tree)

    def add_operation(
        self, func: OpOverload, read: Any, outputs: Sequence[Tensor], written: Sequence[Tensor], module: str
    ) -> None:
        """Note an operation that has run: ``read`` are its arguments as ``read`` gave them."""
        args, kwargs = read
        new = [tensor for tensor in outputs if _key(tensor) not in self._current]
        changed = [*new, *written]
        if not changed:
            return  # a view
        in_place = bool(written) and not new
        base = self._operand(written[0]) if in_place else None
        random = draws_random_numbers(func, args, kwargs)
        sources = {leaf.node for leaf in pytree.tree_leaves(read) if isinstance(leaf, Operand)}
        static = not random and (ignores_input_values(func) or all(self.graph[index].static for index in sources))
        shapes = tuple(tuple(tensor.shape) for tensor in changed)
        coverage = _coverage(written[0]) if in_place else 1.0
        node = Node(func, args, kwargs, shapes, module, static=static, random=random, base=base, coverage=coverage)
        self.graph.nodes.append(node)
        for position, tensor in enumerate(changed):
            self._current[_key(tensor)] = (len(self.graph) - 1, position)

    def _operand(self, tensor: Tensor) -> Operand:
        if _key(tensor) not in self._current:
            self._leaf(tensor, Node(None, value=None if tensor.is_meta else tensor, static=True))
        node, output = self._current[_key(tensor)]
        strides = tuple(map(int, tensor.stride()))
        return Operand(
            node, output, tuple(tensor.shape), strides, int(tensor.storage_offset()), tensor.is_floating_point()
        )

    def _leaf(self, tensor: Tensor, node: Node) -> None:
        self.graph.nodes.append(node)
        self._current[_key(tensor)] = (len(self.graph) - 1, 0)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _key(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _coverage(tensor: Tensor) -> float:
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.numel() / held if held else 1.0
