"""The truth of the paired measurement, from hooks and ``torch.var``, sharing no code with the project."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def run(model: nn.Module, batch: Any) -> object:
    """Call the model as its owner does: a dict holds the arguments, anything else is the input."""
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(batch)


def norms_of(model: nn.Module) -> dict[str, Any]:
    """The BN layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def values_of(x: Tensor) -> Tensor:
    """An input (N, C, …) as (C, values) in float64."""
    return x.detach().double().transpose(0, 1).flatten(1)


def normalise(module: Any, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """What a BN layer makes of its input with these statistics, each (C,)."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    normal = (x.double() - mean.view(shape)) / (variance.view(shape) + module.eps).sqrt()
    if module.affine:
        normal = normal * module.weight.double().view(shape) + module.bias.double().view(shape)
    return normal.to(x.dtype)


def dropout_shift(model: nn.Module, batch: Any, draws: int) -> dict[str, tuple[Tensor, Tensor]]:
    """V_on / V_off of every BN layer, each (C,), and the relative scatter (C,) of V_on between draws.

    Both are variances within a call of the layer, which normalises by the call's own variance. With
    dropout on the mean is the call's own, too; with dropout off it is the one that the same call
    has with dropout on, averaged over the draws.
    """
    model = copy.deepcopy(model)
    norms = norms_of(model)
    runs: dict[str, list[list[Tensor]]] = {name: [] for name in norms}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, args, calls=runs[name]: calls[-1].append(values_of(args[0])))
    model.train()
    for _ in range(draws):
        for calls in runs.values():
            calls.append([])
        run(model, batch)
    runs = {name: calls for name, calls in runs.items() if calls[-1]}
    off: dict[str, list[Tensor]] = {name: [] for name in runs}

    def normalise_call(name: str, module: Any, x: Tensor) -> Tensor:
        call, values = len(off[name]), values_of(x)
        off[name].append(values.var(1))
        mean = torch.stack([calls[call].mean(1) for calls in runs[name][:draws]]).mean(0)
        return normalise(module, x, mean, values.var(1, correction=0))

    model.eval()
    for calls in runs.values():
        calls.append([])  # the evaluation forward is recorded, too, and not used
    for name in runs:
        norms[name].register_forward_hook(
            lambda module, args, _, name=name: normalise_call(name, module, args[0])
        )
    run(model, batch)
    shifts = {}
    for name, calls in runs.items():
        on = torch.stack([torch.stack([x.var(1) for x in draw]).mean(0) for draw in calls[:draws]])
        shifts[name] = (on.mean(0) / torch.stack(off[name]).mean(0), on.std(0) / on.mean(0))
    return shifts
