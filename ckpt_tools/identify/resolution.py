"""Decides which architectures a checkpoint may hold.

The user's choice comes first, then what the file says of itself, then what the keys and shapes of
its tensors show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from ckpt_tools.contract import Checkpoint, RecognisedBy
from ckpt_tools.errors import AmbiguousArchitecture, ArchitectureError
from ckpt_tools.identify.admission import ArgumentRefused
from ckpt_tools.identify.architecture_index import DigestMatch, load_shipped_index
from ckpt_tools.identify.candidate import Candidate, fit_candidate, module_candidate
from ckpt_tools.identify.closest_architectures import describe_closest
from ckpt_tools.identify.equivalents import merge_equivalent_candidates
from ckpt_tools.identify.file_name_hints import guess_by_file_name
from ckpt_tools.identify.recipe import (
    describe_recorded_name,
    recipe_with_rates_alone,
    recipe_with_recorded_arguments,
    recipe_without_arguments,
    recorded_recipes,
)
from ckpt_tools.identify.recorded_provenance import add_recorded_arguments, corrected_recipe
from ckpt_tools.identify.recorded_rates import recorded_class
from ckpt_tools.identify.stored_forms import shapes_as_model

# At every other digest level, the head was left out of the comparison.
_BY_LEVEL: dict[str, RecognisedBy] = {"full": "shapes"}


def find_candidates(
    checkpoint: Checkpoint,
    architecture: str | None = None,
    model_kwargs: Mapping[str, object] | None = None,
) -> tuple[Candidate, ...]:
    """Return every architecture that fits the checkpoint, one for each function it may compute.

    Nearly always it is a single one. What the user or the checkpoint names is taken if the keys
    agree. Otherwise the index proposes architectures by digests of keys and shapes, and the
    proposals are compared key by key.

    Raises ArchitectureError if nothing fits.
    """
    user_kwargs = dict(model_kwargs or {})
    if architecture is not None:
        adapter, recipe = recipe_with_recorded_arguments(checkpoint.words, architecture)
        recipe = add_recorded_arguments(checkpoint, adapter, recipe)
        return (_fit_named_architecture(checkpoint, Candidate(adapter, recipe, "user"), user_kwargs),)
    # A trusted pickle may hold the model itself.
    if checkpoint.module is not None:
        return (module_candidate(checkpoint),)
    misfits: list[ArchitectureError] = []
    proposals: Iterable[Candidate] = _recorded_candidates(checkpoint)
    fitting = list(_fitting_candidates(checkpoint, proposals, user_kwargs, misfits))
    if fitting:
        _require_one_meaning(checkpoint, fitting)
        return (fitting[0],)
    for match in load_shipped_index().find_matches(shapes_as_model(checkpoint)):
        if _is_part_of_larger_model(checkpoint, match.prefix):
            continue  # The BatchNorm layers outside the prefix would be left out.
        proposals = _propose_candidates(checkpoint, match)
        # With the user's arguments, a misfit is worth telling: the arguments may be the reason.
        # Without them the user asked for none of these architectures.
        reported = misfits if user_kwargs else []
        fitting = list(_fitting_candidates(checkpoint, proposals, user_kwargs, reported))
        if fitting:
            preferred = _prefer_candidates(checkpoint, fitting)
            distinct = merge_equivalent_candidates(checkpoint, preferred)
            _require_one_meaning(checkpoint, fitting if len(distinct) == 1 else distinct)
            return distinct
    raise _unknown_architecture_error(checkpoint, misfits)


def _fit_named_architecture(
    checkpoint: Checkpoint, candidate: Candidate, user_kwargs: Mapping[str, object]
) -> Candidate:
    """Return the candidate that the user names, with the arguments that the file records.

    Those of a training module may mean something else in the user's own callable, which is then
    called without them, as long as its tensors show that this fits.
    """
    try:
        return fit_candidate(checkpoint, candidate, user_kwargs)
    except ArgumentRefused:
        raise
    except ArchitectureError:
        plain = recipe_with_rates_alone(candidate.adapter, candidate.recipe)
        if candidate.recipe.adapter != "factory" or plain == candidate.recipe:
            raise
        with contextlib.suppress(ArchitectureError):
            return fit_candidate(checkpoint, replace(candidate, recipe=plain), user_kwargs)
        raise


def require_single_candidate(checkpoint: Checkpoint, candidates: tuple[Candidate, ...]) -> Candidate:
    """Return the candidate if there is only one.

    Raises AmbiguousArchitecture if there are several. Its message lists them, and what the file's
    name suggests.
    """
    if len(candidates) == 1:
        return candidates[0]
    lines = [
        item.architecture + (f" (same as {', '.join(item.twins)})" if item.twins else "")
        for item in candidates
    ]
    guess = guess_by_file_name(checkpoint.path, candidates)
    hint = f"The file's name suggests {guess.architecture}. " if guess else ""
    example = (guess or candidates[0]).architecture
    raise AmbiguousArchitecture(
        f"{checkpoint.shown_path}: its tensors fit {len(candidates)} architectures that differ in "
        "function or in the input they expect:\n  "
        + "\n  ".join(lines)
        + f"\n{hint}Choose one, e.g. --arch {example}.",
        tuple(candidate.architecture for candidate in candidates),
    )


def _recorded_candidates(checkpoint: Checkpoint) -> Iterator[Candidate]:
    # The correction was made with this architecture, whatever else stands in the file or beside it.
    corrected = corrected_recipe(checkpoint)
    for adapter, recipe in [corrected] if corrected else recorded_recipes(checkpoint):
        yield Candidate(adapter, recipe, "checkpoint")


def _propose_candidates(checkpoint: Checkpoint, match: DigestMatch) -> Iterator[Candidate]:
    """Yield the architectures of a match, first with the arguments that the checkpoint records.

    The recorded arguments may be wrong, so the architecture follows without them.
    """
    by = _BY_LEVEL.get(match.level, "shapes without head")
    for architecture in match.architectures:
        try:
            adapter, recipe = recipe_with_recorded_arguments(checkpoint.words, architecture)
        except ArchitectureError:
            continue  # The installed library does not have it.
        yield Candidate(adapter, recipe, by, prefix=match.prefix)
        if recipe.kwargs:
            yield Candidate(*recipe_without_arguments(architecture), by, prefix=match.prefix)


def _is_part_of_larger_model(checkpoint: Checkpoint, prefix: str) -> bool:
    """Whether BatchNorm layers stand outside the prefix, as around a backbone in a larger model.

    A copy of the same model, such as its moving average (EMA), does not count.
    """
    inner = {key.removeprefix(prefix) for key in checkpoint.tensors if key.startswith(prefix)}
    for key in checkpoint.tensors:
        if key.endswith("running_var") and not key.startswith(prefix):
            # A copy has the same keys behind a prefix of its own, of up to three attributes.
            suffixes = (key.split(".", depth)[-1] for depth in range(1, 4))
            if inner.isdisjoint(suffixes):
                return True
    return False


def _fitting_candidates(
    checkpoint: Checkpoint,
    proposals: Iterable[Candidate],
    user_kwargs: Mapping[str, object],
    misfits: list[ArchitectureError],
) -> Iterator[Candidate]:
    """Yield the first proposal of each architecture that fits the checkpoint.

    The errors of those that do not fit are appended to `misfits`.
    """
    architectures: set[str] = set()
    for candidate in proposals:
        if candidate.architecture in architectures:
            continue
        try:
            yield fit_candidate(checkpoint, candidate, user_kwargs)
        except ArgumentRefused:
            # Without the argument, the same architecture may fit and compute something else.
            raise
        except ArchitectureError as error:
            misfits.append(error)
        else:
            architectures.add(candidate.architecture)


def _prefer_candidates(checkpoint: Checkpoint, candidates: list[Candidate]) -> list[Candidate]:
    """Drop candidates that are less likely than others.

    Those of the pickled class's own library are preferred, then those that fit to the last key.
    """
    library = recorded_class(checkpoint).partition(".")[0]
    candidates = [item for item in candidates if item.adapter.prefix == library] or candidates
    return [item for item in candidates if not item.as_built] or candidates


def _require_one_meaning(checkpoint: Checkpoint, candidates: Iterable[Candidate]) -> None:
    """Raise AmbiguousArchitecture if candidates of two libraries record drop rates.

    Twins of two libraries share their keys, but a recorded `drop_rate` may mean different layers in
    each.
    """
    architectures = {
        candidate.adapter.prefix: candidate.architecture
        for candidate in candidates
        if candidate.recipe.rates == "recorded"
    }
    if len(architectures) > 1:
        first, second, *_ = architectures.values()
        raise AmbiguousArchitecture(
            f"{checkpoint.shown_path}: its keys fit {first} and {second}, and the drop rates it "
            f"records may mean different layers in each. Give --arch {first} or --arch {second}.",
            tuple(architectures.values()),
        )


def _unknown_architecture_error(
    checkpoint: Checkpoint, misfits: list[ArchitectureError]
) -> ArchitectureError:
    description = f"{checkpoint.shown_path}: {describe_recorded_name(checkpoint)}."
    reason = misfits[0] if misfits else description
    return ArchitectureError(
        f"{reason}\n{describe_closest(shapes_as_model(checkpoint))}\n"
        "Give --arch, e.g. --arch timm:resnet50, --arch torchvision:densenet121 or "
        "--arch package.module:factory."
    )
