"""Batches whose rows are not known to be independent samples are never cut: they count or go as a whole."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_tools
from ckpt_tools import reestimate_bn
from ckpt_tools.errors import DataError, ModelError
from ckpt_tools.reestimate.concerns import result_warnings

NODES, PAIRS = 24, 12


class Messages(nn.Module):
    """A graph network: every node gets its neighbours' mean, by the numbers of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear, self.bn = nn.Dropout(0.2), nn.Linear(5, 7), nn.BatchNorm1d(7)

    def inputs(self, x: Tensor, edges: Tensor) -> Tensor:
        sums = torch.zeros_like(x).index_add_(0, edges[1], x[edges[0]])
        return self.linear(x + sums)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.bn(self.inputs(self.drop(x), edges))


class Frames(nn.Module):
    """Clips of four frames, folded into the batch: each frame minus the first one of its clip."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear, self.bn = nn.Dropout(0.2), nn.Linear(5, 7), nn.BatchNorm1d(7)

    def inputs(self, x: Tensor) -> Tensor:
        clips = x.view(-1, 4, 5)
        return self.linear((clips - 0.9 * clips[:, :1]).flatten(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.inputs(self.drop(x)))


class Attending(nn.Module):
    """A set: every row attends to all rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear, self.bn = nn.Dropout(0.2), nn.Linear(5, 7), nn.BatchNorm1d(7)

    def inputs(self, x: Tensor) -> Tensor:
        return self.linear(x - (x @ x.T / 5).clamp(-20, 20).softmax(1) @ x)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.inputs(self.drop(x)))


def edges(nodes: int = NODES) -> Tensor:
    ends = torch.arange(nodes).view(-1, 2).T
    return torch.cat([ends, ends.flip(0)], 1)


def call_graph(model: Any, batch: Any) -> object:
    return model(*batch)


KINDS: dict[str, tuple[type, Callable[[Tensor], Any], dict[str, Any]]] = {
    "dict": (Messages, lambda x: {"x": x, "edges": edges()}, {}),
    "own forward": (Messages, lambda x: (x, edges()), {"forward": call_graph}),
    "frames": (Frames, lambda x: x, {}),
    "set": (Attending, lambda x: [x, torch.zeros(len(x))], {}),
}


def rows(batches: int, g: torch.Generator) -> list[Tensor]:
    return [torch.randn(NODES, 5, generator=g) for _ in range(batches)]


def spoil(parts: list[Tensor], number: int, row: int, value: float) -> list[Tensor]:
    parts = [part.clone() for part in parts]
    parts[number][row] = value
    return parts


def true_variance(model: Any, kind: str, parts: list[Tensor]) -> Tensor:
    arguments = (edges(),) if isinstance(model, Messages) else ()
    with torch.no_grad():
        return torch.cat([model.inputs(part, *arguments).double() for part in parts]).var(0)


def corrected(kind: str, parts: list[Tensor], **options: Any) -> tuple[Any, Any]:
    make, pack, more = KINDS[kind]
    torch.manual_seed(0)
    model = make().eval()
    walk = ckpt_tools.walk(model, pack(parts[-1]), **more)
    options = {"estimator": "pooled", "layers": "all", "force": True, **more, **options}
    return model, reestimate_bn(model, [pack(part) for part in parts], walk=walk, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["pooled", "exact"])
def test_where_much_would_be_lost_the_outlier_counts_and_is_named(kind: str, estimator: str) -> None:
    parts = spoil(rows(8, torch.Generator().manual_seed(1)), 3, 6, 1e3)
    model, result = corrected(kind, parts, estimator=estimator)
    torch.testing.assert_close(
        model.bn.running_var.double(), true_variance(model, kind, parts), rtol=1e-3, atol=0
    )
    assert result.outliers == ()
    assert result.images == 8 * NODES
    assert any("sample 6 of batch 3" in outlier.name for outlier in result.kept_outliers)
    assert any("rows_are_samples" in text for text in result_warnings(result))


@pytest.mark.parametrize("kind", KINDS)
def test_where_little_is_lost_the_whole_batch_goes_and_is_named(kind: str) -> None:
    parts = rows(120, torch.Generator().manual_seed(1))
    model, result = corrected(kind, spoil(parts, 77, 6, 1e3))
    others = true_variance(model, kind, [*parts[:77], *parts[78:]])
    torch.testing.assert_close(model.bn.running_var.double(), others, rtol=1e-4, atol=0)
    assert result.images == 119 * NODES
    assert {outlier.name.split(" of ")[1] for outlier in result.outliers} == {"batch 77"}
    assert all(outlier.whole_batch for outlier in result.outliers)
    assert result.kept_outliers == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["pooled", "exact", "ratio"])
def test_nan_never_counts_and_takes_its_batch_along(kind: str, estimator: str) -> None:
    parts = rows(8, torch.Generator().manual_seed(1))
    spoilt = spoil(parts, 3, 6, math.nan)
    model, result = corrected(kind, spoilt, estimator=estimator)
    clean, expected = corrected(kind, [*parts[:3], *parts[4:]], estimator=estimator)
    assert result.images == expected.images == 7 * NODES
    assert [outlier.reason for outlier in result.outliers] == ["not finite"]
    if estimator != "ratio":  # which draws other dropout
        torch.testing.assert_close(model.bn.running_var, clean.bn.running_var)


def test_a_ratio_needs_no_batch_that_holds_an_outlier() -> None:
    parts = rows(8, torch.Generator().manual_seed(1))
    _, result = corrected("dict", spoil(parts, 3, 6, 1e3), estimator="ratio")
    assert result.images == 7 * NODES
    assert "batch 3" in result.outliers[0].name
    assert result.kept_outliers == ()


def test_every_batch_lost_is_an_error_that_names_them() -> None:
    parts = spoil([torch.randn(200, 5)], 0, 6, math.nan)
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    with pytest.raises(DataError, match=r"sample 6 of batch 0.*rows_are_samples"):
        reestimate_bn(model, parts, estimator="pooled", layers="all")


def test_a_caller_who_knows_better_loses_the_sample_alone() -> None:
    parts = rows(8, torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).eval()
    options = {"estimator": "pooled", "layers": "all", "force": True}
    twin = copy.deepcopy(model)
    result = reestimate_bn(model, spoil(parts, 3, 6, 1e3), rows_are_samples=True, **options)
    others = [*parts[:3], torch.cat([parts[3][:6], parts[3][7:]]), *parts[4:]]
    reestimate_bn(twin, others, **options)
    assert [outlier.name for outlier in result.outliers] == ["sample 6 of batch 3"]
    torch.testing.assert_close(model[1].running_var, twin[1].running_var)


class Short(nn.Module):
    """Runs out of memory for more than so many rows."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.most = model, most

    def forward(self, x: Tensor, *more: Tensor) -> object:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.model(x, *more)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_halved_only_where_halves_give_the_same_inputs(kind: str) -> None:
    make, pack, more = KINDS[kind]
    torch.manual_seed(0)
    parts = rows(4, torch.Generator().manual_seed(1))
    model = Short(make(), NODES).eval()
    batches = [pack(part) for part in parts]
    if kind == "dict":
        batches = [(part, edges()) for part in parts]
        more = {"forward": call_graph}
    options = {"estimator": "pooled", "layers": "all", "force": True, **more}
    walk = ckpt_tools.walk(model, batches[0], **more)
    model.most = 8 if kind == "frames" else 10
    if kind == "frames":  # halves at the boundary of a clip: 12, too large, and then 6 frames, no clips
        with pytest.raises(ModelError, match="trial"):
            reestimate_bn(model, batches, walk=walk, **options)
        return
    with pytest.raises(ModelError, match=r"no trial.*rows_are_samples"):
        reestimate_bn(model, batches, walk=walk, **options)


@pytest.mark.parametrize("estimator", ["pooled", "ratio"])
def test_memory_is_halved_for_independent_rows(estimator: Any) -> None:
    torch.manual_seed(0)
    layers = [
        nn.Linear(5, 7),
        nn.Dropout(0.2),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Linear(7, 4),
        nn.BatchNorm1d(4),
    ]
    model = Short(nn.Sequential(*layers), 32).eval()
    parts = [torch.randn(32, 5) for _ in range(4)]
    walk = ckpt_tools.walk(model, parts[0])
    model.most = 10
    result = reestimate_bn(model, parts, walk=walk, estimator=estimator, force=True)
    assert result.cut_to == 8
    assert result.images == 128
