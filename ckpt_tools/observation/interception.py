"""A forward whose BN layers run as their Layer says, because calls of batch_norm are caught."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ckpt_tools.model.calling import batch_norm_arguments
from ckpt_tools.observation.layer import Layer
from ckpt_tools.observation.remaining_noise import NoiseRemoval
from ckpt_tools.results import DropoutSite
from ckpt_tools.walker.dropout_sites import (
    disable_attention_dropout,
    enable_dropout,
    parse_dropout_call,
)


class StopForward(BaseException):
    """Ends a forward once all watched layers have run.

    It is no Exception, because a model's own ``except Exception`` would swallow that.
    """


class Interception(TorchFunctionMode):
    """While it is active, watched BN layers run as their Layer says, and dropout does nothing.

    Layers are recognised by the running_var that they pass to F.batch_norm, whatever their class,
    so the modules stay untouched in evaluation mode. Dropout that ignores the mode
    (``F.dropout(x, training=True)``) is skipped here too, unless ``dropout`` leaves it on; so is
    other noise, as far as ``NoiseRemoval`` can switch it off. Where modules with children cannot be
    in training mode (``containers=False``), the dropout functions that they call are switched on.
    """

    def __init__(self, *, dropout: bool = False, containers: bool = True) -> None:
        super().__init__()
        self._dropout, self._containers_train = dropout, containers
        self._noise = None if dropout else NoiseRemoval()
        self._context = ExitStack()
        self._watched: dict[int, Layer] = {}
        self._waiting: set[int] | None = None  # keys of layers to run before the forward may end
        self._images = 1

    @property
    def noise_left_on(self) -> tuple[DropoutSite, ...]:
        """The operations that drew random numbers under test conditions all the same."""
        return self._noise.noise_left_on if self._noise else ()

    def name_modules(self, model: nn.Module) -> None:
        """Let noise be reported by the names that modules have in ``model``."""
        if self._noise is not None:
            self._noise.module_names = {id(module): name for name, module in model.named_modules()}

    def __enter__(self) -> Interception:
        # Entered first, so that it also sees operations of what this mode calls.
        if self._noise is not None and self._noise.is_needed:
            self._context.enter_context(self._noise)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        exit_noise = self._context.pop_all()
        exit_noise.__exit__(*error)

    def begin(self, images: int, watched: Iterable[Layer], *, stop: bool) -> None:
        """Announce a batch of so many ``images``.

        With ``stop`` the forward ends by StopForward once every watched layer has run.
        """
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
            if not self._containers_train:
                args, kwargs = enable_dropout(func, args, kwargs)
            return func(*args, **kwargs)
        # The rate of dropout may also be an argument of a larger function, such as attention; that
        # function is called with the rate changed.
        drop = parse_dropout_call(func, args, kwargs)
        if drop is not None:
            return drop.input
        args, kwargs = disable_attention_dropout(func, args, kwargs)
        return func(*args, **kwargs)

    def _batch_norm(self, arguments: dict[str, Any]) -> Tensor:
        key = _key(arguments["running_var"])
        layer = self._watched.get(key)
        if layer is None:
            return F.batch_norm(**arguments)
        x = arguments["input"]
        layer.observe(x, self._images)
        if self._waiting is not None:
            self._waiting.discard(key)
            if not self._waiting:
                raise StopForward
        return layer.normalise(x, arguments["weight"], arguments["bias"], arguments["eps"])


class CompiledInterception(Interception):
    """The same for a compiled model.

    BN layers become a custom operator. The compiler does not look into one, so it makes a single
    graph of the model around the layers instead of a graph between any two of them.
    """

    def __enter__(self) -> CompiledInterception:
        _active_handlers.append(super()._batch_norm)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        _active_handlers.pop()

    def begin(self, images: int, watched: Iterable[Layer], *, stop: bool) -> None:
        """Announce a batch. Compiled graphs run to their end, so ``stop`` has no effect."""
        super().begin(images, watched, stop=False)

    def _batch_norm(self, arguments: dict[str, Any]) -> Tensor:
        # A layer that uses batch statistics in evaluation mode, too, has none to correct.
        if arguments.get("training", False):
            return F.batch_norm(**arguments)
        names = ("input", "running_mean", "running_var", "weight", "bias", "eps")
        output: Tensor = _observed_batch_norm(*(arguments[name] for name in names))
        return output


_active_handlers: list[Callable[[dict[str, Any]], Tensor]] = []
"""The last entry is what the operator below calls; it is there for the time of a forward."""


@torch.library.custom_op("ckpt_tools::observed_batch_norm", mutates_args=())
def _observed_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The output (N, C, …) of a BN layer, whose input is measured on the way."""
    statistics = {"running_mean": running_mean, "running_var": running_var}
    affine = {"weight": weight, "bias": bias}
    return _active_handlers[-1]({"input": x, **statistics, **affine, "eps": eps})


@_observed_batch_norm.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _key(running_var: Tensor | None) -> int:
    """The address of a layer's buffer; a compiled graph passes another tensor that shares it."""
    return 0 if running_var is None else running_var.data_ptr()
