"""A batch as data loaders give it: its input tensors, its size, and some of its samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ckpt_tools.model.layouts import values_of

# A tensor, a tuple or list whose first item is the input, or a mapping for ``model(**batch)``.
Batch: TypeAlias = object


def to_pytree(batch: Batch) -> object:
    """Return the batch in containers that pytree knows: of mappings it knows dict alone."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _input(batch: Batch) -> object:
    """Return the part of a batch that goes into the model; labels stand behind it."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch else to_pytree(batch)


def input_tensors(batch: Batch) -> list[Tensor]:
    """Return the floating-point tensors that go into the model, in order."""
    leaves = pytree.tree_leaves(_input(batch))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def batch_size(batch: Batch) -> int:
    """Return the number of samples.

    That is the length of a list of images, else the first dimension that most tensors share. If
    several are equally frequent, that of the largest tensor counts. A batch that only the caller's
    ``forward`` understands counts as one sample.
    """
    inputs = _input(batch)
    if _are_images(inputs):
        return len(inputs)
    leaves = pytree.tree_leaves(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        return 1
    # A nested tensor has no len().
    sizes = [tensor.size(0) for tensor in tensors]
    return max(tensors, key=lambda tensor: (sizes.count(tensor.size(0)), tensor.numel())).size(0)


def batch_shapes(batch: Batch) -> tuple[torch.Size, ...]:
    """Return the shapes of all tensors that go into the model, in order.

    That of a sparse or nested tensor is the shape of its values.
    """
    leaves = pytree.tree_leaves(_input(batch))
    return tuple(values_of(leaf).shape for leaf in leaves if isinstance(leaf, Tensor))


# Images (C, H, W) have as many dimensions as a batch of sequences (N, T, F). They have at most four
# channels, and a batch of so few samples is rare.
_MAX_IMAGE_CHANNELS = 4


def _are_images(inputs: object) -> TypeGuard[Sequence[Tensor]]:
    """Tell whether this is a list of images (C, H, W), as detection models take it."""
    if not isinstance(inputs, (tuple, list)) or not inputs:
        return False
    return all(
        isinstance(item, Tensor) and item.ndim == 3 and len(item) <= _MAX_IMAGE_CHANNELS for item in inputs
    )


def slice_samples(batch: Batch, start: int, stop: int) -> Batch:
    """Return the samples from ``start`` to ``stop`` as a batch of views.

    All samples together are the batch itself: a sparse or nested tensor cannot be cut by rows.
    """
    if start <= 0 and stop >= batch_size(batch):
        return batch
    return _map_samples(batch, lambda samples: samples[start:stop])


def select_samples(batch: Batch, rows: Sequence[int]) -> Batch:
    """Return the samples with the numbers ``rows`` as a batch; its tensors are copies.

    Images in a list are not copied, and all rows in order are the batch itself.
    """
    if list(rows) == list(range(batch_size(batch))):
        return batch

    def select_rows(samples: Tensor | Sequence[Tensor]) -> object:
        if isinstance(samples, Tensor):
            return samples[torch.tensor(rows, device=samples.device)]
        return [samples[row] for row in rows]

    return _map_samples(batch, select_rows)


def repeat_samples(batch: Batch, count: int) -> Batch | None:
    """Return the batch with every sample ``count`` times.

    None where it is not clear which rows are samples: a list of images, an input whose tensors
    have different lengths (a graph's nodes and edges), or none.
    """
    inputs, size = _input(batch), batch_size(batch)
    lengths = {len(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim}
    if count < 2 or _are_images(inputs) or lengths != {size}:
        return None
    return _map_samples(batch, lambda rows: rows.repeat(count, *[1] * (rows.ndim - 1)))


def _map_samples(batch: Batch, select: Callable[[Any], object]) -> Batch:
    """Apply ``select`` to the list of images, or to every tensor with one row for each sample.

    Tensors of other lengths (a scalar, a mask that all samples share) stay as they are.
    """
    inputs, size = _input(batch), batch_size(batch)
    if _are_images(inputs):
        return [select(inputs)]

    def select_rows(tensor: Tensor) -> object:
        return select(tensor) if tensor.ndim and tensor.size(0) == size else tensor

    return pytree.tree_map_only(Tensor, select_rows, to_pytree(batch))


def iterate_inputs(batch: Batch) -> Iterator[tuple[int | None, Tensor]]:
    """Yield the floating-point tensors that go into the model, each with a row.

    In a list of images that is the number of the image, and each is a sample. In any other batch
    it is None: a tensor has one row for each sample.
    """
    tensors = input_tensors(batch)
    are_samples = _are_images(_input(batch)) and len(tensors) == batch_size(batch)
    rows = range(len(tensors)) if are_samples else itertools.repeat(None)
    yield from zip(rows, tensors, strict=False)


def to_device(
    batch: Batch, device: torch.device | str, memory_format: torch.memory_format | None = None
) -> Batch:
    """Move every tensor of a batch to ``device``.

    Tensors with four dimensions get the ``memory_format``, if there is one: torch refuses channels
    last for other numbers of dimensions.
    """
    # Towards the CPU, a copy that is still under way could be read too early.
    non_blocking = torch.device(device).type == "cuda"

    def move_tensor(tensor: Tensor) -> Tensor:
        if memory_format is None or tensor.ndim != 4:
            return tensor.to(device, non_blocking=non_blocking)
        return tensor.to(device, non_blocking=non_blocking, memory_format=memory_format)

    return pytree.tree_map_only(Tensor, move_tensor, to_pytree(batch))
