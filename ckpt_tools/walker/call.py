"""How a model is called on a batch, and what stands inside a wrapped model."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ckpt_tools.errors import DataError

Batch: TypeAlias = object
"""A tensor, a tuple or list whose first item is the input, or a mapping for ``model(**batch)``."""

Forward: TypeAlias = Callable[[nn.Module, Batch], object]


def call(model: nn.Module, batch: Batch) -> object:
    """Run ``model`` on the input part of a batch; the labels that a loader may add are ignored."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and batch:
        return model(batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise DataError(
        f"a batch is of type {type(batch).__name__}; expected a tensor, a tuple or list whose first item is "
        "the input, or a dict of the model's arguments. Pass forward=lambda model, batch: … for anything else."
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside any nesting of DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


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


def samples(batch: Batch, start: int, stop: int) -> Batch:
    """The input of a batch cut to some of its samples, as a batch."""
    given, size = _input(batch), batch_size(batch)
    if _are_images(given):
        return [given[start:stop]]

    def cut(leaf: Tensor) -> Tensor:
        return leaf[start:stop] if leaf.ndim and leaf.shape[0] == size else leaf

    return pytree.tree_map_only(Tensor, cut, dict(batch) if isinstance(batch, Mapping) else batch)


def chosen(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some samples of a batch, given by their numbers, as a batch of copies."""
    given, size = _input(batch), batch_size(batch)
    if _are_images(given):
        return [[given[row] for row in rows]]

    def cut(leaf: Tensor) -> Tensor:
        return leaf[torch.tensor(rows, device=leaf.device)] if leaf.ndim and leaf.shape[0] == size else leaf

    return pytree.tree_map_only(Tensor, cut, dict(batch) if isinstance(batch, Mapping) else batch)


def each_input(batch: Batch) -> Iterator[tuple[int | None, Tensor]]:
    """The floating-point tensors that go into the model, each with its sample if it is one of a list of images."""
    tensors = input_tensors(batch)
    listed = _are_images(_input(batch)) and len(tensors) == batch_size(batch)
    rows = range(len(tensors)) if listed else itertools.repeat(None)
    yield from zip(rows, tensors, strict=False)


def to_device(batch: Batch, device: torch.device | str, memory_format: torch.memory_format | None = None) -> Batch:
    """Every tensor of a batch on ``device``; those with four dimensions in ``memory_format``, if there is one."""
    overlap = torch.device(device).type == "cuda"  # towards the CPU, a copy under way could be read too early

    def moved(leaf: Tensor) -> Tensor:
        format_ = memory_format if memory_format is not None and leaf.ndim == 4 else torch.preserve_format
        return leaf.to(device, non_blocking=overlap, memory_format=format_)

    plain = dict(batch) if isinstance(batch, Mapping) else batch
    return pytree.tree_map_only(Tensor, moved, plain)


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def batch_norm_arguments(args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, Any]:
    """The arguments of a call of ``F.batch_norm`` by name, those that it uses in evaluation mode always among them."""
    return {"weight": None, "bias": None, "eps": 1e-5, **dict(zip(_BATCH_NORM, args, strict=False)), **kwargs}


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lives."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def eager() -> Iterator[None]:
    """Compiled submodules run uncompiled: our modes see operations, not graphs.

    The stance belongs to the process: where models take turns in several threads, the last to leave restores it.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled
        yield
        return
    _STANCE.enter()
    try:
        yield
    finally:
        _STANCE.leave()


class _Stance:
    """torch.compiler's stance while anybody needs it to be eager."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._held: AbstractContextManager[object] = nullcontext()

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._held = torch.compiler.set_stance("force_eager")
                self._held.__enter__()

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._held.__exit__(None, None, None)


_STANCE = _Stance()
