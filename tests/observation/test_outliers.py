"""Extreme, blank and non-finite samples: found, named and without effect; clean data: not one bit differs."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

import ckpt_tools
from ckpt_tools.cli import main
from ckpt_tools.contract import InputSpec
from ckpt_tools.data.images.image_folder import FolderSource
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.diagnosis.data_sample import draw_sample
from ckpt_tools.distributed import ALONE
from ckpt_tools.errors import DataError, ModelError
from ckpt_tools.observation.finite import not_finite_rows
from ckpt_tools.observation.outliers import (
    EnergyHistory,
    find_suspects,
    is_extreme,
    log_energies,
    one_colour_rows,
)
from ckpt_tools.reestimate.method_run import _sample_namer
from ckpt_tools.results import Reestimation

# All data here is of independent samples. tests/reestimate/test_uncut_batches.py has other data.
reestimate_bn = functools.partial(ckpt_tools.reestimate_bn, rows_are_samples=True)

SHAPE = (3, 8, 8)
BAD = (100, 200, 300)
NETS = {
    "densenet": (nets.DenseNet, SHAPE),
    "resnet": (nets.ResNet, SHAPE),
    "reused": (nets.Reused, SHAPE),
    "mlp": (nets.mlp, (10,)),
    "video": (nets.video, (2, 6, 6, 6)),
    "sequence": (nets.sequence, (4, 20)),
}


def net(kind: str = "densenet") -> tuple[nn.Module, Tensor]:
    """A trained net, and 600 clean samples."""
    make, shape = NETS[kind]
    torch.manual_seed(0)
    data = nets.batches(shape, 20, 32)
    return nets.trained(make(), data), torch.cat(data)[:600]


def spoilt(x: Tensor) -> Tensor:
    """One sample 100 times too large, one all white, one NaN."""
    bad = x.clone()
    bad[BAD[0]] *= 100
    bad[BAD[1]] = 3.0
    bad[BAD[2]].view(-1)[5] = math.nan
    return bad


def clean(x: Tensor) -> Tensor:
    return x[[row for row in range(len(x)) if row not in BAD]]


def run(
    model: nn.Module, x: Tensor, size: int = 128, **options: Any
) -> tuple[Reestimation, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    result = reestimate_bn(
        model, list(x.split(size)), **{"layers": "all", "force": True, "estimator": "pooled", **options}
    )
    return result, {name: b for name, b in model.named_buffers() if name.endswith("running_var")}


def farthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] / b[name] - 1).abs().max()) for name in a)


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(
    "options",
    [{}, {"estimator": "exact"}, {"estimator": "ema", "epochs": 2}, {"statistics": "mean+variance"}],
    ids=["pooled", "exact", "ema", "precise"],
)
def test_three_among_600_are_named_and_change_nothing(kind: str, options: dict[str, Any]) -> None:
    model, x = net(kind)
    before = spoilt(x)
    result, found = run(model, before, 300, **options)
    _, expected = run(model, clean(x), 300, **options)
    assert farthest(found, expected) < 0.02
    told = {(one.name, one.reason) for one in result.outliers}
    assert told == {
        ("sample 100 of batch 0", "extreme"),
        ("sample 200 of batch 0", "blank"),
        ("sample 0 of batch 1", "not finite"),
    }
    extreme = next(one for one in result.outliers if one.reason == "extreme")
    assert extreme.leverage is not None
    assert extreme.leverage > 1000
    assert result.images == 597
    assert torch.equal(before.nan_to_num(7), spoilt(x).nan_to_num(7))  # a user's batch is never changed


def test_a_spoilt_batch_is_what_its_other_samples_make_of_it() -> None:
    model, x = net()
    assert identical(run(model, spoilt(x), 600)[1], run(model, clean(x), 600)[1])


@pytest.mark.parametrize("size", [5, 17, 64, 512])
def test_batches_of_any_size(size: int) -> None:
    model, x = net("resnet")
    result, found = run(model, spoilt(x), size)
    parts = [clean_part for part in range(0, 600, size) if len(clean_part := _without(x, part, size))]
    twin = copy.deepcopy(model)
    reestimate_bn(twin, parts, layers="all", force=True, estimator="pooled")
    assert len(result.outliers) == 3
    assert farthest(found, {n: b for n, b in twin.named_buffers() if n.endswith("running_var")}) < 1e-6


@pytest.mark.parametrize("size", [2, 4, 7, 31])
@pytest.mark.parametrize("places", [(0,), (1,), (2, 5, 9)])
def test_the_first_of_small_batches(size: int, places: tuple[int, ...]) -> None:
    model, x = net()
    bad = x.clone()
    bad[list(places)] *= 100
    result, found = run(model, bad, size)
    assert {one.name for one in result.outliers} == {
        f"sample {at % size} of batch {at // size}" for at in places
    }
    rest = [row for row in range(len(x)) if row not in places]
    assert farthest(found, run(model, x[rest], size)[1]) < 0.02


def test_a_loader_may_fill_the_same_memory_again() -> None:
    model, x = net()

    class Refilled:
        def __iter__(self) -> Iterator[Tensor]:
            buffer = torch.empty_like(x[:4])
            for batch in x.split(4):
                yield buffer.copy_(batch)

    twin = copy.deepcopy(model)
    reestimate_bn(twin, Refilled(), layers="all", force=True, estimator="pooled")
    assert identical(
        {n: b for n, b in twin.named_buffers() if n.endswith("running_var")}, run(model, x, 4)[1]
    )


@pytest.mark.parametrize("value", [1e20, 1e38])
def test_values_whose_squares_are_not_finite(value: float) -> None:
    model, x = net()
    for place in (3, 300):
        bad = x.clone()
        bad[place].view(-1)[7] = value
        result, found = run(model, bad)
        assert [one.name for one in result.outliers] == [f"sample {place % 128} of batch {place // 128}"]
        assert farthest(found, run(model, x)[1]) < 0.02
        (first, *_) = draw_sample(list(bad.split(128)), 256)
        assert len(first) == 128 - (place < 128)


def _without(x: Tensor, start: int, size: int) -> Tensor:
    return x[[row for row in range(start, min(600, start + size)) if row not in BAD]]


@pytest.mark.parametrize("kind", ["densenet", "reused", "mlp"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (128, {}),
        (9, {}),
        (200, {"estimator": "exact"}),
        (64, {"estimator": "ema", "epochs": 2}),
        (50, {"tolerance": 0.2}),
    ],
)
def test_clean_data_gives_the_same_bits_with_the_guard_on_and_off(
    kind: str, size: int, options: dict[str, Any]
) -> None:
    model, x = net(kind)
    guarded, found = run(model, x, size, **options)
    free, expected = run(model, x, size, keep_outliers=True, **options)
    assert guarded.outliers == free.outliers == ()
    assert identical(found, expected)
    assert (guarded.images, guarded.passes) == (free.images, free.passes)


def test_keeping_them_keeps_all_but_nan() -> None:
    model, x = net()
    result, found = run(model, spoilt(x), keep_outliers=True)
    assert [one.reason for one in result.outliers] == ["not finite"]
    assert result.images == 599
    assert farthest(found, run(model, clean(x))[1]) > 1


def digits(count: int = 900) -> Tensor:
    images = torch.from_numpy(load_digits().images[:count]).float() / 16
    return (images.unsqueeze(1).repeat(1, 3, 1, 1) - 0.5) / 0.5


def crops(count: int = 700, side: int = 8) -> Tensor:
    """Of two photographs, one in four very dark or nearly white."""
    rng = np.random.default_rng(0)
    images = [np.asarray(image) for image in load_sample_images().images]
    found = []
    for number in range(count):
        image = images[number % 2]
        top, left = (int(rng.integers(length - 64)) for length in image.shape[:2])
        crop = (
            image[top : top + 64, left : left + 64]
            .reshape(side, 64 // side, side, 64 // side, 3)
            .mean((1, 3))
            / 255
        )
        found.append(crop * (0.1 if number % 8 == 0 else 1) if number % 8 != 4 else 1 - 0.1 * crop)
    return torch.from_numpy(np.stack(found)).float().permute(0, 3, 1, 2).sub(0.45).div(0.25)


def heavy(count: int = 600) -> Tensor:
    """Contrasts whose logarithm is normal with standard deviation 1: the largest is 20 times the median."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, *SHAPE, generator=g) * torch.randn(count, 1, 1, 1, generator=g).exp()


def blanks(count: int = 600) -> Tensor:
    """Two in a hundred are blank: part of this data."""
    x = digits(count)
    x[::50] = -1.0
    return x


@pytest.mark.parametrize(
    ("size", "kind"), [(16, "resnet"), (40, "densenet"), (256, "densenet"), (600, "resnet")]
)
@pytest.mark.parametrize("make", [digits, crops, heavy, blanks])
def test_no_false_alarm(make: Any, size: int, kind: str) -> None:
    x = make()
    torch.manual_seed(1)
    model = nets.trained(NETS[kind][0](), list(x.split(64)), 20)
    result, found = run(model, x, size)
    _, expected = run(model, x, size, keep_outliers=True)
    assert result.outliers == ()
    assert result.images == len(x)
    assert result.common == (("blank",) if make is blanks else ())
    assert identical(found, expected)


def test_of_a_stream_that_cannot_be_read_again_what_was_left_out_stays_so() -> None:
    model, x = net()
    x[::20] = 1.0

    def once() -> Iterator[Tensor]:
        yield from x.split(60)

    result = reestimate_bn(model, once(), layers="all", force=True, estimator="pooled")
    assert 0 < len(result.outliers) <= 30
    assert result.images + len(result.outliers) == 600


@pytest.mark.parametrize("share", [0.01, 0.02])
def test_nan_in_more_than_one_in_a_hundred_is_an_error(share: float) -> None:
    model, x = net()
    before = copy.deepcopy(model.state_dict())
    x[torch.arange(0, 600, round(1 / share)), 0, 0, 0] = math.inf
    if share == 0.01:
        assert len(run(model, x)[0].outliers) == 6
        return
    with pytest.raises(
        DataError, match=r"sample 0 of batch 0, .*NaN or infinity in the input; 12 of 600 samples"
    ):
        reestimate_bn(model, list(x.split(128)), layers="all", estimator="pooled")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Brittle(nn.Module):
    """Overflows for one kind of input."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.inner, self.limit = net()[0], limit

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.where(x[:, :1, :1, :1] > self.limit, x * math.inf, x))


def test_activations_that_overflow() -> None:
    x = net()[1]
    largest = int(x[:, 0, 0, 0].argmax())
    limit = float(x[:, 0, 0, 0].topk(2).values.mean())
    result = reestimate_bn(Brittle(limit), list(x.split(100)), layers="all", force=True, estimator="pooled")
    (one,) = result.outliers
    assert (one.name, one.reason) == (f"sample {largest % 100} of batch {largest // 100}", "not finite")
    assert one.where.startswith("inner.norms.0")
    with pytest.raises(ModelError, match="overflow"):
        reestimate_bn(Brittle(-1e9), list(x.split(100)), layers="all", force=True, estimator="pooled")


class Listening(nn.Module):
    """One sample's pattern resonates with the second weight; its input is like all others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.where((x[:, 0, 0, 0] > 50)[:, None, None, None], x * 300, x))


def test_what_shows_in_the_layers_alone() -> None:
    x = net()[1]
    x[77] = x[77] / x[77].std()
    x[77, 0, 0, 0] = 51.0
    x[77, 0] = x[77, 0].clamp(-60, 60)
    others = torch.cat([x[:77], x[78:]])
    assert find_suspects(
        x[:128] * torch.tensor([1.0] * 128)[:, None, None, None], EnergyHistory()
    ).keys() <= {77}
    model = Listening()
    result = reestimate_bn(
        model, [{"x": part} for part in x.split(200)], layers="all", force=True, estimator="pooled"
    )
    (one,) = result.outliers
    assert (one.name, one.reason) == ("sample 77 of batch 0", "extreme")
    assert one.where.startswith("inner.")
    twin = Listening()
    reestimate_bn(
        twin, [others[:199], *others[199:].split(200)], layers="all", force=True, estimator="pooled"
    )
    same = zip(model.buffers(), twin.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_a_shuffled_second_pass_knows_them_by_their_content() -> None:
    model, x = net()
    model.eval()
    data = torch.utils.data.TensorDataset(spoilt(x))
    loader = torch.utils.data.DataLoader(data, 150, shuffle=True, generator=torch.Generator().manual_seed(0))
    result = reestimate_bn(model, loader, layers="all", estimator="exact", force=True)
    assert len(result.outliers) == 3
    assert result.passes > 2
    assert result.residual is not None
    assert result.residual <= 1e-4


def test_the_rule_needs_distance_and_a_gap() -> None:
    g = torch.Generator().manual_seed(0)
    usual = torch.randn(400, generator=g, dtype=torch.float64) * 0.3
    assert is_extreme(torch.tensor([2.9, 9.2], dtype=torch.float64), usual).tolist() == [False, True]
    ladder = torch.cat([usual, torch.arange(1, 9, dtype=torch.float64)])
    assert not is_extreme(ladder, ladder).any()
    assert not is_extreme(usual[:7] * 100, usual[:7]).any()  # too few to tell
    wide = usual * 20
    assert not is_extreme(wide, wide).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_measures_of_an_input(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, 4, 4).to(dtype)
    x[2], x[3] = 0.25, torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    found = log_energies((x, torch.zeros(5)))
    assert found is not None
    np.testing.assert_allclose(found.numpy(), np.log(x.double().square().mean((1, 2, 3)).numpy()), rtol=1e-3)
    assert one_colour_rows(x) == [2, 3]
    assert one_colour_rows(torch.zeros(4, 30)) == []  # a vector without entries is no picture
    x[4, 0, 0, 0] = math.nan
    assert not_finite_rows(x, 0) == [4]
    assert not_finite_rows([[*x]], 0) == [4]
    assert not_finite_rows({"x": x, "mask": torch.full((5, 2), -math.inf)}, 0) == [4]
    with pytest.raises(DataError, match="no single sample"):
        not_finite_rows({"x": x, "bias": torch.tensor([math.nan, 0])}, 0)


def test_a_first_look_is_not_spoilt() -> None:
    x = net()[1][:64]
    bad = x.clone()
    bad[5], bad[6], bad[7] = bad[5] * 100, 3.0, math.nan
    (look,) = draw_sample([bad], 256)
    assert torch.equal(torch.as_tensor(look), torch.cat([x[:5], x[8:]]))


def test_files_are_named_by_their_path(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(120):
        (tmp_path / f"class{number % 3}").mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels if number != 50 else np.full_like(pixels, 255)).save(
            tmp_path / f"class{number % 3}" / f"{number}.png"
        )
    (tmp_path / "class0" / "60.png").write_bytes(b"")
    stream = FolderSource.open("photos", tmp_path, limit=None, seed=0).batches(
        InputSpec(SHAPE, (0.5,) * 3, (0.25,) * 3), Reading(batch_size=25, workers=0)
    )
    result = reestimate_bn(net()[0], stream, layers="all", force=True, estimator="pooled")
    assert [(one.name, one.reason) for one in result.outliers] == [("class2/50.png", "blank")]
    assert _sample_namer([], ALONE)(3, 2) == "sample 2 of batch 3"


@pytest.mark.parametrize(("count", "size"), [(2, 8), (3, 8), (4, 16), (6, 24)])
def test_many_in_a_small_batch_of_named_arguments(count: int, size: int) -> None:
    """They are compared with those before them, not with one another."""
    model, x = net()
    bad = x.clone()
    rows = slice(3 * size, 3 * size + count)
    bad[rows] *= 100
    good = torch.cat([x[: rows.start], x[rows.stop :]])
    changed, named = copy.deepcopy(model), [{"x": part} for part in bad.split(size)]
    result = reestimate_bn(changed, named, force=True, estimator="pooled")
    assert len(result.outliers) == count
    expected = copy.deepcopy(model)
    reestimate_bn(expected, [{"x": part} for part in good.split(size)], force=True, estimator="pooled")
    assert farthest(variances(changed), variances(expected)) < 0.02


def variances(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("running_var")}


def test_a_sample_that_begins_like_an_outlier_is_none() -> None:
    """Pages of a book, one of them blank: at most places all are white."""
    model, _ = net("resnet")
    pages = torch.full((96, 3, 32, 32), 2.0)
    for number, page in enumerate(pages):
        page[:, 3 + number % 7 : 30 : 8, 5:28:3] = -1.0 + number / 100
    pages[40] = 2.0
    result = reestimate_bn(model, pages.split(16), estimator="exact", force=True)
    assert [(one.name, one.reason) for one in result.outliers] == [("sample 8 of batch 2", "blank")]
    assert result.images == 95


class Sum(nn.Module):
    """Two inputs as one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.mlp()

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.net(pair[0] + pair[1])


def test_several_inputs_are_cut_together() -> None:
    _, x = net("mlp")
    other = torch.randn_like(x)
    torch.manual_seed(0)
    model = Sum().train()
    for _ in range(10):
        model((x, other))
    model.eval()
    bad, worse = x.clone(), other.clone()
    bad[100] *= 100
    worse[200, 3] = math.nan

    def pairs(a: Tensor, b: Tensor) -> list[Any]:
        return [
            ((one, two), torch.zeros(len(one))) for one, two in zip(a.split(64), b.split(64), strict=True)
        ]

    changed, expected = copy.deepcopy(model), copy.deepcopy(model)
    result = reestimate_bn(changed, pairs(bad, worse), force=True, estimator="pooled")
    assert result.images == 598
    assert {one.name for one in result.outliers} == {"sample 36 of batch 1", "sample 8 of batch 3"}
    kept = [row for row in range(600) if row not in (100, 200)]
    reestimate_bn(expected, pairs(x[kept], other[kept]), force=True, estimator="pooled")
    assert farthest(variances(changed), variances(expected)) < 0.02


def test_the_command_names_rows_and_reports_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, x = net()
    torch.save(model.state_dict(), "model.pt")
    np.save("bad.npy", spoilt(x).numpy())
    np.save("good.npy", clean(x).numpy())
    call = ["bn-reestimate", "model.pt", "--arch", "nets:DenseNet", "--device", "cpu", "-q", "--data"]
    told = CliRunner().invoke(main, [*call, "bad.npy", "--json", "-o", "bad.safetensors", "--report", "r.md"])
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    assert {(one["name"], one["reason"]) for one in facts["outliers"]} == {
        ("row 100", "extreme"),
        ("row 200", "blank"),
        ("row 300", "not finite"),
    }
    assert facts["data"]["images"] == 597
    assert all(f"row {row}" in Path("r.md").read_text() for row in BAD)
    assert CliRunner().invoke(main, [*call, "good.npy", "-o", "good.safetensors"]).exit_code == 0
    a, b = load_file("bad.safetensors"), load_file("good.safetensors")
    variances = [key for key in a if key.endswith("running_var")]
    assert farthest({key: a[key] for key in variances}, {key: b[key] for key in variances}) < 0.02
    text = CliRunner().invoke(main, [*call, "bad.npy", "-o", "again.safetensors"])
    assert "3 samples left out" in text.output
    kept = CliRunner().invoke(
        main, [*call, "bad.npy", "--keep-outliers", "--force", "--json", "-o", "k.safetensors"]
    )
    facts = json.loads(kept.stdout)
    assert [one["name"] for one in facts["outliers"]] == ["row 300"]
    assert "--keep-outliers" in facts["command"]
