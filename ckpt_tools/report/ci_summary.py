"""What a CI step is told beside the report: failures as Markdown, and what to look at though all went well."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_NAMED = 5  # of many things, before "…"
_OUTCOMES = {2: "usage", 3: "nothing to do", 4: "a check said no", 130: "interrupted"}


def failure_markdown(message: str, code: int) -> str:
    """An error message under a title that tells the exit code."""
    return f"### ckpt-fix: {_OUTCOMES.get(code, 'failed')} (exit code {code})\n\n{_cell(message)}\n"


def checkpoint_warnings(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What went well enough to be written, and should be looked at all the same."""
    found = [*_skipped_warnings(facts["data"]["skipped"], "sample"), *skipped_image_warnings(facts)]
    data, controls = facts["data"]["agreement"], facts["controls"]
    if data["verdict"] == "disagree":
        found.append(f"the data does not look like the training data and was used all the same: {data['cause']}")
    if controls["verdict"] == "disagree":
        found.append("control layers disagree with the data, which was used all the same")
    if (data["verdict"], controls["verdict"]) == ("none", "none"):
        found.append(f"nothing vouches for the data: {data['cause']}; no control layer ({controls['reason']})")
    return tuple(found)


def folder_warnings(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The same of all checkpoints of a run that were done in it, each with its name."""
    done = [record for record in records if record["status"] == "done"]
    return tuple(
        f"{record['checkpoint']}: {worry}" for record in done for worry in checkpoint_warnings(record["report"])
    )


def error_without_path(record: Mapping[str, Any]) -> str:
    """What went wrong with a checkpoint of many, without its path, with which most messages begin."""
    return str(record.get("error")).removeprefix(f"{record.get('checkpoint')}: ")


def skipped_image_warnings(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Labelled images that no metric has seen."""
    return _skipped_warnings((facts.get("metrics") or {}).get("skipped") or (), "labelled image")


def _skipped_warnings(skipped: Sequence[Mapping[str, Any]], noun: str) -> tuple[str, ...]:
    if not skipped:
        return ()
    names = _list_items(f"{item['name']} ({item['reason']})" for item in skipped)
    return (f"{len(skipped)} unreadable {noun}(s) skipped: {names}",)


def _list_items(items: Iterable[str]) -> str:
    every = list(items)
    return ", ".join(every[:_NAMED]) + (", …" if len(every) > _NAMED else "")


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor becomes markup."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    for character in "\\|`*_[]~":
        escaped = escaped.replace(character, f"&#{ord(character)};")
    return escaped
