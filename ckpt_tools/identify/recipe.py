"""How to build what a checkpoint holds: the user's word, else the checkpoint's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckpt_tools import plugins
from ckpt_tools.construction import without_standard_input
from ckpt_tools.contract import Adapter, Checkpoint, Recipe

AdapterAndRecipe = tuple[Adapter, Recipe]

_ARGUMENTS = ("args", "hyper_parameters", "config", "cfg")


def recorded_recipes(checkpoint: Checkpoint) -> list[AdapterAndRecipe]:
    """The recipes that the checkpoint's words describe, the likeliest first; they may be wrong."""
    with without_standard_input():  # adapters load their libraries here, and make configurations
        said = [(adapter, adapter.recognise(checkpoint.words)) for adapter in _readers(checkpoint)]
    return [(adapter, recipe) for adapter, recipe in said if recipe is not None]


def recipe_with_recorded_arguments(words: Mapping[str, object], architecture: str) -> AdapterAndRecipe:
    """An architecture by name, with the arguments that the words hold for it. Raises ArchitectureError."""
    adapter, name = plugins.resolve(architecture)
    said = adapter.recognise(words)
    # A timm tag (resnet50.a1_in1k) names weights, not another architecture.
    if said is not None and said.name.partition(".")[0] == name.partition(".")[0]:
        return adapter, replace(said, name=name)
    rates = _script_rates(words, adapter.rate_kwargs(name))
    return adapter, Recipe(adapter.prefix, name, rates, "recorded" if rates else "unknown")


def recipe_without_arguments(architecture: str) -> AdapterAndRecipe:
    """An architecture by name alone. Raises ArchitectureError."""
    adapter, name = plugins.resolve(architecture)
    return adapter, Recipe(adapter.prefix, name)


def describe_recorded_name(checkpoint: Checkpoint) -> str:
    """What the words say about the architecture, for a message: a name nobody knows, or nothing."""
    names = (checkpoint.words.get(key) for key in ("arch", "architecture", "model"))
    name = next((name for name in names if isinstance(name, str)), None)
    if name is not None:
        return f"the file calls its architecture {name!r}, which no adapter can build without being told how"
    return "the file does not say which architecture it holds"


def _readers(checkpoint: Checkpoint) -> list[Adapter]:
    """A file without words spares the import of every library."""
    return list(plugins.adapters().values()) if checkpoint.words else []


def _script_rates(words: Mapping[str, object], keywords: tuple[str, ...]) -> dict[str, object]:
    """Drop rates that the training script's arguments hold under the constructor's own names."""
    for key in _ARGUMENTS:
        arguments = words.get(key)
        if isinstance(arguments, Mapping):
            said = {name: arguments.get(name) for name in keywords}
            return {name: rate for name, rate in said.items() if type(rate) in (int, float)}
    return {}
