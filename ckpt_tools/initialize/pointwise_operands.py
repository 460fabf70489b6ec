"""The operands of one pointwise operation, sorted by what they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ckpt_tools.initialize.chain import Chain, Elements
from ckpt_tools.initialize.constants import Constants
from ckpt_tools.initialize.operations import HOMOGENEOUS
from ckpt_tools.initialize.state import Source, State, is_dropout, mask_keep, replay_node
from ckpt_tools.walker.graph import Node, Operand

MAX_PARTS = 4  # an expression of more parts is not integrated over all of them at once


@dataclass(frozen=True)
class PointwiseOperands:
    """A pointwise operation and its operands.

    ``name`` is the operation's name. ``states`` has the operands that are activations or noise.
    ``averages`` has averages of an activation that is itself an operand, as in x / √mean(x²): they
    count as numbers. All other operands are ``constants``.
    """

    node: Node
    name: str
    states: dict[Operand, State]
    averages: dict[Operand, float]
    constants: Constants

    @cached_property
    def activations(self) -> list[State]:
        """The states that are not made of noise alone."""
        return [state for state in self.states.values() if not state.random]

    @cached_property
    def masks(self) -> list[State]:
        """The states that are made of noise alone."""
        return [state for state in self.states.values() if state.random]

    @cached_property
    def parts(self) -> frozenset[Source]:
        """The independent parts that all operands together are made of."""
        return frozenset().union(*(state.parts for state in self.states.values()))

    @property
    def has_one_source(self) -> bool:
        """Whether all activations are functions of the same source.

        The result is such a function, too, unless a constant or noise interferes.
        """
        return len({state.source for state in self.activations}) == 1

    @property
    def operands_share_parts(self) -> bool:
        """Whether an independent part occurs in two operands.

        They are dependent then, and the moments of their sum or product need an integral.
        """
        return sum(len(state.parts) for state in self.states.values()) > len(self.parts)

    @property
    def dropout_moves_through(self) -> bool:
        """Whether dropout in front of the operation is the same as dropout behind it.

        relu(m·x) = m·relu(x) for a mask m, but tanh(m·x) ≠ m·tanh(x) where m is 1 / keep.
        """
        keeps = {state.keep for state in self.activations}
        return min(keeps) >= 1 or (self.name in HOMOGENEOUS and len(keeps) == 1)

    @property
    def extend_a_chain(self) -> bool:
        """Whether the result is a function of one source, with dropout behind that function."""
        masks_are_dropout = not self.masks or is_dropout(self.name, self.masks)
        return self.has_one_source and self.dropout_moves_through and masks_are_dropout

    @property
    def need_an_integral(self) -> bool:
        """Whether the moments of the operands do not suffice for those of the result."""
        dropout_is_inside = self.has_one_source and not self.dropout_moves_through
        return dropout_is_inside or self.operands_share_parts

    @property
    def can_be_integrated(self) -> bool:
        """Whether the result is an expression over few enough independent parts."""
        return len(self.parts) <= MAX_PARTS

    @property
    def keep(self) -> float:
        """The keep probability of the result where the masks are dropout."""
        activation_keep = min(state.keep for state in self.activations)
        return activation_keep * math.prod(mask_keep(mask.signal) for mask in self.masks)

    def constant(self, operand: Operand) -> float | Elements:
        """An average or a constant as one number, or as the elements where they differ."""
        if operand in self.averages:
            return self.averages[operand]
        return self.constants.number_or_elements(operand)

    def replay(self, replacement: Callable[[State], Any]) -> Chain:
        """The operation with ``replacement(state)`` in place of activations and noise."""

        def replace_operand(operand: Operand) -> Any:
            state = self.states.get(operand)
            return self.constant(operand) if state is None else replacement(state)

        return replay_node(self.node, replace_operand)

    def replay_joint(self) -> Chain:
        """The operation as an expression over all independent parts."""
        return self.replay(lambda state: state.joint)
