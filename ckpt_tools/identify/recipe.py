"""Which architecture a checkpoint holds: the user's word, else the checkpoint's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckpt_tools import plugins
from ckpt_tools.contract import Adapter, Checkpoint, Recipe
from ckpt_tools.errors import ArchitectureError

Choice = tuple[Adapter, Recipe]

_ARGUMENTS = ("args", "hyper_parameters", "config", "cfg")


def choices(checkpoint: Checkpoint, architecture: str | None) -> list[Choice]:
    """The recipes that may have made this checkpoint, the likeliest first. Raises ArchitectureError."""
    if architecture is not None:
        return [_asked_for(checkpoint.words, architecture)]
    said = [(adapter, adapter.recognise(checkpoint.words)) for adapter in _readers(checkpoint)]
    found = [(adapter, recipe) for adapter, recipe in said if recipe is not None]
    if not found:
        raise ArchitectureError(_unsaid(checkpoint))
    return found


def _readers(checkpoint: Checkpoint) -> list[Adapter]:
    """A file without words spares the import of every library."""
    return list(plugins.adapters().values()) if checkpoint.words else []


def _asked_for(words: Mapping[str, object], architecture: str) -> Choice:
    adapter, name = plugins.resolve(architecture)
    said = adapter.recognise(words)
    # A timm tag (resnet50.a1_in1k) names weights, not another architecture.
    if said is not None and said.name.partition(".")[0] == name.partition(".")[0]:
        return adapter, replace(said, name=name)
    rates = _script_rates(words, adapter.rate_kwargs(name))
    return adapter, Recipe(adapter.prefix, name, rates, "recorded" if rates else "unknown")


def _script_rates(words: Mapping[str, object], keywords: tuple[str, ...]) -> dict[str, object]:
    """Drop rates that the training script's arguments hold under the constructor's own names."""
    for key in _ARGUMENTS:
        arguments = words.get(key)
        if isinstance(arguments, Mapping):
            said = {name: arguments.get(name) for name in keywords}
            return {name: rate for name, rate in said.items() if type(rate) in (int, float)}
    return {}


def _unsaid(checkpoint: Checkpoint) -> str:
    names = (checkpoint.words.get(key) for key in ("arch", "architecture", "model"))
    name = next((name for name in names if isinstance(name, str)), None)
    if name is not None:
        told = f"the file calls its architecture {name!r}, which no adapter can build without being told how"
    else:
        told = "the file does not say which architecture it holds"
    return (
        f"{checkpoint.path}: {told}. Give --arch, e.g. --arch timm:resnet50, --arch torchvision:densenet121 "
        "or --arch package.module:factory."
    )
