"""Training conditions without training: dropout at its rates, nothing learned, and everything restored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.walker.call import device_of
from ckpt_tools.walker.sites import saved_host_randomness


def switch_dropout_on(model: nn.Module, *, containers: bool) -> None:
    """Training mode for all but BN layers; with ``containers=False`` for leaf modules only.

    Flags are set one by one, and whoever calls this restores them.
    """
    for module in model.modules():
        leaf = not any(True for _ in module.children())
        if not isinstance(module, _BatchNorm) and (containers or leaf):
            module.training = True


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Every global generator starts from ``seed``, and afterwards stands where it stood."""
    device = device_of(model)
    devices: list[torch.device] = [device] if device.type == "cuda" else []
    with saved_host_randomness(), torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module; afterwards flags and buffers are as they were.

    Flags are set one by one: a module's own ``eval()`` may do more than that (merge weights, say).
    """
    modules = list(model.modules())
    flags = [module.training for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    contents = {id(b): (b, b.detach().clone()) for held in buffers for b in held.values() if b is not None}
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, flag, held in zip(modules, flags, buffers, strict=True):
            module.training = flag
            module._buffers.update(held)
        for buffer, content in contents.values():
            overwrite(buffer, content)


def overwrite(buffer: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``buffer``, wherever the buffer was made."""
    # What was made in inference mode can only be written there.
    with torch.no_grad(), torch.inference_mode(buffer.is_inference()):
        buffer.copy_(value)
