"""The second moment behind an operation of which nothing else is known, by running it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ckpt_tools.initialize.chain import chain_function
from ckpt_tools.initialize.constants import Constants
from ckpt_tools.initialize.state import State
from ckpt_tools.model.randomness import preserve_random_generators, seed_random_generators
from ckpt_tools.walker.graph import Node, Operand

_VALUES, _MAX_RUNS = 2**15, 2**12  # so many outputs are averaged, of so many runs at most


def simulate_second_moment(node: Node, state: State, constants: Constants) -> float | None:
    """E[y²] of an operation's first output y, run on random values of its one activation.

    It serves gated units, recurrent layers, noisy activations, sums, sorting and whatever else is
    no pointwise function. Constants have their values.

    Args:
        node: the operation.
        state: what is known of the activation; its values are drawn independently.
        constants: the values of all other operands.

    Returns:
        The moment, NaN where the operation is undefined for some of the values, or None if it
        cannot be run.
    """
    # The operation may draw from torch's global generator. Equal models get equal weights.
    with preserve_random_generators(), torch.no_grad():
        seed_random_generators(0)
        try:
            first = _run(node, state, constants)
            runs = min(_MAX_RUNS, math.ceil(_VALUES / max(1, first.numel())))
            outputs = [first, *(_run(node, state, constants) for _ in range(runs - 1))]
        # An operation of any library may refuse, with any exception.
        except Exception:  # noqa: BLE001
            return None
    return sum(float(output.square().mean()) for output in outputs) / runs


def _run(node: Node, state: State, constants: Constants) -> Tensor:
    def make_tensor(operand: Operand) -> Tensor:
        if not constants.is_static(operand):
            return _draw_activation(state, operand.shape)
        constant = constants.tensor(operand)
        if constant is None:
            raise ValueError("unknown")
        return constant.clone()  # the operation may write in place

    args, kwargs = pytree.tree_map_only(Operand, make_tensor, (node.args, dict(node.kwargs)))
    results = [
        result for result in pytree.tree_leaves(node.op(*args, **kwargs)) if isinstance(result, Tensor)
    ]
    return results[0].double()


def _draw_activation(state: State, shape: tuple[int, ...]) -> Tensor:
    normal = torch.randn(shape, dtype=torch.float64) * state.source_signal.deviation
    values = chain_function(state.chain)(state.source_signal.mean + normal)
    if state.keep < 1:
        values = values * (torch.rand(shape) < state.keep) / state.keep
    return values.float()
