"""Limits on what a constructor may cost when a checkpoint file chose its arguments.

A file of two kilobytes can describe a model of ten million blocks. `limited_construction` bounds
every construction inside its block: the number of modules and parameters, the size of parameters,
and the seconds of each one. Libraries have no standard input meanwhile, so that none can ask the
person at the terminal for a permission.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from ckpt_tools.errors import ArchitectureError

__all__ = ["ConstructionBudget", "count_construction", "limited_construction", "without_standard_input"]

_TIMES = 4  # a construction may register so many times as much as the file holds
# A construction may register these in addition, for any file. A detection head that is probed with
# 7,919 classes takes 60 million values on the CPU (on the meta device none); ssd300_vgg16 first
# builds a VGG of 4.5 times its own size.
_SPARE_MODULES = 1000
_SPARE_VALUES = 1 << 26
_SECONDS = 30.0
_FACTORIES = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace}
    | {torch.eye, torch.randint, torch.randperm, torch.logspace, torch.empty_strided, torch.tril_indices}
)


@dataclass(frozen=True)
class ConstructionBudget:
    """The most that one construction may register and last.

    `modules` also bounds the number of parameters and buffers. `values` counts their elements where
    they take memory: not on the meta device. In models of timm and torchvision there are at most
    3.3 modules to a tensor.
    """

    modules: int
    values: int
    seconds: float = _SECONDS

    @staticmethod
    def from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> ConstructionBudget:
        """Return the budget of a file whose tensors have these shapes."""
        values = sum(math.prod(shape) for shape in shapes.values())
        return ConstructionBudget(_TIMES * len(shapes) + _SPARE_MODULES, _TIMES * values + _SPARE_VALUES)


class _BudgetExceeded(BaseException):
    """Ends a construction.

    No Exception: constructors and their callers catch those and try something else.
    """


_budget: ContextVar[ConstructionBudget | None] = ContextVar("construction_budget", default=None)


@contextlib.contextmanager
def limited_construction(budget: ConstructionBudget | None, subject: str) -> Iterator[None]:
    """Bound every construction in the block by `budget`, and take standard input away.

    `budget` None: only standard input is taken away. `subject` begins the message: the file, and
    what is built. Raises ArchitectureError where a construction exceeds the budget.
    """
    token = _budget.set(budget)
    try:
        with without_standard_input():
            yield
    except _BudgetExceeded as error:
        raise ArchitectureError(
            f"{subject}: expected a model that the file's tensors justify, found one that {error}. "
            "If it is right all the same, name the architecture and its arguments yourself: --arch "
            "and --model-kwargs."
        ) from error
    finally:
        _budget.reset(token)


@contextlib.contextmanager
def count_construction() -> Iterator[None]:
    """Count the constructions in the block against the budget of `limited_construction`.

    A construction inside another one is counted for itself and for the outer one.
    """
    budget = _budget.get()
    if budget is None:
        yield
        return
    meter = _Meter(budget, threading.get_ident())
    with meter.count_registrations(), _MeteredFactories(meter), _time_limit(budget.seconds):
        yield


class _Meter:
    """Counts the modules, parameters and buffers that one thread registers."""

    def __init__(self, budget: ConstructionBudget, thread: int) -> None:
        self._budget, self._thread = budget, thread
        self._modules = self._tensors = self._values = 0

    @contextlib.contextmanager
    def count_registrations(self) -> Iterator[None]:
        """Count all modules, parameters and buffers that are registered in the block."""
        handles = [
            torch_module.register_module_module_registration_hook(self._add_module),
            torch_module.register_module_parameter_registration_hook(self._add_tensor),
            torch_module.register_module_buffer_registration_hook(self._add_tensor),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def require_values(self, count: int) -> None:
        """Raise _BudgetExceeded if the budget has no room for a single tensor of so many values."""
        if count > self._budget.values:
            raise _BudgetExceeded(f"makes a tensor of {count:,} values, more than {self._budget.values:,}")

    def _add_module(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if threading.get_ident() != self._thread:  # the hooks are torch's for the whole process
            return
        self._modules += 1
        if self._modules > self._budget.modules:
            raise _BudgetExceeded(f"registers more than {self._budget.modules:,} modules")

    def _add_tensor(self, parent: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if threading.get_ident() != self._thread or tensor is None:
            return
        self._tensors += 1
        if self._tensors > self._budget.modules:
            raise _BudgetExceeded(f"registers more than {self._budget.modules:,} parameters and buffers")
        if not tensor.is_meta and not nn.parameter.is_lazy(tensor):
            self._values += tensor.numel()
        if self._values > self._budget.values:
            raise _BudgetExceeded(f"registers parameters of more than {self._budget.values:,} values")


class _MeteredFactories(TorchFunctionMode):
    """Checks the size of a tensor before it is made.

    When a parameter is registered, its memory has been taken already.
    """

    def __init__(self, meter: _Meter) -> None:
        super().__init__()
        self._meter = meter

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in _FACTORIES and not _goes_to_meta(kwargs):
            self._meter.require_values(_count_values(func, args, kwargs))
        return func(*args, **kwargs)


def _goes_to_meta(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device") or torch.get_default_device()
    return torch.device(device).type == "meta"


def _count_values(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the number of values of a tensor that a factory would make, without making it."""
    described = {
        name: value for name, value in kwargs.items() if name not in ("generator", "out", "pin_memory")
    }
    try:
        return int(func(*args, **{**described, "device": "meta"}).numel())
    # The call itself is wrong, and the error of the real call will say so better.
    except (RuntimeError, TypeError, ValueError):
        return 0


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _BudgetExceeded in this thread once the block has lasted so long.

    CPython raises an exception in another thread between two bytecodes, so that any Python loop
    ends. Signals would reach the main thread only. Elsewhere than in CPython there is no limit.
    """
    raise_in_thread = getattr(getattr(ctypes, "pythonapi", None), "PyThreadState_SetAsyncExc", None)
    if raise_in_thread is None:
        yield
        return
    thread = ctypes.c_ulong(threading.get_ident())
    lock, state = threading.Lock(), {"over": False, "late": False}

    def interrupt() -> None:
        with lock:
            if not state["over"]:
                state["late"] = True
                raise_in_thread(thread, ctypes.py_object(_OutOfTime))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except _OutOfTime:
        pass  # raised below, with a message
    finally:
        with lock:
            state["over"] = True
        timer.cancel()
        if state["late"]:
            raise_in_thread(thread, None)  # one that has not arrived yet must not arrive later
    if state["late"]:
        raise _BudgetExceeded(f"takes more than {seconds:.0f} s to build")


class _OutOfTime(_BudgetExceeded):
    """Is raised in a thread whose construction has lasted too long.

    CPython makes the exception without a message.
    """


@contextlib.contextmanager
def without_standard_input() -> Iterator[None]:
    """Let `input()` find the end of a file, so that no library can ask for a permission."""
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:  # noqa: PTH123 - a device, no path
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before
