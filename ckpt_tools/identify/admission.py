"""The gate between what a checkpoint file says about its model and the constructor that builds it.

Every argument from a file passes through `admit_recipe`, and every construction that a file leads
to runs inside `bound_construction`. An input that a file's provenance describes passes through
`admit_input_spec`.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TypeGuard

from ckpt_tools.construction import ConstructionBudget, limited_construction
from ckpt_tools.contract import Adapter, Checkpoint, InputSpec, Recipe, RecognisedBy
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.file_arguments import ArgumentKind, Evidence, LeftOut, NotAdmitted, Rate, admit_argument

__all__ = [
    "ArgumentRefused",
    "admit_input_spec",
    "admit_recipe",
    "bound_construction",
    "bound_first_construction",
]


class ArgumentRefused(ArchitectureError):
    """A file sets an argument that it may not set, or to a value that it may not have."""


def admit_recipe(
    checkpoint: Checkpoint, adapter: Adapter, recipe: Recipe, user_kwargs: Mapping[str, object]
) -> Recipe:
    """Return the recipe with the arguments that the file may set, as its adapter lists them.

    An argument in `user_kwargs` is left out, since the user's value replaces the file's. Class
    counts and input channels that the tensors do not justify are left out, too, since they are read
    off the shapes anyway.

    Raises ArgumentRefused for another value that the adapter does not admit: without it the same
    tensors would be built into another function. Raises ArchitectureError for an argument that the
    adapter does not list, most often one of another library with models of the same name.
    """
    kinds = _list_argument_kinds(adapter, recipe.name) if recipe.kwargs else {}
    evidence = Evidence.from_shapes(checkpoint.shapes)
    admitted: dict[str, object] = {}
    for name, value in recipe.kwargs.items():
        if name in user_kwargs:
            continue
        try:
            admitted[name] = admit_argument(kinds, name, value, evidence)
        except LeftOut:
            continue
        except NotAdmitted as reason:
            if name not in _READ_OFF_SHAPES:
                error_class = ArgumentRefused if name in kinds else ArchitectureError
                raise error_class(_describe_refusal(checkpoint, recipe, name, value, reason)) from reason
    return replace(recipe, kwargs=admitted)


# Widths that `Adapter.class_kwargs` reads off the shapes. A backbone without its head may still
# record a class count that no tensor justifies, so an inadmissible value of these is dropped
# instead of refused.
_READ_OFF_SHAPES = frozenset(
    {"num_classes", "n_classes", "num_labels", "in_chans", "in_channels", "num_channels"}
)


def bound_first_construction(
    checkpoint: Checkpoint, recipe: Recipe, recognised_by: RecognisedBy
) -> AbstractContextManager[None]:
    """Do what `bound_construction` does for the first construction, whose shapes are compared.

    The user's own code is bounded here, too, if the file sets more than its drop rates. `recipe` has
    the arguments of the file.
    """
    if recipe.adapter == "factory" and not all(map(_is_rate, recipe.kwargs.values())):
        budget = ConstructionBudget.from_shapes(checkpoint.shapes)
        return limited_construction(budget, f"{checkpoint.shown_path}: {recipe.architecture}")
    return bound_construction(checkpoint, recipe, recognised_by)


def bound_construction(
    checkpoint: Checkpoint, recipe: Recipe, recognised_by: RecognisedBy
) -> AbstractContextManager[None]:
    """Return a context in which building the model costs no more than the file justifies.

    The user's own code (`package.module:factory`) does what it likes, and may also ask its user
    something. There is no limit for an architecture of a library that the user named and for which
    the file sets nothing but drop rates.
    """
    if recipe.adapter == "factory":
        return nullcontext()
    # Drop rates do not change the size of a model, so its cost is what the user chose.
    chosen_by_user = recognised_by == "user" and all(map(_is_rate, recipe.kwargs.values()))
    budget = None if chosen_by_user else ConstructionBudget.from_shapes(checkpoint.shapes)
    return limited_construction(budget, f"{checkpoint.shown_path}: {recipe.architecture}")


# Pixels of an input that a file may ask for. Nothing in the tensors of a convolutional network
# bounds them, and an input of 8,192 × 8,192 takes 17 GB in one layer of a ResNet.
_LARGEST_SIDE = 2048
_INTERPOLATIONS = frozenset({"nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"})
_CROP_MODES = frozenset({"center", "squash", "border"})


def admit_input_spec(values: Mapping[str, object], origin: str) -> InputSpec | None:
    """Return the input that a file describes by the fields of InputSpec; None if it is not valid.

    Shapes are bounded, numbers finite, and words must stand in a closed list.
    """
    shape, crop_pct = values.get("shape"), values.get("crop_pct", 1.0)
    mean, std = values.get("mean", []), values.get("std", [])
    interpolation, crop_mode = values.get("interpolation", "bilinear"), values.get("crop_mode", "center")
    if not _is_shape(shape) or not (_is_number(crop_pct) and 0.05 <= crop_pct <= 1):
        return None
    if not (_is_number_list(mean, shape[0]) and _is_number_list(std, shape[0])):
        return None
    if len(mean) != len(std) or not all(deviation > 0 for deviation in std):
        return None
    # Not every value can be looked up in a set.
    if not isinstance(interpolation, str) or not isinstance(crop_mode, str):
        return None
    if interpolation not in _INTERPOLATIONS or crop_mode not in _CROP_MODES:
        return None
    return InputSpec(
        tuple(shape),
        tuple(map(float, mean)),
        tuple(map(float, std)),
        interpolation,
        float(crop_pct),
        crop_mode,
        origin,
    )


def _is_shape(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or not 1 <= len(value) <= 4:
        return False
    if not all(type(side) is int and side > 0 for side in value):
        return False
    is_image = len(value) > 2
    return math.prod(value) <= _LARGEST_SIDE**2 and not (is_image and max(value) > _LARGEST_SIDE)


def _is_number_list(value: object, channels: int) -> TypeGuard[list[float]]:
    return isinstance(value, list) and len(value) in (0, channels) and all(map(_is_number, value))


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # JSON has integers of any length, which no float can hold. For NaN the comparison is false.
    return abs(value) < 1e6


def _list_argument_kinds(adapter: Adapter, name: str) -> Mapping[str, ArgumentKind]:
    rates = dict.fromkeys(adapter.rate_kwargs(name), Rate())
    # `file_arguments` is optional: adapters of third parties may not have it.
    list_kinds = getattr(adapter, "file_arguments", None)
    return rates if list_kinds is None else {**rates, **list_kinds(name)}


def _is_rate(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and 0 <= value <= 1)


def _describe_refusal(
    checkpoint: Checkpoint, recipe: Recipe, name: str, value: object, reason: NotAdmitted
) -> str:
    return (
        f"{checkpoint.shown_path}: expected arguments of {recipe.architecture} that a checkpoint "
        f"may set, found {name}={reprlib.repr(value)} ({reason}). If the file is right, give it "
        f"yourself: --model-kwargs {name}=…"
    )
