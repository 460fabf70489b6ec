"""The initialisations that `bench init` compares ours with, each written from its publication."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torchvision.models import VGG

from ckpt_tools import activation_moments, rewrite_init

LSUV_TOLERANCE, LSUV_MOST = 0.1, 10  # Mishkin & Matas 2016, algorithm 1


def weight_layers(model: nn.Module) -> Iterator[nn.Linear | _ConvNd]:
    for module in model.modules():
        if isinstance(module, nn.Linear | _ConvNd):
            yield module


def zero_biases(model: nn.Module) -> None:
    for layer in weight_layers(model):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def he(model: nn.Module) -> None:
    """He et al. 2015: a Gaussian of variance 2 / fan-in, whatever the nonlinearity."""
    zero_biases(model)
    for layer in weight_layers(model):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def xavier(model: nn.Module) -> None:
    """Glorot & Bengio 2010: uniform, of variance 2 / (fan-in + fan-out)."""
    zero_biases(model)
    for layer in weight_layers(model):
        nn.init.xavier_uniform_(layer.weight)


def lsuv(model: nn.Module, batch: Tensor) -> None:
    """Mishkin & Matas 2016: orthonormal, then each layer in order of execution divided by its
    output's deviation.

    Deviations are measured on ``batch`` in training mode. All layers are done within one forward: a
    layer runs again on the input it got, and its successors see the rescaled output.
    """
    zero_biases(model)
    done: set[nn.Module] = set()

    def rescale(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer.weight, Tensor)
        for _ in range(LSUV_MOST):
            variance = float(output.double().var(correction=0))
            if layer in done or abs(variance - 1) < LSUV_TOLERANCE or not 0 < variance < math.inf:
                break
            layer.weight.div_(math.sqrt(variance))
            output = layer.forward(*inputs)
        done.add(layer)
        return output

    with torch.no_grad(), ExitStack() as hooks:
        for layer in weight_layers(model):
            nn.init.orthogonal_(layer.weight)
            hooks.callback(layer.register_forward_hook(rescale).remove)
        model.train()(batch)


def autoinit_dropout(model: nn.Module, batch: Tensor, seed: int) -> bool:
    """The dropout rule of Bingham & Miikkulainen 2021, all else as in our propagated rule; False if
    no plain chain.

    They follow mean and variance: dropout with keep p keeps the mean μ and makes the variance ν/p,
    so that the layer behind is scaled for E[x²] = ν/p + μ². It is (ν + μ²)/p.
    """
    containers = (module for module in model.modules() if any(module.children()))
    if not all(isinstance(module, nn.Sequential | VGG) for module in containers):
        return False
    rewrite_init(model, batch, rule="propagated", seed=seed)
    chain = [module for module in model.modules() if not any(module.children())]
    for f, dropout, layer in zip(chain, chain[1:], chain[2:], strict=False):
        if isinstance(dropout, nn.Dropout) and isinstance(layer, nn.Linear):
            moments, keep = activation_moments(f), 1 - dropout.p
            theirs = (moments.forward - moments.mean**2) / keep + moments.mean**2
            with torch.no_grad():
                layer.weight.mul_(math.sqrt(moments.forward / keep / theirs))
    return True
