"""Which fields of a batch with names, ``{"image": …, "label": …}``, a model is called with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ckpt_tools.errors import DataError

__all__ = ["LABEL_FIELDS", "find_label_field", "select_arguments"]

LABEL_FIELDS = ("labels", "label", "targets", "target", "y")
"""The names that labels usually have, the first of which counts."""

_LABEL_NAME = re.compile(r"(?:.*_)?(labels?|targets?|class(es)?|class_(id|idx|index))|y")
_INPUT_FIELDS = (
    *("image", "images", "img", "imgs", "pixel_values", "x", "input", "inputs", "data"),
    *("features", "input_values", "input_features", "audio", "signal", "video", "input_ids"),
)


def select_arguments(model: nn.Module, fields: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments that a batch of named fields becomes.

    A model that can be called with all fields gets them all. Otherwise labels, and what is no tensor
    with two dimensions or more (numbers, names of files), are left out. What remains is passed by
    name, or, where the model takes a single tensor, as that tensor, whatever its field is called.
    Fields that fit no such rule all go to the model, whose error then names what it lacks.
    """
    signature = _forward_signature(model)
    unlabelled = {name: value for name, value in fields.items() if not _is_label(name)}
    inputs = {name: value for name, value in unlabelled.items() if _is_input(value)}
    for arguments in (fields, unlabelled, inputs):
        if signature is None or (arguments and _accepts(signature, arguments)):
            return (), dict(arguments)
    assert signature is not None
    input_name = _single_input_name(signature, inputs)
    if input_name is not None:
        return (inputs[input_name],), {}
    return (), dict(fields)


def find_label_field(names: Collection[str]) -> str | None:
    """Return which of these fields holds the labels; None if none does.

    Raises DataError if there are several ("fine_label", "coarse_label") and none has a usual name.
    """
    usual = next((name for name in LABEL_FIELDS if name in names), None)
    candidates = [name for name in names if _is_label(name)]
    if usual is None and len(candidates) > 1:
        raise DataError(
            f"a batch with several labels: {', '.join(map(str, candidates))}. Yield the one that the head "
            "is for as 'labels'."
        )
    return usual or next(iter(candidates), None)


def _forward_signature(model: nn.Module) -> inspect.Signature | None:
    """Return the signature of ``forward``; of a wrapper that passes everything on, of what it wraps."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # compiled code has none
        return None
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    children = list(model.children())
    if kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} and len(children) == 1:
        return _forward_signature(children[0])
    return signature


def _accepts(signature: inspect.Signature, fields: Mapping[str, Any]) -> bool:
    try:
        signature.bind(**fields)
    except TypeError:
        return False
    return True


def _is_label(name: object) -> bool:
    return isinstance(name, str) and _LABEL_NAME.fullmatch(name) is not None


def _is_input(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1


def _single_input_name(signature: inspect.Signature, inputs: Mapping[str, Any]) -> str | None:
    """Return which field is the input of a model that is called with one tensor; None if unclear."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [item for item in signature.parameters.values() if item.kind in positional]
    required = [item for item in parameters if item.default is inspect.Parameter.empty]
    if len(required) > 1 or not parameters:
        return None
    if len(inputs) == 1:
        return next(iter(inputs))
    # Masks and boxes may stand beside the image. A second parameter could be meant for them.
    if len(parameters) > 1:
        return None
    names = (parameters[0].name, *_INPUT_FIELDS)
    return next((name for name in names if name in inputs), None)
