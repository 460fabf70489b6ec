"""A model in evaluation mode for a while, and everything of it restored."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ckpt_tools.walker.overwrite import put_back


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module; afterwards flags, buffers, hooks, children and attributes are as they were.

    Flags are set one by one: a module's own ``eval()`` may do more than that (merge weights, say).
    """
    modules = list(model.modules())
    flags = [module.training for module in modules]
    attributes = [_held(vars(module)) for module in modules]
    buffers = [buffer for module in modules for buffer in module._buffers.values() if buffer is not None]
    contents = {id(buffer): (buffer, buffer.detach().clone()) for buffer in buffers}
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
        for held in attributes:
            _put_back(held)
        put_back(list(contents.values()))


_Held = list[tuple[Any, Any]]
_OWN = frozenset(vars(nn.Module()))  # what torch keeps of every module: buffers, hooks, children


def _held(attributes: dict[str, Any]) -> _Held:
    """A module's attributes, and its containers of torch, each with what it holds.

    They belong together: a module that makes a buffer when it is first used remembers in an attribute that it has. What
    else an attribute holds may change within.
    """
    containers = [value for name, value in attributes.items() if name in _OWN and type(value) in _CONTAINERS]
    return [(container, container.copy()) for container in (attributes, *containers)]


_CONTAINERS = (dict, OrderedDict, set)


def _put_back(held: _Held) -> None:
    for container, content in held:
        if not _same(container, content):
            container.clear()
            container.update(content)


def _same(container: Any, content: Any) -> bool:
    """Whether both hold the very same objects in the same order; tensors do not compare as one."""
    if isinstance(container, dict) and list(container) != list(content):
        return False
    one, other = (part.values() if isinstance(part, dict) else part for part in (container, content))
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
