"""The raw bytes of tensors, and comparing them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["PIECE_BYTES", "ByteArray", "equal_bytes", "raw_bytes"]

# Bytes are handled in pieces of this size: two of them fit into the cache of one core.
PIECE_BYTES = 1 << 20

ByteArray = npt.NDArray[np.uint8]


def raw_bytes(tensor: Tensor) -> ByteArray:
    """Return a tensor's bytes in row-major order, shape (nbytes,).

    They are a view of a tensor that lies in memory like that, and a copy of any other.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # A tensor with one element counts as contiguous whatever its stride is, and view() refuses such
    # a stride.
    row: ByteArray = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy()
    return row


def equal_bytes(first: ByteArray, second: ByteArray) -> bool:
    """Return whether two arrays of bytes are equal.

    They are compared in pieces, because numpy's answer for each byte takes as much memory as the
    bytes. ``torch.equal`` is not used: on a busy machine it waits for its threads.
    """
    return len(first) == len(second) and all(
        np.array_equal(first[start : start + PIECE_BYTES], second[start : start + PIECE_BYTES])
        for start in range(0, len(first), PIECE_BYTES)
    )
