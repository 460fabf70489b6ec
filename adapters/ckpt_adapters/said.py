"""Reading a checkpoint's own words: which model, with which arguments.

The habits covered: timm's train.py and the torchvision references (``args``), pytorch/examples (``arch``),
Lightning (``hyper_parameters``), the config.json of Hugging Face folders (``config``), plain scripts (any of these
names).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from ckpt_tools.contract import InputSpec

Words = Mapping[str, object]

_ARGUMENTS = ("args", "hyper_parameters", "config", "cfg")
_NAMES = ("arch", "architecture", "model", "model_name")
_KWARGS = ("model_kwargs", "model_args")  # of timm's train.py, of its config.json
# The weights come from the checkpoint; a recorded wish to start from published ones is no longer of use.
_LARGEST = 8192  # pixels, of a side of an input
# Settings of another meaning, or nonsense, raise whatever the arithmetic with them does.
MISREAD = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError)
_WEIGHTS = {"pretrained", "pretrained_backbone", "weights", "weights_backbone", "checkpoint_path"}


def arguments(words: Words) -> dict[str, object]:
    """The arguments of the training script, {} if none were saved."""
    for key in _ARGUMENTS:
        value = words.get(key)
        if isinstance(value, Mapping):
            return {str(name): item for name, item in value.items()}
    return {}


def hub_config(words: Words) -> dict[str, object]:
    """The config.json of a Hugging Face folder, transformers' or timm's; {} if there is none."""
    value = words.get("config")
    if not isinstance(value, Mapping):
        return {}
    of_transformers = "model_type" in value and not value.keys().isdisjoint({"architectures", "transformers_version"})
    of_timm = isinstance(value.get("pretrained_cfg"), Mapping)
    return {str(name): item for name, item in value.items()} if of_transformers or of_timm else {}


def model_kwargs(words: Words) -> dict[str, object]:
    """Constructor arguments that the file or the script's arguments name as such."""
    for source in (words, arguments(words)):
        for key in _KWARGS:
            value = source.get(key)
            if isinstance(value, Mapping):
                return {str(name): item for name, item in value.items() if name not in _WEIGHTS}
    return {}


def names(words: Words, *owners: str) -> list[str]:
    """Model names in the words that one of ``owners`` may answer for: plain ones, and ``owner:name``."""
    found: list[str] = []
    for source in (words, arguments(words)):
        for key in _NAMES:
            value = source.get(key)
            if not isinstance(value, str):
                continue
            owner, _, name = value.rpartition(":")
            if owner in ("", *owners) and name not in found:
                found.append(name)
    return found


def rates(words: Words, keywords: Iterable[str]) -> dict[str, float]:
    """Drop rates that the script's arguments hold under the constructor's own names."""
    said = arguments(words) | model_kwargs(words)
    return {name: rate for name in keywords if (rate := number(said.get(name))) is not None}


def sound(spec: InputSpec) -> InputSpec:
    """The spec, if numbers from a file make it one that a model can be given. Raises ValueError."""
    sides = all(type(side) is int and 0 < side <= _LARGEST for side in spec.shape)
    numbers = (*spec.mean, *spec.std, spec.crop_pct)
    if not sides or math.prod(spec.shape) > _LARGEST**2 or not all(map(math.isfinite, numbers)) or spec.crop_pct <= 0:
        raise ValueError(f"an input of shape {spec.shape}, mean {spec.mean}, std {spec.std}, crop {spec.crop_pct}")
    return spec


def number(value: object) -> float | None:
    """The value if it is a number, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
