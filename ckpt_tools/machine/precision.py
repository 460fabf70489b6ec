"""The arithmetic of a pass: full float32, or what accelerators do faster, with the deviation that it brings."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from ckpt_tools.contract import Precision
from ckpt_tools.errors import UsageError
from ckpt_tools.results import Spread

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def compute_in_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Matrix products and convolutions in ``precision``; afterwards the process computes as it did before.

    "fp32" is IEEE float32, also where torch allows TF32 by itself (cuDNN's convolutions); "tf32" rounds their inputs
    to 10 bits on NVIDIA GPUs since Ampere and changes nothing elsewhere; "bf16" and "fp16" are torch.autocast's.
    """
    cudnn: Any = torch.backends.cudnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        with autocast_context(precision, device):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


@contextlib.contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Kernels of CUDA that add in one order alone; afterwards the process chooses as it did before. CPUs need nothing.

    torch raises RuntimeError where an operation has no such kernel. The setting belongs to the process: where models
    take turns in several threads, the last to leave restores it.
    """
    global _users
    if device.type != "cuda":
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            _before.enter_context(_one_order())
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _before.close()


_lock, _before = threading.Lock(), contextlib.ExitStack()
_users = 0


@contextlib.contextmanager
def _one_order() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    warning = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(_WORKSPACE)
    try:
        os.environ.setdefault(_WORKSPACE, ":4096:8")  # torch asks for it, cuBLAS reads it
        torch.use_deterministic_algorithms(True)
        cudnn.benchmark, cudnn.deterministic = False, True
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warning)
        cudnn.benchmark, cudnn.deterministic = before
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)


def autocast_context(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """torch.autocast for the two half-width types, nothing for the others."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise UsageError for an unknown word, or where the device has no such arithmetic."""
    if precision not in get_args(Precision):
        raise UsageError(f"precision={precision!r}: expected one of {', '.join(get_args(Precision))}.")
    if precision == "tf32" and device.type != "cuda":
        raise UsageError(f"precision tf32 is arithmetic of NVIDIA GPUs; the model is on {device}. Use fp32 or bf16.")


def relative_deviation(exact: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Spread:
    """|found / exact − 1| of variances (C,) by layer, over the channels of all layers; dead ones are left out."""
    pairs = [(exact[name], found[name]) for name in exact if name in found]
    relative = torch.cat([((b - a).abs() / a)[a > 0] for a, b in pairs])
    if not len(relative):
        return Spread(0.0, 0.0, 0.0)
    return Spread(float(relative.median()), float(relative.min()), float(relative.max()))
