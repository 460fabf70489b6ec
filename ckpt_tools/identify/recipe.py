"""Recipes for what a checkpoint holds: the architecture that the user or the file names, and its
arguments.

Arguments from a file are proposals. `admission.admit_recipe` decides which of them may reach a
constructor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckpt_tools.construction import without_standard_input
from ckpt_tools.contract import Adapter, Checkpoint, Recipe
from ckpt_tools.identify import plugins

AdapterAndRecipe = tuple[Adapter, Recipe]

# Where training scripts keep their arguments in a checkpoint.
_ARGUMENTS = ("args", "hyper_parameters", "config", "cfg")


def recorded_recipes(checkpoint: Checkpoint) -> list[AdapterAndRecipe]:
    """Return the recipes that the checkpoint's own words describe, in the order of the adapters.

    They may be wrong: several libraries share names of models.
    """
    if not checkpoint.words:
        # No adapter can recognise such a file, and loading the adapters imports every library.
        return []
    recipes: list[AdapterAndRecipe] = []
    # Adapters import their libraries and make configurations here. Neither may ask the user a
    # question.
    with without_standard_input():
        for adapter in plugins.adapters().values():
            recipe = adapter.recognise(checkpoint.words)
            if recipe is not None:
                recipes.append((adapter, recipe))
    return recipes


def recipe_with_recorded_arguments(words: Mapping[str, object], architecture: str) -> AdapterAndRecipe:
    """Return the recipe of a named architecture with the arguments that a file's words hold for it.

    Raises ArchitectureError if no adapter knows the architecture.
    """
    adapter, name = plugins.resolve(architecture)
    recorded = adapter.recognise(words)
    # A timm tag (resnet50.a1_in1k) names weights, not another architecture.
    if recorded is not None and recorded.name.partition(".")[0] == name.partition(".")[0]:
        return adapter, replace(recorded, name=name)
    keywords = adapter.rate_kwargs(name)
    rates = _recorded_drop_rates(words, keywords)
    # `recorded_arguments` is optional: only the adapter for the user's own code has it.
    read_arguments = getattr(adapter, "recorded_arguments", None)
    arguments, is_complete = read_arguments(name, words) if read_arguments else ({}, False)
    has_rates = rates or is_complete or any(keyword in arguments for keyword in keywords)
    return adapter, Recipe(
        adapter.prefix, name, {**rates, **arguments}, "recorded" if has_rates else "unknown"
    )


def recipe_with_rates_alone(adapter: Adapter, recipe: Recipe) -> Recipe:
    """Return the recipe with nothing but drop rates, since the other arguments do not fit."""
    rates = {name: recipe.kwargs[name] for name in adapter.rate_kwargs(recipe.name) if name in recipe.kwargs}
    return replace(recipe, kwargs=rates, rates="recorded" if rates else "unknown")


def recipe_without_arguments(architecture: str) -> AdapterAndRecipe:
    """Return the recipe of an architecture in its default build. Raises ArchitectureError."""
    adapter, name = plugins.resolve(architecture)
    return adapter, Recipe(adapter.prefix, name)


def describe_recorded_name(checkpoint: Checkpoint) -> str:
    """Say for a message what the file calls its architecture.

    It is called where nothing fits, so a name that stands there is one that no adapter knows.
    """
    for key in ("arch", "architecture", "model"):
        name = checkpoint.words.get(key)
        if isinstance(name, str):
            return (
                f"the file calls its architecture {name!r}, which no adapter can build without being told how"
            )
    return "the file does not say which architecture it holds"


def _recorded_drop_rates(words: Mapping[str, object], keywords: tuple[str, ...]) -> dict[str, object]:
    """Return drop rates from the arguments of the training script.

    Only those count that stand there under a name of the constructor's.
    """
    for key in _ARGUMENTS:
        arguments = words.get(key)
        if isinstance(arguments, Mapping):
            rates = {name: arguments.get(name) for name in keywords}
            # Not `isinstance`: a flag is an integer to Python, and no rate.
            return {name: rate for name, rate in rates.items() if type(rate) in (int, float)}
    return {}
