"""How a model is called on a batch, and what stands inside a wrapped model."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ckpt_tools.errors import DataError
from ckpt_tools.model.batch import Batch

Forward: TypeAlias = Callable[[nn.Module, Batch], object]


def call_model(model: nn.Module, batch: Batch) -> object:
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


def unwrap_model(model: nn.Module) -> nn.Module:
    """The module inside any nesting of DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


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
def force_eager() -> Iterator[None]:
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
