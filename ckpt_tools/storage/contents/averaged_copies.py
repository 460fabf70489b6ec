"""Averaged copies of a model within one state dict, as training modules keep them: ``model.*`` and ``ema_model.*``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["AveragedCopy", "find_averaged_copies"]

_AVERAGED = frozenset({"ema", "swa", "averaged", "polyak"})
_MODELS = frozenset({"model", "module", "net", "network", "weights"})
_STATISTIC = "running_var"
_MOST = 64  # attributes that sound like averages, and places of a copy; a hostile file can have one in every key


@dataclass(frozen=True)
class AveragedCopy:
    """``root`` is the attribute that holds the averaging, ``prefix`` what stands before the copy's keys in it."""

    root: str
    prefix: str


def find_averaged_copies(state: Mapping[str, object]) -> list[AveragedCopy]:
    """The parts of a state dict whose name speaks of averages and whose keys and shapes occur once more elsewhere."""
    attributes = {tuple(key.split(".")[:-1][:2]) for key in state}
    roots = sorted({root for parts in attributes for root in _roots(parts)})
    if not roots or len(roots) > _MOST:
        return []
    shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    found = [
        AveragedCopy(root, prefix)
        for root in roots
        if (prefix := _copy_in(root, shapes)) is not None
    ]
    return [
        copy
        for copy in found
        if not any(copy.root != x.root and copy.root.startswith(x.root) for x in found)
    ]


def _roots(parts: tuple[str, ...]) -> list[str]:
    """``("model", "ema")`` → ``["model.ema."]``."""
    return [
        ".".join(parts[: i + 1]) + "." for i, part in enumerate(parts) if _sounds_averaged(part)
    ]


def _sounds_averaged(name: str) -> bool:
    tokens = set(re.split(r"[^a-z0-9]+", name.lower()))
    # A branch behind average pooling may be called avg as well.
    return not _AVERAGED.isdisjoint(tokens) or ("avg" in tokens and not _MODELS.isdisjoint(tokens))


def _copy_in(root: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    inside = [key for key in shapes if key.startswith(root)]
    outside = {key: shape for key, shape in shapes.items() if not key.startswith(root)}
    inner = Counter(root + key.removeprefix(root).partition(".")[0] + "." for key in inside)
    for prefix in (root, *(one for one, count in inner.items() if count * 2 >= len(inside))):
        part = {key.removeprefix(prefix): shapes[key] for key in inside if key.startswith(prefix)}
        if part and len(part) * 2 >= len(inside) and _occurs(part, outside):
            return prefix
    return None


def _occurs(part: Mapping[str, tuple[int, ...]], outside: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all of ``part`` stands elsewhere under one prefix, and all running variances there in it."""
    first = next(iter(part))
    places = [
        key.removesuffix(first) for key in outside if key == first or key.endswith("." + first)
    ][:_MOST]
    if bool(_statistics(part)) != bool(_statistics(outside)):
        return False
    return any(
        all(outside.get(place + key) == shape for key, shape in part.items())
        and _statistics(key.removeprefix(place) for key in outside if key.startswith(place))
        == _statistics(part)
        for place in places
    )


def _statistics(keys: Iterable[str]) -> set[str]:
    return {key for key in keys if key.rpartition(".")[2] == _STATISTIC}
