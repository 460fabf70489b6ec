"""Reading the facts of a run, a plain dict as ``outcome_json`` makes it, without trusting that all are there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ckpt_tools.report.number_format import finite_number

Facts = Mapping[str, Any]


def get_mapping(facts: Facts, name: str) -> Facts:
    """A mapping among the facts, empty where there is none."""
    found = facts.get(name)
    return found if isinstance(found, Mapping) else {}


def get_mappings(facts: Facts, name: str) -> list[Facts]:
    """The mappings of a list among the facts."""
    found = facts.get(name)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, (list, tuple)) else []


def median_ratios(facts: Facts) -> dict[str, float]:
    """The median ratio stored / new of every rewritten layer that was measured, by name."""
    found = {
        str(row.get("name")): finite_number(get_mapping(row, "ratio").get("median")) for row in rewritten_layers(facts)
    }
    return {name: value for name, value in found.items() if value is not None}


def most_changed_layer(ratios: Mapping[str, float]) -> str | None:
    """The layer whose ratio is furthest from 1, up or down."""
    return max(ratios, key=lambda name: abs(math.log(max(ratios[name], 1e-30))), default=None)


def rewritten_layers(facts: Facts) -> list[Facts]:
    """The layers whose running variance is new."""
    return [row for row in get_mappings(facts, "layers") if row.get("rewritten")]


def other_names_sentence(record: Facts) -> str:
    """The further names of a checkpoint's file in a sentence, short for those in its own folder; "" without any."""
    found = record.get("also_named")
    paths = [PurePath(str(path)) for path in found] if isinstance(found, (list, tuple)) else []
    folder = PurePath(str(record.get("checkpoint"))).parent
    names = [path.name if path.parent == folder else str(path) for path in paths]
    return f"One file, processed once, that is also named {', '.join(names)}." if names else ""


def layer_role(row: Facts) -> str:
    """What became of a layer, in one or two words."""
    if row.get("rewritten"):
        return "rewritten"
    if row.get("control"):
        return "control"
    return "not reached" if str(row.get("reason", "")).startswith("never reached") else "kept"
