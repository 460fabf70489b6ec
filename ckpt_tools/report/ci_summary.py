"""What a CI step shows beside the report: failures, and warnings about runs that ended well.

This module is imported when a command fails, also by usage errors, which must not wait for torch.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_tools.report.columns import list_names

# Exit codes; 1 is a failure of any other kind.
_OUTCOMES = {2: "usage", 3: "nothing to do", 4: "a check said no", 130: "interrupted"}


def failure_markdown(message: str, code: int) -> str:
    """Return an error message as Markdown, under a title that names the exit code."""
    title = f"### ckpt-fix: {_OUTCOMES.get(code, 'failed')} (exit code {code})"
    return f"{title}\n\n{_escape_markup(message)}\n"


def checkpoint_warnings(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a user should look at although the output was written, one sentence each.

    ``facts`` is the dict of ``outcome_json``. A file that could not be read, signs that a
    correction does more than it should, a doubt about the data, a verdict that ``--force``
    overruled, and data about which no check says anything are worth a warning.
    """
    data, controls = facts["data"]["agreement"], facts["controls"]
    mismatch = facts.get("verdict") or {}  # an earlier version did not write it
    warnings = list(facts.get("warnings") or ())
    warnings += _skipped_warnings(facts["data"]["skipped"], "sample")
    warnings += skipped_image_warnings(facts)
    used = "it was used all the same"
    if facts.get("estimator") == "ratio":
        used = "this estimator does not depend on it"
    if data["verdict"] in ("disagree", "refuse"):
        warnings.append(f"the data does not look like the training data; {used}: {data['cause']}")
    elif "doubt" in (mismatch.get("level"), data["verdict"]):
        seen = mismatch["reason"] if mismatch.get("level") == "doubt" else data["cause"]
        warnings.append(f"the data differs from what the BN layers remember: {seen}")
    if controls["verdict"] in ("doubt", "disagree"):
        warnings.append(f"{controls['reason'] or 'control layers disagree with the data'}; {used}")
    # One verdict is enough: each of the checks may have nothing to compare. Nobody expects one
    # about inputs that were made up.
    made_up = facts["data"].get("kind") == "synthetic"
    if not made_up and {data["verdict"], controls["verdict"], mismatch.get("level", "none")} == {"none"}:
        no_control = f"no control layer ({controls['reason']})"
        warnings.append(f"nothing vouches for the data: {data['cause']}; {no_control}")
    return tuple(warnings)


def folder_warnings(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the warnings of all checkpoints that this run has done, each behind its path."""
    return tuple(
        f"{record['checkpoint']}: {warning}"
        for record in records
        if record["status"] == "done"
        for warning in checkpoint_warnings(record["report"])  # of "done before" an earlier run warned
    )


def error_without_path(record: Mapping[str, Any]) -> str:
    """Return the error of a checkpoint in a folder without the path with which most messages begin.

    The tables name the checkpoint already, and a long path would hide what went wrong.
    """
    return str(record.get("error")).removeprefix(f"{record.get('checkpoint')}: ")


def skipped_image_warnings(facts: Mapping[str, Any]) -> list[str]:
    """Return a warning if labelled images could not be read, so that no metric counts them."""
    metrics = facts.get("metrics") or {}
    return _skipped_warnings(metrics.get("skipped") or (), "labelled image")


def _skipped_warnings(skipped: Sequence[Mapping[str, Any]], noun: str) -> list[str]:
    if not skipped:
        return []
    names = list_names(f"{item['name']} ({item['reason']})" for item in skipped)
    return [f"{len(skipped)} unreadable {noun}(s) skipped: {names}"]


def _escape_markup(text: str) -> str:
    """Return the text on one line, with entities for what could be markup in Markdown or HTML.

    ``html.escape`` alone would leave the characters that Markdown gives a meaning to.
    """
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    for character in "\\|`*_[]~":
        escaped = escaped.replace(character, f"&#{ord(character)};")
    return escaped
