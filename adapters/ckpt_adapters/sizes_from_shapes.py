"""Class count and input channels, read off a state dict's shapes.

A skeleton is built with a number that occurs nowhere else. Where that number turns up in a shape, the
state dict holds the real one: this finds the head of any architecture without a list of heads.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_adapters.construct import Constructor, construct_skeleton
from ckpt_tools.errors import ArchitectureError

_UNUSUAL = 7919  # a prime, so that its multiples (anchors × classes) are unusual too

Shapes = Mapping[str, tuple[int, ...]]


def infer_size_argument(
    make: Constructor, kwargs: Mapping[str, object], keyword: str, axis: int, shapes: Shapes
) -> int | None:
    """The value of ``keyword`` that explains ``shapes`` along ``axis``.

    0 if the state dict has none of the tensors that carry it; None if they disagree, or if the constructor
    does not take the keyword.
    """
    try:
        model = construct_skeleton(make, {**kwargs, keyword: _UNUSUAL})
    except ArchitectureError:
        return None
    carriers = {
        key: tensor.shape[axis] // _UNUSUAL
        for key, tensor in model.state_dict().items()
        if hasattr(tensor, "shape") and len(tensor.shape) > axis and tensor.shape[axis] % _UNUSUAL == 0
    }
    carriers = {key: times for key, times in carriers.items() if times}
    if not carriers:
        return None
    found = {shapes[key][axis] / times for key, times in carriers.items() if key in shapes and len(shapes[key]) > axis}
    if not found:
        return 0
    value = found.pop()
    return int(value) if not found and value == int(value) else None
