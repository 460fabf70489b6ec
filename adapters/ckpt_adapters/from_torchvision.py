"""The adapter for torchvision, https://github.com/pytorch/vision."""

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

# Keyword arguments that switch auxiliary heads on, and the prefixes of these heads' keys.
_AUXILIARY_HEADS = {"aux_logits": ("AuxLogits.", "aux1."), "aux_loss": ("aux_classifier.",)}
_DOWNLOADS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")
# MobileNetV3's builders take these, although no signature has them.
_NOT_IN_SIGNATURES = {"width_mult", "reduced_tail", "dilated"}
_FRAMES = 16  # The video models were trained on clips of this length, or of a multiple of it.
# pytorch/examples/imagenet resizes to 256 and crops 224, whatever the model; its files hold
# "best_acc1".
_EXAMPLES_ARGUMENTS = {"val_resize_size": 256, "val_crop_size": 224}


class TorchvisionAdapter:
    """Models of `torchvision.models`: classification, segmentation, detection, video."""

    prefix = "torchvision"

    def architectures(self) -> Sequence[str]:
        """Return every model name that torchvision registers."""
        return sorted(models.list_models())

    def recognise(self, words: Mapping[str, object]) -> Recipe | None:
        """Return the recipe of a checkpoint that names a model of torchvision.

        It may come from torchvision's reference scripts, from pytorch/examples, or from another
        script.
        """
        if recorded_arguments.hub_config(words):
            return None  # The folder holds a model of timm, which shares many names with torchvision.
        registered = set(models.list_models())
        names = recorded_arguments.model_names(words, self.prefix)
        name = next((name for name in names if name in registered), None)
        if name is None:
            return None
        rates = recorded_arguments.drop_rates(words, self.rate_kwargs(name))
        kwargs = {**rates, **recorded_arguments.model_arguments(words)}
        return Recipe(self.prefix, name, kwargs, "recorded" if rates else "unknown")

    def build(self, name: str, kwargs: Mapping[str, object]) -> nn.Module:
        """Call the model's builder without pretrained weights. Raises ArchitectureError."""
        _require_known_keywords(name, kwargs)
        return construct(f"torchvision:{name}", _constructor(name), kwargs)

    def class_kwargs(
        self, shapes: Mapping[str, tuple[int, ...]], name: str, kwargs: Mapping[str, object]
    ) -> dict[str, object]:
        """Read `num_classes`, and whether there are auxiliary heads, off the shapes."""
        arguments: dict[str, object] = {
            keyword: any(key.startswith(prefixes) for key in shapes)
            for keyword, prefixes in _AUXILIARY_HEADS.items()
            if keyword in _keywords(name)
        }
        # The auxiliary heads have a class count, too, so they must be there when it is inferred.
        classes = infer_size_argument(_constructor(name), {**arguments, **kwargs}, "num_classes", 0, shapes)
        if classes:
            arguments["num_classes"] = classes
        return arguments

    def rate_kwargs(self, name: str) -> tuple[str, ...]:
        """Return `dropout`, `stochastic_depth_prob`, … as far as this model takes them."""
        return _rate_kwargs(name)

    def file_arguments(self, name: str) -> Mapping[str, ArgumentKind]:
        """Return the table of `torchvision_arguments`, which serves all models.

        A model's class refuses an argument that it does not take.
        """
        del name
        return ARGUMENTS

    def input_spec(self, model: nn.Module, name: str, words: Mapping[str, object]) -> InputSpec | None:
        """Return the transform of the default weights, with the changes that a training script
        records.

        Returns None for optical flow, where a sample is a pair of images.
        """
        del model
        weights = models.get_model_weights(name).DEFAULT
        preset: Any = weights.transforms()
        if type(preset).__name__ == "OpticalFlow":
            return None
        if "best_acc1" in words:
            args: Mapping[str, object] = _EXAMPLES_ARGUMENTS
        else:
            args = recorded_arguments.training_arguments(words)
        origin = f"torchvision {type(weights).__name__}.{weights.name}"
        # Another script's arguments may have the same names and another meaning. Then the preset
        # stands.
        with contextlib.suppress(*recorded_arguments.INVALID_SETTING_ERRORS):
            args = {key: value for key, value in args.items() if value}
            spec = _make_input_spec(preset, args, origin)
            return recorded_arguments.require_valid_input_spec(spec)
        return _make_input_spec(preset, {}, origin)


@functools.cache
def _rate_kwargs(name: str) -> tuple[str, ...]:
    return rate_keywords(_constructor(name))


@functools.cache
def _keywords(name: str) -> frozenset[str]:
    return frozenset(keyword_parameters(_constructor(name)))


def _require_known_keywords(name: str, kwargs: Mapping[str, object]) -> None:
    """Refuse keyword arguments that would be ignored, or that would download weights.

    Half of torchvision's builders accept any keyword argument and ignore what they do not know.
    """
    for keyword in _DOWNLOADS:
        if keyword in kwargs:
            raise ArchitectureError(
                f"torchvision:{name}: the weights come from the checkpoint, found {keyword}. Leave it out."
            )
    if not kwargs:
        return
    unknown = set(kwargs) - _NOT_IN_SIGNATURES - _keywords(name)
    if unknown and _accepts_anything(_constructor(name)):
        message = unknown_keyword_message(f"torchvision:{name}", min(unknown), _keywords(name))
        raise ArchitectureError(message)


def _accepts_anything(make: Callable[..., object]) -> bool:
    try:
        construct_skeleton(make, {"no_such_argument": None})
    except ArchitectureError:
        return False
    return True


def _constructor(name: str) -> functools.partial[nn.Module]:
    registered = models.list_models()
    if name not in registered:
        raise ArchitectureError(
            f"torchvision:{name}: expected one of torchvision's model names, found {name!r}."
            f"{suggest_names(name, registered)}"
        )
    builder = models.get_model_builder(name)
    parameters = inspect.signature(builder).parameters
    # Left out, `weights_backbone` would stand for pretrained weights: segmentation and detection
    # download them.
    fixed: dict[str, Any] = {
        keyword: None for keyword in ("weights", "weights_backbone") if keyword in parameters
    }
    if "inception" in name or "googlenet" in name:
        # Their initialisation takes minutes of truncated normals, and warns about that.
        fixed["init_weights"] = False
    return functools.partial(builder, **fixed)


def _make_input_spec(preset: Any, args: Mapping[str, object], origin: str) -> InputSpec:
    """Return the input specification of one of torchvision's transform presets.

    `args` of a training script go before the preset. Presets of detection have neither a size nor a
    mean.
    """
    crop = _side(args.get("val_crop_size")) or _side(getattr(preset, "crop_size", None))
    resize = _side(args.get("val_resize_size")) or _side(getattr(preset, "resize_size", None))
    side = crop or resize or 224
    video = type(preset).__name__ == "VideoClassification"
    mode = args.get("interpolation") or getattr(preset, "interpolation", "bilinear")
    changed = sorted({"val_crop_size", "val_resize_size", "interpolation"} & args.keys())
    if changed:
        origin += f", {', '.join(changed)} from the checkpoint's training script"
    return InputSpec(
        shape=(3, _FRAMES, side, side) if video else (3, side, side),
        mean=tuple(getattr(preset, "mean", ())),
        std=tuple(getattr(preset, "std", ())),
        interpolation=str(getattr(mode, "value", mode)),
        crop_pct=min(1.0, crop / resize) if crop and resize else 1.0,
        origin=origin,
    )


def _side(size: object) -> int | None:
    """Return the shorter side: presets hold a list of one or two numbers, scripts a number."""
    if isinstance(size, list | tuple) and size:
        return int(min(size))
    return size if isinstance(size, int) else None
