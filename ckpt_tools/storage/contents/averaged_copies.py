"""Averaged copies of a model within one state dict.

Training modules keep them beside the model itself: ``model.*`` and ``ema_model.*``. Some register
them as buffers, whose names may have no dots (``find_flattened_copy``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["AveragedCopy", "FlattenedCopy", "find_averaged_copies", "find_flattened_copy"]

_AVERAGED = frozenset({"ema", "swa", "averaged", "polyak"})
_MODELS = frozenset({"model", "module", "net", "network", "weights"})
_STATISTIC = "running_var"
# Bounds attributes that sound like averages, and places of a copy: a hostile file can have one in
# every key.
_MAX_CANDIDATES = 64


@dataclass(frozen=True)
class AveragedCopy:
    """An averaged copy of a model in a state dict.

    ``root`` is the prefix of the attribute that holds the averaging, with its counters; ``prefix``
    is that of the copy.
    """

    root: str
    prefix: str


def find_averaged_copies(state: Mapping[str, object]) -> list[AveragedCopy]:
    """Return the averaged copies in a state dict.

    A copy's attribute has a name that speaks of averages, and its keys and shapes occur once more
    elsewhere.
    """
    attributes = {tuple(key.split(".")[:-1][:2]) for key in state}
    roots = sorted({root for parts in attributes for root in _averaged_roots(parts)})
    if not roots or len(roots) > _MAX_CANDIDATES:
        return []
    shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    copies = [
        AveragedCopy(root, prefix)
        for root in roots
        if (prefix := _find_copy_prefix(root, shapes)) is not None
    ]
    # An average of an average is a part of the outer one.
    return [
        copy
        for copy in copies
        if not any(copy.root != x.root and copy.root.startswith(x.root) for x in copies)
    ]


@dataclass(frozen=True)
class FlattenedCopy:
    """A copy of parameters in buffers, whose names are those of the parameters without dots.

    ``buffers`` maps each buffer's key to that of its parameter, and ``counters`` are the other keys
    beside them. ``root`` is the beginning of their keys. ``averaged`` says whether the average is in
    the buffers, or in the parameters themselves.
    """

    root: str
    buffers: Mapping[str, str]
    counters: tuple[str, ...]
    averaged: bool


def find_flattened_copy(state: Mapping[str, object]) -> FlattenedCopy | None:
    """Return the copy of parameters that mmcv 1 or LitEma has registered as buffers, if any.

    mmcv writes ``ema_conv1_weight`` for ``conv1.weight``, and has swapped the two when it saves at
    the end of an epoch. LitEma of latent diffusion writes ``model_ema.conv1weight``.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    for root, dot, counters, averaged in (
        ("ema_", "_", (), False),
        ("model_ema.", "", ("model_ema.decay", "model_ema.num_updates"), True),
    ):
        buffers = [key for key in shapes if key.startswith(root) and key not in counters]
        if not buffers or any("." in key.removeprefix(root) for key in buffers):
            continue
        keys = [key for key in shapes if not key.startswith(root)]
        # LitEma averages the part of a training module that is called `model`.
        for prefix in ("", "model."):
            names = {root + key.removeprefix(prefix).replace(".", dot): key for key in keys}
            if all(shapes[key] == shapes.get(names.get(key, "")) for key in buffers):
                present = tuple(key for key in counters if key in state)
                return FlattenedCopy(root, {key: names[key] for key in buffers}, present, averaged)
    return None


def _averaged_roots(parts: tuple[str, ...]) -> list[str]:
    """Return the prefixes in a path that speak of averages.

    ``("model", "ema")`` gives ``["model.ema."]``.
    """
    return [".".join(parts[: i + 1]) + "." for i, part in enumerate(parts) if _sounds_averaged(part)]


def _sounds_averaged(name: str) -> bool:
    tokens = set(re.split(r"[^a-z0-9]+", name.lower()))
    # A branch behind average pooling may be called avg as well.
    return not _AVERAGED.isdisjoint(tokens) or ("avg" in tokens and not _MODELS.isdisjoint(tokens))


def _find_copy_prefix(root: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    inside = [key for key in shapes if key.startswith(root)]
    outside = {key: shape for key, shape in shapes.items() if not key.startswith(root)}
    # The copy may stand below the root, as in ``ema.module.*`` with counters beside ``module``.
    inner = Counter(root + key.removeprefix(root).partition(".")[0] + "." for key in inside)
    for prefix in (root, *(name for name, count in inner.items() if count * 2 >= len(inside))):
        part = {key.removeprefix(prefix): shapes[key] for key in inside if key.startswith(prefix)}
        if part and len(part) * 2 >= len(inside) and _occurs(part, outside):
            return prefix
    return None


def _occurs(part: Mapping[str, tuple[int, ...]], outside: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether all of ``part`` stands outside under one prefix.

    The running variances under that prefix must all be in ``part``: otherwise it is a copy of
    another model.
    """
    first = next(iter(part))
    places = [key.removesuffix(first) for key in outside if key == first or key.endswith("." + first)][
        :_MAX_CANDIDATES
    ]
    if bool(_running_variances(part)) != bool(_running_variances(outside)):
        return False
    for place in places:
        inside = (key.removeprefix(place) for key in outside if key.startswith(place))
        same_shapes = all(outside.get(place + key) == shape for key, shape in part.items())
        if same_shapes and _running_variances(inside) == _running_variances(part):
            return True
    return False


def _running_variances(keys: Iterable[str]) -> set[str]:
    return {key for key in keys if key.rpartition(".")[2] == _STATISTIC}
