"""The state of what modules hold besides tensors: their classes, containers, numpy arrays, random generators."""

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

_MAPPINGS = (dict, OrderedDict, defaultdict, set)
_SEQUENCES = (list, deque)
"""Types whose whole state are their elements. Subclasses may keep more, so they are left alone."""


class ModuleState:
    """The class of a module (parametrisations exchange it) and the dict of its attributes."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._class, self._attributes = module, type(module), vars(module)

    def put_back(self) -> None:
        """Past any ``__setattr__`` of the module's own."""
        if type(self._module) is not self._class:
            object.__setattr__(self._module, "__class__", self._class)
        if vars(self._module) is not self._attributes:
            object.__setattr__(self._module, "__dict__", self._attributes)


class ContainerState:
    """Which objects a container holds, and in which order."""

    def __init__(self, container: Any) -> None:
        self._container, self._content = container, container.copy()

    def put_back(self) -> None:
        """Put the same objects back."""
        container, content = self._container, self._content
        if _holds_same(container, content):
            return
        container.clear()
        (container.update if hasattr(container, "update") else container.extend)(content)


def holds_model_state(container: Any) -> bool:
    """Whether the elements of a container belong to the state of a model, so that it is to have them back.

    Those of dicts and sets do: a module may remember there what it has built. A list or deque does where it holds
    tensors or modules, as the flat weights of an RNN. Any other, and a Counter, is a log, in which a forward tells its
    author what it has done.
    """
    if type(container) in _SEQUENCES:
        return any(isinstance(element, (Tensor, nn.Module)) for element in container)
    return type(container) in _MAPPINGS


def container_elements(thing: object) -> Iterator[object]:
    """The elements of a container of any class, read past overridden methods; the values of a dict."""
    if isinstance(thing, dict):
        yield from dict.values(thing)
        return
    kinds: tuple[Any, ...] = (list, tuple, set, deque)
    for kind in kinds:
        if isinstance(thing, kind):
            yield from kind.__iter__(thing)


def bound_modules(function: object) -> Iterator[object]:
    """The modules that a function would run: those it is bound to, closes over or finds among its globals.

    Functions that it wraps are yielded, too. Other things that it closes over are none of the model's: a hook may
    collect activations for its author.
    """
    held: list[object] = []
    if isinstance(function, MethodType):
        held = [function.__self__]
    elif isinstance(function, partial):
        held = [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, FunctionType):
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # an empty one
                held.append(cell.cell_contents)
        held += function.__defaults__ or ()
        held += (function.__kwdefaults__ or {}).values()
        names = (function.__globals__.get(name) for name in function.__code__.co_names)
        yield from (value for value in names if isinstance(value, nn.Module))
    yield from (value for value in held if isinstance(value, (nn.Module, FunctionType, MethodType, partial)))


def _holds_same(container: Any, content: Any) -> bool:
    """Whether both hold the very same objects in the same order; tensors do not compare as one."""
    if len(container) != len(content):
        return False
    pairs = [(container, content)]
    if isinstance(container, dict):
        pairs.append((container.values(), content.values()))
    return all(a is b for old, new in pairs for a, b in zip(old, new, strict=True))


class ArrayState:
    """The values of a numpy array."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array, self._content = array, array.copy()

    def put_back(self) -> None:
        """Nothing is written where nothing has changed."""
        if self._array.tobytes() != self._content.tobytes():  # NaN equals itself here
            self._array[...] = self._content


class GeneratorState:
    """Where a random generator stands."""

    def __init__(self, generator: Any) -> None:
        get, self._set = _generator_access(generator)
        self._state = get()

    def put_back(self) -> None:
        """Set the generator back."""
        self._set(self._state)


_GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator)


def is_generator(thing: object) -> bool:
    """Whether ``GeneratorState`` can hold its state; ``random.SystemRandom`` has none."""
    return isinstance(thing, _GENERATORS) and not isinstance(thing, random.SystemRandom)


def _generator_access(generator: Any) -> tuple[Callable[[], object], Callable[[Any], object]]:
    """How the state of a generator is read and set."""
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        return generator.get_state, generator.set_state
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    return lambda: bits.state, lambda state: setattr(bits, "state", state)
