"""What a corrected file says of its model: architecture, arguments, drop rates and input.

A safetensors file has no place for the arguments of the training script, so ``bn-reestimate``
records in the provenance of its output what it has learned from them or from the user. These words
are worth no more than any other words of a file: arguments pass through `admission.admit_recipe`,
the input through `admission.admit_input_spec`, and an architecture counts only if it stands in the
list of an adapter. Which code of the user's runs (`package.module:factory`) no file may choose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace

from ckpt_tools.construction import without_standard_input
from ckpt_tools.contract import Adapter, Checkpoint, InputSpec, Recipe
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify import plugins
from ckpt_tools.identify.admission import admit_input_spec
from ckpt_tools.storage.provenance import recorded_correction

__all__ = [
    "add_recorded_arguments",
    "corrected_recipe",
    "describe_input",
    "recorded_input_spec",
]


def corrected_recipe(checkpoint: Checkpoint) -> tuple[Adapter, Recipe] | None:
    """Return the recipe that the provenance of a corrected file names.

    Returns None for another file, for an architecture that no adapter lists, and for a factory.
    """
    architecture = recorded_correction(checkpoint).get("architecture")
    if not isinstance(architecture, str):
        return None
    prefix, _, name = architecture.partition(":")
    if prefix not in plugins.prefixes():
        return None
    with without_standard_input():
        try:
            adapter = plugins.adapter(prefix)
            # A timm tag (resnet50.a1_in1k) names weights, not another architecture.
            if not {name, name.partition(".")[0]} & set(adapter.architectures()):
                return None
        except ArchitectureError:
            return None  # The library is not installed here.
    return adapter, add_recorded_arguments(checkpoint, adapter, Recipe(adapter.prefix, name))


def add_recorded_arguments(checkpoint: Checkpoint, adapter: Adapter, recipe: Recipe) -> Recipe:
    """Return the recipe with the arguments that a corrected file records for this architecture.

    They replace those that stand elsewhere in the file: the correction was made with them.
    """
    correction = recorded_correction(checkpoint)
    arguments = correction.get("model_kwargs")
    if not isinstance(arguments, Mapping) or not _is_same(correction.get("architecture"), recipe):
        return recipe
    kwargs = {**recipe.kwargs, **arguments}
    has_rates = any(name in arguments for name in adapter.rate_kwargs(recipe.name))
    if "module_rates" in correction:
        # These are the rates of single modules, which are set on the model once it is built.
        has_rates = False
    return replace(recipe, kwargs=kwargs, rates="recorded" if has_rates else recipe.rates)


def _is_same(architecture: object, recipe: Recipe) -> bool:
    if not isinstance(architecture, str) or recipe.adapter == "factory":
        return architecture == recipe.architecture
    # A tag of timm does not matter, as above.
    return architecture.partition(".")[0] == recipe.architecture.partition(".")[0]


def recorded_input_spec(checkpoint: Checkpoint) -> InputSpec | None:
    """Return the input shape and preprocessing that a corrected file records, if they are valid."""
    values = recorded_correction(checkpoint).get("input")
    if not isinstance(values, Mapping):
        return None
    return admit_input_spec(values, origin="recorded by bn-reestimate")


def describe_input(spec: InputSpec | None) -> dict[str, object]:
    """Return the entry of the provenance that `recorded_input_spec` reads; {} without a spec."""
    if spec is None:
        return {}
    values = dataclasses.asdict(spec)
    del values["origin"]  # text for people, which a file need not hand on
    return {"input": values}
