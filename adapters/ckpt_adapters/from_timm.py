"""timm: https://github.com/huggingface/pytorch-image-models."""

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

_timm: Any = library  # typed in part only

# timm's train.py under its own names, and what it hands to create_model; None is not handed on.
_RATES = {"drop": "drop_rate", "drop_path": "drop_path_rate", "drop_block": "drop_block_rate"}
_OTHERS = {"gp": "global_pool", "bn_momentum": "bn_momentum", "bn_eps": "bn_eps", "num_classes": "num_classes"}
_SCRIPT = {*_RATES, "drop_connect"}
# Words of other training scripts whose model names timm shares.
_FOREIGN = {"best_acc1", "val_crop_size", "val_resize_size"}
_DATA = ("in_chans", "input_size", "img_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


class TimmAdapter:
    """Models of timm, with or without a pretrained tag (``resnet50``, ``resnet50.a1_in1k``)."""

    prefix = "timm"

    def architectures(self) -> Sequence[str]:
        """Every model name timm registers."""
        return sorted(_timm.list_models())

    def recognise(self, words: Mapping[str, object]) -> Recipe | None:
        """A checkpoint of timm's train.py, a folder of its ``save_for_hf``, or a script's that names a timm model."""
        args = recorded_arguments.training_arguments(words)
        # A name of the Hub stands for the model of that name in the library; nothing is looked up there.
        recorded = recorded_arguments.model_names(words, self.prefix, "hf-hub", "hf_hub")
        names = (name.removeprefix("timm/") for name in recorded)
        name = next((name for name in names if is_timm_model(name)), None)
        if name is None or (_FOREIGN & {*words, *args} and not _SCRIPT & args.keys()):
            return None
        plain = recorded_arguments.drop_rates(words, self.rate_kwargs(name))
        kwargs = {**_script_kwargs(name, args), **plain, **recorded_arguments.model_arguments(words)}
        return Recipe(self.prefix, name, kwargs, "recorded" if plain or _SCRIPT & args.keys() else "unknown")

    def build(self, name: str, kwargs: Mapping[str, object]) -> nn.Module:
        """``timm.create_model`` without weights."""
        return construct(f"timm:{name}", _maker(name), kwargs)

    def class_kwargs(
        self, shapes: Mapping[str, tuple[int, ...]], name: str, kwargs: Mapping[str, object]
    ) -> dict[str, object]:
        """``num_classes`` (0 for a state dict without a head) and ``in_chans``."""
        make = _maker(name)
        classes = infer_size_argument(make, kwargs, "num_classes", 0, shapes)
        channels = infer_size_argument(make, kwargs, "in_chans", 1, shapes)
        found: dict[str, object] = {} if classes is None else {"num_classes": classes}
        return found | ({"in_chans": channels} if channels else {})

    def rate_kwargs(self, name: str) -> tuple[str, ...]:
        """``drop_rate``, ``drop_path_rate``, … as far as this model's class takes them."""
        return _rate_kwargs(name)

    def file_arguments(self, name: str) -> Mapping[str, ArgumentKind]:
        """Return the table of `timm_arguments`, whatever the model: a class refuses what it does not take."""
        del name
        return ARGUMENTS

    def input_spec(self, model: nn.Module, name: str, words: Mapping[str, object]) -> InputSpec | None:
        """``timm.data.resolve_data_config`` of the checkpoint's arguments or its config.json over the model's own."""
        del name
        stored = recorded_arguments.hub_config(words).get("pretrained_cfg")
        args = _data_args(stored if isinstance(stored, Mapping) else recorded_arguments.training_arguments(words))
        teller = "the checkpoint's args" if stored is None else "config.json"
        with contextlib.suppress(
            *recorded_arguments.INVALID_SETTING_ERRORS
        ):  # another script's arguments, of the same names
            origin = "timm default_cfg" + (f", {', '.join(args)} from {teller}" if args else "")
            return recorded_arguments.require_valid_input_spec(
                _spec(_timm.data.resolve_data_config(args, model=model), origin)
            )
        return _spec(_timm.data.resolve_data_config(model=model), "timm default_cfg")


@functools.cache
def _rate_kwargs(name: str) -> tuple[str, ...]:
    return rate_keywords(_maker(name))


def _maker(name: str) -> functools.partial[nn.Module]:
    if not is_timm_model(name):
        raise ArchitectureError(
            f"timm:{name}: expected one of timm's model names, found {name!r}.{suggest_names(name, _timm.list_models())}"
        )
    return functools.partial(_create, name)


def is_timm_model(name: str) -> bool:
    """Return whether timm knows the name without a look-up on the Hub (`hf-hub:`) or in a folder (`local-dir:`)."""
    return ":" not in name and "/" not in name and bool(_timm.is_model(name))


def _create(name: str, *, split_bn: int = 0, **kwargs: object) -> nn.Module:
    overlay = {"input_size": _input_size(name, kwargs)} if {"in_chans", "img_size"} & kwargs.keys() else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mapping deprecated model name")  # it is mapped: fine
        model: nn.Module = _timm.create_model(name, pretrained=False, pretrained_cfg_overlay=overlay, **kwargs)
    return _timm.layers.convert_splitbn_model(model, split_bn) if split_bn else model


def _input_size(name: str, kwargs: Mapping[str, object]) -> tuple[int, ...]:
    """So that the model's own data config tells the size and channels it is built for."""
    channels, height, width = _default_cfg(name).get("input_size") or (3, 224, 224)
    size = kwargs.get("img_size")
    if isinstance(size, int):
        height = width = size
    elif isinstance(size, Sequence) and len(size) == 2:
        height, width = size
    wanted = kwargs.get("in_chans")
    return (wanted if isinstance(wanted, int) else channels, height, width)


def _default_cfg(name: str) -> dict[str, Any]:
    cfg = _timm.models.get_pretrained_cfg(name)
    return {} if cfg is None else cfg.to_dict()


def _script_kwargs(name: str, args: Mapping[str, object]) -> dict[str, object]:
    """What train.py made of its arguments."""
    if not _SCRIPT & args.keys():
        return {}
    kwargs = {keyword: args.get(key) for key, keyword in (_RATES | _OTHERS).items()}
    if kwargs["drop_path_rate"] is None:
        kwargs["drop_path_rate"] = args.get("drop_connect")  # its name before 2020
    size = args.get("input_size")
    kwargs["in_chans"] = args.get("in_chans") or (size[0] if isinstance(size, list | tuple) and size else None)
    if _default_cfg(name.partition(".")[0]).get("fixed_input_size"):
        kwargs["img_size"] = args.get("img_size") or (size if isinstance(size, int) else None)
    if args.get("split_bn"):
        splits = args.get("aug_splits")
        kwargs["split_bn"] = max(splits if isinstance(splits, int) else 0, 2)
    return {keyword: value for keyword, value in kwargs.items() if value is not None}


def _data_args(args: Mapping[str, object]) -> dict[str, object]:
    """The arguments that resolve_data_config reads, where they are set and of its types."""
    found = {key: args[key] for key in _DATA if args.get(key) not in (None, "")}
    size = found.get("input_size")
    if isinstance(size, int):  # DeiT and its descendants
        found.pop("input_size")
        found.setdefault("img_size", size)
    if not isinstance(found.get("img_size", 0), int):
        found.pop("img_size")
    return found


def _spec(config: Mapping[str, Any], origin: str) -> InputSpec:
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
    return (sum(values) / len(values),) * channels
