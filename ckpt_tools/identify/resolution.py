"""Which architectures a checkpoint may hold: the user's word, the checkpoint's own, then what its tensors say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ckpt_tools.contract import Checkpoint, RecognisedBy
from ckpt_tools.errors import AmbiguousArchitecture, ArchitectureError
from ckpt_tools.identify.admission import ArgumentRefused
from ckpt_tools.identify.architecture_index import DigestMatch, load_shipped_index
from ckpt_tools.identify.candidate import Candidate, fit_candidate, module_candidate
from ckpt_tools.identify.closest_architectures import describe_closest
from ckpt_tools.identify.equivalents import merge_equivalent_candidates
from ckpt_tools.identify.file_name_hints import guess_by_file_name
from ckpt_tools.identify.recipe import (
    AdapterAndRecipe,
    describe_recorded_name,
    recipe_with_recorded_arguments,
    recipe_without_arguments,
    recorded_recipes,
)
from ckpt_tools.identify.recorded_rates import recorded_class

_BY: dict[str, RecognisedBy] = {"full": "shapes"}


def find_candidates(
    checkpoint: Checkpoint,
    architecture: str | None = None,
    model_kwargs: Mapping[str, object] | None = None,
) -> tuple[Candidate, ...]:
    """Every architecture that fits the checkpoint, one a function; nearly always a single one.

    What the user or the checkpoint says is taken if the keys agree; then digests of keys and shapes propose, and
    what they propose is compared key by key. Raises ArchitectureError if nothing fits.
    """
    given = dict(model_kwargs or {})
    if architecture is not None:
        asked = Candidate(*recipe_with_recorded_arguments(checkpoint.words, architecture), "user")
        return (fit_candidate(checkpoint, asked, given),)
    if checkpoint.module is not None:
        return (module_candidate(checkpoint),)
    refusals: list[ArchitectureError] = []
    said = list(_fitting_candidates(checkpoint, _recorded_candidates(checkpoint), given, refusals))
    if said:
        _require_one_meaning(checkpoint, said)
        return (said[0],)
    for match in load_shipped_index().find_matches(checkpoint.shapes):
        if _is_a_part(checkpoint, match.prefix):
            continue
        found = list(
            _fitting_candidates(checkpoint, _propose_candidates(checkpoint, match), given, refusals if given else [])
        )
        if found:
            distinct = merge_equivalent_candidates(checkpoint, _narrow_candidates(checkpoint, found))
            _require_one_meaning(checkpoint, found if len(distinct) == 1 else distinct)
            return distinct
    raise _unknown(checkpoint, refusals)


def require_single_candidate(checkpoint: Checkpoint, found: tuple[Candidate, ...]) -> Candidate:
    """The candidate if there is one. Raises AmbiguousArchitecture, which lists them, if there are several."""
    if len(found) == 1:
        return found[0]
    lines = [one.architecture + (f" (same as {', '.join(one.twins)})" if one.twins else "") for one in found]
    guess = guess_by_file_name(checkpoint.path, found)
    hint = f"The file's name suggests {guess.architecture}. " if guess else ""
    raise AmbiguousArchitecture(
        f"{checkpoint.shown_path}: its tensors fit {len(found)} architectures that differ in function or in the "
        "input they "
        "expect:\n  " + "\n  ".join(lines) + f"\n{hint}Choose one, e.g. --arch {(guess or found[0]).architecture}.",
        tuple(one.architecture for one in found),
    )


def _recorded_candidates(checkpoint: Checkpoint) -> Iterator[Candidate]:
    for adapter, recipe in recorded_recipes(checkpoint):
        yield Candidate(adapter, recipe, "checkpoint")


def _propose_candidates(checkpoint: Checkpoint, match: DigestMatch) -> Iterator[Candidate]:
    """What a digest names, with the arguments that the checkpoint's words hold for it."""
    by = _BY.get(match.level, "shapes without head")
    for architecture in match.architectures:
        if (choice := _in_library(checkpoint, architecture)) is not None:
            yield Candidate(*choice, by, prefix=match.prefix)
            if choice[1].kwargs:  # the words may be wrong about these
                yield Candidate(*recipe_without_arguments(architecture), by, prefix=match.prefix)


def _is_a_part(checkpoint: Checkpoint, prefix: str) -> bool:
    """Whether BatchNorm layers stand outside the prefix: a backbone in a larger model. A copy (EMA) does not count."""
    inner = {key.removeprefix(prefix) for key in checkpoint.tensors if key.startswith(prefix)}
    outer = (key for key in checkpoint.tensors if key.endswith("running_var") and not key.startswith(prefix))
    return any(inner.isdisjoint(key.split(".", depth)[-1] for depth in range(1, 4)) for key in outer)


def _in_library(checkpoint: Checkpoint, architecture: str) -> AdapterAndRecipe | None:
    """None for what the installed library does not have."""
    try:
        return recipe_with_recorded_arguments(checkpoint.words, architecture)
    except ArchitectureError:
        return None


def _fitting_candidates(
    checkpoint: Checkpoint,
    proposed: Iterable[Candidate],
    given: Mapping[str, object],
    refusals: list[ArchitectureError],
) -> Iterator[Candidate]:
    """The proposals that settle, the first for each architecture; why the others do not goes to ``refusals``."""
    seen: set[str] = set()
    for candidate in proposed:
        if candidate.architecture in seen:
            continue
        try:
            yield fit_candidate(checkpoint, candidate, given)
        except ArgumentRefused:
            # The same architecture without the argument may fit the tensors and compute something else.
            raise
        except ArchitectureError as error:
            refusals.append(error)
        else:
            seen.add(candidate.architecture)


def _narrow_candidates(checkpoint: Checkpoint, found: list[Candidate]) -> list[Candidate]:
    """The pickled class's library before others, those that fit to the last key before those with a foreign head."""
    library = recorded_class(checkpoint).partition(".")[0]
    for wanted in (lambda one: one.adapter.prefix == library, lambda one: not one.as_built):
        found = [one for one in found if wanted(one)] or found
    return found


def _require_one_meaning(checkpoint: Checkpoint, found: Iterable[Candidate]) -> None:
    """Twins of two libraries share their keys, but a recorded ``drop_rate`` may mean different layers."""
    recorded = {one.adapter.prefix: one.architecture for one in found if one.recipe.rates == "recorded"}
    if len(recorded) > 1:
        first, second, *_ = recorded.values()
        raise AmbiguousArchitecture(
            f"{checkpoint.shown_path}: its keys fit {first} and {second}, and the drop rates it records may mean "
            "different "
            f"layers in each. Give --arch {first} or --arch {second}.",
            tuple(recorded.values()),
        )


def _unknown(checkpoint: Checkpoint, refusals: list[ArchitectureError]) -> ArchitectureError:
    told = str(refusals[0]) if refusals else f"{checkpoint.shown_path}: {describe_recorded_name(checkpoint)}."
    return ArchitectureError(
        f"{told}\n{describe_closest(checkpoint.shapes)}\n"
        "Give --arch, e.g. --arch timm:resnet50, --arch torchvision:densenet121 or --arch package.module:factory."
    )
