"""The command that repeats a run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping

from ckpt_tools.identify.model_kwargs import parse_model_kwargs
from ckpt_tools.jobs.plan import Plan
from ckpt_tools.location import Location
from ckpt_tools.redaction import without_secrets

_OPTION_NAMES = {"architecture": "arch"}  # fields whose option has another name


def repeating_command(plan: Plan) -> str:
    """Return the command line that makes the same bytes again.

    It holds what the user asked for, and the batch size that the plan chose: the default depends on
    the free memory, and another batch size gives other variances. Credentials and query strings of
    URLs are left out.
    """
    reading = dataclasses.replace(plan.request.reading, batch_size=plan.batch_size)
    request = dataclasses.replace(plan.request, reading=reading)
    checkpoint = str(request.checkpoint)
    if checkpoint.startswith("-"):  # click would take the name for an option
        checkpoint = f"./{checkpoint}"
    return shlex.join(without_secrets(["ckpt-fix", "bn-reestimate", checkpoint, *_options(request)]))


def _options(settings: object) -> Iterator[str]:
    """Yield the option and the value of every field that does not have its default.

    An option is named like its field. A mapping or texts give the option once for every entry, a flag has
    no value, and a dataclass within the request stands for the options of its own fields.
    """
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        # The checkpoint is an argument, not an option.
        if field.name == "checkpoint" or value == _default(field):
            continue
        option = "--" + _OPTION_NAMES.get(field.name, field.name).replace("_", "-")
        if dataclasses.is_dataclass(value) and not isinstance(value, Location):
            yield from _options(value)
        elif isinstance(value, Mapping):
            for name, item in value.items():
                yield from (option, f"{name}={_literal(item)}")
        elif isinstance(value, tuple) and all(isinstance(item, str) for item in value):
            for item in value:
                yield from (option, item)
        elif isinstance(value, bool):
            yield option
        else:
            yield from (option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value))


def _default(field: dataclasses.Field[object]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _literal(value: object) -> str:
    """Return a value as ``--model-kwargs`` reads it back.

    A text like ``1`` or ``None`` would come back as a number or as None, so it is quoted; others
    stay as they are.
    """
    if isinstance(value, str) and parse_model_kwargs([f"name={value}"])["name"] == value:
        return value
    return repr(value)
