"""An architecture that a checkpoint may hold: it is compared key by key, then built and filled.

`fit_candidate` compares on a model without weights, which is cheap. `load_candidate` builds the
real model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ckpt_tools.contract import Adapter, Checkpoint, InputSpec, LoadedModel, Recipe, RecognisedBy
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify import plugins
from ckpt_tools.identify.admission import admit_recipe, bound_construction, bound_first_construction
from ckpt_tools.identify.key_matching import (
    common_prefix,
    compare_shapes,
    fill_model,
    misfit_error,
    unsaved_buffer_keys,
)
from ckpt_tools.identify.recorded_provenance import recorded_input_spec
from ckpt_tools.identify.recorded_rates import recorded_rates, set_rates
from ckpt_tools.identify.shape_digest import LOSS_ATTRIBUTES, Shapes, top_attributes
from ckpt_tools.identify.skeleton import (
    CLASS_KEYWORDS,
    SkipRandomInitialisation,
    build_skeleton,
    keys_depending_on,
    state_dict_shapes,
)
from ckpt_tools.identify.stored_forms import shapes_as_model
from ckpt_tools.storage.reading import select_prefix

# Libraries leave a dropout module out where its rate is 0. Any rate strictly between 0 and 1 makes
# them build it.
_PROBE_RATE = 0.2


@dataclass(frozen=True)
class Candidate:
    """An architecture, who named it, and how the checkpoint's keys correspond to its own.

    `twins` are further architectures that compute the same function with the same weights. `prefix`
    stands before the architecture's keys in the checkpoint, and is None as long as it is not known.
    `as_built` are top attributes (`head.`) whose tensors in the checkpoint have other shapes or
    keys: they keep the values the model is built with.
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
        """The name as the user writes it after `--arch`."""
        return self.recipe.architecture

    @property
    def names(self) -> tuple[str, ...]:
        """The candidate's own name, then the names of its twins."""
        return (self.architecture, *self.twins)


def fit_candidate(
    checkpoint: Checkpoint, candidate: Candidate, user_kwargs: Mapping[str, object]
) -> Candidate:
    """Return the candidate with the prefix and the arguments that fit the checkpoint's shapes.

    The keys and shapes are compared on a model without weights. The user's arguments replace all
    others.

    Raises ArchitectureError if the shapes do not fit, and ArgumentRefused for arguments that no
    file may set.
    """
    recipe = admit_recipe(checkpoint, candidate.adapter, candidate.recipe, user_kwargs)
    with bound_first_construction(checkpoint, recipe, candidate.recognised_by):
        return _fit_to_shapes(checkpoint, replace(candidate, recipe=recipe), user_kwargs)


def _fit_to_shapes(
    checkpoint: Checkpoint, candidate: Candidate, user_kwargs: Mapping[str, object]
) -> Candidate:
    prefix = candidate.prefix or ""
    part, recipe, skeleton = _build_for_part(checkpoint, candidate, prefix, user_kwargs)
    if candidate.prefix is None:
        # Reading the class count off the shapes needs the prefix, so the head of this skeleton may
        # have another size than the checkpoint's. All other keys show the prefix.
        prefix = common_prefix(state_dict_shapes(skeleton), shapes_as_model(checkpoint, skeleton))
        if prefix:
            part, recipe, skeleton = _build_for_part(checkpoint, candidate, prefix, user_kwargs)
    expected = state_dict_shapes(skeleton)
    shapes = shapes_as_model(part, skeleton)
    differences = compare_shapes(expected, shapes, unsaved_buffer_keys(skeleton))
    replaceable: tuple[str, ...] = ()
    if differences.keys:
        replaceable = _replaceable_attributes(candidate.adapter, recipe, expected)
        if not differences.only_under(replaceable):
            raise misfit_error(differences, expected, part, shapes, recipe.architecture)
    return replace(
        candidate,
        recipe=recipe,
        prefix=prefix,
        as_built=tuple(attribute for attribute in replaceable if differences.touches(attribute)),
        input_spec=_input_spec(candidate.adapter, skeleton, recipe.name, part),
    )


def _build_for_part(
    checkpoint: Checkpoint, candidate: Candidate, prefix: str, user_kwargs: Mapping[str, object]
) -> tuple[Checkpoint, Recipe, nn.Module]:
    """Return the part of the checkpoint under the prefix, and the model to compare it with.

    The recipe has the sizes that the part's shapes show; the model is built by it, without weights.
    """
    part = select_prefix(checkpoint, prefix) if prefix else checkpoint
    recipe = _add_size_arguments(part, candidate.adapter, candidate.recipe, user_kwargs)
    return part, recipe, build_skeleton(candidate.adapter, recipe.name, recipe.kwargs)


def _replaceable_attributes(adapter: Adapter, recipe: Recipe, expected: Shapes) -> tuple[str, ...]:
    """Return the top attributes under which a checkpoint may differ from the architecture.

    These are the head, which people replace, and loss functions that were saved along with the
    model.
    """
    head = top_attributes(keys_depending_on(adapter, recipe.name, recipe.kwargs, CLASS_KEYWORDS))
    attributes = top_attributes(expected)
    if len(head) == len(attributes):
        # The class count reaches into every part, so it does not tell which one is the head.
        head = ()
    return (*head, *sorted(LOSS_ATTRIBUTES - set(attributes)))


def load_candidate(checkpoint: Checkpoint, candidate: Candidate) -> LoadedModel:
    """Build a candidate on the CPU and load the checkpoint into it. Raises CkptToolsError.

    `candidate` comes from `fit_candidate` or `module_candidate`.
    """
    if candidate.recognised_by == "module":
        return _load_module(checkpoint, candidate.recipe)
    with bound_construction(checkpoint, candidate.recipe, candidate.recognised_by):
        return _build_and_fill(checkpoint, candidate)


def _build_and_fill(checkpoint: Checkpoint, candidate: Candidate) -> LoadedModel:
    adapter, recipe = candidate.adapter, candidate.recipe
    part = select_prefix(checkpoint, candidate.prefix) if candidate.prefix else checkpoint
    rates = recorded_rates(part) if recipe.rates == "unknown" else {}
    # Random initial values are needed only where the checkpoint leaves some of them in place.
    initialise = bool(candidate.as_built)
    model = _build_model(adapter, recipe, initialise=initialise)
    if rates:
        recipe = replace(recipe, rates="recorded")
        if missing_rates := set_rates(model, rates):
            # The saved module had drop paths that this model was built without. Build them in.
            keywords = adapter.rate_kwargs(recipe.name)
            rate_kwargs = {name: rate for name, rate in missing_rates.items() if name in keywords}
            recipe = replace(recipe, kwargs={**recipe.kwargs, **rate_kwargs})
            model = _build_model(adapter, recipe, initialise=initialise)
            if set_rates(model, rates):
                # Some layers with a rate do not exist in this architecture with any arguments.
                recipe = replace(recipe, rates="unknown")
    fill_model(model, part, recipe.architecture, candidate.as_built)
    return LoadedModel(
        model=model,
        checkpoint=part,
        recipe=recipe,
        input_spec=_input_spec(adapter, model, recipe.name, part),
        probe=build_probe(adapter, recipe),
        recognised_by=candidate.recognised_by,
        twins=candidate.twins,
        as_built=candidate.as_built,
    )


def _input_spec(adapter: Adapter, model: nn.Module, name: str, checkpoint: Checkpoint) -> InputSpec | None:
    """Return the input that a corrected file records, else what its words and the library say."""
    return recorded_input_spec(checkpoint) or adapter.input_spec(model, name, checkpoint.words)


def load_recipe(adapter: Adapter, recipe: Recipe) -> LoadedModel:
    """Build an architecture without a checkpoint, with the library's own initialisation."""
    model = _build_model(adapter, recipe)
    input_spec = adapter.input_spec(model, recipe.name, {})
    return LoadedModel(model, None, recipe, input_spec, build_probe(adapter, recipe))


def build_with_rates(
    loaded: LoadedModel, rates: Mapping[str, float], state: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Build a loaded model's architecture again with other drop rates.

    Without `state`, a state dict of the loaded model, the result has no weights (it is on the meta
    device where that works). Raises ArchitectureError if the constructor refuses a rate, or if a
    rate changes what the state dict holds.
    """
    recipe = loaded.recipe
    recipe = replace(recipe, kwargs={**recipe.kwargs, **rates})
    adapter = plugins.adapter(recipe.adapter)
    with _bound_rebuilding(loaded, recipe):
        if state is None:
            return build_skeleton(adapter, recipe.name, recipe.kwargs)
        model = _build_model(adapter, recipe, initialise=False)
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ArchitectureError(
            f"{recipe.architecture}: its state dict differs between drop rates: {error}"
        ) from error
    return model


def _bound_rebuilding(loaded: LoadedModel, recipe: Recipe) -> AbstractContextManager[None]:
    if loaded.checkpoint is None:
        return contextlib.nullcontext()
    return bound_construction(loaded.checkpoint, recipe, loaded.recognised_by)


def rebuild_with_rates(loaded: LoadedModel, rates: Mapping[str, float]) -> LoadedModel:
    """Return the loaded model with the same weights at drop rates that the statistics fit."""
    recipe = loaded.recipe
    recipe = replace(recipe, kwargs={**recipe.kwargs, **rates}, rates="estimated")
    model = build_with_rates(loaded, rates, loaded.model.state_dict())
    return replace(loaded, model=model, recipe=recipe)


def module_candidate(checkpoint: Checkpoint) -> Candidate:
    """Return the candidate for a trusted pickle that holds a whole model.

    Nothing has to be built, and nothing to be compared.
    """
    recipe = Recipe("module", type(_unwrapped_module(checkpoint)).__name__, {}, "model")
    return Candidate(plugins.adapter("factory"), recipe, "module")


def build_probe(adapter: Adapter, recipe: Recipe) -> nn.Module | None:
    """Build the architecture without weights and with every drop rate above zero.

    The walker reads from it which BN layers dropout could reach (see `LoadedModel.probe`). Returns
    None if the architecture has no drop rates, or cannot be built with all of them.
    """
    rates = dict.fromkeys(adapter.rate_kwargs(recipe.name), _PROBE_RATE)
    if not rates:
        return None
    try:
        return build_skeleton(adapter, recipe.name, {**recipe.kwargs, **rates})
    except (ArchitectureError, RuntimeError):
        return None


def _add_size_arguments(
    checkpoint: Checkpoint, adapter: Adapter, recipe: Recipe, user_kwargs: Mapping[str, object]
) -> Recipe:
    """Add the class count and input channels that the shapes show, then the user's arguments.

    The shapes override what the file records, and the user overrides both.
    """
    shapes = checkpoint.shapes | shapes_as_model(checkpoint)
    sizes = adapter.class_kwargs(shapes, recipe.name, {**recipe.kwargs, **user_kwargs})
    recipe = replace(recipe, kwargs={**recipe.kwargs, **sizes, **user_kwargs})
    if any(name in user_kwargs for name in adapter.rate_kwargs(recipe.name)):
        return replace(recipe, rates="given")
    return recipe


def _build_model(adapter: Adapter, recipe: Recipe, *, initialise: bool = True) -> nn.Module:
    # The caller may have set another default device.
    with (
        torch.device("cpu"),
        contextlib.nullcontext() if initialise else SkipRandomInitialisation(),
    ):
        return adapter.build(recipe.name, recipe.kwargs).float().eval()


def _unwrapped_module(checkpoint: Checkpoint) -> nn.Module:
    """Return the trusted module without the wrappers whose prefix was removed from the keys."""
    assert checkpoint.module is not None
    try:
        return checkpoint.module.get_submodule(checkpoint.prefix.removesuffix("."))
    except AttributeError:
        return checkpoint.module


def _load_module(checkpoint: Checkpoint, recipe: Recipe) -> LoadedModel:
    # Work on a copy: the checkpoint's tensors are the module's own, and must stay as in the file.
    model = copy.deepcopy(_unwrapped_module(checkpoint)).cpu().float().eval()
    fill_model(model, checkpoint, recipe.architecture)
    input_spec = _input_spec_of_module(model)
    return LoadedModel(model, checkpoint, recipe, input_spec, recognised_by="module")


def _input_spec_of_module(model: nn.Module) -> InputSpec | None:
    """Read the model's own `input_spec` or timm-like `default_cfg`, as the factory adapter does."""
    try:
        return plugins.adapter("factory").input_spec(model, type(model).__name__, {})
    except ArchitectureError:
        return None
