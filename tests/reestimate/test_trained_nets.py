"""Nets trained with dropout on the bundled digits: how near each estimator is to the truth, batch size 64."""

from __future__ import annotations

import copy
import functools

import nets
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools import reestimate_bn
from ckpt_tools.demo.digits import load_digits
from ckpt_tools.demo.train import train
from ckpt_tools.model.calling import call_model
from ckpt_tools.moments import Moments
from ckpt_tools.observation.interception import Interception
from ckpt_tools.observation.layer import Layer
from ckpt_tools.observation.running import Runner
from ckpt_tools.reestimate.batches import Batches
from ckpt_tools.reestimate.estimators import pooled
from ckpt_tools.reestimate.passes import PassContext
from ckpt_tools.reestimate.screening import Screening


def fitted(model: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    """Ten epochs of Adam: past the steep part, so that running statistics are those of a trained net."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(10):
        for chosen in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model.eval()


@functools.cache
def case(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    digits = load_digits(0)
    images, labels = digits.train_images, digits.train_labels
    if name == "densenet":
        return train(digits, seed=0, epochs=6), images
    if name == "mlp":
        images = images.flatten(1)
        layers: list[nn.Module] = [nn.Linear(64, 128)]
        for _ in range(4):
            layers += [nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.4), nn.Linear(128, 128)]
        return fitted(nn.Sequential(*layers), images, labels), images
    images = images.expand(-1, 3, -1, -1).contiguous()
    return fitted(nets.ResNet(0.3, wide=name == "wide", classes=10), images, labels), images


NAMES = ["densenet", "mlp", "wide", "droppath"]


def errors(name: str, images: Tensor | None = None, **arguments: object) -> Tensor:
    """On some images of the case, or all."""
    model, every = case(name)
    images = every if images is None else images
    changed = copy.deepcopy(model)
    result = reestimate_bn(changed, images.split(64), **arguments)
    names = {layer.name for layer in result.rewritten}
    found = {key: changed.get_buffer(f"{key}.running_var") for key in names}
    return oracle.relative_difference(found, oracle.corrected(model, images, names))


@pytest.mark.parametrize("name", NAMES)
def test_pooled_and_exact(name: str) -> None:
    """Together, for each process would train the net anew."""
    error = errors(name, estimator="pooled")
    assert error.median() < 0.01
    assert error.max() < 0.06
    few = case(name)[1][:200]  # a pass for each depth
    assert errors(name, few, estimator="exact").max() < 1e-3


def run_pass(model: nn.Module, batches: list[Tensor]) -> dict[str, Moments]:
    """The moments of every BN layer after a pass over some of the batches, as one rank would hold them."""
    model = copy.deepcopy(model)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    layers = {name: Layer(name, module, rewritten=True) for name, module in norms.items()}
    with torch.no_grad():
        screening = Screening(model, lambda batch, row: "", keep=False, rows_are_samples=True)
        runner = Runner(model, call_model, Interception())
        context = PassContext(model, Batches(batches), runner, layers, screening)
        estimate = pooled(context, "variance", None)
    return {name: evidence.moments for name, evidence in estimate.last_pass.evidence.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_split_over_ranks_or_resumes(name: str, ranks: int) -> None:
    """Each rank makes its own share of the batches; merged, they are what one process finds."""
    model, images = case(name)
    batches = list(images.split(64))
    whole = run_pass(model, batches)
    shares = [run_pass(model, batches[rank::ranks]) for rank in range(ranks)]
    for key, expected in whole.items():
        merged = functools.reduce(Moments.merge, (share[key] for share in shares))
        assert merged.count == expected.count
        torch.testing.assert_close(merged.variance(), expected.variance(), rtol=1e-5, atol=1e-12)


def test_the_controls_agree_with_the_training_data_and_not_with_other_data() -> None:
    model, images = case("densenet")
    assert reestimate_bn(copy.deepcopy(model), images.split(64)).controls.verdict == "agree"
    wrong = reestimate_bn(copy.deepcopy(model), (images * 255).split(64), force=True)
    assert wrong.controls.verdict == "disagree"
