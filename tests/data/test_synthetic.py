import math

import pytest
import torch

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.data_source import Source, describe_source
from ckpt_tools.data.sample_order import Reading, Share
from ckpt_tools.data.synthetic_source import SyntheticSource
from ckpt_tools.errors import DataError, UsageError
from ckpt_tools.model.random_inputs import synthetic_images, synthetic_samples

KINDS = ["smooth", "1/f^2 power", "1/f power", "white"]
IMAGENET = InputSpec((3, 24, 24), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def draw(count, shape, kind, seed=0):
    return synthetic_images(count, shape, kind=kind, generator=torch.Generator().manual_seed(seed))


def read(source, spec=None, batch_size=64, **options):
    return torch.cat(list(source.batches(spec, Reading(batch_size, **options))))


def neighbour_correlation(images):
    return float((images[..., 1:] * images[..., :-1]).mean() / images.square().mean())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 17, 30), (5, 16, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_images_have_mean_0_and_variance_1(kind, shape):
    images = draw(2000, shape, kind)
    assert images.shape == (2000, *shape)
    assert images.dtype == torch.float32
    assert images.mean().abs() < 0.03
    assert abs(images.var() - 1) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_every_channel_has_variance_1_and_follows_the_luminance(kind):
    correlations = torch.corrcoef(draw(2000, (3, 16, 16), kind).transpose(0, 1).flatten(1))
    assert torch.allclose(correlations, 0.9 + 0.1 * torch.eye(3), atol=0.02)


@pytest.mark.parametrize("side", [8, 32, 224])
def test_kinds_are_ordered_by_how_much_neighbours_are_alike(side):
    smooth, steep, flat, white = (neighbour_correlation(draw(12, (1, side, side), kind)) for kind in KINDS)
    assert smooth > steep + 0.1
    assert steep > flat + 0.1
    assert flat > white + 0.1
    assert abs(white) < 0.1


@pytest.mark.parametrize("side", [32, 33])
@pytest.mark.parametrize(("kind", "exponent"), [("1/f^2 power", 2), ("1/f power", 1), ("white", 0)])
def test_the_power_spectrum_falls_as_the_kind_says(kind, exponent, side):
    power = torch.fft.fft2(draw(4000, (1, side, side), kind).double()).abs().square().mean((0, 1))
    frequencies = torch.fft.fftfreq(side).double()
    radius = (frequencies[:, None] ** 2 + frequencies**2).sqrt()
    level = (power * radius**exponent).flatten()[1:]  # without frequency 0
    # The mean of 4,000 exponential numbers has a relative error of 1.6 %, twice the variance √2 times it.
    assert torch.allclose(level, level.mean().expand_as(level), rtol=0.12)
    expected = side**exponent if exponent else 1
    assert math.isclose(power[0, 0] / level.mean(), expected, rel_tol=0.12)


def test_other_shapes_are_independent_normal_numbers():
    for shape in [(64,), (4, 50), (2, 4, 8, 8)]:
        samples = synthetic_samples(500, shape, generator=torch.Generator().manual_seed(0))
        assert samples.shape == (500, *shape)
        assert samples.mean().abs() < 0.03
        assert abs(samples.var() - 1) < 0.05
    images = synthetic_samples(9, (1, 8, 8), kind="smooth", generator=torch.Generator().manual_seed(3))
    assert torch.equal(images, draw(9, (1, 8, 8), "smooth", seed=3))


@pytest.mark.parametrize("shape", [(3, 20, 21), (7,), (40,), (4, 30)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_inputs_do_not_depend_on_batches_workers_or_processes(kind, shape):
    source = SyntheticSource(shape, count=37, seed=5, noise=kind)
    inputs = read(source)
    assert inputs.shape == (37, *shape)
    for options in ({"batch_size": 1}, {"batch_size": 20, "workers": 3}, {"batch_size": 64, "workers": 0}):
        assert torch.allclose(read(source, **options), inputs, atol=1e-5)
    parts = [list(source.batches(None, Reading(5, share=Share(rank, 3)))) for rank in range(3)]
    shared = torch.cat([parts[number % 3][number // 3] for number in range(8)])
    assert torch.allclose(shared, inputs, atol=1e-5)


def test_a_stream_repeats_itself_and_another_seed_gives_other_inputs():
    stream = SyntheticSource((3, 16, 16), count=20).batches(None, Reading(8))
    first, second = torch.cat(list(stream)), torch.cat(list(stream))
    assert torch.equal(first, second)
    assert (stream.count, stream.batch_count, stream.skipped_samples) == (20, 3, ())
    assert stream.sample_name(1, 2) == "random input 9"
    other = read(SyntheticSource((3, 16, 16), count=20, seed=1))
    assert (first - other).abs().mean() > 0.5
    assert len({tuple(image.flatten()[:4].tolist()) for image in [*first, *other]}) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_of_torch_do_not_count(kind):
    source = SyntheticSource((3, 16, 16), count=20, noise=kind)
    inputs = read(source, workers=0)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again = read(source, workers=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.dtype == torch.float32
    assert torch.equal(again, inputs)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    read(SyntheticSource((3, 16, 16), count=20), workers=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_normalised_images_are_made_of_pixels(kind):
    inputs = read(SyntheticSource(count=2000, noise=kind), IMAGENET, cached=True)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    pixels = inputs * std + mean
    assert pixels.min() > -1e-5
    assert pixels.max() < 1 + 1e-5
    assert torch.allclose(pixels * 255, (pixels * 255).round(), atol=1e-3)
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(0.45), atol=0.01)
    # An image of smooth noise varies more in its middle than at the points between the grid's: it is a
    # mixture of normal distributions, of which clamping takes a little more.
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor(0.25), atol=0.01)


def test_without_mean_and_std_pixels_are_only_divided_by_255():
    inputs = read(SyntheticSource(count=100), InputSpec((1, 16, 16)))
    assert inputs.min() >= 0
    assert inputs.max() <= 1
    assert torch.allclose((inputs * 255).round() / 255, inputs, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 16, 16), (64,), (2, 100), (1, 8, 8, 8)])
def test_inputs_that_are_no_images_have_mean_0_and_variance_1(shape):
    inputs = read(SyntheticSource(count=500), InputSpec(shape))
    assert inputs.mean().abs() < 0.03
    assert abs(inputs.var() - 1) < 0.05


def test_as_many_means_as_channels_make_an_image():
    spec = InputSpec((5, 16, 16), mean=(0.5,) * 5, std=(0.25,) * 5)
    assert read(SyntheticSource(count=30), spec).abs().max() <= 2


def test_values_for_another_number_of_channels_are_refused():
    with pytest.raises(UsageError, match=r"mean has 3 values, the model takes 1 channels"):
        SyntheticSource().batches(InputSpec((1, 8, 8), (0.1, 0.2, 0.3), (1.0,)), Reading(8))


def test_a_source_says_what_it_is():
    source: Source = SyntheticSource()
    assert (source.spec, source.count, source.sample_shape) == ("synthetic inputs", 512, None)
    assert not source.is_preprocessed
    assert describe_source(source) == "synthetic"
    with pytest.raises(DataError, match="--input-size"):
        source.batches(None, Reading(8))
    shaped = SyntheticSource((3, 224, 224), noise="1/f^2 power")
    assert shaped.is_preprocessed
    assert shaped.batches(None, Reading(8)).transform == "random images with a 1/f² power spectrum, 3×224×224"
    words = SyntheticSource(noise="smooth").batches(IMAGENET, Reading(8)).transform
    assert words == (
        "random images of smooth noise, 3×24×24, /255, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225"
    )
    assert (
        SyntheticSource((64,)).batches(None, Reading(8)).transform == "independent random numbers N(0, 1), 64"
    )
