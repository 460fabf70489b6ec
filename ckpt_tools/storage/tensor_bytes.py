"""The bytes of tensors, and whether they are equal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["PIECE_BYTES", "ByteArray", "equal_bytes", "raw_bytes"]

PIECE_BYTES = 1 << 20  # bytes handled at a time: what two of them need stays in a core's own cache

ByteArray = npt.NDArray[np.uint8]


def raw_bytes(tensor: Tensor) -> ByteArray:
    """A tensor's bytes in row-major order, shape (nbytes,): a view where it lies in memory like that, else a copy."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # A tensor of one number counts as contiguous with any stride, but is no row of bytes then.
    found: ByteArray = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy()
    return found


def equal_bytes(one: ByteArray, other: ByteArray) -> bool:
    """Whether two arrays of bytes are equal.

    Piece by piece: numpy's answer for each byte takes as much memory as the bytes. (``torch.equal`` waits for threads
    that a busy machine does not give it.)
    """
    return len(one) == len(other) and all(
        np.array_equal(one[i : i + PIECE_BYTES], other[i : i + PIECE_BYTES])
        for i in range(0, len(one), PIECE_BYTES)
    )
