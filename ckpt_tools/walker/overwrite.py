"""Writing into tensors of a model: wherever they were made, and all of them or none."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor


def overwrite(buffer: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``buffer``, wherever the buffer was made."""
    # What was made in inference mode can only be written there; leaving that mode switches gradients on.
    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
        for dim in _expanded(buffer):
            buffer, value = buffer.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
        buffer.copy_(value)


def _expanded(tensor: Tensor) -> list[int]:
    """Dimensions along which all elements are one place in memory, which cannot be written as many."""
    if tensor.layout is not torch.strided:
        return []
    return [dim for dim in range(tensor.ndim) if tensor.stride(dim) == 0 and tensor.shape[dim] > 1]


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
    """Copy the second of each pair into the first; an interrupt in the midst of it is raised when all are done.

    One that cannot be written keeps no other from it.
    """
    try:
        _overwrite_each(contents)
    except BaseException:
        with contextlib.suppress(Exception):
            _overwrite_each(contents)
        raise


def _overwrite_each(contents: Sequence[tuple[Tensor, Tensor]]) -> None:
    failures = []
    for target, content in contents:
        try:
            overwrite(target, content)
        except Exception as error:  # noqa: BLE001 - raised below
            failures.append(error)
    if failures:
        raise failures[0]
