"""The adapter for timm, https://github.com/huggingface/pytorch-image-models."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import timm as library
import timm.data
import timm.layers
import timm.models
from torch import nn

from ckpt_adapters import recorded_arguments
from ckpt_adapters.construct import construct, rate_keywords, suggest_names
from ckpt_adapters.sizes_from_shapes import infer_size_argument
from ckpt_adapters.timm_arguments import ARGUMENTS
from ckpt_tools.contract import InputSpec, Recipe
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.file_arguments import ArgumentKind

_timm: Any = library  # timm has type annotations in part only.

# Arguments of timm's train.py, and the keyword of `create_model` that each becomes. None is not
# handed on.
_RATE_ARGUMENTS = {
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "drop_block": "drop_block_rate",
}
_MODEL_ARGUMENTS = {
    "gp": "global_pool",
    "bn_momentum": "bn_momentum",
    "bn_eps": "bn_eps",
    "num_classes": "num_classes",
}
# Only timm's script has one of these arguments.
_TIMM_SCRIPT = {*_RATE_ARGUMENTS, "drop_connect"}
# Only other training scripts, whose model names timm shares, write one of these words.
_OTHER_SCRIPTS = {"best_acc1", "val_crop_size", "val_resize_size"}
_DATA_ARGUMENTS = (
    "in_chans",
    "input_size",
    "img_size",
    "interpolation",
    "mean",
    "std",
    "crop_pct",
    "crop_mode",
)


class TimmAdapter:
    """Models of timm, with or without a pretrained tag (`resnet50`, `resnet50.a1_in1k`)."""

    prefix = "timm"

    def architectures(self) -> Sequence[str]:
        """Return every model name that timm registers."""
        return sorted(_timm.list_models())

    def recognise(self, words: Mapping[str, object]) -> Recipe | None:
        """Return the recipe of a checkpoint that names a timm model.

        It may come from timm's train.py, from a folder of timm's `save_for_hf`, or from another
        script.
        """
        args = recorded_arguments.training_arguments(words)
        # A name of the Hub stands for the model of that name in the library; nothing is looked up
        # there.
        recorded_names = recorded_arguments.model_names(words, self.prefix, "hf-hub", "hf_hub")
        names = (name.removeprefix("timm/") for name in recorded_names)
        name = next((name for name in names if is_timm_model(name)), None)
        by_timm_script = bool(_TIMM_SCRIPT & args.keys())
        if name is None or (_OTHER_SCRIPTS & {*words, *args} and not by_timm_script):
            return None
        rates = recorded_arguments.drop_rates(words, self.rate_kwargs(name))
        kwargs = {
            **(_script_kwargs(name, args) if by_timm_script else {}),
            **rates,
            **recorded_arguments.model_arguments(words),
        }
        return Recipe(self.prefix, name, kwargs, "recorded" if rates or by_timm_script else "unknown")

    def build(self, name: str, kwargs: Mapping[str, object]) -> nn.Module:
        """Call `timm.create_model` without pretrained weights. Raises ArchitectureError."""
        return construct(f"timm:{name}", _constructor(name), kwargs)

    def class_kwargs(
        self, shapes: Mapping[str, tuple[int, ...]], name: str, kwargs: Mapping[str, object]
    ) -> dict[str, object]:
        """Read `num_classes` and `in_chans` off the shapes.

        A state dict without a head has 0 classes, by which timm builds a model without one.
        """
        make = _constructor(name)
        sizes: dict[str, object] = {}
        classes = infer_size_argument(make, kwargs, "num_classes", 0, shapes)
        if classes is not None:
            sizes["num_classes"] = classes
        channels = infer_size_argument(make, kwargs, "in_chans", 1, shapes)
        if channels:
            sizes["in_chans"] = channels
        return sizes

    def rate_kwargs(self, name: str) -> tuple[str, ...]:
        """Return `drop_rate`, `drop_path_rate`, … as far as this model's class takes them."""
        return _rate_kwargs(name)

    def file_arguments(self, name: str) -> Mapping[str, ArgumentKind]:
        """Return the table of `timm_arguments`, which serves all models.

        A model's class refuses an argument that it does not take.
        """
        del name
        return ARGUMENTS

    def input_spec(self, model: nn.Module, name: str, words: Mapping[str, object]) -> InputSpec | None:
        """Return the preprocessing of the checkpoint's config.json or arguments, over the model's
        own.

        `timm.data.resolve_data_config` combines the two.
        """
        del name
        hub_cfg = recorded_arguments.hub_config(words).get("pretrained_cfg")
        source = "the checkpoint's args" if hub_cfg is None else "config.json"
        if isinstance(hub_cfg, Mapping):
            args = _data_arguments(hub_cfg)
        else:
            args = _data_arguments(recorded_arguments.training_arguments(words))
        origin = "timm default_cfg" + (f", {', '.join(args)} from {source}" if args else "")
        # Another script's arguments may have the same names and another meaning. Then the model's
        # own stand.
        with contextlib.suppress(*recorded_arguments.INVALID_SETTING_ERRORS):
            config = _timm.data.resolve_data_config(args, model=model)
            return recorded_arguments.require_valid_input_spec(_make_input_spec(config, origin))
        return _make_input_spec(_timm.data.resolve_data_config(model=model), "timm default_cfg")


@functools.cache
def _rate_kwargs(name: str) -> tuple[str, ...]:
    return rate_keywords(_constructor(name))


def _constructor(name: str) -> functools.partial[nn.Module]:
    if not is_timm_model(name):
        raise ArchitectureError(
            f"timm:{name}: expected one of timm's model names, found {name!r}."
            f"{suggest_names(name, _timm.list_models())}"
        )
    return functools.partial(_create_model, name)


def is_timm_model(name: str) -> bool:
    """Return whether timm's registry has the name.

    Names that timm would look up on the Hub (`hf-hub:`) or in a folder (`local-dir:`) are not
    accepted.
    """
    return ":" not in name and "/" not in name and bool(_timm.is_model(name))


def _create_model(name: str, *, split_bn: int = 0, **kwargs: object) -> nn.Module:
    """Call `timm.create_model`, with a data configuration that fits the arguments.

    timm leaves the configuration's input size as it is when the model is built for other channels
    or another size. `split_bn` is the number of splits of timm's SplitBatchNorm, which train.py
    puts in after building.
    """
    overlay = {}
    if {"in_chans", "img_size"} & kwargs.keys():
        overlay["input_size"] = _input_size(name, kwargs)
    with warnings.catch_warnings():
        # timm builds the new model of that name, which is what we want.
        warnings.filterwarnings("ignore", message="Mapping deprecated model name")
        model: nn.Module = _timm.create_model(
            name, pretrained=False, pretrained_cfg_overlay=overlay, **kwargs
        )
    return _timm.layers.convert_splitbn_model(model, split_bn) if split_bn else model


def _input_size(name: str, kwargs: Mapping[str, object]) -> tuple[int, ...]:
    """Return channels, height and width that a model with these arguments is built for."""
    channels, height, width = _default_cfg(name).get("input_size") or (3, 224, 224)
    size = kwargs.get("img_size")
    if isinstance(size, int):
        height = width = size
    elif isinstance(size, Sequence) and len(size) == 2:
        height, width = size
    in_chans = kwargs.get("in_chans")
    return (in_chans if isinstance(in_chans, int) else channels, height, width)


def _default_cfg(name: str) -> dict[str, Any]:
    cfg = _timm.models.get_pretrained_cfg(name)
    return {} if cfg is None else cfg.to_dict()


def _script_kwargs(name: str, args: Mapping[str, object]) -> dict[str, object]:
    """Return the keyword arguments that timm's train.py makes of its own arguments."""
    arguments = _RATE_ARGUMENTS | _MODEL_ARGUMENTS
    kwargs = {keyword: args.get(argument) for argument, keyword in arguments.items()}
    if kwargs["drop_path_rate"] is None:
        kwargs["drop_path_rate"] = args.get("drop_connect")  # Its name before 2020.
    size = args.get("input_size")
    channels = size[0] if isinstance(size, list | tuple) and size else None
    kwargs["in_chans"] = args.get("in_chans") or channels
    # Only models of a fixed input size take it as an argument.
    if _default_cfg(name.partition(".")[0]).get("fixed_input_size"):
        kwargs["img_size"] = args.get("img_size") or (size if isinstance(size, int) else None)
    if args.get("split_bn"):
        splits = args.get("aug_splits")
        kwargs["split_bn"] = max(splits if isinstance(splits, int) else 0, 2)  # As in train.py.
    return {keyword: value for keyword, value in kwargs.items() if value is not None}


def _data_arguments(args: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments that `resolve_data_config` reads, if they are set and of its types."""
    data_arguments = {key: args[key] for key in _DATA_ARGUMENTS if args.get(key) not in (None, "")}
    size = data_arguments.get("input_size")
    if isinstance(size, int):
        # DeiT's script and its descendants give the side as `input_size`; for timm it is (C, H, W).
        data_arguments.pop("input_size")
        data_arguments.setdefault("img_size", size)
    if not isinstance(data_arguments.get("img_size", 0), int):
        data_arguments.pop("img_size")
    return data_arguments


def _make_input_spec(config: Mapping[str, Any], origin: str) -> InputSpec:
    channels = int(config["input_size"][0])
    return InputSpec(
        shape=tuple(config["input_size"]),
        mean=_per_channel(config["mean"], channels),
        std=_per_channel(config["std"], channels),
        interpolation=str(config["interpolation"]),
        crop_pct=float(config["crop_pct"]),
        crop_mode=str(config["crop_mode"]),
        origin=origin,
    )


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(float(value) for value in values)
    # For another number of channels than the three of the configuration, the mean over them is the
    # best guess.
    return (sum(values) / len(values),) * channels
