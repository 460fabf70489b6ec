"""Checks around a forward: nothing that is not finite may reach a running variance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import nn

from ckpt_tools.errors import DataError, ModelError
from ckpt_tools.model.batch import Batch, batch_size, input_tensors
from ckpt_tools.moments import Moments


def check_input(batch: Batch, number: int) -> None:
    """Raise DataError if the input of a batch holds NaN or infinity."""
    for tensor in input_tensors(batch):
        if math.isfinite(tensor.sum()):  # as is no sum with NaN or infinity in it
            continue
        # Among named arguments may be an attention mask, whose infinities are meant.
        wrong = tensor.isnan() if isinstance(batch, Mapping) else ~tensor.isfinite()
        if bool(wrong.any()):
            bad = wrong.reshape(len(tensor), -1).any(1).nonzero().flatten().tolist() if tensor.ndim else [0]
            raise DataError(
                f"batch {number}: NaN or infinity in the input, samples {bad[:5]} of {batch_size(batch)}. "
                "Remove them or fix the preprocessing."
            )


def check_activations(model: nn.Module, seen: Mapping[str, Moments | None], number: int) -> None:
    """Raise ModelError if a BN layer's input was not finite: bad weights, or an overflow."""
    sums = {name: moments.m2.sum() for name, moments in seen.items() if moments is not None}
    if not sums or bool(torch.isfinite(torch.stack(list(sums.values()))).all()):
        return
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name}: NaN or infinity in the model's weights; nothing can be measured behind them.")
    name = next(name for name, total in sums.items() if not bool(torch.isfinite(total)))
    raise ModelError(
        f"{name}: batch {number} gives non-finite inputs to this layer although weights and input are finite; "
        "the activations overflow. Check the preprocessing (--mean, --std), or run in float32."
    )
