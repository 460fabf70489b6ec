"""Reads the class count and the input channels off a state dict's shapes.

A skeleton is built with a number that occurs nowhere else. Where that number turns up in a shape,
the state dict has the real one at the same place. This finds the head of any architecture without a
list of heads.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_adapters.construct import Constructor, construct_skeleton
from ckpt_tools.errors import ArchitectureError

_UNUSUAL = 7919  # A prime, so that its multiples (anchors × classes) are unusual, too.

Shapes = Mapping[str, tuple[int, ...]]


def infer_size_argument(
    make: Constructor, kwargs: Mapping[str, object], keyword: str, axis: int, shapes: Shapes
) -> int | None:
    """Return the value of `keyword` that explains `shapes`, where it shows along `axis` of weights.

    Returns 0 if the state dict has none of the tensors that depend on it, and None if they disagree
    or if the constructor does not take the keyword.
    """
    try:
        model = construct_skeleton(make, {**kwargs, keyword: _UNUSUAL})
    except ArchitectureError:
        return None
    # By key, how many times the value fits into the axis: a detector's head has classes × anchors.
    multiples: dict[str, int] = {}
    for key, tensor in model.state_dict().items():
        shape = getattr(tensor, "shape", ())
        if len(shape) > axis and shape[axis] and shape[axis] % _UNUSUAL == 0:
            multiples[key] = shape[axis] // _UNUSUAL
    if not multiples:
        return None
    values = {
        shapes[key][axis] / multiple
        for key, multiple in multiples.items()
        if key in shapes and len(shapes[key]) > axis
    }
    if not values:
        return 0
    value = values.pop()
    return int(value) if not values and value == int(value) else None
