"""Writing into tensors of a model: wherever they were made, and all of them or none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def overwrite(buffer: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``buffer``, wherever the buffer was made."""
    # What was made in inference mode can only be written there; leaving that mode switches gradients on.
    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
        buffer.copy_(value)


def overwrite_all(writes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first: into all of them, or, if that is interrupted, into none."""
    before = [(target, target.detach().clone()) for target, _ in writes]
    try:
        for target, value in writes:
            overwrite(target, value)
    except BaseException:
        put_back(before)
        raise


def put_back(contents: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first; an interrupt in the midst of it is raised when all are done."""
    try:
        for target, content in contents:
            overwrite(target, content)
    except BaseException:
        for target, content in contents:
            overwrite(target, content)
        raise
