"""A forward in which BN layers run as their Layer says: how calls of batch_norm and dropout are caught."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ckpt_tools.model.calling import batch_norm_arguments
from ckpt_tools.reestimate.layer import Layer
from ckpt_tools.reestimate.operator import current, observed_batch_norm
from ckpt_tools.walker.dropout_sites import disable_attention_dropout, parse_dropout_call


class SeenEnough(BaseException):
    """Ends a forward whose remaining layers are of no interest. No Exception: a model may catch those."""


class Interception(TorchFunctionMode):
    """During a forward: BN layers under observation run as their Layer says, and calls of dropout do nothing.

    Layers are recognised by the running_var they hand to F.batch_norm, whatever their class, so their modules stay
    untouched in evaluation mode. Dropout that ignores the mode (``F.dropout(x, training=True)``) is skipped here,
    unless ``dropout`` leaves it on.
    """

    def __init__(self, *, dropout: bool = False) -> None:
        super().__init__()
        self._dropout = dropout
        self._watched: dict[int, Layer] = {}
        self._waiting: set[int] | None = None
        self._images = 1

    def begin(self, images: int, watched: Iterable[Layer], *, stop: bool) -> None:
        """Announce a batch. With ``stop`` its forward ends by SeenEnough once every watched layer has seen it."""
        self._images = images
        self._watched = {_key(layer.module.running_var): layer for layer in watched}
        self._waiting = set(self._watched) if stop else None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._batch_norm(batch_norm_arguments(args, kwargs))
        if self._dropout:
            return func(*args, **kwargs)
        drop = parse_dropout_call(func, args, kwargs)
        if drop is not None:
            return drop.input
        args, kwargs = disable_attention_dropout(func, args, kwargs)
        return func(*args, **kwargs)

    def _batch_norm(self, given: dict[str, Any]) -> Tensor:
        key = _key(given["running_var"])
        layer = self._watched.get(key)
        if layer is None:
            return F.batch_norm(**given)
        layer.observe(given["input"], self._images)
        if self._waiting is not None:
            self._waiting.discard(key)
            if not self._waiting:
                raise SeenEnough
        return layer.normalise(given["input"], given["weight"], given["bias"], given["eps"])


class CompiledInterception(Interception):
    """The same where the model is compiled: BN layers become an operator that the compiler does not look into."""

    def __enter__(self) -> CompiledInterception:
        current.append(super()._batch_norm)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        current.pop()

    def begin(self, images: int, watched: Iterable[Layer], *, stop: bool) -> None:
        """Announce a batch; graphs run to their end, so ``stop`` has no effect."""
        super().begin(images, watched, stop=False)

    def _batch_norm(self, given: dict[str, Any]) -> Tensor:
        if given.get("training", False):
            return F.batch_norm(**given)
        names = ("input", "running_mean", "running_var", "weight", "bias", "eps")
        output: Tensor = observed_batch_norm(*(given[name] for name in names))
        return output


def _key(running_var: Tensor | None) -> int:
    """What tells a layer by the buffer it hands over; a compiled graph hands over another object on its memory."""
    return 0 if running_var is None else running_var.data_ptr()
