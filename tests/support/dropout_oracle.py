"""The oracle of the walk."""

from __future__ import annotations

import random

import torch
from torch import nn


def changed_by_dropout(model: nn.Module, x: torch.Tensor, draws: int = 6) -> set[str]:
    """The oracle: BN layers whose input differs between training and evaluation, BN itself in evaluation."""

    def inputs() -> dict[str, list[torch.Tensor]]:
        seen: dict[str, list[torch.Tensor]] = {}
        hooks = [
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].clone())
            )
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        with torch.no_grad():
            model(x.clone())
        for hook in hooks:
            hook.remove()
        return seen

    before = inputs() if not model.eval().training else {}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    changed = set()
    for seed in range(draws):
        torch.manual_seed(seed)
        random.seed(seed)
        for name, tensors in inputs().items():
            pairs = zip(tensors, before.get(name, []), strict=False)
            if any(not torch.allclose(new, old, rtol=1e-4, atol=1e-6) for new, old in pairs):
                changed.add(name)
    model.eval()
    return changed
