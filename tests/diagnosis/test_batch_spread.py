"""Batches that are more unlike each other than chance: sorted data, frames in order, never shuffled data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import ckpt_tools
from ckpt_tools.cli import main
from ckpt_tools.diagnosis.batch_spread import measure_batch_spread
from ckpt_tools.errors import CheckFailed
from ckpt_tools.observation.layer import Layer, batch_variance
from ckpt_tools.reestimate.concerns import result_warnings
from ckpt_tools.results import BatchSpread, Reestimation


def measure(batches: tuple[Tensor, ...]) -> BatchSpread | None:
    layer = Layer("bn", nn.BatchNorm1d(batches[0].shape[1]), rewritten=True)
    layer.begin_pass(batch_variance)
    for batch in batches:
        layer.begin_batch(per_image=False)
        layer.observe(batch, len(batch))
        layer.end_batch()
    assert layer.evidence is not None
    return measure_batch_spread({"bn": layer}, {"bn": layer.evidence})


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def samples(kind: str, count: int, g: torch.Generator) -> Tensor:
    x = torch.randn(count, 6, generator=g)
    if kind == "heavy tails":
        return x / torch.randn(count, 1, generator=g).abs().clamp_min(0.01)
    if kind == "all channels alike":
        return x[:, :1].repeat(1, 6)
    if kind == "a rare class":
        return x + 20.0 * (torch.rand(count, 1, generator=g) < 0.1)
    return x


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "all channels alike", "a rare class"])
@pytest.mark.parametrize(("size", "batches"), [(8, 3), (5, 12), (64, 4), (64, 20)])
def test_independent_samples_never_differ(kind: str, size: int, batches: int) -> None:
    g = torch.Generator().manual_seed(size)
    for _ in range(10):
        spread = measure(samples(kind, size * batches, g).split(size))
        assert spread is not None
        assert not spread.unlike, spread


@pytest.mark.parametrize("size", [8, 32, 64])
def test_sorted_samples_differ_in_mean_or_in_scale(size: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10 * size, 6, generator=g)
    number = torch.arange(10 * size)[:, None] // size
    scaled = x * (1 + 0.3 * number) if size > 8 else x + number  # few samples tell little of a variance
    for unlike in (x + 0.3 * number, scaled, x * 0.01 + torch.sin(number)):
        spread = measure(unlike.split(size))
        assert spread is not None
        assert spread.unlike, spread
        shuffled = measure(unlike[torch.randperm(len(x), generator=g)].split(size))
        assert shuffled is not None
        assert not shuffled.unlike, shuffled


def test_the_ratio_is_that_of_standard_deviations() -> None:
    # Means of 64 samples have a variance of 1/64; what is added here has three times as much.
    g = torch.Generator().manual_seed(0)
    added = torch.randn(400, 6, generator=g).repeat_interleave(64, 0) * (3 / 64) ** 0.5
    spread = measure((torch.randn(25600, 6, generator=g) + added).split(64))
    assert spread is not None
    assert spread.ratio == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("sizes", [[64], [64, 64], [1] * 30])
def test_too_little_to_tell(sizes: list[int]) -> None:
    assert measure(torch.randn(sum(sizes), 6).split(sizes)) is None


def video(videos: int = 8, frames: int = 24) -> Tensor:
    """Frames in order: each video has a look of its own, and its frames differ a little."""
    g = torch.Generator().manual_seed(0)
    look = torch.randn(videos, 3, 8, 8, generator=g) + torch.randn(videos, 3, 1, 1, generator=g)
    return look.repeat_interleave(frames, 0) + 0.2 * torch.randn(videos * frames, 3, 8, 8, generator=g)


def table() -> Tensor:
    """Rows in the order of their first column, which the others follow."""
    x = torch.randn(640, 10, generator=torch.Generator().manual_seed(0))
    x = x + x[:, :1]
    return x[x[:, 0].argsort()]


ORDERED = {"video": (nets.DenseNet, video), "table": (nets.mlp, table)}


def run(kind: str, *, shuffled: bool, **options: Any) -> Reestimation:
    make, data = ORDERED[kind]
    x = data()
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    model = nets.trained(make(), list(x[order].split(32)))
    batches = list((x[order] if shuffled else x).split(32))
    return ckpt_tools.reestimate_bn(model, batches, layers="all", force=not options.get("strict"), **options)


@pytest.mark.parametrize("kind", ORDERED)
@pytest.mark.parametrize(
    "options",
    [{"estimator": "pooled"}, {"estimator": "ratio"}, {"statistics": "mean+variance"}, {}],
    ids=["pooled", "ratio", "precise", "auto"],
)
def test_data_in_order_is_told_from_shuffled_data(kind: str, options: dict[str, Any]) -> None:
    ordered, shuffled = (run(kind, shuffled=value, **options) for value in (False, True))
    assert any("batches differ more than chance" in text for text in result_warnings(ordered))
    assert "shuffle" in repr(ordered)
    assert "shuffle" in ordered.summary()
    assert not any("shuffle" in text for text in (*result_warnings(shuffled), repr(shuffled)))
    assert shuffled.batch_spread is not None
    assert not shuffled.batch_spread.unlike


def test_strict_stops_at_it() -> None:
    with pytest.raises(CheckFailed, match="shuffle"):
        run("table", shuffled=False, statistics="mean+variance", strict=True)


def in_order() -> list[Tensor]:
    """Batches for the command line, as they stand in the file."""
    return list(torch.from_numpy(np.load("table.npy")).split(32))


def test_sources_of_our_own_shuffle() -> None:
    x = table()
    torch.save(nets.trained(nets.mlp(), list(x[torch.randperm(640)].split(32))).state_dict(), "model.pt")
    np.save("table.npy", x.numpy())
    command = ["bn-reestimate", "model.pt", "--arch", "nets:mlp", "--batch-size", "32", "--json", "--force"]
    told = {}
    for data in ("table.npy", f"{__name__}:in_order"):
        result = CliRunner().invoke(main, [*command, "--data", data, "-o", f"{len(told)}.safetensors"])
        assert result.exit_code == 0, result.output
        told[data] = json.loads(result.stdout)
    ours, theirs = (any("shuffle" in text for text in item["warnings"]) for item in told.values())
    assert (ours, theirs) == (False, True)
    assert [item["batch_spread"]["unlike"] for item in told.values()] == [False, True]
