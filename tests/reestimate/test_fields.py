"""Nets of many fields: the walk and the estimators against oracles that share no code with the project."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from field_nets import FIELDS
from paired_oracle import dropout_shift, normalise, norms_of, run, values_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ckpt_tools

DRAWS = 100  # of the oracle's noise
BATCHES = 10  # in the paired measurement, each with four repeats or more

# BN layers that lie behind themselves: later sweeps see what the earlier ones have corrected.
SWEEPS = {"weight-tied": 40}


def make(name: str) -> tuple[nn.Module, Any]:
    """A net with affine parameters of every size, whose statistics are those of a training on the batch."""
    build, batch = FIELDS[name]
    torch.manual_seed(0)
    model = build()
    for norm in norms_of(model).values():
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        norm.momentum = None
    for _ in range(20):
        run(model.train(), batch)
    return model.eval(), batch


def inputs_of_norms(model: nn.Module, batch: Any) -> dict[str, list[Tensor]]:
    """What each call of each BN layer gets."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        norm.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(values_of(args[0]))
        )
        for name, norm in norms_of(model).items()
    ]
    run(model, batch)
    for hook in hooks:
        hook.remove()
    return seen


def noisy_layers(model: nn.Module, batch: Any) -> set[str]:
    """BN layers whose input changes with the seed, while all BN layers are in evaluation mode."""
    model = copy.deepcopy(model).train()
    for norm in norms_of(model).values():
        norm.training = False
    draws = []
    for seed in range(4):
        torch.manual_seed(seed)
        draws.append({name: torch.cat(calls, 1) for name, calls in inputs_of_norms(model, batch).items()})
    return {
        name
        for name, first in draws[0].items()
        if any((draw[name] - first).abs().max() > 1e-5 for draw in draws)
    }


def pooled_variances(model: nn.Module, batches: list[Any], names: set[str]) -> dict[str, Tensor]:
    """Sums over all batches, while each call is normalised by the kept mean and its own variance."""
    model = copy.deepcopy(model)
    count: dict[str, int] = {}
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(name: str, module: Any, x: Tensor) -> Tensor:
        # Sums around the kept mean: float64 has digits enough for these.
        values, mean = values_of(x), module.running_mean.double()
        offsets = values - mean[:, None]
        total, squares = sums.get(name, (0, 0))
        sums[name] = total + offsets.sum(1), squares + offsets.square().sum(1)
        count[name] = count.get(name, 0) + values.shape[1]
        return normalise(module, x, mean, values.var(1, correction=0))

    for name, norm in norms_of(model).items():
        if name in names:
            norm.register_forward_hook(lambda module, args, _, name=name: observe(name, module, args[0]))
    for batch in batches:
        run(model, batch)
    return {
        name: (squares - total.square() / count[name]) / (count[name] - 1)
        for name, (total, squares) in sums.items()
    }


def swept_variances(model: nn.Module, batch: Any, names: set[str], sweeps: int) -> dict[str, Tensor]:
    """Layer by layer in order of execution: the variance of the input behind corrected layers."""
    model = copy.deepcopy(model)
    norms = norms_of(model)
    order = [name for name in inputs_of_norms(model, batch) if name in names]
    for _ in range(sweeps):
        for name in order:
            norms[name].running_var = torch.cat(inputs_of_norms(model, batch)[name], 1).var(1).float()
    return {name: norms[name].running_var.double() for name in order}


def corrected(model: nn.Module, batches: list[Any], estimator: Any) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    ckpt_tools.reestimate_bn(model, batches, estimator=estimator, force=True, keep_outliers=True)
    return {name: norm.running_var.double() for name, norm in norms_of(model).items()}


@pytest.mark.parametrize("name", FIELDS)
def test_walk(name: str) -> None:
    model, batch = make(name)
    walk = ckpt_tools.walk(model, batch)
    assert {layer.name for layer in walk.batch_norms if layer.downstream_of} == noisy_layers(model, batch)
    assert all(layer.reached for layer in walk.batch_norms)


@pytest.mark.parametrize("name", FIELDS)
def test_pooled(name: str) -> None:
    model, batch = make(name)
    second = pytree.tree_map_only(Tensor, lambda x: 1.1 * x if x.is_floating_point() else x, batch)
    truth = pooled_variances(model, [batch, second], noisy_layers(model, batch))
    new = corrected(model, [batch, second], "pooled")
    for layer, variance in truth.items():
        torch.testing.assert_close(new[layer], variance, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", FIELDS)
def test_exact(name: str) -> None:
    model, batch = make(name)
    truth = swept_variances(model, batch, noisy_layers(model, batch), SWEEPS.get(name, 1))
    new = corrected(model, [batch], "exact")
    for layer, norm in norms_of(model).items():
        assert layer in truth or torch.equal(new[layer], norm.running_var.double())
    for layer, variance in truth.items():
        torch.testing.assert_close(new[layer], variance, rtol=2e-3, atol=1e-8)


@pytest.mark.parametrize("name", FIELDS)
def test_ratio(name: str) -> None:
    model, batch = make(name)
    shifts = dropout_shift(model, batch, DRAWS)
    new = corrected(model, [batch] * BATCHES, "ratio")
    for layer in noisy_layers(model, batch):
        shift, scatter = shifts[layer]
        found = norms_of(model)[layer].running_var.double() / new[layer]
        error = scatter * (1 / DRAWS + 1 / (4 * BATCHES)) ** 0.5
        # The mean that test conditions keep is itself measured on some draws only, hence the share.
        assert ((found / shift - 1).abs() < 5 * error + 0.03).all(), layer
        assert float((found / shift).log().median().abs()) < 4 * float(error.median()) + 0.01, layer
