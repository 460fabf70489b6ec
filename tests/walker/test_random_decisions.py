"""Random numbers that leave torch and decide what a forward does, and modules that never train."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ckpt_tools


@torch.library.custom_op("ckpt_tools_test::coin", mutates_args=())
def coin(x: Tensor) -> Tensor:
    return torch.rand_like(x)


@coin.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


DECISIONS: dict[str, Callable[[], object]] = {
    "tolist": lambda: torch.rand(3).tolist()[1] < 0.5,
    "numpy": lambda: torch.rand(3).detach().cpu().numpy().max() < 0.5,
    "array": lambda: np.array(torch.rand(3))[0] < 0.5,
    "dlpack": lambda: np.from_dlpack(torch.rand(3))[0] < 0.5,
    "between tensors": lambda: torch.from_dlpack(torch.rand(3))[0] < 0.5,
    "bytes": lambda: torch.randint(255, (2,)).numpy().tobytes()[0] < 128,
    "index": lambda: [True, False][torch.randint(2, ())],
    "custom operator": lambda: coin(torch.ones(1)) < 0.5,
    "python": lambda: random.random() < 0.5,
    "numpy's generator": lambda: np.random.rand() < 0.5,
}


class Gate(nn.Module):
    """Returns no tensor but a plain value, as a policy network or a scheduler may do."""

    def __init__(self, decide: Callable[[], object], wrap: Callable[[object], object] = bool) -> None:
        super().__init__()
        self.decide, self.wrap = decide, wrap

    def forward(self) -> object:
        return self.wrap(self.decide())


class Skipping(nn.Module):
    """Adds a branch if its gate says so; the second BN layer sees the consequences."""

    def __init__(self, gate: Callable[[], object]) -> None:
        super().__init__()
        self.first, self.branch, self.second = nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        decision = self.gate()
        if decision["keep"] if isinstance(decision, dict) else decision:
            x = x + self.branch(x)
        return self.second(x)


def reached(model: nn.Module) -> dict[str, bool]:
    walk = ckpt_tools.walk(model, torch.randn(4, 6))
    return {layer.name: bool(layer.downstream_of) for layer in walk.batch_norms}


@pytest.mark.parametrize("kind", DECISIONS)
def test_a_random_decision_in_python_is_a_site(kind: str) -> None:
    assert reached(Skipping(DECISIONS[kind])) == {"first": False, "second": True}
    assert reached(Skipping(Gate(DECISIONS[kind]))) == {"first": False, "second": True}


def test_a_submodule_may_return_its_decision_inside_anything() -> None:
    gate = Gate(DECISIONS["tolist"], lambda decision: {"keep": bool(decision)})
    assert reached(Skipping(gate)) == {"first": False, "second": True}


def test_values_that_are_not_random_decide_nothing() -> None:
    assert not any(reached(Skipping(Gate(lambda: torch.ones(3).tolist()[0] > 0.5))).values())


@pytest.mark.parametrize("generator", [random.Random(0), np.random.default_rng(0)])
def test_generators_of_ones_own_stay_invisible(generator: random.Random) -> None:
    """The README lists them under Limits."""
    assert not any(reached(Skipping(lambda: generator.random() < 0.5)).values())


class FrozenBackbone(nn.Module):
    """Its ``train()`` keeps the backbone in evaluation mode, with the dropout in there."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.BatchNorm1d(6))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(6))

    def train(self, mode: bool = True) -> FrozenBackbone:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_dropout_that_train_leaves_off_is_no_site() -> None:
    walk = ckpt_tools.walk(FrozenBackbone().eval(), torch.randn(4, 6))
    assert [site.name for site in walk.dropout_sites] == ["head.0"]
    assert [layer.downstream_of for layer in walk.batch_norms] == [(), ("head.0",)]
