"""Read the facts of a run, a dict as ``outcome_json`` makes it, of which any part may be missing.

The report of a folder is made from its manifest. An earlier version may have written that file, or
somebody may have edited it, so every value may be missing or of another type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ckpt_tools.report.number_format import finite_number

Facts = Mapping[str, Any]


def get_mapping(facts: Facts, name: str) -> Facts:
    """Return the mapping under a name, an empty one where there is none."""
    value = facts.get(name)
    return value if isinstance(value, Mapping) else {}


def get_list(facts: Facts, name: str) -> list[Any]:
    """Return the list under a name, an empty one where there is none."""
    value = facts.get(name)
    return list(value) if isinstance(value, (list, tuple)) else []


def get_mappings(facts: Facts, name: str) -> list[Facts]:
    """Return the mappings in the list under a name; items of another type are passed over."""
    return [item for item in get_list(facts, name) if isinstance(item, Mapping)]


def median_ratios(facts: Facts) -> dict[str, float]:
    """Return the median over channels of stored / new variance, by name of the rewritten layer.

    Layers that were not measured are left out.
    """
    ratios = {}
    for layer in rewritten_layers(facts):
        median = finite_number(get_mapping(layer, "ratio").get("median"))
        if median is not None:
            ratios[str(layer.get("name"))] = median
    return ratios


def most_changed_layer(ratios: Mapping[str, float]) -> str | None:
    """Return the name of the layer whose ratio is furthest from 1, up or down; None without layers.

    Half is as far from 1 as twice, so logarithms are compared.
    """
    # A ratio of 0, from a stored variance of 0, has no logarithm.
    return max(ratios, key=lambda name: abs(math.log(max(ratios[name], 1e-30))), default=None)


def rewritten_layers(facts: Facts) -> list[Facts]:
    """Return the layers whose running variance is new."""
    return [layer for layer in get_mappings(facts, "layers") if layer.get("rewritten")]


def other_names_sentence(record: Facts) -> str:
    """Return a sentence with the further names of a checkpoint's file, "" where it has none.

    Names in the checkpoint's own folder stand without the folder.
    """
    folder = PurePath(str(record.get("checkpoint"))).parent
    paths = [PurePath(str(path)) for path in get_list(record, "also_named")]
    names = [path.name if path.parent == folder else str(path) for path in paths]
    return f"One file, processed once, that is also named {', '.join(names)}." if names else ""


def layer_role(layer: Facts) -> str:
    """Return the role of a layer in a word or two: rewritten, control, not reached, or kept."""
    if layer.get("rewritten"):
        return "rewritten"
    if layer.get("control"):
        return "control"
    # The reason of a layer that no batch came through begins like this, whatever follows.
    return "not reached" if str(layer.get("reason", "")).startswith("never reached") else "kept"
