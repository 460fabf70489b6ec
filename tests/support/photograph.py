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
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

_CALLS = (
    "batch_norm",
    "dropout",
    "dropout2d",
    "alpha_dropout",
    "scaled_dot_product_attention",
    "linear",
    "conv2d",
)
_BACKENDS = ("cudnn", "cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn", "mkldnn.conv", "mkldnn.matmul")
_SWITCHES = (
    "backends.cuda.flash_sdp_enabled",
    "backends.cuda.math_sdp_enabled",
    "backends.cuda.mem_efficient_sdp_enabled",
    "backends.cuda.preferred_linalg_library",
    "backends.cudnn.benchmark_limit",
    "backends.mha.get_fastpath_enabled",
    "backends.mkldnn.deterministic",
    "backends.mkldnn.enabled",
    "backends.quantized.engine",
    "_C._get_cublas_allow_fp16_reduced_precision_reduction",
    "_C._get_cublas_allow_bf16_reduced_precision_reduction",
    "_C._get_cublas_allow_fp16_accumulation",
    "_C._get_cublas_allow_tf32",
    "_C._get_cudnn_allow_tf32",
    "get_float32_matmul_precision",
    "is_anomaly_check_nan_enabled",
    "is_warn_always_enabled",
    "sparse.check_sparse_tensor_invariants.is_enabled",
)


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
        "threads": {
            thread.name for thread in threading.enumerate() if "ckpt-tools-statistics" not in thread.name
        },
        "streams": (id(sys.stdout), id(sys.stderr)),
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109 - as the process has it
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what has changed, has gone or is new."""
    return sorted(
        name for name in before.keys() | after.keys() if before.get(name, _GONE) != after.get(name, _GONE)
    )


_GONE = object()


def _of_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules(remove_duplicate=False):
        yield f"{name}.__class__".lstrip("."), (type(module), id(vars(module)))
        for attribute, value in vars(module).items():
            yield from _of_value(f"{name}.{attribute}".lstrip("."), value)


def _of_value(place: str, value: object) -> Iterator[tuple[str, Any]]:
    """A value and, to any depth, what it holds."""
    yield place, _shallow(value)
    if isinstance(value, dict):
        yield f"{place}[]", list(map(str, value))
        for key, held in value.items():
            yield from _of_value(f"{place}[{key}]", held)
    elif isinstance(value, (list, tuple, deque)):
        for key, held in enumerate(value):
            yield from _of_value(f"{place}[{key}]", held)
            if isinstance(held, nn.Module):  # out of torch's sight
                yield from ((f"{place}[{key}].{name}", part) for name, part in _of_modules(held))
    elif isinstance(value, set):
        yield f"{place}[]", sorted(map(str, value))
    elif isinstance(value, torch.Generator):
        yield f"{place}[]", value.get_state().numpy().tobytes()
    elif isinstance(value, random.Random):
        yield f"{place}[]", value.getstate()
    elif isinstance(value, np.random.Generator):
        yield f"{place}[]", str(value.bit_generator.state)


def _shallow(value: object) -> object:
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, np.ndarray):
        return id(value), value.shape, value.tobytes()
    return value if isinstance(value, (str, int, float, bool, torch.dtype, torch.device)) else id(value)


def _of_tensor(tensor: Tensor) -> tuple[object, ...]:
    grad = None if not tensor.is_leaf or tensor.grad is None else (id(tensor.grad), _of_tensor(tensor.grad))
    hooks = [
        sorted(map(id, (hooks or {}).values())) for hooks in (tensor._backward_hooks, _late_hooks(tensor))
    ]
    autograd = tensor.is_leaf, tensor.requires_grad, tensor.is_inference(), grad, hooks
    return (
        id(tensor),
        type(tensor),
        tensor.shape,
        tensor.dtype,
        autograd,
        dict(vars(tensor)),
        _of_contents(tensor),
    )


def _late_hooks(tensor: Tensor) -> dict[int, Any] | None:
    return tensor._post_accumulate_grad_hooks if tensor.is_leaf else None


def _of_contents(tensor: Tensor) -> object:
    """Where the values of a tensor are, and which."""
    if tensor.layout is torch.sparse_coo:
        return [_of_contents(part) for part in (tensor._indices(), tensor._values())]
    if tensor.layout is torch.sparse_csr:
        return [_of_contents(part) for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values())]
    address = tensor.storage_offset(), tensor.data_ptr(), tensor.untyped_storage().nbytes()
    place = tensor.device, tensor.stride(), address
    if tensor.is_meta or not tensor.untyped_storage().nbytes():
        return place
    plain = tensor.detach().int_repr() if tensor.is_quantized else tensor.detach().as_subclass(Tensor)
    return place, plain.clone().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _of_torch() -> Iterator[tuple[str, Any]]:
    yield "generator", torch.get_rng_state().numpy().tobytes()
    yield (
        "gradients",
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
    )
    yield "saved tensors", torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    yield "defaults", (torch.get_default_dtype(), torch.get_default_device())
    yield "determinism", _determinism()
    yield "switches", [(name, _switch(name)) for name in _SWITCHES]
    yield "precision", [_precision(name) for name in _BACKENDS]
    yield "autocast", [_autocast(device) for device in ("cpu", "cuda")] + [torch.is_autocast_cache_enabled()]
    yield "threads of operations", (torch.get_num_threads(), torch.get_num_interop_threads())
    yield (
        "function modes",
        [getattr(mode, "device", id(mode)) for mode in torch.overrides._get_current_function_mode_stack()],
    )
    yield (
        "dispatch modes",
        [id(mode) for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack()],
    )
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


def _switch(name: str) -> object:
    owner: Any = torch
    for part in name.split("."):
        owner = getattr(owner, part)
    try:
        return owner() if callable(owner) else owner
    except RuntimeError as error:  # TF32 under its old and its new name
        return type(error)


def _precision(name: str) -> object:
    backend: Any = torch.backends
    for part in name.split("."):
        backend = getattr(backend, part)
    return backend.fp32_precision


def _autocast(device: str) -> tuple[object, ...]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
