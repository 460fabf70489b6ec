"""`statistics="mean+variance"` takes the place of torch's update_bn; the README lists what differs."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

import ckpt_tools
from ckpt_tools import reestimate_bn
from ckpt_tools.errors import NothingToDo

Pair = namedtuple("Pair", ["image", "label"])


class Vectors(nn.Module):
    """A fully connected net; its argument has a name for batches that are dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Linear(5, 40), nn.BatchNorm1d(40)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.first(x))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.first(x))


NETS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "vectors": (Vectors, (100, 5)),
    "images": (Images, (100, 3, 5, 5)),
}

LOADERS: dict[str, Callable[[Tensor], Iterable[Any]]] = {
    "tensors": lambda x: x.split(5),
    "a loader of inputs": lambda x: DataLoader(TensorDataset(x), 5, shuffle=True),
    "a loader of inputs and labels": lambda x: DataLoader(TensorDataset(x, x[:, 0]), 5, shuffle=True),
    "tuples": lambda x: [(part, None) for part in x.split(5)],
    "lists": lambda x: [[part, ["text"], {"id": 3}] for part in x.split(5)],
    "named tuples": lambda x: [Pair(part, torch.zeros(5)) for part in x.split(5)],
    "a generator": lambda x: (part for part in x.split(5)),
    "dicts": lambda x: [{"x": part} for part in x.split(5)],
}


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("batches", LOADERS)
@pytest.mark.parametrize("training", [True, False])
def test_the_input_types_of_update_bn_and_dicts(kind: str, batches: str, training: bool) -> None:
    make, shape = NETS[kind]
    torch.manual_seed(0)
    x, model = torch.rand(shape), make().train(training)
    with torch.no_grad():
        values = model.first(x).transpose(0, 1).flatten(1).double()
    for _ in range(2):
        reestimate_bn(model, LOADERS[batches](x), statistics="mean+variance")
        torch.testing.assert_close(model.bn.running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-5)
        expected = values.var(1, correction=0)
        torch.testing.assert_close(model.bn.running_var.double(), expected, rtol=1e-4, atol=1e-7)
        model.bn.reset_running_stats()
    assert model.training == training
    assert model.bn.momentum == (0.3 if kind == "images" else 0.1)


@pytest.mark.parametrize("kind", NETS)
def test_near_what_update_bn_itself_writes(kind: str) -> None:
    make, shape = NETS[kind]
    torch.manual_seed(0)
    x = torch.rand(20 * shape[0], *shape[1:])
    model = AveragedModel(make())
    peer = copy.deepcopy(model)
    update_bn(x.split(50), peer)
    reestimate_bn(model, x.split(50), statistics="mean+variance")
    torch.testing.assert_close(model.module.bn.running_mean, peer.module.bn.running_mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.module.bn.running_var, peer.module.bn.running_var, rtol=0.02, atol=1e-5)


def test_inputs_of_several_arguments_by_a_forward_of_ones_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.bn(x - y)

    x, y, model = torch.rand(64, 5), torch.rand(64, 5), Two()
    batches = list(zip(x.split(16), y.split(16), strict=True))
    reestimate_bn(model, batches, statistics="mean+variance", forward=lambda model, batch: model(*batch))
    torch.testing.assert_close(model.bn.running_mean, (x - y).mean(0), rtol=1e-4, atol=1e-6)


def test_what_differs_from_update_bn() -> None:
    torch.manual_seed(0)
    x = torch.rand(70, 5) * 3
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5))
    peer = copy.deepcopy(model)
    batches = [x[:64], x[64:]]
    update_bn(batches, peer)
    reestimate_bn(model, batches, statistics="mean+variance")
    ours, theirs = model[1], peer[1]
    assert isinstance(ours, nn.BatchNorm1d)
    assert isinstance(theirs, nn.BatchNorm1d)
    assert ours.num_batches_tracked == 0
    assert theirs.num_batches_tracked == 2
    torch.testing.assert_close(ours.running_mean, x.mean(0))  # dropout off, and every value weighs the same
    assert float((theirs.running_var / x.var(0)).median()) > 1.2
    linear = nn.Sequential(nn.Linear(5, 5))
    update_bn(batches, linear)
    with pytest.raises(NothingToDo):
        reestimate_bn(linear, batches, statistics="mean+variance")
    with pytest.raises(ValueError, match="more than 1 value"):
        update_bn([x[:64], x[64:65]], peer)
    assert reestimate_bn(model, [x[:64], x[64:65]], statistics="mean+variance").images == 65


def test_the_differences_are_in_the_readme() -> None:
    text = (Path(ckpt_tools.__file__).parents[1] / "README.md").read_text()
    table = text.split("### Instead of `torch.optim.swa_utils.update_bn`")[1].split("## How it works")[0]
    for word in (
        "num_batches_tracked",
        "dropout",
        "one value per channel",
        "unequal size",
        "NothingToDo",
    ):
        assert word in table
