"""The initialisations that scripts/bench-init compares ours with, each written from its publication."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torchvision.models import VGG

from ckpt_tools import activation_moments

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
    """Mishkin & Matas 2016: orthonormal, then each layer in order of execution divided by its output's deviation.

    Deviations are measured on ``batch`` in training mode. All layers are done within one forward: a layer runs again
    on the input it got, and its successors see the rescaled output.
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


@dataclass(frozen=True)
class Spread:
    """What AutoInit knows of a signal; every signal counts as Gaussian."""

    mean: float = 0.0
    variance: float = 1.0

    @property
    def second(self) -> float:
        return self.variance + self.mean**2


def autoinit(model: nn.Module) -> bool:
    """Bingham & Miikkulainen 2021, for nets that run their leaf modules one after another; False for others.

    Mean and variance are followed from an N(0, 1) input, and every weight layer gets variance 1 / (fan-in · E[x²]),
    so that its output has mean 0 and variance 1. Functions by quadrature; poolings as of independent positions.
    """
    leaves = [module for module in model.modules() if not any(module.children())]
    chained = all(isinstance(module, nn.Sequential | VGG) for module in model.modules() if any(module.children()))
    if not chained or any(after(module, Spread()) is None for module in leaves):
        return False
    zero_biases(model)
    signal = Spread()
    for module in leaves:
        if isinstance(module, nn.Linear | _ConvNd):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, 0.0, 1 / math.sqrt(fan_in * signal.second))
        behind = after(module, signal)
        assert behind is not None
        signal = behind
    return True


def after(module: nn.Module, signal: Spread) -> Spread | None:
    """What a module makes of a signal; None if it is not one of those that a plain chain consists of."""
    match module:
        case nn.Linear() | _ConvNd():
            return Spread()
        case nn.Dropout():
            return Spread(
                signal.mean, signal.variance / (1 - module.p)
            )  # the mean's share, mean²·p / (1 − p), is left out
        case nn.ReLU() | nn.Tanh() | nn.ELU() | nn.GELU():
            return through(module, signal)
        case nn.MaxPool2d():
            return maximum(signal, count=module.kernel_size**2)
        case nn.Flatten() | nn.Identity() | nn.AdaptiveAvgPool2d():  # VGG's pools 7×7 to 7×7
            return signal
    return None


def through(f: nn.Module, signal: Spread) -> Spread:
    deviation = math.sqrt(signal.variance)
    found = activation_moments(lambda z: f(signal.mean + deviation * z))
    return Spread(found.mean, found.forward - found.mean**2)


def maximum(signal: Spread, count: int) -> Spread:
    """The largest of ``count`` independent Gaussians: its density is n·φ(z)·Φ(z)^(n−1)."""
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    density = count * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * torch.special.ndtr(z) ** (count - 1)
    mean = float(torch.trapezoid(z * density, z))
    variance = float(torch.trapezoid((z - mean).square() * density, z))
    return Spread(signal.mean + math.sqrt(signal.variance) * mean, signal.variance * variance)
