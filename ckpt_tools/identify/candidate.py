"""One architecture that a checkpoint may hold: compared with it key by key, then built and filled."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from ckpt_tools import plugins
from ckpt_tools.contract import Adapter, Checkpoint, InputSpec, LoadedModel, Recipe, RecognisedBy
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify.admission import admit_recipe, bound_construction
from ckpt_tools.identify.key_matching import (
    common_prefix,
    compare_shapes,
    fill_model,
    misfit_error,
    unsaved_buffer_keys,
)
from ckpt_tools.identify.recorded_rates import recorded_rates, set_rates
from ckpt_tools.identify.shape_digest import LOSS_ATTRIBUTES, top_attributes
from ckpt_tools.identify.skeleton import (
    CLASS_KEYWORDS,
    SkipRandomInitialisation,
    build_skeleton,
    keys_depending_on,
    state_dict_shapes,
)
from ckpt_tools.storage.reading import select_prefix

_PROBE_RATE = 0.2  # any rate strictly between 0 and 1 brings a hidden dropout site to life


@dataclass(frozen=True)
class Candidate:
    """An architecture, who named it, and how the checkpoint's keys lie in it.

    ``twins`` compute the same function with the same weights. ``prefix`` stands before the keys in the checkpoint;
    None until it is known. ``as_built`` are top attributes (``head.``) that the checkpoint fills in its own way.
    """

    adapter: Adapter
    recipe: Recipe
    recognised_by: RecognisedBy
    twins: tuple[str, ...] = ()
    prefix: str | None = None
    as_built: tuple[str, ...] = ()
    input_spec: InputSpec | None = None

    @property
    def architecture(self) -> str:
        """The name as the user writes it after ``--arch``."""
        return self.recipe.architecture

    @property
    def names(self) -> tuple[str, ...]:
        """Its own name and its twins'."""
        return (self.architecture, *self.twins)


def fit_candidate(checkpoint: Checkpoint, candidate: Candidate, given: Mapping[str, object]) -> Candidate:
    """The candidate with prefix and arguments as the checkpoint's shapes and the user have them.

    Its keys and shapes are compared on a model without weights. Raises ArchitectureError if they do not fit, and
    ArgumentRefused for arguments that no file may set.
    """
    recipe = admit_recipe(checkpoint, candidate.adapter, candidate.recipe, given)
    with bound_construction(checkpoint, recipe, candidate.recognised_by):
        return _fit_to_shapes(checkpoint, replace(candidate, recipe=recipe), given)


def _fit_to_shapes(checkpoint: Checkpoint, candidate: Candidate, given: Mapping[str, object]) -> Candidate:
    adapter, name, prefix = candidate.adapter, candidate.recipe.name, candidate.prefix
    part = select_prefix(checkpoint, prefix) if prefix else checkpoint
    recipe = _add_size_arguments(part, adapter, candidate.recipe, given)
    model = build_skeleton(adapter, name, recipe.kwargs)
    wanted = state_dict_shapes(model)
    if prefix is None and (prefix := common_prefix(wanted, part.tensors)):
        part = select_prefix(checkpoint, prefix)
        recipe = _add_size_arguments(part, adapter, candidate.recipe, given)
        model = build_skeleton(adapter, name, recipe.kwargs)
        wanted = state_dict_shapes(model)
    found = compare_shapes(wanted, part.shapes, unsaved_buffer_keys(model))
    head: tuple[str, ...] = ()
    if found.keys:
        head = top_attributes(keys_depending_on(adapter, name, recipe.kwargs, CLASS_KEYWORDS))
        if len(head) == len(top_attributes(wanted)):
            head = ()
        head = (*head, *sorted(LOSS_ATTRIBUTES - set(top_attributes(wanted))))
        if not found.only_under(head):
            raise misfit_error(found, wanted, part, recipe.architecture)
    return replace(
        candidate,
        recipe=recipe,
        prefix=prefix,
        as_built=tuple(one for one in head if found.touches(one)),
        input_spec=adapter.input_spec(model, name, part.words),
    )


def load_candidate(checkpoint: Checkpoint, candidate: Candidate) -> LoadedModel:
    """Build a settled candidate on the CPU and load the checkpoint into it. Raises CkptToolsError."""
    if candidate.recognised_by == "module":
        return _whole_module(checkpoint, candidate.recipe)
    with bound_construction(checkpoint, candidate.recipe, candidate.recognised_by):
        return _build_and_fill(checkpoint, candidate)


def _build_and_fill(checkpoint: Checkpoint, candidate: Candidate) -> LoadedModel:
    adapter, recipe = candidate.adapter, candidate.recipe
    part = select_prefix(checkpoint, candidate.prefix) if candidate.prefix else checkpoint
    rates = recorded_rates(part) if recipe.rates == "unknown" else {}
    filled_by_file = not candidate.as_built  # then no initial value survives
    model = _build_model(adapter, recipe, initialise=not filled_by_file)
    if rates:
        recipe = replace(recipe, rates="recorded")
        if hidden := set_rates(model, rates):
            taken = {name: rate for name, rate in hidden.items() if name in adapter.rate_kwargs(recipe.name)}
            recipe = replace(recipe, kwargs={**recipe.kwargs, **taken})
            model = _build_model(adapter, recipe, initialise=not filled_by_file)
            if set_rates(model, rates):  # of layers that this architecture has not, whatever its arguments
                recipe = replace(recipe, rates="unknown")
    fill_model(model, part, recipe.architecture, candidate.as_built)
    return LoadedModel(
        model=model,
        checkpoint=part,
        recipe=recipe,
        input_spec=adapter.input_spec(model, recipe.name, part.words),
        probe=build_probe(adapter, recipe),
        recognised_by=candidate.recognised_by,
        twins=candidate.twins,
        as_built=candidate.as_built,
    )


def load_recipe(adapter: Adapter, recipe: Recipe) -> LoadedModel:
    """An architecture without a checkpoint: the library's own initialisation."""
    model = _build_model(adapter, recipe)
    return LoadedModel(model, None, recipe, adapter.input_spec(model, recipe.name, {}), build_probe(adapter, recipe))


def module_candidate(checkpoint: Checkpoint) -> Candidate:
    """The model that a trusted pickle holds as a whole; nothing has to be built."""
    recipe = Recipe("module", type(_inner(checkpoint)).__name__, {}, "model")
    return Candidate(plugins.adapter("factory"), recipe, "module")


def build_probe(adapter: Adapter, recipe: Recipe) -> nn.Module | None:
    """The architecture with every drop rate above zero; None if it has none or cannot be built so."""
    rates = adapter.rate_kwargs(recipe.name)
    if not rates:
        return None
    try:
        return build_skeleton(adapter, recipe.name, {**recipe.kwargs, **dict.fromkeys(rates, _PROBE_RATE)})
    except (ArchitectureError, RuntimeError):
        return None


def _add_size_arguments(
    checkpoint: Checkpoint, adapter: Adapter, recipe: Recipe, given: Mapping[str, object]
) -> Recipe:
    """The recipe with what the shapes say (over the words) and what the user says (over everything)."""
    sizes = adapter.class_kwargs(checkpoint.shapes, recipe.name, {**recipe.kwargs, **given})
    told = any(name in given for name in adapter.rate_kwargs(recipe.name))
    return replace(recipe, kwargs={**recipe.kwargs, **sizes, **given}, rates="given" if told else recipe.rates)


def _build_model(adapter: Adapter, recipe: Recipe, *, initialise: bool = True) -> nn.Module:
    with torch.device("cpu"), contextlib.nullcontext() if initialise else SkipRandomInitialisation():
        return adapter.build(recipe.name, recipe.kwargs).float().eval()


def _inner(checkpoint: Checkpoint) -> nn.Module:
    """The trusted module without the wrappers whose prefix was removed from the keys."""
    assert checkpoint.module is not None
    try:
        return checkpoint.module.get_submodule(checkpoint.prefix.removesuffix("."))
    except AttributeError:
        return checkpoint.module


def _whole_module(checkpoint: Checkpoint, recipe: Recipe) -> LoadedModel:
    # A copy: the checkpoint's tensors are the module's own, and must stay what the file holds.
    model = copy.deepcopy(_inner(checkpoint)).cpu().float().eval()
    fill_model(model, checkpoint, recipe.architecture)
    return LoadedModel(model, checkpoint, recipe, _own_spec(model), recognised_by="module")


def _own_spec(model: nn.Module) -> InputSpec | None:
    """What the model's ``input_spec`` or timm-like ``default_cfg`` says."""
    try:
        return plugins.adapter("factory").input_spec(model, type(model).__name__, {})
    except ArchitectureError:
        return None
