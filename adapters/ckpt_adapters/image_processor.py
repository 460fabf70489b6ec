"""Turns the settings of a transformers image processor into an InputSpec.

The settings stand in the file `preprocessor_config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_adapters import recorded_arguments
from ckpt_tools.contract import InputSpec

Settings = Mapping[str, Any]

# The files hold PIL's numbers of interpolation methods, which are the positions here.
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# From this side on, ConvNeXt's processor resizes without keeping the aspect ratio. Below it, it
# crops.
_SQUASHED_FROM = 384
_LEVIT_RESIZE = 256 / 224  # LeViT's processor resizes the shorter side by this factor before it crops.


def input_spec(
    settings: Settings, defaults: Settings, channels: int, side: object, origin: str
) -> InputSpec | None:
    """Return what a processor does to an image, where `settings` override the `defaults` of its
    class.

    `side` is the image size that the model is built for. It replaces a size that stands in the
    defaults only. Returns None if neither gives a size.

    Raises ValueError, TypeError or KeyError for settings of another meaning.
    """
    merged = {**defaults, **settings}
    geometry = _output_geometry(merged, _means_square(defaults))
    if geometry is None or not {"size", "crop_size"} & settings.keys():
        model_size = _height_and_width(side)
        if model_size is not None:
            _, crop_pct, mode = geometry or (model_size, 1.0, "center")
            geometry = (model_size, crop_pct, mode)
    if geometry is None:
        return None
    (height, width), crop_pct, mode = geometry
    mean, std = _scaling(merged, channels, normalised=not defaults and "image_mean" in merged)
    if merged.get("do_flip_channel_order"):
        origin += ", which expects BGR: the order of the channels is not changed"
    spec = InputSpec(
        shape=(channels, height, width),
        mean=mean,
        std=std,
        interpolation=_INTERPOLATIONS[int(merged.get("resample", 2))],
        crop_pct=crop_pct,
        crop_mode=mode,
        origin=origin,
    )
    return recorded_arguments.require_valid_input_spec(spec)


def _scaling(
    settings: Settings, channels: int, *, normalised: bool
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation that do what rescaling, offset and normalisation do.

    Both are on the scale 0–1, by channel. They are empty if pixels are only divided by 255.
    `normalised` holds where the settings do not say whether the processor normalises.
    """
    normalised = bool(settings.get("do_normalize", normalised))
    mean = _per_channel(settings["image_mean"], channels) if normalised else (0.0,) * channels
    std = _per_channel(settings["image_std"], channels) if normalised else (1.0,) * channels
    if normalised and settings.get("include_top"):
        # EfficientNet's processor divides by the standard deviation twice.
        std = tuple(value**2 for value in std)
    # The processor computes pixel · rescale_factor − offset. An InputSpec is about pixels that were
    # divided by 255.
    factor = 255.0
    if settings.get("do_rescale", True):
        factor *= float(settings.get("rescale_factor", 1 / 255))
    offset = 1.0 if settings.get("rescale_offset") else 0.0
    if not normalised and offset == 0 and abs(factor - 1) < 1e-6:
        return (), ()
    return tuple((m + offset) / factor for m in mean), tuple(s / factor for s in std)


def _output_geometry(settings: Settings, number_is_square: bool) -> tuple[tuple[int, int], float, str] | None:
    """Return (height, width) of the output, and `crop_pct` and `crop_mode` as in InputSpec.

    Returns None if the settings give no size.
    """
    crop = _height_and_width(settings.get("crop_size")) if settings.get("do_center_crop") else None
    if not settings.get("do_resize", True):
        return (crop, 1.0, "center") if crop else None
    shortest, resized = _resize_target(settings.get("size"), number_is_square)
    processor = settings.get("image_processor_type", settings.get("feature_extractor_type", ""))
    if str(processor).startswith("Levit") and shortest:
        shortest = int(_LEVIT_RESIZE * shortest)
    elif settings.get("crop_pct") and shortest:
        # ConvNeXt's processor: the size is that of the crop, and the image is resized to size /
        # crop_pct.
        resized = (shortest, shortest)
        if crop is None and shortest >= _SQUASHED_FROM:
            return resized, 1.0, "squash"
        crop, shortest = crop or resized, int(shortest / float(settings["crop_pct"]))
    if shortest:
        crop = crop or (shortest, shortest)
        return crop, min(1.0, min(crop) / shortest), "center"
    if resized and crop:
        return crop, min(1.0, min(crop) / min(resized)), "center"
    if resized:
        return resized, 1.0, "squash"
    return (crop, 1.0, "center") if crop else None


def _resize_target(size: object, number_is_square: bool) -> tuple[int | None, tuple[int, int] | None]:
    """Return the shorter side, or (height, width), that images are resized to."""
    if isinstance(size, Mapping):
        return _side(size.get("shortest_edge")), _height_and_width(size)
    if isinstance(size, int) and not number_is_square:
        return _side(size), None
    return None, _height_and_width(size)


def _means_square(defaults: Settings) -> bool:
    """Whether a single number as the size means a square.

    It means the shorter side where the processor's class has a shorter side by default.
    """
    size = defaults.get("size")
    return not (isinstance(size, Mapping) and "shortest_edge" in size)


def _height_and_width(size: object) -> tuple[int, int] | None:
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    sides = [_side(side) for side in (size if isinstance(size, list | tuple) else (size, size))]
    return (sides[0], sides[1]) if len(sides) == 2 and sides[0] and sides[1] else None


def _side(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    numbers = [float(value) for value in (values if isinstance(values, list | tuple) else [values])]
    # For another number of channels, the mean over the given ones is the best guess.
    return tuple(numbers) if len(numbers) == channels else (sum(numbers) / len(numbers),) * channels
