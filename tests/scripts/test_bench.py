"""The contestants of `scripts/run bench` do the same job, and its figures are what their names say."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from click.testing import CliRunner
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fvcore scripts a loss when it is imported
    from bench import __main__ as command
    from bench import files, loaders, networks, passes, photos, stopping


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


@pytest.fixture
def network(monkeypatch):
    tiny = networks.Network("tiny", small, 16, 8)
    for module in (networks, command):
        monkeypatch.setattr(module, "NETWORKS", {"tiny": tiny})
    return tiny


def test_all_contestants_estimate_the_same_variances(network):
    costs = passes.race(network, "cpu", 2, 16, 1, exact=True)
    assert [cost.contestant for cost in costs] == [one.name for one in passes.CONTESTANTS]
    assert {cost.images for cost in costs if "tolerance" not in cost.contestant} == {32}
    writers = {cost.contestant: cost.errors for cost in costs if cost.errors is not None}
    assert set(writers) == {one.name for one in passes.CONTESTANTS if one.writes}
    assert all(median < 0.2 for median, _ in writers.values())


def test_ratios_compare_within_a_round():
    costs = [
        passes.Cost(passes.OURS, (1.0, 2.0, 3.0), 0, 1, None),
        passes.Cost("other", (2.0, 4.0, 9.0), 0, 1, None),
    ]
    assert passes.ratios(costs, passes.OURS)["other"] == (2.0, 2.0, 3.0)
    assert passes.speed_up(costs, "other") == 2.0


def test_passes_are_printed_and_kept(network, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "RESULTS", tmp_path / "measurements.json")
    result = CliRunner().invoke(command.main, ["passes", "--rounds", "1", "--batches", "1", "--no-exact"])
    assert result.exit_code == 0, result.output
    assert all(f"| {one.name} |" in result.output for one in passes.CONTESTANTS)
    (section,) = json.loads((tmp_path / "measurements.json").read_text()).values()
    assert section["torch"] == torch.__version__
    assert [cost["contestant"] for cost in section["figures"]["tiny"]] == [
        one.name for one in passes.CONTESTANTS
    ]
    assert "gain over update_bn" in result.output


def test_sizes_are_printed_and_kept(network, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SMALL", network)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "measurements.json")
    result = CliRunner().invoke(command.main, ["sizes", "--rounds", "1", "--most", "1000"])
    assert result.exit_code == 0, result.output
    (section,) = json.loads((tmp_path / "measurements.json").read_text()).values()
    assert {"1×125", "8×125"} < set(section["figures"])


def test_coverage_of_everything_is_whole(monkeypatch):
    """Where every trial reads everything, its estimate is that of everything but for its batches."""
    images, labels = photos.photos(300, stopping.SIDE, stopping.SIDE)
    name = next(iter(stopping.NETS))
    found = stopping.coverage(name, images, labels, 1e-6, 2)
    assert found["images, median"] == 300
    assert found["95th percentile of the true error, mean"] < 0.05


def test_photographs_are_many_and_repeatable(tmp_path):
    (a, labels), (b, _) = (photos.photos(64, 16, 16) for _ in range(2))
    assert torch.equal(a, b)
    assert len(labels.unique()) > 4
    assert float(a.float().mean((1, 2, 3)).std()) > 10
    folder = photos.jpeg_folder(tmp_path, 8, 16, 16)
    assert len(list(folder.rglob("*.jpg"))) == 8


def test_writing_is_raced_with_cp(tmp_path):
    seconds = files.writing(tmp_path, 40 << 20, 1)
    assert set(seconds) == {"cp", "cp and sync", "save"}
    assert not (tmp_path / "copy.safetensors").exists()


def test_loaders_give_the_same_pixels(tmp_path):
    loaders.photographs(tmp_path, 4)
    ours, peer = (
        next(iter(loaders.LOADERS[name](tmp_path, "bilinear", 0))) for name in ("ours", "torchvision")
    )
    ours, peer = (batch[0] if isinstance(batch, (list, tuple)) else batch for batch in (ours, peer))
    as_pixels = [
        batch * torch.tensor(loaders.STD).reshape(3, 1, 1) + torch.tensor(loaders.MEAN).reshape(3, 1, 1)
        for batch in (ours.sort(0).values, peer.sort(0).values)
    ]
    assert float((as_pixels[0] - as_pixels[1]).abs().mean()) < 0.01
