"""Checks around a forward: no NaN or infinity may reach a running variance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ckpt_tools.arguments import advise
from ckpt_tools.errors import DataError, ModelError
from ckpt_tools.model.batch import Batch, batch_size, input_tensors, iterate_inputs
from ckpt_tools.model.layouts import is_plain, values_of
from ckpt_tools.moments import Moments


def not_finite_rows(batch: Batch, number: int) -> list[int]:
    """Rows of a batch whose input holds NaN or infinity, in ascending order.

    Raises DataError, naming the batch by ``number``, if the value stands in a tensor that belongs
    to no single sample: leaving out rows would not remove it.
    """
    # A sum is NaN or infinite if one of its terms is. Nearly every batch ends here, after one
    # reduction instead of an elementwise test.
    if all(math.isfinite(values_of(tensor).sum()) for tensor in input_tensors(batch)):
        return []
    rows: set[int] = set()
    for row, tensor in iterate_inputs(batch):
        # A mapping may hold an attention mask, where minus infinity has a meaning.
        values = values_of(tensor)
        wrong = values.isnan() if isinstance(batch, Mapping) else ~values.isfinite()
        if row is not None:
            rows |= {row} if bool(wrong.any()) else set()
        elif is_plain(tensor) and tensor.ndim and len(tensor) == batch_size(batch):
            rows.update(wrong.reshape(len(tensor), -1).any(1).nonzero().flatten().tolist())
        elif bool(wrong.any()):
            raise DataError(
                f"batch {number}: NaN or infinity in the input, in a tensor {_describe_shape(tensor)} "
                "that belongs to no single sample. Remove it or fix the preprocessing."
            )
    return sorted(rows)


def _describe_shape(tensor: Tensor) -> str:
    # Rows of a nested tensor have different lengths.
    return f"of {tensor.size(0)} nested rows" if tensor.is_nested else str(tuple(tensor.shape))


def check_input(batch: Batch, number: int) -> None:
    """Raise DataError if the input of a batch holds NaN or infinity."""
    rows = not_finite_rows(batch, number)
    if rows:
        raise DataError(
            f"batch {number}: NaN or infinity in the input, samples {rows[:5]} of "
            f"{batch_size(batch)}. Remove them or fix the preprocessing."
        )


def check_activations(model: nn.Module, moments: Mapping[str, Moments | None], number: int) -> None:
    """Raise ModelError if the input of a BN layer was not finite.

    Args:
        model: its parameters and buffers are searched for NaN, which explains most such cases.
        moments: of each layer's input by layer name, in order of execution.
        number: of the batch, for the message.
    """
    sums = {name: layer.m2.sum() for name, layer in moments.items() if layer is not None}
    # One transfer to the host for all layers, instead of one for each.
    if not sums or bool(torch.isfinite(torch.stack(list(sums.values()))).all()):
        return
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(values_of(tensor)).all()):
            raise ModelError(
                f"{name}: NaN or infinity in the model's weights; nothing can be measured behind them."
            )
    name = next(name for name, total in sums.items() if not bool(torch.isfinite(total)))
    raise ModelError(
        f"{name}: batch {number} gives non-finite inputs to this layer although weights and input "
        "are finite; the activations overflow. Check the preprocessing"
        f"{advise(' (--mean, --std)', '')}, or run in float32."
    )
