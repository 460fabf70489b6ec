"""The state of a tensor and of the memory behind it, remembered so that it can be put back.

Contents are compared and written as bytes of the storage. That is exact (NaN payloads and negative
zeros included), works for every dtype, stride and overlap, and for inference tensors and quantised
ones. It also leaves version counters alone, so that an autograd graph that saved the tensor stays
usable. ``parameter.data`` does not count versions either, which is why only a copy can tell whether
the contents have changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from ckpt_tools.errors import is_short_of_memory
from ckpt_tools.model.layouts import dense_parts

# Integers by their width in bytes, the widest first.
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class StorageState:
    """The size of a storage, and a copy of its bytes from ``start`` to ``stop``.

    The copy lies beside the original, or in main memory where the device has no room for it.
    """

    def __init__(self, storage: UntypedStorage, start: int, stop: int) -> None:
        self._storage, self._start, self._stop = storage, start, stop
        self._size = storage.nbytes()
        has_contents = storage.device.type != "meta" and start != stop
        self._copy = _copy_of(self._bytes()) if has_contents else None

    def put_back(self) -> None:
        """Put size and bytes back; nothing is written where nothing has changed."""
        if self._storage.nbytes() != self._size:
            self._storage.resize_(self._size)
        if self._copy is None:
            return
        present = self._bytes()
        if not torch.equal(present.to(self._copy.device), self._copy):
            present.copy_(self._copy)

    def _bytes(self) -> Tensor:
        """Return a view of the bytes as integers.

        They are the widest that fit: comparing int64 is six times faster than comparing uint8.
        """
        start, stop = self._start, self._stop
        width = next(width for width in _INTEGERS if start % width == 0 and stop % width == 0)
        view = torch.empty(0, dtype=_INTEGERS[width], device=self._storage.device)
        return view.set_(self._storage, start // width, ((stop - start) // width,), (1,))


def _copy_of(content: Tensor) -> Tensor:
    try:
        return content.clone()
    except RuntimeError as error:
        # The device is full. Comparing across devices is slow, but the run goes on.
        if content.device.type == "cpu" or not is_short_of_memory(error):
            raise
        return content.cpu()


class TensorState:
    """What a tensor object is, apart from the contents of its memory.

    That are its class, its layout and storage, and its part in autograd. ``inner`` has the tensors
    that a subclass such as DTensor wraps, by the name of the attribute.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._class = tensor, type(tensor)
        self.inner = dict(_inner_tensors(tensor))
        self._alias = None if self.inner else tensor.detach()
        self._layout = None if self.inner else _layout(tensor)
        self._leaf, self._requires_grad = tensor.is_leaf, tensor.requires_grad
        # Only leaves keep gradients; torch warns when that of another tensor is read.
        self.grad = tensor.grad if self._leaf else None
        self.hooks = {name: getattr(tensor, name, None) for name in _HOOKS} if self._leaf else {}

    def put_back(self) -> None:
        """Put class, shape and storage back."""
        tensor: Any = self.tensor
        if type(tensor) is not self._class:
            tensor.__class__ = self._class
        for name, inner in self.inner.items():
            if getattr(tensor, name) is not inner:
                setattr(tensor, name, inner)
        # Assigning ``data`` lets the tensor have the storage, shape and strides of another.
        if self._alias is not None and _layout(tensor) != self._layout:
            tensor.data = self._alias

    def put_back_autograd(self) -> None:
        """Put the gradient, the hooks and ``requires_grad`` back."""
        if not self._leaf:
            return
        tensor = self.tensor
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if not tensor.is_leaf:  # written in place from something that requires gradients
                tensor.detach_()
            if tensor.requires_grad != self._requires_grad:
                tensor.requires_grad_(self._requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad
        for name, hooks in self.hooks.items():
            if getattr(tensor, name, None) is not hooks:
                setattr(tensor, name, hooks)

    def spans(self) -> Iterator[tuple[UntypedStorage, int, int]]:
        """Yield the storages of the contents, each with the bytes in use: from start up to stop."""
        if self.inner:  # inner tensors have states of their own
            return
        for part in dense_parts(self.tensor):
            if (storage := _storage(part)) is not None:
                yield storage, *_span(part, storage)


# Where torch keeps the hooks of a tensor.
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _inner_tensors(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors inside a wrapper subclass, each with the name of its attribute.

    A tensor with memory of its own has none.
    """
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten(tensor)[0]:
            if isinstance(inner := getattr(tensor, name), Tensor):
                yield name, inner


def _storage(part: Tensor) -> UntypedStorage | None:
    """Return the storage of a tensor.

    The result is None if torch does not show the contents, as in MKL-DNN's layout.
    """
    try:
        return part.untyped_storage()
    except NotImplementedError:
        return None


def _span(part: Tensor, storage: UntypedStorage) -> tuple[int, int]:
    """Return from where to where in its storage a tensor lies, in bytes."""
    if part.is_nested:  # nested tensors have no strides
        return 0, storage.nbytes()
    if not part.numel():
        return 0, 0
    dimensions = zip(part.shape, part.stride(), strict=True)
    length = 1 + sum(int((size - 1) * stride) for size, stride in dimensions)
    start, width = int(part.storage_offset()), part.element_size()
    # A storage may be smaller than its tensor needs: FSDP empties it in between.
    stop = min((start + length) * width, storage.nbytes())
    return min(start * width, stop), stop


def _layout(tensor: Tensor) -> tuple[object, ...]:
    """Return a value that changes when a tensor gets another storage, or is read in another way."""
    layouts: list[object] = [tensor.dtype, tensor.layout]
    for part in dense_parts(tensor):
        if (storage := _storage(part)) is None:
            layouts.append(tuple(part.shape))
        elif part.is_nested:
            layouts.append(storage._cdata)
        else:
            bits = part.is_conj(), part.is_neg()
            position = (storage._cdata, part.storage_offset(), tuple(part.shape), part.stride())
            layouts.append((*position, part.dtype, bits))
    return tuple(layouts)
