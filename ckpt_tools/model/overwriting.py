"""Writing into tensors of a model: wherever they were made, and all of them or none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ckpt_tools.model.model_state import ModelState


def overwrite_tensor(buffer: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``buffer``, wherever the buffer was made.

    The buffer may be an inference tensor, require gradients or be expanded (``Tensor.expand``).
    """
    # A tensor that was made in inference mode can only be written there. For any other that mode is
    # left, which switches gradients on; autograd refuses to write to leaves that require them.
    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
        for dim in _expanded_dimensions(buffer):
            buffer, value = buffer.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
        buffer.copy_(value)


def _expanded_dimensions(tensor: Tensor) -> list[int]:
    """Return the dimensions along which all elements are the same place in memory.

    torch refuses to write several values to one place.
    """
    if tensor.layout is not torch.strided:
        return []
    return [dim for dim in range(tensor.ndim) if tensor.stride(dim) == 0 and tensor.shape[dim] > 1]


def overwrite_tensors(writes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first: into all of them, or into none.

    If anything raises on the way, an interrupt included, the tensors already written get their old
    contents back.
    """
    state = ModelState([target for target, _ in writes])
    try:
        for target, value in writes:
            overwrite_tensor(target, value)
    except BaseException:
        state.put_back()
        raise
