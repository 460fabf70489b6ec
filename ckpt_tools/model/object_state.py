"""The state of what modules hold besides tensors.

That are their classes and attributes, containers, numpy arrays and random generators.
"""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# An object of these very types is nothing but its elements. A subclass may keep more.
_MAPPINGS = (dict, OrderedDict, defaultdict, set)
_SEQUENCES = (list, deque)


class ModuleState:
    """The class of a module and the dict of its attributes.

    A parametrisation exchanges the class of its module. The contents of the dict are remembered by
    a ``ContainerState``.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._class, self._attributes = module, type(module), vars(module)

    def put_back(self) -> None:
        """Put class and dict back, past any ``__setattr__`` of the module's own."""
        if type(self._module) is not self._class:
            object.__setattr__(self._module, "__class__", self._class)
        if vars(self._module) is not self._attributes:
            object.__setattr__(self._module, "__dict__", self._attributes)


class ContainerState:
    """Which objects a container holds, and in which order."""

    def __init__(self, container: Any) -> None:
        self._container, self._content = container, container.copy()

    def put_back(self) -> None:
        """Put the same objects back in the same order, if anything has changed."""
        container, content = self._container, self._content
        if _holds_same(container, content):
            return
        # Cleared and filled, because the model may hold the container itself in several places.
        container.clear()
        (container.update if hasattr(container, "update") else container.extend)(content)


def holds_model_state(container: Any) -> bool:
    """Tell whether the elements of a container belong to the state of a model.

    Those of dicts and sets do: a module may remember there what it has built. Those of a list or
    deque do if there are tensors or modules among them, such as the flat weights of an RNN. Any
    other list, and a Counter, is taken for a log, in which a forward tells its author what it has
    done.
    """
    if type(container) in _SEQUENCES:
        return any(isinstance(element, (Tensor, nn.Module)) for element in container)
    return type(container) in _MAPPINGS


def container_elements(thing: object) -> Iterator[object]:
    """Yield the elements of a container of any class, or the values of a dict.

    Anything that is no container yields nothing.
    """
    # A subclass may override its methods, and compute something else or raise.
    if isinstance(thing, dict):
        yield from dict.values(thing)
        return
    kinds: tuple[Any, ...] = (list, tuple, set, deque)
    for kind in kinds:
        if isinstance(thing, kind):
            yield from kind.__iter__(thing)


def bound_modules(function: object) -> Iterator[object]:
    """Yield the modules and functions that a function refers to, and so may run.

    It may be bound to them, close over them, have them as default arguments or use them as global
    names. Other things that it closes over do not belong to the model: a hook may collect
    activations for its author.
    """
    references: list[object] = []
    if isinstance(function, MethodType):
        references = [function.__self__]
    elif isinstance(function, partial):
        references = [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, FunctionType):
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # the cell is empty
                references.append(cell.cell_contents)
        references += function.__defaults__ or ()
        references += (function.__kwdefaults__ or {}).values()
        # Of the globals only modules: following functions would lead through whole libraries.
        used = (function.__globals__.get(name) for name in function.__code__.co_names)
        references += (value for value in used if isinstance(value, nn.Module))
    kinds = (nn.Module, FunctionType, MethodType, partial)
    yield from (value for value in references if isinstance(value, kinds))


def _holds_same(container: Any, content: Any) -> bool:
    """Tell whether both hold the very same objects in the same order.

    ``==`` would not do: that of tensors compares element by element.
    """
    if len(container) != len(content):
        return False
    pairs = [(container, content)]
    if isinstance(container, dict):
        pairs.append((container.values(), content.values()))
    return all(a is b for old, new in pairs for a, b in zip(old, new, strict=True))


class ArrayState:
    """The values of a numpy array that can be written to."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array, self._content = array, array.copy()

    def put_back(self) -> None:
        """Put the values back; nothing is written where nothing has changed."""
        # As bytes, because NaN does not equal itself.
        if self._array.tobytes() != self._content.tobytes():
            self._array[...] = self._content


class GeneratorState:
    """The position of a random generator of torch, numpy or Python."""

    def __init__(self, generator: Any) -> None:
        get, self._set = _generator_access(generator)
        self._state = get()

    def put_back(self) -> None:
        """Set the generator back."""
        self._set(self._state)


_GENERATORS = (
    *(torch.Generator, random.Random),
    *(np.random.RandomState, np.random.Generator, np.random.BitGenerator),
)


def is_generator(thing: object) -> bool:
    """Tell whether this is a random generator with a state; ``random.SystemRandom`` has none."""
    return isinstance(thing, _GENERATORS) and not isinstance(thing, random.SystemRandom)


def _generator_access(generator: Any) -> tuple[Callable[[], object], Callable[[Any], object]]:
    """Return two functions, which read and set the state of a generator."""
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        return generator.get_state, generator.set_state
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    return lambda: bits.state, lambda state: setattr(bits, "state", state)
