"""Reading the facts of a run, a plain dict as ``outcome_json`` makes it, without trusting that all are there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ckpt_tools.report.numbers import number

Facts = Mapping[str, Any]


def part(facts: Facts, name: str) -> Facts:
    """A mapping among the facts, empty where there is none."""
    found = facts.get(name)
    return found if isinstance(found, Mapping) else {}


def parts(facts: Facts, name: str) -> list[Facts]:
    """The mappings of a list among the facts."""
    found = facts.get(name)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, (list, tuple)) else []


def medians(facts: Facts) -> dict[str, float]:
    """The median ratio stored / new of every rewritten layer that was measured, by name."""
    found = {str(row.get("name")): number(part(row, "ratio").get("median")) for row in rewritten_layers(facts)}
    return {name: value for name, value in found.items() if value is not None}


def furthest(ratios: Mapping[str, float]) -> str | None:
    """The layer whose ratio is furthest from 1, up or down."""
    return max(ratios, key=lambda name: abs(math.log(max(ratios[name], 1e-30))), default=None)


def rewritten_layers(facts: Facts) -> list[Facts]:
    """The layers whose running variance is new."""
    return [row for row in parts(facts, "layers") if row.get("rewritten")]


def role_of(row: Facts) -> str:
    """What became of a layer, in one or two words."""
    if row.get("rewritten"):
        return "rewritten"
    if row.get("control"):
        return "control"
    return "not reached" if str(row.get("reason", "")).startswith("never reached") else "kept"
