"""A copy of a model that a walk may run in any mode: what the copy's forward writes, the model never sees."""

from __future__ import annotations

import copy
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.model.rebinding import rebind_functions

RecordingMode = Literal["training", "leaves", "evaluation"]


def copy_model(model: nn.Module, *, meta: bool) -> nn.Module:
    """A copy of the model for one forward, on meta or for real: training mode may write to anything it holds."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().to("meta") if meta else tensor.detach().clone()

    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(copied(parameter), requires_grad=False) for parameter in model.parameters()
    }
    for module in model.modules():
        loose = [value for value in vars(module).values() if isinstance(value, Tensor)]
        for tensor in [*module._buffers.values(), *loose]:
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = copied(tensor)
    known = dict(memo)
    try:
        twin = copy.deepcopy(model, known)
    except Exception:  # noqa: BLE001 - a lock or an open file among the attributes; they can be shared
        known = memo
        twin = _copy_by_attribute(model, known)
    rebind_functions(twin, known)
    return twin


def _copy_by_attribute(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy that shares the attributes that cannot be copied."""
    modules = list(model.modules())
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
    for module in modules:
        attributes = {}
        for name, value in vars(module).items():
            try:
                attributes[name] = copy.deepcopy(value, memo)
            except Exception:  # noqa: BLE001 - whatever its copying raises
                attributes[name] = value
        memo[id(module)].__dict__.update(attributes)
    twin: nn.Module = memo[id(model)]
    return twin


def set_mode(model: nn.Module, mode: RecordingMode) -> dict[int, str]:
    """Set every module's train flag; BN layers by the identity of their running_var."""
    layers: dict[int, str] = {}
    for name, module in model.named_modules():
        module.training = mode == "training" or (mode == "leaves" and not module._modules)
        if isinstance(module, _BatchNorm):
            module.training = False  # not .eval(): the layer may hold drop and activation modules
            layers.setdefault(id(module.running_var), name)
    return layers
