"""Where the contents of a tensor lie, whatever its layout: strided, sparse or nested."""

from __future__ import annotations

import torch
from torch import Tensor

_ROW_COMPRESSED = (torch.sparse_csr, torch.sparse_bsr)
_COLUMN_COMPRESSED = (torch.sparse_csc, torch.sparse_bsc)


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return the strided tensors that a sparse tensor consists of; for others the tensor itself.

    The values come last.
    """
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in _ROW_COMPRESSED:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in _COLUMN_COMPRESSED:
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is neither sparse nor nested: it has strides, and rows of one length."""
    return tensor.layout is torch.strided and not tensor.is_nested


def values_of(tensor: Tensor) -> Tensor:
    """Return the values of a sparse or nested tensor, without its structure, as a strided tensor.

    They share the tensor's memory. A plain tensor is returned as it is.
    """
    if is_plain(tensor):
        return tensor
    if tensor.layout is torch.jagged:
        # Not ``values()``, which is an operation of its own where a mode watches.
        values: Tensor = vars(tensor)["_values"]
        return values
    if tensor.is_nested:
        # A nested tensor need not be contiguous, so all of its memory counts.
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return flat.set_(tensor.untyped_storage())
    return dense_parts(tensor)[-1]
