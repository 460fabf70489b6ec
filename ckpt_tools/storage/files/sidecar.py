"""Descriptions beside the weights: ``config.json`` and ``preprocessor_config.json``.

Folders of Hugging Face and timm have them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ckpt_tools.errors import CheckpointError
from ckpt_tools.paths import is_file, require_below

__all__ = [
    "SIDECAR_NAMES",
    "find_hub_weights",
    "has_sidecars",
    "is_trainer_file",
    "read_sidecar_words",
]

_SIDECARS = {"config": "config.json", "preprocessor": "preprocessor_config.json"}
SIDECAR_NAMES = tuple(_SIDECARS.values())
_MAX_BYTES = 32 * 2**20  # of one file; the label names of 20,000 classes take one MiB
# In the order in which transformers looks for them.
_HUB_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_SHARD = re.compile(r"(pytorch_)?model-\d+-of-\d+\.(safetensors|bin)")
_TRAINER = re.compile(r"(optimizer|scheduler|scaler|rng_state(_\d+)?|training_args)\.(pt|pth|bin)")
# A config of a model has one of these keys. A settings file that happens to have the name
# config.json has none.
_MODEL_KEYS = frozenset({"architecture", "architectures", "model_type", "pretrained_cfg", "model_cfg"})


def find_hub_weights(names: list[str]) -> str | None:
    """Return the name of the weights in a folder of Hugging Face's layout.

    Safetensors come before pickles. This is None if no name is one of those.
    """
    return next((name for name in _HUB_WEIGHTS if name in names), None)


def is_trainer_file(name: str) -> bool:
    """Return whether a file is one that transformers' Trainer saves beside the weights."""
    return _TRAINER.fullmatch(name) is not None


def has_sidecars(name: str) -> bool:
    """Return whether a file is named as weights on the Hugging Face hub are.

    Only then the JSON files beside it are taken for its description.
    """
    return name in _HUB_WEIGHTS or _SHARD.fullmatch(name) is not None


def read_sidecar_words(path: Path) -> dict[str, object]:
    """Return the content of the JSON files beside a checkpoint, under "config" and "preprocessor".

    ``path`` is the folder or the file that the user gave. Beside a file they count only if the file
    is named as weights of the Hugging Face hub are, and if the config is one of a model. The result
    is empty if there are none. Raises CheckpointError for a damaged one.
    """
    if path.is_dir():
        return _read_folder_sidecars(path)
    if not has_sidecars(path.name):
        return {}
    words = _read_folder_sidecars(path.absolute().parent)
    config = words.get("config")
    return words if isinstance(config, Mapping) and not _MODEL_KEYS.isdisjoint(config) else {}


def _read_folder_sidecars(folder: Path) -> dict[str, object]:
    words: dict[str, object] = {}
    for word, name in _SIDECARS.items():
        file = folder / name
        if is_file(file) and (content := _parse_sidecar(require_below(folder, file, origin=file))):
            words[word] = content
    return words


def _parse_sidecar(file: Path) -> dict[str, object]:
    try:
        size = file.stat().st_size
        if size > _MAX_BYTES:
            raise ValueError(f"{size:,} bytes")
        content = json.loads(file.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}). Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: expected the JSON description of the model beside it, found none ({error}). "
            "Fetch it again, or move it away and give --arch."
        ) from error
    return content
