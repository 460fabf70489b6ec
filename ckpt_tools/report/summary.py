"""A few lines of Markdown for the summary of a CI step, from the JSON of a ``bn-reestimate``."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

_NAMED = 5  # of many things, before "…"
_VERDICTS = {"agree": "agrees with the BN statistics", "disagree": "disagrees (forced)", "none": "not compared"}
_OUTCOMES = {2: "usage", 3: "nothing to do", 4: "a check said no", 130: "interrupted"}


def summary_markdown(facts: Mapping[str, Any]) -> str:
    """What was done, as a table; worries below it."""
    rows = [
        ("checkpoint", _code(facts["checkpoint"]["path"])),
        ("architecture", _code(facts["architecture"])),
        ("rewritten", _rewritten(facts)),
        ("stored/new variance", _ratios(facts["layers"])),
        ("standard error", _errors(facts["layers"])),
        ("images", f"{facts['data']['images']:,} of {_code(facts['data']['spec'])}"),
        ("data", _VERDICTS[facts["data"]["agreement"]["verdict"]]),
        ("controls", _controls(facts["controls"])),
        ("output", f"{_code(facts['output']['path'])}<br>sha256 {_code(facts['output']['sha256'])}"),
    ]
    table = [f"| {name} | {value} |" for name, value in rows]
    warned = [f"\n**Warning:** {_cell(worry)}" for worry in worries(facts)]
    return "\n".join(["### ckpt-fix bn-reestimate", "", "| | |", "|---|---|", *table, *warned]) + "\n"


def failure_markdown(message: str, code: int) -> str:
    """An error message under a title that tells the exit code."""
    return f"### ckpt-fix: {_OUTCOMES.get(code, 'failed')} (exit code {code})\n\n{_cell(message)}\n"


def worries(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What went well enough to be written, and should be looked at all the same."""
    found = []
    if skipped := facts["data"]["skipped"]:
        names = _listed(f"{item['name']} ({item['reason']})" for item in skipped)
        found.append(f"{len(skipped)} unreadable sample(s) skipped: {names}")
    data, controls = facts["data"]["agreement"], facts["controls"]
    if data["verdict"] == "disagree":
        found.append(f"the data does not look like the training data and was used all the same: {data['cause']}")
    if controls["verdict"] == "disagree":
        found.append("control layers disagree with the data, which was used all the same")
    if (data["verdict"], controls["verdict"]) == ("none", "none"):
        found.append(f"nothing vouches for the data: {data['cause']}; no control layer ({controls['reason']})")
    return tuple(found)


def _rewritten(facts: Mapping[str, Any]) -> str:
    layers = facts["layers"]
    count = sum(layer["rewritten"] for layer in layers)
    return f"{count} of {len(layers)} BN layers ({_cell(facts['estimator'])}, {_cell(facts['statistics'])})"


def _controls(controls: Mapping[str, Any]) -> str:
    count = len(controls["names"])
    return f"{count} layer(s) {_cell(controls['verdict'])}" if count else "none"


def _ratios(layers: Iterable[Mapping[str, Any]]) -> str:
    """Medians of the layers: the middle one, and both ends with their layers."""
    found = sorted(
        (layer["ratio"]["median"], layer["name"]) for layer in layers if layer["rewritten"] and layer["ratio"]
    )
    if not found:
        return "not measured"
    (low, first), (high, last) = found[0], found[-1]
    middle = statistics.median(ratio for ratio, _ in found)
    return f"{middle:.3f} in the median layer; {low:.3f} in {_code(first)} to {high:.3f} in {_code(last)}"


def _errors(layers: Iterable[Mapping[str, Any]]) -> str:
    found = [error for layer in layers if layer["rewritten"] and (error := layer["relative_standard_error"])]
    middle = [error["median"] for error in found if error["median"] is not None]
    worst = [error["max"] for error in found if error["max"] is not None]
    if not middle or not worst:
        return "unknown"
    return f"{statistics.median(middle):.1%} in the median layer, {max(worst):.1%} in the worst channel"


def _listed(items: Iterable[str]) -> str:
    every = list(items)
    return ", ".join(every[:_NAMED]) + (", …" if len(every) > _NAMED else "")


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor becomes markup."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    for character in "\\|`*_[]~":
        escaped = escaped.replace(character, f"&#{ord(character)};")
    return escaped


def _code(text: str) -> str:
    return f"<code>{_cell(text)}</code>"
