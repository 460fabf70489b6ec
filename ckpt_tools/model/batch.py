"""A batch as data loaders give it: its input tensors, its size, and some of its samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Batch: TypeAlias = object
"""A tensor, a tuple or list whose first item is the input, or a mapping for ``model(**batch)``."""


def _input(batch: Batch) -> object:
    """The part of a batch that goes into the model, in containers that pytree knows."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def input_tensors(batch: Batch) -> list[Tensor]:
    """The floating-point tensors that go into the model, in order."""
    leaves = pytree.tree_leaves(_input(batch))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def batch_size(batch: Batch) -> int:
    """Number of samples: the length of a list of images, else the first dimension that most tensors share.

    Of equally frequent ones that of the largest tensor counts. A batch that only the caller's ``forward`` understands
    counts as one.
    """
    given = _input(batch)
    if _are_images(given):
        return len(given)
    leaves = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and leaf.ndim]
    firsts = [leaf.shape[0] for leaf in leaves]
    best = max(leaves, key=lambda leaf: (firsts.count(leaf.shape[0]), leaf.numel()), default=None)
    return 1 if best is None else best.shape[0]


def _are_images(given: object) -> TypeGuard[Sequence[Tensor]]:
    """Whether this is a list of images (C, H, W), as detection models take it, and not of several batched inputs."""
    if not isinstance(given, (tuple, list)) or not given:
        return False
    return all(isinstance(item, Tensor) and item.ndim == 3 and item.shape[0] <= _CHANNELS for item in given)


_CHANNELS = 4  # of an image, at most


def slice_samples(batch: Batch, start: int, stop: int) -> Batch:
    """The input of a batch cut to some of its samples, as a batch."""
    given, size = _input(batch), batch_size(batch)
    if _are_images(given):
        return [given[start:stop]]

    def cut(leaf: Tensor) -> Tensor:
        return leaf[start:stop] if leaf.ndim and leaf.shape[0] == size else leaf

    return pytree.tree_map_only(Tensor, cut, dict(batch) if isinstance(batch, Mapping) else batch)


def select_samples(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some samples of a batch, given by their numbers, as a batch of copies."""
    given, size = _input(batch), batch_size(batch)
    if _are_images(given):
        return [[given[row] for row in rows]]

    def cut(leaf: Tensor) -> Tensor:
        return leaf[torch.tensor(rows, device=leaf.device)] if leaf.ndim and leaf.shape[0] == size else leaf

    return pytree.tree_map_only(Tensor, cut, dict(batch) if isinstance(batch, Mapping) else batch)


def iterate_inputs(batch: Batch) -> Iterator[tuple[int | None, Tensor]]:
    """The floating-point tensors that go into the model, each with its sample if it is one of a list of images."""
    tensors = input_tensors(batch)
    listed = _are_images(_input(batch)) and len(tensors) == batch_size(batch)
    rows = range(len(tensors)) if listed else itertools.repeat(None)
    yield from zip(rows, tensors, strict=False)


def to_device(batch: Batch, device: torch.device | str, memory_format: torch.memory_format | None = None) -> Batch:
    """Every tensor of a batch on ``device``; those with four dimensions in ``memory_format``, if there is one."""
    overlap = torch.device(device).type == "cuda"  # towards the CPU, a copy under way could be read too early

    def move_tensor(leaf: Tensor) -> Tensor:
        format_ = memory_format if memory_format is not None and leaf.ndim == 4 else torch.preserve_format
        return leaf.to(device, non_blocking=overlap, memory_format=format_)

    plain = dict(batch) if isinstance(batch, Mapping) else batch
    return pytree.tree_map_only(Tensor, move_tensor, plain)
