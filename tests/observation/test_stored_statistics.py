"""Stored statistics that no training leaves: named as those of the layer, or replaced unseen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import ckpt_tools
from ckpt_tools.errors import ModelError

X = torch.randn(256, 5, 7, generator=torch.Generator().manual_seed(0)) + 0.5
IMPOSSIBLE = {"nan": torch.nan, "infinity": torch.inf, "negative": -0.5}


def net() -> nn.Sequential:
    """Sequences: the first BN layer is a control, the second one lies behind dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(5, 6, 3), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout1d(0.3),
        nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(12, 2),
    ).eval()  # fmt: skip


def spoil(model: nn.Sequential, layer: int, buffer: str, value: float, channels: slice) -> None:
    getattr(model[layer], buffer)[channels] = value


@pytest.mark.parametrize("layer", [1, 5])
@pytest.mark.parametrize(
    ("buffer", "kind"),
    [
        ("running_var", "nan"),
        ("running_var", "infinity"),
        ("running_var", "negative"),
        ("running_mean", "nan"),
    ],
)
@pytest.mark.parametrize("estimator", ["auto", "ratio", "pooled", "exact", "ema"])
def test_the_layer_and_its_statistic_are_named(estimator: Any, buffer: str, kind: str, layer: int) -> None:
    model = net()
    spoil(model, layer, buffer, IMPOSSIBLE[kind], slice(1, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=rf"^{layer}\.{buffer}: .*in 2 of . channels"):
        ckpt_tools.reestimate_bn(model, X.split(64), estimator=estimator)
    assert all(torch.equal(new.nan_to_num(), old.nan_to_num()) for new, old in zip_values(model, before))


def zip_values(model: nn.Module, before: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(value, before[name]) for name, value in model.state_dict().items()]


@pytest.mark.parametrize("kind", IMPOSSIBLE)
@pytest.mark.parametrize("channels", [slice(0, 1), slice(None)], ids=["a channel", "all channels"])
def test_mean_and_variance_depend_on_nothing_stored(channels: slice, kind: str) -> None:
    model, peer = net(), net()
    for layer in (1, 5):
        spoil(model, layer, "running_var", IMPOSSIBLE[kind], channels)
        if kind != "negative":
            spoil(model, layer, "running_mean", IMPOSSIBLE[kind], channels)
    result = ckpt_tools.reestimate_bn(model, [X], statistics="mean+variance")
    peer[3].p = 0.0  # update_bn leaves dropout on
    update_bn([X], peer)  # type: ignore[no-untyped-call]
    assert not result.outliers
    for layer in (1, 5):
        mine, theirs = model[layer], peer[layer]
        torch.testing.assert_close(mine.running_mean, theirs.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.running_var, theirs.running_var, rtol=2e-3, atol=0)


def test_a_moving_average_starts_from_what_is_stored() -> None:
    model = net()
    spoil(model, 5, "running_var", torch.nan, slice(None))
    with pytest.raises(ModelError, match="running_var"):
        ckpt_tools.reestimate_bn(model, X.split(64), statistics="mean+variance", estimator="ema")
