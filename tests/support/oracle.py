"""The truth, sharing no code with the project: BN by BN in order of execution, torch.var of the layer's input
over all data in evaluation mode, with the layers before it already corrected."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def inputs_of(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """All that reaches the layer, as (C, values) in float64. Batches of 50 images stay in the cache."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].double().transpose(0, 1).flatten(1))
    )
    with torch.no_grad():
        for batch in x.split(50):
            model(batch)
    hook.remove()
    return torch.cat(seen, 1)


def corrected(
    model: nn.Module, x: Tensor, names: set[str] | None = None, sweeps: int = 1
) -> dict[str, Tensor]:
    """Running variances by layer name. ``sweeps`` > 1 where a layer lies behind itself (a reused one)."""
    model = copy.deepcopy(model).eval()
    modules = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    order: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(x[:2])
    for hook in hooks:
        hook.remove()
    chosen = [name for name in dict.fromkeys(order) if names is None or name in names]
    for _ in range(sweeps):
        for name in chosen:
            modules[name].running_var = inputs_of(model, modules[name], x).var(1).float()
    return {name: modules[name].running_var for name in chosen}


def relative_difference(found: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """|found/truth − 1| of every channel."""
    return torch.cat([(found[name].double() / truth[name].double() - 1).abs() for name in truth])
