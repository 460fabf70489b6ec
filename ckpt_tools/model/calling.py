"""How a model is called on a batch, and what stands inside a wrapped model."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckpt_tools.errors import DataError, UsageError
from ckpt_tools.model.batch import Batch
from ckpt_tools.model.batch_fields import select_arguments
from ckpt_tools.model.process_context import ProcessContext

Forward: TypeAlias = Callable[[nn.Module, Batch], object]


def call_model(model: nn.Module, batch: Batch) -> object:
    """Run ``model`` on the input part of a batch and return what it returns.

    Labels that a loader may add are ignored; of a dict, ``select_arguments`` says what the model gets.
    Raises DataError for a batch of any other type than
    ``Batch`` describes.
    """
    if isinstance(batch, Mapping):
        args, kwargs = select_arguments(model, batch)
        return model(*args, **kwargs)
    if isinstance(batch, (tuple, list)) and batch:
        return model(batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise DataError(
        f"a batch is of type {type(batch).__name__}; expected a tensor, a tuple or list "
        "whose first item is the input, or a dict of the model's arguments. "
        "Pass forward=lambda model, batch: … for anything else."
    )


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel and torch.compile.

    The wrappers may be nested in any way. Raises UsageError for anything but a module.
    """
    if not isinstance(model, nn.Module):
        kind, loaded = type(model).__name__, isinstance(getattr(model, "model", None), nn.Module)
        advice = (
            "Pass its attribute `model`." if loaded else "ckpt_tools.load(path).model builds one from a file."
        )
        raise UsageError(f"model is a {kind}; expected a torch.nn.Module. {advice}")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        # torch.compile keeps the module under this name.
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


_BATCH_NORM_PARAMETERS = list(inspect.signature(F.batch_norm).parameters)


def batch_norm_arguments(args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, Any]:
    """Return the arguments of a call of ``F.batch_norm`` by name.

    Those that it uses in evaluation mode are always among them.
    """
    defaults = {"weight": None, "bias": None, "eps": 1e-5}
    return {**defaults, **dict(zip(_BATCH_NORM_PARAMETERS, args, strict=False)), **kwargs}


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first tensor; the CPU for a model without any."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def force_eager() -> AbstractContextManager[None]:
    """Within this context, compiled submodules run uncompiled.

    Dispatch modes and hooks then see operations; of a compiled graph they would see one call.
    """
    # Without this module nothing can have been compiled, and setting a stance would import it.
    return _EAGER if "torch._dynamo" in sys.modules else nullcontext()


_EAGER = ProcessContext(lambda: torch.compiler.set_stance("force_eager"))
