"""The settings of a transformers image processor (``preprocessor_config.json``) as an InputSpec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_adapters import recorded_arguments
from ckpt_tools.contract import InputSpec

Settings = Mapping[str, Any]

_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's numbers, as stored
_WARPED_FROM = 384  # ConvNeXt's processor crops smaller images and warps larger ones
_LEVIT_RESIZE = 256 / 224


def input_spec(settings: Settings, defaults: Settings, channels: int, side: object, origin: str) -> InputSpec | None:
    """What a processor does to an image, ``settings`` going before the ``defaults`` of its class.

    ``side`` is the image size that the model is built for: it takes the place of a size that only the defaults know.
    None if neither tells a size. Raises ValueError, TypeError or KeyError for settings of another meaning.
    """
    said = {**defaults, **settings}
    fitted = _output_geometry(said, _square(defaults))
    if fitted is None or not {"size", "crop_size"} & settings.keys():
        own = _pair(side)
        if own is not None:
            fitted = (own, fitted[1], fitted[2]) if fitted else (own, 1.0, "center")
    if fitted is None:
        return None
    (height, width), crop_pct, mode = fitted
    mean, std = _scaling(said, channels, normalised=not defaults and "image_mean" in said)
    flipped = (
        ", which expects BGR: the order of the channels is not changed" if _on(said, "do_flip_channel_order") else ""
    )
    spec = InputSpec(
        shape=(channels, height, width),
        mean=mean,
        std=std,
        interpolation=_INTERPOLATIONS[int(said.get("resample", 2))],
        crop_pct=crop_pct,
        crop_mode=mode,
        origin=origin + flipped,
    )
    return recorded_arguments.require_valid_input_spec(spec)


def _scaling(said: Settings, channels: int, *, normalised: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation on the scale 0–1 that do the same as rescaling, offset and normalisation."""
    normalised = bool(said.get("do_normalize", normalised))
    mean = _per_channel(said["image_mean"], channels) if normalised else (0.0,) * channels
    std = _per_channel(said["image_std"], channels) if normalised else (1.0,) * channels
    if normalised and _on(said, "include_top"):  # EfficientNet's divides once more
        std = tuple(value**2 for value in std)
    # pixel · factor − offset, written for pixels that were divided by 255 already
    factor = 255 * (float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 1.0)
    offset = 1.0 if _on(said, "rescale_offset") else 0.0
    if not normalised and offset == 0 and abs(factor - 1) < 1e-6:
        return (), ()
    return tuple((m + offset) / factor for m in mean), tuple(s / factor for s in std)


def _output_geometry(said: Settings, square: bool) -> tuple[tuple[int, int], float, str] | None:
    """Height and width of what comes out, the share of the crop, and its mode; None if no size is told."""
    crop = _pair(said.get("crop_size")) if _on(said, "do_center_crop") else None
    if not said.get("do_resize", True):
        return (crop, 1.0, "center") if crop else None
    shortest, whole = _resize_target(said.get("size"), square)
    kind = str(said.get("image_processor_type", said.get("feature_extractor_type", "")))
    if kind.startswith("Levit") and shortest:
        shortest = int(_LEVIT_RESIZE * shortest)
    elif "crop_pct" in said and said["crop_pct"] and shortest:
        whole = (shortest, shortest)
        if crop is None and shortest >= _WARPED_FROM:
            return whole, 1.0, "squash"
        crop, shortest = crop or whole, int(shortest / float(said["crop_pct"]))
    if shortest:
        crop = crop or (shortest, shortest)
        return crop, min(1.0, min(crop) / shortest), "center"
    if whole and crop:
        return crop, min(1.0, min(crop) / min(whole)), "center"
    return (whole, 1.0, "squash") if whole else (crop, 1.0, "center") if crop else None


def _resize_target(size: object, square: bool) -> tuple[int | None, tuple[int, int] | None]:
    """The shorter side, or height and width, that images are resized to."""
    if isinstance(size, Mapping):
        return _side(size.get("shortest_edge")), _pair(size)
    whole = _pair(size)
    return (None, whole) if square or not isinstance(size, int) else (whole[0] if whole else None, None)


def _square(defaults: Settings) -> bool:
    """Whether a lone number means a square: not where the class itself goes by the shorter side."""
    size = defaults.get("size")
    return not (isinstance(size, Mapping) and "shortest_edge" in size)


def _pair(size: object) -> tuple[int, int] | None:
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    sides = [_side(side) for side in (size if isinstance(size, list | tuple) else (size, size))]
    return (sides[0], sides[1]) if len(sides) == 2 and sides[0] and sides[1] else None


def _side(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    found = [float(value) for value in (values if isinstance(values, list | tuple) else [values])]
    return tuple(found) if len(found) == channels else (sum(found) / len(found),) * channels


def _on(said: Settings, name: str) -> bool:
    return bool(said.get(name))
