"""From a file to the model it holds, with its weights, its input and its drop rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ckpt_tools import plugins
from ckpt_tools.contract import Adapter, Checkpoint, LoadedModel, Recipe
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify.keys import common_prefix, fill
from ckpt_tools.identify.recipe import Choice, choices
from ckpt_tools.storage.read import read_checkpoint, under

_PROBE_RATE = 0.2  # any rate strictly between 0 and 1 brings a hidden dropout site to life


def load(
    path: str | Path,
    architecture: str | None = None,
    *,
    model_kwargs: Mapping[str, object] | None = None,
    weights: str = "auto",
    trust: bool = False,
) -> LoadedModel:
    """Read a checkpoint and build the model it belongs to, on the CPU in float32 and evaluation mode.

    ``architecture`` (``timm:resnet50``, ``package.module:factory``) may be None if the file names it itself.
    ``model_kwargs`` go before whatever the file says. ``weights`` chooses between raw and averaged weights.
    Raises CheckpointError for a file that cannot be read, ArchitectureError for one that does not fit.
    """
    return identify(read_checkpoint(Path(path), weights=weights, trust=trust), architecture, model_kwargs)


def identify(
    checkpoint: Checkpoint,
    architecture: str | None = None,
    model_kwargs: Mapping[str, object] | None = None,
) -> LoadedModel:
    """The model a checkpoint belongs to; the keys decide where its words leave a choice."""
    given = dict(model_kwargs or {})
    refusals: list[ArchitectureError] = []
    possible = choices(checkpoint, architecture)
    for i, (adapter, recipe) in enumerate(possible):
        try:
            loaded = _fitted(checkpoint, adapter, recipe, given)
        except ArchitectureError as error:
            refusals.append(error)
            continue
        _require_one_meaning(checkpoint, recipe, possible[i + 1 :], given)
        return loaded
    raise refusals[0]


def load_architecture(architecture: str, model_kwargs: Mapping[str, object] | None = None) -> LoadedModel:
    """An architecture without a checkpoint: the library's own initialisation, the model's own drop rates."""
    adapter, name = plugins.resolve(architecture)
    recipe = Recipe(adapter.prefix, name, dict(model_kwargs or {}), "model")
    model = _built(adapter, recipe)
    return LoadedModel(model, None, recipe, adapter.input_spec(model, name, {}), _probe(adapter, recipe))


def _fitted(checkpoint: Checkpoint, adapter: Adapter, recipe: Recipe, given: Mapping[str, object]) -> LoadedModel:
    sized = _sized(checkpoint, adapter, recipe, given)
    model = _built(adapter, sized)
    prefix = common_prefix(model.state_dict(), checkpoint.tensors)
    if prefix:
        checkpoint = under(checkpoint, prefix)
        sized = _sized(checkpoint, adapter, recipe, given)
        model = _built(adapter, sized)
    fill(model, checkpoint, sized.architecture)
    spec = adapter.input_spec(model, sized.name, checkpoint.words)
    return LoadedModel(model, checkpoint, sized, spec, _probe(adapter, sized))


def _require_one_meaning(
    checkpoint: Checkpoint, chosen: Recipe, others: Sequence[Choice], given: Mapping[str, object]
) -> None:
    """Twins of two libraries share their keys, but a recorded ``drop_rate`` may mean different layers."""
    for adapter, recipe in others:
        if chosen.rates != "recorded" or recipe.rates != "recorded":
            continue
        try:
            _fitted(checkpoint, adapter, recipe, given)
        except ArchitectureError:
            continue
        raise ArchitectureError(
            f"{checkpoint.path}: its keys fit {chosen.architecture} and {recipe.architecture}, and the drop rates "
            f"it records may mean different layers in each. Give --arch {chosen.architecture} or "
            f"--arch {recipe.architecture}."
        )


def _sized(checkpoint: Checkpoint, adapter: Adapter, recipe: Recipe, given: Mapping[str, object]) -> Recipe:
    """The recipe with what the shapes say (over the words) and what the user says (over everything)."""
    sizes = adapter.class_kwargs(checkpoint.shapes, recipe.name, {**recipe.kwargs, **given})
    told = any(name in given for name in adapter.rate_kwargs(recipe.name))
    return replace(recipe, kwargs={**recipe.kwargs, **sizes, **given}, rates="given" if told else recipe.rates)


def _built(adapter: Adapter, recipe: Recipe) -> nn.Module:
    with torch.device("cpu"):
        return adapter.build(recipe.name, recipe.kwargs).float().eval()


def _probe(adapter: Adapter, recipe: Recipe) -> nn.Module | None:
    rates = adapter.rate_kwargs(recipe.name)
    if not rates:
        return None
    kwargs = {**recipe.kwargs, **dict.fromkeys(rates, _PROBE_RATE)}
    for device in ("meta", "cpu"):  # some constructors compute with values
        try:
            with torch.device(device):
                return adapter.build(recipe.name, kwargs).eval()
        except (ArchitectureError, RuntimeError):
            continue
    return None
