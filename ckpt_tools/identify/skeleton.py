"""Models without weights: the keys and shapes of an architecture, and which of them follow the class count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ckpt_tools.contract import Adapter
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify.shape_digest import Shape

CLASS_KEYWORDS = ("num_classes", "n_classes", "num_labels")
CHANNEL_KEYWORDS = ("in_chans", "in_channels")

_UNUSUAL = 7919  # a number that no library uses of its own accord


class SkipRandomInitialisation(TorchFunctionMode):
    """Random initial values of parameters are not drawn, which takes half the time of building a model.

    For models whose parameters are all overwritten afterwards. Buffers get their values: a file need not hold them.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if func in (Tensor.normal_, Tensor.uniform_) and isinstance(args[0], nn.Parameter):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


def build_skeleton(adapter: Adapter, name: str, kwargs: Mapping[str, object]) -> nn.Module:
    """The model on the meta device, or on the CPU where its constructor needs values. Raises ArchitectureError."""
    try:
        with torch.device("meta"):
            return adapter.build(name, kwargs).eval()
    except (ArchitectureError, RuntimeError, NotImplementedError):
        with torch.device("cpu"):
            return adapter.build(name, kwargs).eval()


def state_dict_shapes(model: nn.Module) -> dict[str, Shape]:
    """Shape of every tensor of a model's state dict by key."""
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def keys_depending_on(
    adapter: Adapter,
    name: str,
    kwargs: Mapping[str, object],
    keywords: Iterable[str],
    own: Mapping[str, Shape] | None = None,
) -> frozenset[str]:
    """The keys whose shape, or existence, follows the first of ``keywords`` that the constructor takes.

    ``own`` are the shapes of the model without any of them, if known. Raises ArchitectureError if it cannot be built.
    """
    plain = {key: value for key, value in kwargs.items() if key not in keywords}
    own = state_dict_shapes(build_skeleton(adapter, name, plain)) if own is None else own
    for keyword in keywords:
        try:
            other = state_dict_shapes(build_skeleton(adapter, name, {**plain, keyword: _UNUSUAL}))
        except ArchitectureError:
            continue
        return frozenset(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
    return frozenset()
