"""The command that repeats a run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping

from ckpt_tools.identify.model_kwargs import parse_model_kwargs
from ckpt_tools.jobs.plan import Plan
from ckpt_tools.location import Location
from ckpt_tools.redaction import without_secrets

_NAMES = {"architecture": "arch"}  # fields whose option has another name


def repeating_command(plan: Plan) -> str:
    """What to type to get the same bytes again: what was asked for, with the batch size that came out of it.

    Credentials and query strings of URLs are left out.
    """
    request = dataclasses.replace(plan.request, batch_size=plan.batch_size)
    checkpoint = str(request.checkpoint)
    checkpoint = f"./{checkpoint}" if checkpoint.startswith("-") else checkpoint
    return shlex.join(without_secrets(["ckpt-fix", "bn-reestimate", checkpoint, *_options(request)]))


def _options(said: object) -> Iterator[str]:
    """Every field that is not what it is by default, as the option of its name."""
    for field in dataclasses.fields(said):  # type: ignore[arg-type]
        value = getattr(said, field.name)
        if field.name == "checkpoint" or value == _default(field):
            continue
        option = "--" + _NAMES.get(field.name, field.name).replace("_", "-")
        if dataclasses.is_dataclass(value) and not isinstance(value, Location):
            yield from _options(value)
        elif isinstance(value, Mapping):
            for name, item in value.items():
                yield from (option, f"{name}={_literal(item)}")
        elif isinstance(value, bool):
            yield option
        else:
            yield from (option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value))


def _default(field: dataclasses.Field[object]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _literal(value: object) -> str:
    """A text as it is where it is read back as the same text, everything else as Python writes it."""
    plain = isinstance(value, str) and parse_model_kwargs([f"name={value}"])["name"] == value
    return str(value) if plain else repr(value)
