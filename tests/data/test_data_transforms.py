"""The oracle: timm's and torchvision's own evaluation transforms."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.images.resampling import INTERPOLATIONS, matches_pil
from ckpt_tools.data.images.transforms import ImageTransform, PixelScale
from ckpt_tools.errors import DataError, UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(64, 48), (31, 77), (32, 32), (9, 40), (101, 100)]


def picture(size, mode="RGB", seed=0):
    noise = np.random.default_rng(seed).integers(
        0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8
    )
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    return image.convert(mode)


def ours(spec, image):
    return PixelScale(spec)(ImageTransform(spec)(image)[None])[0]


def levels_off(a, b, std=STD):
    return (a - b).abs() * 255 * torch.tensor(std).reshape(-1, 1, 1)


def alike(a, b):
    """Equal but for rounding: where sizes are as 8 to 9, many values lie halfway between two levels."""
    off = levels_off(a, b)
    return off.max() < 2.01 and off.mean() < 0.05


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("hw", [(32, 32), (27, 27), (24, 40)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
def test_equals_timm(crop_mode, hw, crop_pct):
    from timm.data import create_transform

    for size, interpolation in itertools.product(SIZES, ["bilinear", "bicubic"]):
        theirs = create_transform(
            input_size=(3, *hw), interpolation=interpolation, mean=MEAN, std=STD,
            crop_pct=crop_pct, crop_mode=crop_mode, is_training=False,
        )  # fmt: skip
        spec = InputSpec((3, *hw), MEAN, STD, interpolation, crop_pct, crop_mode)
        image = picture(size)
        assert alike(ours(spec, image), theirs(image)), (size, interpolation)


@pytest.mark.parametrize("interpolation", [name for name in INTERPOLATIONS if name != "random"])
def test_every_interpolation_equals_timm(interpolation):
    from timm.data import create_transform

    theirs = create_transform(input_size=(3, 32, 32), interpolation=interpolation, mean=MEAN, std=STD)
    image = picture((70, 50))
    assert alike(ours(InputSpec((3, 32, 32), MEAN, STD, interpolation, 0.875), image), theirs(image))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_modes_become_rgb_as_the_libraries_load_them(mode):
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({}, pretrained_cfg={"input_size": (3, 32, 32), "crop_pct": 0.95})
    theirs = create_transform(**config, is_training=False)
    spec = InputSpec(
        config["input_size"], config["mean"], config["std"], config["interpolation"], config["crop_pct"]
    )
    image = picture((50, 41), mode)
    assert alike(ours(spec, image), theirs(image.convert("RGB")))


@pytest.mark.parametrize("name", ["ResNet50_Weights.IMAGENET1K_V2", "EfficientNet_B1_Weights.IMAGENET1K_V2"])
@pytest.mark.parametrize("size", [(400, 301), (232, 500), (150, 90)])
def test_equals_torchvision(name, size):
    import torchvision

    theirs = torchvision.models.get_weight(name).transforms()
    crop, resize = theirs.crop_size[0], theirs.resize_size[0]
    spec = InputSpec(
        (3, crop, crop), tuple(theirs.mean), tuple(theirs.std), theirs.interpolation.value, crop / resize
    )
    image = picture(size)
    assert alike(ours(spec, image), theirs(image))


@pytest.mark.parametrize("interpolation", [name for name in INTERPOLATIONS if name != "random"])
def test_resizing_is_pils(interpolation):
    """Up and down, odd sizes, strips; noise is the hardest picture."""
    off = []
    for width, height, goal in itertools.product(
        [1, 17, 96, 255, 700], [1, 23, 97, 256, 611], [(20, 31), (64, 48)]
    ):
        image = picture((width, height), seed=width)
        spec = InputSpec((3, goal[1], goal[0]), interpolation=interpolation, crop_mode="squash", crop_pct=1.0)
        theirs = torch.from_numpy(np.array(image.resize(goal, INTERPOLATIONS[interpolation]))).permute(
            2, 0, 1
        )
        difference = ImageTransform(spec)(image).int() - theirs.int()
        if not matches_pil((width, height), goal, interpolation):
            assert not difference.any()
        assert difference.abs().max() <= 2
        off.append(difference.float().abs().mean().item())
    assert max(off) < 0.05
    assert np.mean(off) < 0.01


def test_the_resized_side_never_falls_a_pixel_short():
    for resize in range(33, 600):
        for crop in range(32, resize + 1, 7):
            transform = ImageTransform(InputSpec((3, crop, crop), crop_pct=crop / resize))
            assert transform.size_before_crop((700, 700)) == (resize, resize)


def test_grey_models_get_one_channel():
    spec = InputSpec((1, 16, 16), mean=(0.5,), std=(0.25,))
    image = picture((20, 20))
    grey = ours(spec, image)
    assert grey.shape == (1, 16, 16)
    pixels = torch.from_numpy(np.array(image.convert("L").resize((16, 16), Image.Resampling.BILINEAR)))
    torch.testing.assert_close(grey[0], (pixels / 255 - 0.5) / 0.25)


def test_random_interpolation_is_bicubic():
    image = picture((40, 40))
    a, b = (
        ImageTransform(InputSpec((3, 20, 20), interpolation=name))(image) for name in ("random", "bicubic")
    )
    assert torch.equal(a, b)


def test_scale_without_mean_and_std_only_divides():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    torch.testing.assert_close(PixelScale(InputSpec((1, 16, 16)))(pixels), pixels / 255)


def test_a_strip_that_would_grow_to_gigabytes_is_refused():
    with pytest.raises(Image.DecompressionBombError):
        ImageTransform(InputSpec((3, 224, 224)))(Image.new("RGB", (60000, 1)))


@pytest.mark.parametrize(
    ("spec", "error", "word"),
    [
        (InputSpec((500,)), DataError, "500"),
        (InputSpec((4, 8, 8)), DataError, "--input-size"),
        (InputSpec((3, 8, 8), interpolation="cubic"), UsageError, "bicubic"),
        (InputSpec((3, 8, 8), crop_mode="centre"), UsageError, "squash"),
        (InputSpec((3, 8, 8), crop_pct=0.0), UsageError, "0.875"),
    ],
)
def test_a_transform_that_means_nothing_is_refused(spec, error, word):
    with pytest.raises(error, match=word):
        ImageTransform(spec)


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec((1, 8, 8), mean=MEAN),
        InputSpec((3, 8, 8), std=(0.1, 0.0, 0.1)),
        InputSpec((3, 8, 8), std=STD[:2]),
    ],
)
def test_normalisation_that_does_not_fit_is_refused(spec):
    with pytest.raises(UsageError, match=r"--mean|--std"):
        PixelScale(spec)


def test_the_transform_says_what_it_does():
    spec = InputSpec((3, 224, 224), MEAN, STD, "bicubic", 0.875)
    assert str(ImageTransform(spec)) == "RGB, shorter side to fit 256×256 (bicubic), centre 224×224"
    assert str(PixelScale(spec)) == "/255, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225"
