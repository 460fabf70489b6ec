"""Reads what a checkpoint records of its model: the name, and the arguments of the constructor.

Training scripts store them under different names. Covered are timm's train.py and the torchvision
references (`args`), pytorch/examples (`arch`), Lightning (`hyper_parameters`), the config.json of
Hugging Face folders (`config`), and plain scripts (any of these names).

A file may record anything. What is read here is passed to a constructor only where the adapter's
`file_arguments` admits it (see `ckpt_tools.file_arguments`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from ckpt_tools.contract import InputSpec

Words = Mapping[str, object]

_TRAINING_ARGUMENTS = ("args", "hyper_parameters", "config", "cfg")
_NAMES = ("arch", "architecture", "model", "model_name")
_MODEL_ARGUMENTS = ("model_kwargs", "model_args")  # In timm's train.py and in its config.json.
# Pixels of a side of an input that a file may ask for; the largest in timm and torchvision is
# 1,333. Nothing in the tensors of a convolutional network bounds it, and at 8,192 one layer of a
# ResNet takes 17 GB for two images.
_LARGEST_SIDE = 2048
# Settings of another meaning, or nonsense, raise whatever the arithmetic with them raises.
INVALID_SETTING_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
)
# Where published weights come from, and how a program should run. The weights come from the
# checkpoint, and what else these arguments would do is none of a file's business. They do not
# change the model.
_NOT_ABOUT_THE_MODEL = re.compile(
    r"_?(pretrained|weights|checkpoint|hub|hf)(_.*)?|cache_dir|revision|token|use_auth_token"
    r"|local_(dir|files_only)"
    r"|.*_(pretrained|weights|checkpoint|dir|url|file)|.*(?<!drop)_path|.*_pretrained_backbone"
    r"|device|dtype|progress|scriptable|exportable|no_jit|trust_remote_code"
)
# Swin V2 has a size of this name, although the pattern above matches it.
_NAMES_A_SIZE = frozenset({"pretrained_window_sizes"})


def training_arguments(words: Words) -> dict[str, object]:
    """Return the arguments of the training script, or {} if none were saved."""
    for key in _TRAINING_ARGUMENTS:
        value = words.get(key)
        if isinstance(value, Mapping):
            return {str(name): item for name, item in value.items()}
    return {}


def hub_config(words: Words) -> dict[str, object]:
    """Return the config.json of a Hugging Face folder, or {} if there is none.

    Other files may hold an entry `config`, too. Only transformers' and timm's are returned.
    """
    value = words.get("config")
    if not isinstance(value, Mapping):
        return {}
    of_timm = isinstance(value.get("pretrained_cfg"), Mapping)
    of_transformers = "model_type" in value and ("architectures" in value or "transformers_version" in value)
    return {str(name): item for name, item in value.items()} if of_transformers or of_timm else {}


def model_arguments(words: Words) -> dict[str, object]:
    """Return the constructor arguments that the file, or its training script's arguments, record.

    Arguments that would fetch published weights are left out.
    """
    for source in (words, training_arguments(words)):
        for key in _MODEL_ARGUMENTS:
            value = source.get(key)
            if isinstance(value, Mapping):
                arguments = {str(name): item for name, item in value.items()}
                return {name: item for name, item in arguments.items() if is_about_the_model(name)}
    return {}


def is_about_the_model(argument: str) -> bool:
    """Return whether an argument may describe the model.

    Other arguments say where to find weights, or how to run a program.
    """
    return argument in _NAMES_A_SIZE or _NOT_ABOUT_THE_MODEL.fullmatch(argument) is None


def model_names(words: Words, *owners: str) -> list[str]:
    """Return the recorded names of models, without an owner.

    Names of the form `owner:name` count only if the owner is one of `owners`.
    """
    names: list[str] = []
    for source in (words, training_arguments(words)):
        for key in _NAMES:
            value = source.get(key)
            if not isinstance(value, str):
                continue
            owner, _, name = value.rpartition(":")
            if owner in ("", *owners) and name not in names:
                names.append(name)
    return names


def drop_rates(words: Words, keywords: Iterable[str]) -> dict[str, float]:
    """Return the drop rates that the script's arguments hold under the constructor's own names."""
    recorded = training_arguments(words) | model_arguments(words)
    return {name: rate for name in keywords if (rate := as_number(recorded.get(name))) is not None}


def require_valid_input_spec(spec: InputSpec) -> InputSpec:
    """Return the spec if a model can be given such an input.

    Its numbers may come from a file. Raises ValueError if they are not finite, or if the input
    would be too large.
    """
    sides = all(type(side) is int and 0 < side <= _LARGEST_SIDE for side in spec.shape)
    numbers = (*spec.mean, *spec.std, spec.crop_pct)
    too_large = math.prod(spec.shape) > _LARGEST_SIDE**2
    if not sides or too_large or not all(map(math.isfinite, numbers)) or spec.crop_pct <= 0:
        raise ValueError(
            f"an input of shape {spec.shape}, mean {spec.mean}, std {spec.std}, crop {spec.crop_pct}"
        )
    return spec


def as_number(value: object) -> float | None:
    """Return the value if it is a number, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
