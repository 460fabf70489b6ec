"""The nets and trainings of `scripts/run reproduce`, and its table2, figure3 and figure4 from end to end."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from reproduce import figure3, figure4, resuming, table2
from reproduce.command import command
from reproduce.densenet import densenet
from reproduce.experiment import Setup
from reproduce.sets import Part, Spec
from reproduce.training import Recipe, mirror_and_crop, train
from reproduce.vgg import INITIALISATIONS, vgg

RNG = np.random.default_rng(0)
RECIPE = Recipe("Nesterov", 0.05, 4, 16, 1e-4, (0.5, 0.75), forget=3)


def cifar(folder: Path, files: list[str], key: str, classes: int, count: int = 24) -> None:
    folder.mkdir()
    for name in files:
        labels = [number % classes for number in range(count)]
        data = RNG.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, key: labels}, 2))


def stored(root: Path, name: str) -> str:
    """A tiny data set in torchvision's layout."""
    if name == "cifar10":
        files = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
        cifar(root / "cifar-10-batches-py", files, "labels", 10)
    elif name == "cifar100":
        cifar(root / "cifar-100-python", ["train", "test"], "fine_labels", 100, 200)
    else:
        from scipy import io as matlab

        for split in ("train", "test"):
            digits = np.arange(40)[:, None] % 10 + 1
            matlab.savemat(
                root / f"{split}_32x32.mat",
                {"X": RNG.integers(0, 256, (32, 32, 3, 40), dtype=np.uint8), "y": digits},
            )
    return f"{name}:{root}"


def part(count: int = 64) -> Part:
    generator = torch.Generator().manual_seed(0)
    return Part(torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 10)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("depth", "growth", "millions"), [(40, 12, 1.0), (100, 12, 7.0), (100, 24, 27.2)])
def test_densenets_are_as_large_as_published(depth, growth, millions):
    with torch.device("meta"):
        model = densenet(0.2, depth=depth, growth=growth)
    assert round(parameters(model) / 1e6, 1) == millions
    weights = [one for one in model.modules() if isinstance(one, nn.Conv2d | nn.Linear)]
    assert len(weights) == depth
    # behind every convolution but the first, as Huang et al. have it
    assert sum(isinstance(one, nn.Dropout) for one in model.modules()) == depth - 2


def test_a_depth_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="3·n"):
        densenet(depth=41)


def test_vgg_is_the_one_of_the_paper():
    with torch.device("meta"):
        model = vgg()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    layers = list(model)
    units = [one.weight.shape[0] for one in layers if isinstance(one, nn.Conv2d | nn.Linear)]
    assert units == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6 + [512] * 2 + [10]
    keeps = [round(1 - one.p, 6) for one in layers if isinstance(one, nn.Dropout)]
    assert keeps == [0.7, 0.6, *[0.6] * 6, 0.5, 0.5]
    assert sum(isinstance(one, nn.MaxPool2d) for one in layers) == 5


def test_the_corrected_initialisation_divides_as_the_authors_did():
    """1 / √(0.5 / keep) behind ReLU and dropout, 1 for the first layer; max pooling is ignored."""
    model = vgg(width=0.25)
    INITIALISATIONS["ours"](model, torch.zeros(2, 3, 32, 32), 0)
    weights = [one.weight.detach().flatten(1) for one in model if isinstance(one, nn.Conv2d | nn.Linear)]
    norms = [float(weight.norm(dim=1).mean()) for weight in weights]
    keeps = [0.7, 1, 0.6, 1, 0.6, 0.6, 1, 0.6, 0.6, 1, 0.6, 0.6, 1, 0.5, 0.5]
    assert norms == pytest.approx([1.0, *(math.sqrt(2 * keep) for keep in keeps)], rel=1e-4)


def test_the_rate_falls_where_the_papers_say():
    cifar10 = Recipe("Adam", 1.0, 150, 128, 0.0, figure4.DROPS)
    rates = [cifar10.rate_in(epoch) for epoch in (0, 99, 100, 124, 125, 149)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_augmented_images_are_crops_of_the_image_or_of_its_mirror_image():
    images = torch.arange(1.0, 65.0).reshape(1, 1, 8, 8).repeat(20, 1, 1, 1)
    for image in mirror_and_crop(images):
        kept = image[0][image[0] > 0]
        assert len(kept) >= 16
        rows = [row[row > 0] for row in image[0] if (row > 0).any()]
        steps = {float(step) for row in rows for step in row.diff()}
        assert steps in ({1.0}, {-1.0})


class Interrupted(Exception):
    pass


def trained(scratch: Path, stop: int = 0) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    torch.manual_seed(0)
    model = densenet(0.2, depth=7, growth=4, in_chans=1)

    def each(done: int) -> dict[str, float]:
        if done == stop:
            raise Interrupted
        return {"done": done}

    weight = model.stem.weight
    history = train(model, part(), RECIPE, cell="one", seed=3, scratch=scratch, watched=weight, each=each)
    return model.state_dict(), history


def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    whole = trained(tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(tmp_path / "torn", stop=3)
    assert list((tmp_path / "torn").iterdir())
    torch.manual_seed(99)
    again = trained(tmp_path / "torn")
    assert again[1] == whole[1]
    assert [epoch["done"] for epoch in again[1]] == [1, 2, 3, 4]
    for name, value in whole[0].items():
        assert torch.equal(again[0][name], value), name


def test_momentum_is_forgotten(tmp_path):
    def weights(forget: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = densenet(depth=7, growth=4, in_chans=1)
        recipe = dataclasses.replace(RECIPE, forget=forget, epochs=2)
        weight = model.stem.weight
        train(model, part(), recipe, cell=0, seed=0, scratch=tmp_path, watched=weight, each=lambda done: {})
        return weight.detach()

    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(weights(0), weights(2))  # it would happen after the end


def test_a_diverged_net_is_told_and_left(tmp_path):
    model = vgg(channels=1, width=1 / 16)
    data = Part(torch.full((8, 1, 32, 32), math.inf), torch.zeros(8, dtype=torch.int64))
    watched = model[0].weight
    found = train(
        model, data, RECIPE, cell=0, seed=0, scratch=tmp_path, watched=watched, each=lambda done: {}
    )
    assert [epoch["loss"] for epoch in found] == [math.inf] * 4


def invoke(experiment, *words: str):
    result = CliRunner().invoke(command(experiment), [*words])
    assert result.exit_code == 0, result.output
    return result.output


def test_quick_table2(tmp_path, monkeypatch):
    monkeypatch.setattr(table2, "METHODS", ("ema", "pooled"))
    output = invoke(table2.EXPERIMENT, "--quick", "--seeds", "1", "--out", str(tmp_path))
    assert "keep 0.8 | final | `pooled`" in output
    assert "keep 1 | halfway | `ema`" in output
    assert len(table2.EXPERIMENT.read(tmp_path)) == 2
    assert (tmp_path / "results/table2-digits.svg").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_table2_by_its_full_protocol(tmp_path, monkeypatch, name):
    monkeypatch.setattr(table2, "EPOCHS", {name: 2})
    monkeypatch.setattr(table2, "NETS", {name: ((7, 4, 0.8),)})
    monkeypatch.setattr(table2, "METHODS", ("pooled",))
    monkeypatch.setattr(table2, "PAPER", {(name, 7, 4, 0.8): {"final": (9.0, 8.0)}})
    output = invoke(
        table2.EXPERIMENT, "--data", stored(tmp_path, name), "--seeds", "1", "--out", str(tmp_path / "out")
    )
    assert "9.0 → 8.0" in output
    kept = sorted(path.name for path in (tmp_path / "out/results/.table2" / name).iterdir())
    assert kept == [f"L7-k4-keep0.8-2epochs-seed0-{when}.pt" for when in ("final", "halfway")]
    (record,) = table2.EXPERIMENT.read(tmp_path / "out")
    assert set(record.found["final"]) == {"before", "pooled"}


def test_full_plans_are_those_of_the_paper(tmp_path):
    for name, net in (
        ("svhn", (40, 12, 0.8, 40)),
        ("cifar10", (100, 12, 0.8, 300)),
        ("cifar100", (100, 12, 0.7, 300)),
    ):
        cells = table2.plan(Setup(Spec(name, tmp_path), 1, "cpu", False, tmp_path), ())
        assert net in [(cell.depth, cell.growth, cell.keep, cell.epochs) for cell in cells]
    cells = figure4.plan(Setup(Spec("cifar10", tmp_path), 1, "cpu", False, tmp_path), ())
    rates = {cell.rate for cell in cells if (cell.initialisation, cell.optimizer) == ("He", "Adam")}
    assert len(rates) == 10
    assert rates > {1e-3, 1e-4, 1e-5}
    assert {(cell.width, cell.epochs) for cell in cells} == {(1.0, 150)}


def test_quick_figure4_and_figure3_share_their_trainings(tmp_path):
    out = ["--quick", "--seeds", "2", "--out", str(tmp_path)]
    assert "| Nesterov | He |" in invoke(figure4.EXPERIMENT, *out)
    done = figure4.EXPERIMENT.read(tmp_path)
    assert len(done) == 12  # one rate, two seeds
    assert "| Adam | Xavier |" in invoke(figure3.EXPERIMENT, *out)
    assert figure3.EXPERIMENT.read(tmp_path) == done
    assert (tmp_path / "results/figure3-digits.png").exists()
    for count in range(len(done)):  # wherever it is interrupted, the page can be written
        for experiment in (figure3.EXPERIMENT, figure4.EXPERIMENT):
            experiment.section(done[:count])
            for picture in experiment.pictures.values():
                picture(done[:count])


def test_figure4_by_its_full_protocol(tmp_path, monkeypatch):
    monkeypatch.setattr(figure4, "FULL", figure4.Size(1 / 32, 2, 64))
    monkeypatch.setattr(figure4, "draw_rates", lambda: (0.02,))
    monkeypatch.setattr(figure4, "RATES", {"Nesterov": (1e-2,), "Adam": (1e-3,)})
    out = str(tmp_path / "out")
    invoke(figure4.EXPERIMENT, "--data", stored(tmp_path, "cifar10"), "--seeds", "2", "--out", out)
    found = figure4.EXPERIMENT.read(Path(out))
    assert len(found) == 2 * 3 * (
        2 + 1
    )  # optimizers, initialisations; both rates, and the best with a second seed
    assert all(len(record.found["gradient"]) == 2 for record in found)
