"""The arithmetic of a pass: full float32, or faster kinds, and how far their results deviate."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from ckpt_tools.contract import Precision
from ckpt_tools.errors import UsageError
from ckpt_tools.model.process_context import ProcessContext
from ckpt_tools.results import Spread

# cuBLAS reads this variable, and torch asks for it where algorithms must be deterministic.
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def compute_in_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute matrix products and convolutions in ``precision`` within the context.

    "fp32" is IEEE float32, also where torch allows TF32 by itself (cuDNN's convolutions). "tf32"
    rounds their inputs to 10 bits on NVIDIA GPUs since Ampere and changes nothing elsewhere. "bf16"
    and "fp16" are those of torch.autocast. Afterwards the process computes as it did before.
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


def deterministic_kernels(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which CUDA uses kernels that always add in the same order.

    Other kernels may add in another order in every run, and rounding makes the results differ.
    torch raises RuntimeError where an operation has no such kernel. CPUs need nothing.
    """
    return _DETERMINISTIC if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _set_deterministic_kernels() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(_WORKSPACE)
    try:
        os.environ.setdefault(_WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        # A benchmark chooses the fastest kernel, which need not be the same in every run.
        cudnn.benchmark, cudnn.deterministic = False, True
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        cudnn.benchmark, cudnn.deterministic = before
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)


_DETERMINISTIC = ProcessContext(_set_deterministic_kernels)


def autocast_context(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return torch.autocast for bf16 and fp16; for the others a context without effect."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise UsageError for an unknown word, or where the device has no such arithmetic."""
    choices = get_args(Precision)
    if precision not in choices:
        raise UsageError(f"precision={precision!r}: expected one of {', '.join(choices)}.")
    if precision == "tf32" and device.type != "cuda":
        raise UsageError(
            "precision tf32 is arithmetic of NVIDIA GPUs: expected the model on one, found it on "
            f"{device}. Use fp32 or bf16."
        )


def relative_deviation(exact: Mapping[str, Tensor], measured: Mapping[str, Tensor]) -> Spread:
    """Return the spread of |measured / exact − 1| over the channels of all layers.

    Both map names of layers to variances (C,). Dead channels, whose variance is 0, are left out.
    """
    pairs = [(exact[name], measured[name]) for name in exact if name in measured]
    if not pairs:
        return Spread(0.0, 0.0, 0.0)
    relative = torch.cat([((b - a).abs() / a)[a > 0] for a, b in pairs])
    if not len(relative):
        return Spread(0.0, 0.0, 0.0)
    return Spread(float(relative.median()), float(relative.min()), float(relative.max()))
