"""Values as JSON can hold them, and the entries about the tool that every JSON has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ckpt_tools.plain_text import LONGEST_VALUE, shorten
from ckpt_tools.version import VERSION

TOOL = {"name": "ckpt-tools", "version": VERSION}


def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries on which the numbers depend."""
    versions = {}
    for name in ("torch", "torchvision", "timm", "safetensors", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def to_plain_values(value: object) -> object:
    """Return a value as JSON can hold it.

    JSON has no infinity and no NaN, so both become null. An object of a type that JSON does not
    know becomes its text, and long texts are shortened, since they come from other people's files.
    """
    if isinstance(value, Mapping):
        return {str(key): to_plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain_values(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, bool, type(None))) else shorten(str(value), LONGEST_VALUE)


def dataclass_to_dict(value: Any) -> dict[str, Any]:
    """Return a dataclass as a dict of plain values, and the dataclasses in it as well."""
    fields = to_plain_values(dataclasses.asdict(value))
    assert isinstance(fields, dict)
    return fields
