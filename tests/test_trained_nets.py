"""Nets trained with dropout on the bundled digits: how near each estimator comes to the truth, at batch size 64."""

from __future__ import annotations

import copy
import functools

import nets
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckpt_tools import reestimate_bn
from ckpt_tools.demo.digits import load_digits
from ckpt_tools.demo.train import train


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


def errors(name: str, **arguments: object) -> Tensor:
    model, images = case(name)
    changed = copy.deepcopy(model)
    result = reestimate_bn(changed, images.split(64), **arguments)
    names = {layer.name for layer in result.rewritten}
    found = {key: changed.get_buffer(f"{key}.running_var") for key in names}
    return oracle.relative_difference(found, oracle.corrected(model, images, names))


@pytest.mark.parametrize("name", NAMES)
def test_pooled(name: str) -> None:
    error = errors(name)
    assert error.median() < 0.01
    assert error.max() < 0.06


@pytest.mark.parametrize("name", NAMES)
def test_exact(name: str) -> None:
    assert errors(name, estimator="exact").max() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_any_split_over_ranks_or_resumes(name: str) -> None:
    """The same batches in another grouping: the merge is associative, so the order they come in does not matter."""
    model, images = case(name)
    batches = images.split(64)
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    reestimate_bn(one, batches)
    reestimate_bn(other, [*batches[1::2], *batches[::2]])
    for (key, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0, msg=key)


def test_the_controls_agree_with_the_training_data_and_not_with_other_data() -> None:
    model, images = case("densenet")
    assert reestimate_bn(copy.deepcopy(model), images.split(64)).controls.verdict == "agree"
    wrong = reestimate_bn(copy.deepcopy(model), (images * 255).split(64), force=True)
    assert wrong.controls.verdict == "disagree"
