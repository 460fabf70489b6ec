"""What names in other people's files can be, and what terminals and CI runners do with them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st

FRAGMENTS = (
    *(
        "::error::x",
        "::add-mask::x",
        "  ::set-output name=a::b",
        "\t::debug::",
        "::stop-commands::",
        ":",
        "::",
        "%0A",
        "section_start:1:x\r\x1b[0K",
    ),
    *(
        "##[add-mask]x",
        "##[error]x",
        "##vso[task.setvariable variable=a]b",
        "##teamcity[buildStop]",
        "##",
        "[",
        "]",
    ),
    *(
        "\n",
        "\r",
        "\r\n",
        "\v",
        "\f",
        "\x85",
        "\u2028",
        "\u2029",
        "\n::error::x",
        "\r::error::x",
        "\u2028##[error]x",
    ),
    *(
        "\x1b[2J",
        "\x1b]0;title\x07",
        "\x9b31m",
        "\x7f",
        "\0",
        "\b",
        "\u202e",
        "\u2066",
        "\u200f",
        "\ufeff",
        "\u3000",
    ),
    *("\udcff", "\U000e0001", "é", "漢字", " ", "/", "..", "a.pt", "'", '"', "\\", "$(x)", "`x`", "<b>", "|"),
)
names = (
    st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), min_size=1, max_size=5)
    .map("".join)
    .filter(bool)
)


def lines(output: str) -> list[str]:
    """As the runner reads them, and as a terminal or an editor may."""
    return [part for line in re.split(r"\r\n|\r|\n", output) for part in (line, *line.splitlines())]


def is_command(line: str) -> bool:
    """Whether a CI runner obeys a line, after its sources.

    GitHub: TryParseV2, then TryParse, of actions/runner, src/Runner.Common/ActionCommand.cs,
    for any name of a command.
    Azure Pipelines: TryParse of microsoft/azure-pipelines-agent,
    src/Microsoft.VisualStudio.Services.Agent/Command.cs.
    """
    trimmed = line.lstrip()
    if trimmed.startswith("::") and "::" in trimmed[2:]:
        return True
    return any(
        (start := line.find(mark)) >= 0 and "]" in line[start:] for mark in ("##[", "##vso[", "##teamcity[")
    )


def is_own(line: str) -> bool:
    """Whether a line is an annotation of ckpt-fix, whose escaped data holds neither line nor property."""
    return re.fullmatch(r"::(error|warning) title=ckpt-fix::.*", line) is not None


def poisoned(value: Any, give: Callable[[], str], hint: Any = None) -> Any:
    """A copy of one of our objects, every text in it hostile unless its type names the texts it may be."""
    if isinstance(value, str):
        return value if _is_literal(hint) else give()
    if isinstance(value, Path):
        return Path(give() or "x")
    if isinstance(value, Mapping):
        key_hint, value_hint = (*typing.get_args(hint), None, None)[:2]
        return {
            poisoned(key, give, key_hint): poisoned(item, give, value_hint) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        item_hint = (*typing.get_args(hint), None)[0]
        return type(value)(poisoned(item, give, item_hint) for item in value)
    if isinstance(value, Exception):
        return type(value)(give())
    if not type(value).__module__.startswith("ckpt_tools") or not hasattr(value, "__dict__"):
        return value
    hints = _hints(type(value)) if dataclasses.is_dataclass(value) else {}
    other = copy.copy(value)
    for name, item in vars(value).items():
        if name.endswith("sha256"):  # made by us
            continue
        object.__setattr__(other, name, poisoned(item, give, hints.get(name)))
    return other


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal or any(map(_is_literal, typing.get_args(hint)))


def _hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, without those that are imported for type checkers only."""
    hints = {}
    for field in dataclasses.fields(kind):
        with contextlib.suppress(NameError):
            hints[field.name] = eval(
                str(field.type), vars(sys.modules[kind.__module__])
            )  # our own annotations
    return hints
