"""Facts of a run whose every text is given by a caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Leaves that come from files and their names; the others are words of ours.
FOREIGN = {
    "name",
    "path",
    "spec",
    "reason",
    "op",
    "architecture",
    "format",
    "weights",
    "why",
    "transform",
    "command",
}


def filled(value: Any, give: Callable[[], str], key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: filled(item, give, name) for name, item in value.items()}
    if isinstance(value, list):
        return [filled(item, give, key) for item in value]
    if not isinstance(value, str) or key not in FOREIGN:
        return value
    return f"a{give()}z" if "/" not in value else f"/folder/a{give()}z"
