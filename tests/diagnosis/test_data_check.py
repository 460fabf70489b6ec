"""The right data passes; wrong preprocessing, order and contents are refused and named."""

from __future__ import annotations

import copy
import functools
import itertools
import subprocess
import sys
from pathlib import Path

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckpt_tools import walk
from ckpt_tools.contract import InputSpec
from ckpt_tools.diagnosis.data_check import DataVerdict, check_data, refuse_unlike_training_data
from ckpt_tools.diagnosis.hypotheses import preprocessing_hypotheses
from ckpt_tools.errors import CheckFailed
from ckpt_tools.results import Walk

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,), (0.5,))
RAW = ((0.0,), (1.0,))
BYTES = ((0.0,), (1 / 255,))
Norm = tuple[tuple[float, ...], tuple[float, ...]]


@functools.cache
def pixels(kind: str, channels: int = 3) -> Tensor:
    """512 images of 16×16 in 0–1: warm patches, or cold and nearly flat ones."""
    g = torch.Generator().manual_seed(1)
    coarse = torch.rand(512, 3, 4, 4, generator=g)
    smooth = F.interpolate(coarse, size=(16, 16), mode="bilinear")
    smooth = smooth * torch.tensor([1.0, 0.7, 0.4])[:, None, None]
    return smooth[:, :channels] if kind == "warm" else (0.6 + 0.2 * smooth.flip(1))[:, :channels]


def normalised(x: Tensor, norm: Norm) -> Tensor:
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in norm)
    return (x - mean) / std


@functools.cache
def case(norm: Norm, channels: int = 3) -> tuple[nn.Module, Walk]:
    torch.manual_seed(0)
    data = normalised(pixels("warm", channels), norm)
    model = nets.ResNet(0.2)
    if channels == 1:
        model[0].conv1, model[0].shortcut[0] = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 6, 1)
    nets.trained(model, list(data.split(64)), 80)
    return model, walk(model, data[:2])


def spec(norm: Norm, channels: int = 3) -> InputSpec:
    return InputSpec((channels, 16, 16), *norm)


def judged(trained: Norm, given: Tensor, norm: Norm | None, channels: int = 3) -> DataVerdict:
    model, found = case(trained, channels)
    before = copy.deepcopy(model.state_dict())
    verdict = check_data(
        model,
        given.split(100),
        found,
        spec(norm, channels) if norm else None,
        preprocessed=norm is None,
        rates_known=True,
        usual_size=(channels, 16, 16),
    )
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    return verdict


@pytest.mark.parametrize("norm", [IMAGENET, HALF, RAW, BYTES])
@pytest.mark.parametrize("from_file", [True, False])
def test_the_right_data_passes_and_nothing_is_tried(norm: Norm, from_file: bool) -> None:
    verdict = judged(norm, normalised(pixels("warm"), norm), None if from_file else norm)
    assert (verdict.verdict, verdict.images, verdict.tried) == ("agree", 256, ())
    refuse_unlike_training_data(verdict)


@pytest.mark.parametrize(("right", "wrong"), list(itertools.permutations([IMAGENET, HALF, RAW, BYTES], 2)))
@pytest.mark.parametrize("from_file", [True, False])
def test_another_normalisation_is_named(right: Norm, wrong: Norm, from_file: bool) -> None:
    verdict = judged(right, normalised(pixels("warm"), wrong), None if from_file else wrong)
    assert verdict.verdict == "refuse"
    mean, std = (",".join(f"{value:.4g}" for value in values) for values in right)
    expected = f"mean {mean} and std {std}" if from_file else f"--mean {mean} --std {std}"
    assert expected in verdict.cause
    with pytest.raises(CheckFailed, match="--force"):
        refuse_unlike_training_data(verdict)


@pytest.mark.parametrize("from_file", [True, False])
def test_swapped_channels_are_named(from_file: bool) -> None:
    verdict = judged(IMAGENET, normalised(pixels("warm").flip(1), IMAGENET), None if from_file else IMAGENET)
    assert verdict.verdict == "refuse"
    assert "BGR" in verdict.cause
    assert verdict.tried[0].score < 0.1


def test_another_data_set_fits_no_preprocessing() -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(512, 3, 16, 16, generator=g).round()
    verdict = judged(IMAGENET, normalised(noise, IMAGENET), IMAGENET)
    assert verdict.verdict == "refuse"
    assert "another data set" in verdict.cause


def test_another_size_than_usual_is_said() -> None:
    noise = torch.rand(512, 3, 20, 20, generator=torch.Generator().manual_seed(0)).round()
    verdict = judged(IMAGENET, normalised(noise, IMAGENET), IMAGENET)
    assert "usually takes 3×16×16, given 3×20×20" in verdict.cause


def test_grey_images() -> None:
    mnist = ((0.1307,), (0.3081,))
    assert judged(mnist, normalised(pixels("warm", 1), mnist), mnist, 1).verdict == "agree"
    verdict = judged(mnist, 255 * pixels("warm", 1), None, 1)
    assert "MNIST" in verdict.cause


def test_shifted_images_over_black_are_excused() -> None:
    """Training with padded random crops: the evaluation images are right although the borders are not."""
    torch.manual_seed(0)
    x = 0.5 + 0.5 * pixels("warm")
    padded = F.pad(x, (2,) * 4)
    tops, lefts = torch.randint(5, (2, len(x))).tolist()
    shifted = torch.stack([p[:, t : t + 16, s : s + 16] for p, t, s in zip(padded, tops, lefts, strict=True)])
    model = nets.trained(nets.ResNet(0.0), list(normalised(shifted, IMAGENET).split(64)), 80)
    given = normalised(x, IMAGENET)
    verdict = check_data(
        model, [given], walk(model, given[:2]), spec(IMAGENET), preprocessed=False, rates_known=True
    )
    assert verdict.scores is not None
    assert verdict.scores.early > 0.12
    assert verdict.verdict == "doubt"


def test_features_without_a_map() -> None:
    data = nets.batches((10,), count=8)
    model = nets.trained(nets.mlp(0.0), data, 80)
    found = walk(model, data[0])

    def verdict(scale: float) -> DataVerdict:
        return check_data(
            model, [scale * batch for batch in data], found, None, preprocessed=True, rates_known=True
        )

    assert verdict(1.0).verdict == "agree"
    assert verdict(255.0).verdict == "refuse"


class Named(nn.Module):
    """Takes its input by name, with a mask."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.inside(image * mask)


def test_batches_that_are_no_tensors_are_judged_without_hypotheses() -> None:
    inside, _ = case(IMAGENET)
    model = Named(inside).eval()
    x = normalised(pixels("warm"), IMAGENET)

    def verdict(scale: float) -> DataVerdict:
        batches = [{"image": scale * x[:256], "mask": torch.ones(256, 1, 1, 1)}]
        return check_data(model, batches, walk(model, batches[0]), None, preprocessed=True, rates_known=True)

    assert verdict(1.0).verdict == "agree"
    wrong = verdict(30.0)
    assert (wrong.verdict, wrong.tried) == ("refuse", ())


def test_untrained_statistics_say_nothing() -> None:
    model = nets.DenseNet()
    x = pixels("warm")
    verdict = check_data(model, [x], walk(model, x[:2]), None, preprocessed=True, rates_known=True)
    assert (verdict.verdict, verdict.scores) == ("none", None)
    refuse_unlike_training_data(verdict)


@pytest.mark.parametrize(("right", "wrong"), list(itertools.permutations([IMAGENET, HALF, RAW, BYTES], 2)))
@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("from_file", [True, False])
def test_some_hypothesis_undoes_any_usual_mistake(
    right: Norm, wrong: Norm, swapped: bool, from_file: bool
) -> None:
    x = pixels("warm")[:64]
    given = normalised(x.flip(1) if swapped else x, wrong)
    wanted = normalised(x, right)
    found = preprocessing_hypotheses(given, None if from_file else spec(wrong), preprocessed=from_file)
    best = min(float((one.change(given) - wanted).abs().max() / wanted.std()) for one in found)
    assert best < 1e-3


def test_few_images_are_not_refused_for_being_few() -> None:
    x = normalised(pixels("warm"), IMAGENET)
    assert all(judged(IMAGENET, x[i : i + 16], IMAGENET).verdict == "agree" for i in range(0, 320, 16))


def test_the_bench_runs() -> None:
    scripts = Path(__file__).parents[2] / "scripts"
    command = [sys.executable, "-m", "bench", "data-check", "--quick"]
    done = subprocess.run(command, cwd=scripts, capture_output=True, text=True, check=True)
    assert "| the training data | 0 of" in done.stdout
