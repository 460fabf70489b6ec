"""Models without weights, to see the keys and shapes of an architecture.

Building one with another class count shows which keys depend on it.
"""

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

_UNUSUAL = 7919  # A number that no library uses of its own accord.


class SkipRandomInitialisation(TorchFunctionMode):
    """Fills parameters with zeros where a constructor would draw random values.

    Drawing them takes half the time of building a model. Use it where all parameters are
    overwritten afterwards. Buffers get their values, since a file need not hold them.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func in (Tensor.normal_, Tensor.uniform_) and isinstance(args[0], nn.Parameter):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


def build_skeleton(adapter: Adapter, name: str, kwargs: Mapping[str, object]) -> nn.Module:
    """Build a model on the meta device, or on the CPU where its constructor needs values.

    Tensors on the meta device have shapes but no values, so that the model takes no memory. Raises
    ArchitectureError.
    """
    try:
        with torch.device("meta"):
            return adapter.build(name, kwargs).eval()
    except (ArchitectureError, RuntimeError, NotImplementedError):
        # Some constructors compute with values, torchvision's regnets for example.
        with torch.device("cpu"):
            return adapter.build(name, kwargs).eval()


def state_dict_shapes(model: nn.Module) -> dict[str, Shape]:
    """Return the shape of every tensor of a model's state dict by key."""
    # Extra state (`_extra_state`) may be any object.
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def keys_depending_on(
    adapter: Adapter,
    name: str,
    kwargs: Mapping[str, object],
    keywords: Iterable[str],
    default_shapes: Mapping[str, Shape] | None = None,
) -> frozenset[str]:
    """Return the keys whose shape, or existence, depends on the first of `keywords` that the
    constructor takes.

    `default_shapes` are the shapes of the model built without any of the keywords; they are
    computed if not given. Raises ArchitectureError if that model cannot be built.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in keywords}
    if default_shapes is None:
        default_shapes = state_dict_shapes(build_skeleton(adapter, name, kwargs))
    for keyword in keywords:
        try:
            changed_model = build_skeleton(adapter, name, {**kwargs, keyword: _UNUSUAL})
        except ArchitectureError:
            continue  # The constructor does not take this keyword.
        shapes = state_dict_shapes(changed_model)
        keys = default_shapes.keys() | shapes.keys()
        return frozenset(key for key in keys if default_shapes.get(key) != shapes.get(key))
    return frozenset()
