"""Recurrent operators, of which a walk records the first steps only.

``nn.LSTM`` and its kin run one operator for a whole sequence. On meta tensors, and for a GRU
everywhere, torch takes it apart into some fifteen operations for each step, layer and direction,
and recording them all costs thousands of forwards. Every step does the same, so two of them show
the weights, the dropout between layers and what the state carries from one step to the next.
Cells that a loop calls (``nn.LSTMCell``) are recorded likewise: from the third call on as one
operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_STEPS = 2  # the second one reads the state that the first has left

_SEQUENCE_OPERATORS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
_BATCH_FIRST = 8  # the position of this argument of an operator on padded sequences

_CELL_WEIGHTS = 4  # arguments up to the weights: input, state, w_ih, w_hh

_ATEN = torch.ops.aten
CELL_OPERATORS: dict[Callable[..., object], OpOverload] = {
    torch.lstm_cell: _ATEN.lstm_cell.default,
    torch.gru_cell: _ATEN.gru_cell.default,
    torch.rnn_tanh_cell: _ATEN.rnn_tanh_cell.default,
    torch.rnn_relu_cell: _ATEN.rnn_relu_cell.default,
}


@dataclass(frozen=True)
class RecurrentCall:
    """A call of a recurrent operator on a sequence longer than the steps that are recorded.

    ``first_steps`` are the operator's arguments for these steps. ``time`` is the dimension of its
    output along which the steps stand, and ``length`` the output's size there: the number of steps,
    or for packed sequences that of all their steps together.
    """

    first_steps: tuple[Any, ...]
    time: int
    length: int

    def extend(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return outputs of the shape that the whole sequence has, made of those of the first steps.

        The first output has all steps, the others are the last states.
        """
        first = outputs[0].narrow(self.time, 0, 1)
        shape = list(first.shape)
        shape[self.time] = self.length
        return first.expand(shape).clone(), *outputs[1:]


def parse_recurrent_call(func: Callable[..., object], args: Sequence[Any]) -> RecurrentCall | None:
    """Read the arguments of a recurrent operator.

    The result is None for any other function, and for a sequence that is short enough.
    """
    if func not in _SEQUENCE_OPERATORS or len(args) <= _BATCH_FIRST:
        return None
    sequence = args[0]
    # Padded: (input, state, weights, …, batch_first). Packed: (data, batch_sizes, state, weights, …).
    if isinstance(args[3], (list, tuple)):
        sizes = args[1][:_STEPS]
        if len(args[1]) <= _STEPS:
            return None
        first_steps = (sequence[: int(sizes.sum())], sizes, *args[2:])
        return RecurrentCall(first_steps, 0, len(sequence))
    time = 1 if args[_BATCH_FIRST] else 0
    length = sequence.shape[time]
    if length <= _STEPS:
        return None
    return RecurrentCall((sequence.narrow(time, 0, _STEPS), *args[1:]), time, length)


class CellCalls:
    """Counts the calls of recurrent cells, by their weights."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def is_repeated(self, func: Callable[..., object], args: Sequence[Any]) -> bool:
        """Tell whether this is a cell whose first steps have run, and count the call if it is one."""
        if func not in CELL_OPERATORS or len(args) < _CELL_WEIGHTS:
            return False
        # The copy of the model holds its weights as long as the forward runs.
        key = id(args[_CELL_WEIGHTS - 1])
        self._counts[key] += 1
        return self._counts[key] > _STEPS
