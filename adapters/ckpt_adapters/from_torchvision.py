"""torchvision: https://github.com/pytorch/vision."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torchvision import models

from ckpt_adapters import recorded_arguments
from ckpt_adapters.construct import (
    construct,
    construct_skeleton,
    keyword_parameters,
    rate_keywords,
    suggest_names,
    unknown_keyword_message,
)
from ckpt_adapters.sizes_from_shapes import infer_size_argument
from ckpt_adapters.torchvision_arguments import ARGUMENTS
from ckpt_tools.contract import InputSpec, Recipe
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.file_arguments import ArgumentKind

_AUXILIARY = {"aux_logits": ("AuxLogits.", "aux1."), "aux_loss": ("aux_classifier.",)}
_DOWNLOADS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")
_UNSIGNED = {"width_mult", "reduced_tail", "dilated"}  # of MobileNetV3's builders, in no signature
_FRAMES = 16  # what the video models were trained on, or a multiple of it
# pytorch/examples/imagenet resizes to 256 and crops 224, whatever the model; its files hold "best_acc1".
_EXAMPLES = {"val_resize_size": 256, "val_crop_size": 224}


class TorchvisionAdapter:
    """Models of ``torchvision.models``: classification, segmentation, detection, video."""

    prefix = "torchvision"

    def architectures(self) -> Sequence[str]:
        """Every model name torchvision registers."""
        return sorted(models.list_models())

    def recognise(self, words: Mapping[str, object]) -> Recipe | None:
        """A checkpoint of the reference scripts, of pytorch/examples, or of a script that names a model."""
        if recorded_arguments.hub_config(words):  # of timm, which shares many names
            return None
        known = set(models.list_models())
        name = next((name for name in recorded_arguments.model_names(words, self.prefix) if name in known), None)
        if name is None:
            return None
        rates = recorded_arguments.drop_rates(words, self.rate_kwargs(name))
        kwargs = {**rates, **recorded_arguments.model_arguments(words)}
        return Recipe(self.prefix, name, kwargs, "recorded" if rates else "unknown")

    def build(self, name: str, kwargs: Mapping[str, object]) -> nn.Module:
        """``torchvision.models.get_model`` without weights."""
        _require_known(name, kwargs)
        return construct(f"torchvision:{name}", _maker(name), kwargs)

    def class_kwargs(
        self, shapes: Mapping[str, tuple[int, ...]], name: str, kwargs: Mapping[str, object]
    ) -> dict[str, object]:
        """``num_classes``, and whether there are auxiliary heads."""
        make, taken = _maker(name), _keywords(name)
        found: dict[str, object] = {
            keyword: any(key.startswith(heads) for key in shapes)
            for keyword, heads in _AUXILIARY.items()
            if keyword in taken
        }
        classes = infer_size_argument(make, {**found, **kwargs}, "num_classes", 0, shapes)
        return found | ({"num_classes": classes} if classes else {})

    def rate_kwargs(self, name: str) -> tuple[str, ...]:
        """``drop_rate``, ``dropout``, ``stochastic_depth_prob``, … as far as this model takes them."""
        return _rate_kwargs(name)

    def file_arguments(self, name: str) -> Mapping[str, ArgumentKind]:
        """Return the table of `torchvision_arguments`, whatever the model: a class refuses what it does not take."""
        del name
        return ARGUMENTS

    def input_spec(self, model: nn.Module, name: str, words: Mapping[str, object]) -> InputSpec | None:
        """The transform of the default weights, overridden by the reference scripts' arguments."""
        del model
        weights = models.get_model_weights(name).DEFAULT
        preset: Any = weights.transforms()
        if type(preset).__name__ == "OpticalFlow":  # two images a sample
            return None
        args = _EXAMPLES if "best_acc1" in words else recorded_arguments.training_arguments(words)
        origin = f"torchvision {type(weights).__name__}.{weights.name}"
        with contextlib.suppress(*recorded_arguments.INVALID_SETTING_ERRORS):
            return recorded_arguments.require_valid_input_spec(
                _spec(preset, {key: value for key, value in args.items() if value}, origin)
            )
        return _spec(preset, {}, origin)


@functools.cache
def _rate_kwargs(name: str) -> tuple[str, ...]:
    return rate_keywords(_maker(name))


@functools.cache
def _keywords(name: str) -> frozenset[str]:
    return frozenset(keyword_parameters(_maker(name)))


def _require_known(name: str, kwargs: Mapping[str, object]) -> None:
    """Half of torchvision's builders swallow what they do not know, and some would download."""
    for keyword in _DOWNLOADS:
        if keyword in kwargs:
            raise ArchitectureError(
                f"torchvision:{name}: the weights come from the checkpoint, found {keyword}. Leave it out."
            )
    make = _maker(name)
    unknown = set(kwargs) - _UNSIGNED - _keywords(name) if kwargs else set()
    if unknown and _swallows(make):
        raise ArchitectureError(unknown_keyword_message(f"torchvision:{name}", min(unknown), _keywords(name)))


def _swallows(make: Callable[..., object]) -> bool:
    try:
        construct_skeleton(make, {"no_such_argument": None})
    except ArchitectureError:
        return False
    return True


def _maker(name: str) -> functools.partial[nn.Module]:
    known = models.list_models()
    if name not in known:
        raise ArchitectureError(
            f"torchvision:{name}: expected one of torchvision's model names, found {name!r}.{suggest_names(name, known)}"
        )
    builder = models.get_model_builder(name)
    taken = inspect.signature(builder).parameters
    fixed: dict[str, Any] = {key: None for key in ("weights", "weights_backbone") if key in taken}
    if "inception" in name or "googlenet" in name:
        fixed["init_weights"] = False  # minutes of truncated normals, and a warning about them
    return functools.partial(builder, **fixed)


def _spec(preset: Any, args: Mapping[str, object], origin: str) -> InputSpec:
    """``preset`` is one of torchvision's transform presets; detection presets have neither size nor mean."""
    crop = _side(args.get("val_crop_size")) or _side(getattr(preset, "crop_size", None))
    resize = _side(args.get("val_resize_size")) or _side(getattr(preset, "resize_size", None))
    side = crop or resize or 224
    video = type(preset).__name__ == "VideoClassification"
    mode = args.get("interpolation") or getattr(preset, "interpolation", "bilinear")
    changed = sorted({"val_crop_size", "val_resize_size", "interpolation"} & args.keys())
    return InputSpec(
        shape=(3, _FRAMES, side, side) if video else (3, side, side),
        mean=tuple(getattr(preset, "mean", ())),
        std=tuple(getattr(preset, "std", ())),
        interpolation=str(getattr(mode, "value", mode)),
        crop_pct=min(1.0, crop / resize) if crop and resize else 1.0,
        origin=origin + (f", {', '.join(changed)} from the checkpoint's training script" if changed else ""),
    )


def _side(size: object) -> int | None:
    """The shorter side: presets hold a list of one or two numbers, scripts a number."""
    if isinstance(size, list | tuple) and size:
        return int(min(size))
    return size if isinstance(size, int) else None
