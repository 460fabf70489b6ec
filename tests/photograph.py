"""Everything that a caller could find changed: a model to the last bit, and the state of the process.

Shares no code with the project. Both are mappings of names to values that compare by ``==``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

_CALLS = ("batch_norm", "dropout", "dropout2d", "alpha_dropout", "scaled_dot_product_attention", "linear", "conv2d")
_BACKENDS = ("cudnn", "cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn", "mkldnn.conv", "mkldnn.matmul")


def of_model(model: nn.Module) -> dict[str, Any]:
    """Every module with its attributes, and every tensor with its bits, its layout and its gradient."""
    return dict(_of_modules(model))


def of_process() -> dict[str, Any]:
    """What a forward could leave behind in torch, in numpy, in Python."""
    return dict(_of_torch()) | {
        "random": random.getstate(),
        "numpy": str(np.random.get_state(legacy=False)),
        "numpy errors": np.geterr(),
        "warnings": (list(warnings.filters), id(warnings.showwarning)),
        "signals": {number: id(signal.getsignal(number)) for number in signal.valid_signals()},
        "threads": {thread.name for thread in threading.enumerate() if "ckpt-tools-statistics" not in thread.name},
        "streams": (id(sys.stdout), id(sys.stderr)),
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109 - as the process has it
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what has changed, has gone or is new."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name, _GONE) != after.get(name, _GONE))


_GONE = object()


def _of_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            place = f"{name}.{attribute}".lstrip(".")
            yield place, _shallow(value)
            if isinstance(value, dict):
                yield from ((f"{place}[{key}]", _shallow(held)) for key, held in value.items())
            elif isinstance(value, (list, tuple)):
                yield from ((f"{place}[{key}]", _shallow(held)) for key, held in enumerate(value))
            elif isinstance(value, set):
                yield f"{place}[]", sorted(map(str, value))


def _shallow(value: object) -> object:
    if isinstance(value, Tensor):
        return _of_tensor(value)
    return value if isinstance(value, (str, int, float, bool, torch.dtype, torch.device)) else id(value)


def _of_tensor(tensor: Tensor) -> tuple[object, ...]:
    layout = tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.data_ptr()
    bits = tensor.detach().clone().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    grad = None if not tensor.is_leaf or tensor.grad is None else (id(tensor.grad), _of_tensor(tensor.grad))
    hooks = len(tensor._backward_hooks or ()), len(tensor._post_accumulate_grad_hooks or ())
    return id(tensor), type(tensor), layout, bits, tensor.requires_grad, tensor.is_inference(), grad, hooks


def _of_torch() -> Iterator[tuple[str, Any]]:
    yield "generator", torch.get_rng_state().numpy().tobytes()
    yield "gradients", (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled())
    yield "saved tensors", torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    yield "defaults", (torch.get_default_dtype(), torch.get_default_device())
    yield "determinism", _determinism()
    yield "precision", (torch.get_float32_matmul_precision(), *(_precision(name) for name in _BACKENDS))
    yield "autocast", [_autocast(device) for device in ("cpu", "cuda")] + [torch.is_autocast_cache_enabled()]
    yield "threads of operations", (torch.get_num_threads(), torch.get_num_interop_threads())
    yield "function modes", [id(mode) for mode in torch.overrides._get_current_function_mode_stack()]
    yield "dispatch modes", [id(mode) for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack()]
    yield "functions", [id(getattr(F, name)) for name in _CALLS] + [id(nn.Module.__call__), id(Tensor.copy_)]
    yield (
        "hooks of all modules",
        {
            name: {key: id(hook) for key, hook in value.items()}
            for name, value in vars(module_hooks).items()
            if name.startswith("_global_") and isinstance(value, dict)
        },
    )
    if "torch._dynamo" in sys.modules:
        yield "stance", sys.modules["torch._dynamo.eval_frame"]._stance.stance


def _determinism() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
    )


def _precision(name: str) -> object:
    backend: Any = torch.backends
    for part in name.split("."):
        backend = getattr(backend, part)
    return backend.fp32_precision


def _autocast(device: str) -> tuple[object, ...]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
