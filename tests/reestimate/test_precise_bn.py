"""``statistics="mean+variance"`` with what the BN adaptations of other projects take, against plain sums.

The README compares it with each of them.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from paired_oracle import normalise, norms_of, values_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ckpt_tools
from ckpt_tools.errors import ModelError

X, Y = torch.randn(112, 3, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1, torch.arange(112) % 4
Pair = namedtuple("Pair", ["signal", "label"])


class Net(nn.Module):
    """Takes its input by position or by name, and more than it needs; dropout has to be off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1, self.drop = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.conv2, self.norm2 = nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4)

    def forward(self, signal: Any, label: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if isinstance(signal, (list, dict)):  # a model that takes whole batches, as detectron2's do
            signal = signal["signal"] if isinstance(signal, dict) else torch.stack(signal)
        x = self.drop(self.norm1(self.conv1(scale * signal)).relu())
        return self.norm2(self.conv2(x)).mean(2)


def truth(model: nn.Module, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and biased variance of all values, while each batch is normalised by its own."""
    model = copy.deepcopy(model).eval()
    seen: dict[str, list[Tensor]] = {name: [] for name in norms_of(model)}

    def observe(name: str, module: Any, x: Tensor) -> Tensor:
        values = values_of(x)
        seen[name].append(values)
        return normalise(module, x, values.mean(1), values.var(1, correction=0))

    for name, norm in norms_of(model).items():
        norm.register_forward_hook(lambda module, args, _, name=name: observe(name, module, args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    joined = {name: torch.cat(values, 1) for name, values in seen.items()}
    return {name: (values.mean(1), values.var(1, correction=0)) for name, values in joined.items()}


def check(model: nn.Module, expected: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, norm in norms_of(model).items():
        mean, variance = expected[name]
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-4, atol=1e-6)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X.split(32))


PAIRS = list(zip(X.split(32), Y.split(32), strict=True))  # the last one is smaller
LOADERS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: X.split(32),
    "tuples with labels": lambda: PAIRS,
    "lists with labels": lambda: [[x, y] for x, y in PAIRS],
    "named tuples": lambda: [Pair(x, y) for x, y in PAIRS],
    "dicts of arguments": lambda: [{"signal": x, "label": y} for x, y in PAIRS],
    "an ordered dict": lambda: [OrderedDict(signal=x) for x in X.split(32)],
    "a mapping of one's own": lambda: [UserDict(signal=x, label=y) for x, y in PAIRS],
    "a DataLoader": lambda: DataLoader(TensorDataset(X, Y), batch_size=32),
    "a DataLoader of dicts": lambda: DataLoader(
        [{"signal": x, "label": y} for x, y in zip(X, Y, strict=True)],  # type: ignore[arg-type]
        batch_size=32,
    ),
    "a stream that batches itself": lambda: DataLoader(Stream(), batch_size=None),
    "a generator": lambda: (x for x in X.split(32)),
    "a cycle, cut by islice": lambda: itertools.islice(itertools.cycle(X.split(32)), 4),
}
FORWARDS: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], object]]] = {
    "the batch as it is, a list": (lambda: [list(x) for x in X.split(32)], lambda model, batch: model(batch)),
    "the batch as it is, a dict": (
        lambda: [{"signal": x} for x in X.split(32)],
        lambda model, batch: model(batch),
    ),
    "a tuple as all arguments": (lambda: PAIRS, lambda model, batch: model(*batch)),
    "a nested batch": (
        lambda: [({"image": x}, y) for x, y in PAIRS],
        lambda model, batch: model(batch[0]["image"]),
    ),
    "further arguments": (
        lambda: [{"x": x} for x in X.split(32)],
        lambda model, batch: model(batch["x"], scale=1.0),
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_loaders(loader: str) -> None:
    model = Net().eval()
    expected = truth(model, list(X.split(32)))
    ckpt_tools.reestimate_bn(model, LOADERS[loader](), statistics="mean+variance")
    check(model, expected)


@pytest.mark.parametrize("name", FORWARDS)
def test_forward_functions(name: str) -> None:
    model = Net().eval()
    expected = truth(model, list(X.split(32)))
    loader, forward = FORWARDS[name]
    ckpt_tools.reestimate_bn(model, loader(), statistics="mean+variance", forward=forward)
    check(model, expected)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm1d, ()), (nn.BatchNorm2d, (5, 4)), (nn.BatchNorm3d, (3, 4, 2))]
)
def test_a_model_that_is_a_layer(kind: type[nn.BatchNorm1d], shape: tuple[int, ...], mode: bool) -> None:
    batches = [torch.randn(16, 8, *shape, generator=torch.Generator().manual_seed(i)) + i for i in range(4)]
    model = kind(8).train(mode)
    weight = model.weight.detach().clone()
    ckpt_tools.reestimate_bn(model, batches, statistics="mean+variance")
    check(model, truth(model, batches))
    assert torch.equal(model.weight, weight)
    assert model.training is mode


def test_a_moving_average_is_that_of_layers_in_training_mode() -> None:
    """What NNCF's adaptation leaves: BN layers train, all others do not."""
    model, peer = Net().eval(), Net().eval()
    for norm in norms_of(peer).values():
        norm.training = True
    with torch.no_grad():
        for x in X.split(32):
            peer(x)
    ckpt_tools.reestimate_bn(model, X.split(32), statistics="mean+variance", estimator="ema")
    check(
        model,
        {
            name: (norm.running_mean.double(), norm.running_var.double())
            for name, norm in norms_of(peer).items()
        },
    )


def test_layers_that_are_frozen_are_kept() -> None:
    model = Net().train()
    model.norm1.eval()
    before = model.norm1.running_var.clone()
    ckpt_tools.reestimate_bn(model, X.split(32), statistics="mean+variance")
    assert torch.equal(model.norm1.running_var, before)
    assert not torch.equal(model.norm2.running_var, torch.ones(4))


def test_a_failure_on_the_way_leaves_everything_as_it_was() -> None:
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError):
        ckpt_tools.reestimate_bn(model, [*X.split(32), torch.zeros(8, 2, 6)], statistics="mean+variance")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
