"""The operations of one recorded forward as a graph: what each of them has read and written.

A node stands for the contents of a storage at one time: a parameter, an input, the result of an
operation. An operation in place makes a new node for the same storage. Views are no nodes: an
operand tells which part of its node an operation has read.
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

from ckpt_tools.model.layouts import values_of
from ckpt_tools.walker.dropout_sites import draws_random_numbers, ignores_input_values


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation has read: a view of output number ``output`` of a node."""

    node: int
    output: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    floating: bool

    @property
    def numel(self) -> int:
        """The number of elements of memory that the view covers.

        A dimension that is broadcast has stride 0 and takes no memory of its own.
        """
        dimensions = zip(self.shape, self.stride, strict=True)
        return math.prod(size for size, stride in dimensions if stride or not size)


@dataclass(frozen=True)
class Node:
    """One operation, or a leaf (``func`` is None): a parameter, an input or another tensor.

    Attributes:
        func: the operation.
        args: its arguments, with Operands in place of tensors.
        kwargs: its keyword arguments, likewise.
        outputs: the shapes of the tensors that it has made or changed.
        module: the name of the module that has run it.
        parameter: the leaf is the parameter or buffer of this name.
        value: the leaf is this tensor, which came from outside.
        static: the contents depend on neither the input nor random numbers.
        random: the operation draws random numbers.
        base: what an operation in place has found in the storage.
        coverage: the part of ``base`` that it has overwritten, 0–1.
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
        return tuple(_find_operands((self.args, dict(self.kwargs))))


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
        readers: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes):
            for source in {operand.node for operand in node.operands}:
                readers[source].append(index)
        return readers


class Recorder:
    """Builds a Graph while a forward runs under a dispatch mode.

    ``inputs`` are the tensors of the batch. All other leaves are static: the model's parameters and
    buffers, and tensors that the forward takes from elsewhere.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.graph = Graph()
        # For every storage the node that has its present contents, and which of the node's outputs.
        # A weak reference is a safe key: an address could be used again after the storage is freed.
        self._current: dict[StorageWeakRef, tuple[int, int]] = {}
        for name, tensor in _named_tensors(model):
            if storage_key(tensor) not in self._current:  # tied weights have one node
                self._add_leaf(tensor, Node(None, parameter=name, static=True))
        for tensor in inputs:
            self._add_leaf(tensor, Node(None))

    def to_operands(self, tree: Any) -> Any:
        """Replace the tensors in an operation's arguments by Operands.

        Call this before the operation runs: it may overwrite what it reads.
        """
        return pytree.tree_map_only(Tensor, self._to_operand, tree)

    def add_operation(
        self,
        func: OpOverload,
        operands: Any,
        outputs: Sequence[Tensor],
        written: Sequence[Tensor],
        module: str,
    ) -> None:
        """Add an operation that has run; one that only makes views is left out.

        Args:
            func: the operation.
            operands: its arguments and keyword arguments as ``to_operands`` returned them.
            outputs: the tensors that it has returned.
            written: the arguments that it has written to.
            module: the name of the module that has run it.
        """
        args, kwargs = operands
        # The storage of a view is known already, and so is that of what was written in place.
        new = [tensor for tensor in outputs if storage_key(tensor) not in self._current]
        changed = [*new, *written]
        if not changed:
            return
        in_place = bool(written) and not new
        random = draws_random_numbers(func, args, kwargs)
        sources = [self.graph[operand.node] for operand in _find_operands(operands)]
        made_of_constants = ignores_input_values(func) or all(node.static for node in sources)
        self.graph.nodes.append(
            Node(
                func,
                args,
                kwargs,
                outputs=tuple(tuple(values_of(tensor).shape) for tensor in changed),
                module=module,
                static=made_of_constants and not random,
                random=random,
                base=self._to_operand(written[0]) if in_place else None,
                coverage=_coverage(written[0]) if in_place else 1.0,
            )
        )
        for position, tensor in enumerate(changed):
            self._current[storage_key(tensor)] = (len(self.graph) - 1, position)

    def _to_operand(self, tensor: Tensor) -> Operand:
        # Of a sparse or nested tensor, the operand is the memory of its values.
        tensor = values_of(tensor)
        if storage_key(tensor) not in self._current:
            # A meta tensor has no values to keep.
            value = None if tensor.is_meta else tensor
            self._add_leaf(tensor, Node(None, value=value, static=True))
        node, output = self._current[storage_key(tensor)]
        shape, strides = tuple(tensor.shape), tuple(map(int, tensor.stride()))
        offset = int(tensor.storage_offset())
        return Operand(node, output, shape, strides, offset, tensor.is_floating_point())

    def _add_leaf(self, tensor: Tensor, node: Node) -> None:
        self.graph.nodes.append(node)
        self._current[storage_key(tensor)] = (len(self.graph) - 1, 0)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # By default torch leaves out the further names of a module or tensor that has several.
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _find_operands(tree: Any) -> list[Operand]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Operand)]


def storage_key(tensor: Tensor) -> StorageWeakRef:
    """Return a reference to the storage of a tensor, which its views share.

    Of a sparse or nested tensor that is the storage of its values.
    """
    return StorageWeakRef(values_of(tensor).untyped_storage())


def _coverage(tensor: Tensor) -> float:
    """Return which part of its storage a tensor covers, 0–1."""
    tensor = values_of(tensor)
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.numel() / elements if elements else 1.0
