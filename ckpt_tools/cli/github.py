"""What GitHub Actions is told: annotations, and the summary of the step.

Annotations are workflow commands (``::error title=…::message``). The runner looks for them in both streams of a step
(``ScriptHandler.cs`` of actions/runner), so they go to stderr and stdout stays the result's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ckpt_tools.cli.printing import print_message, write_workflow_command
from ckpt_tools.plain_text import escape_controls, shorten_message
from ckpt_tools.redaction import without_fragments

_TITLE = "ckpt-fix"
_SHOWN = 9  # of each kind: GitHub shows ten of a step, and the last says how the step ended
AnnotationLevel = Literal["error", "warning"]


def annotate(kind: AnnotationLevel, message: str) -> None:
    """Show ``message`` on the page of the run; elsewhere do nothing."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        message = shorten_message(without_fragments(message))
        write_workflow_command(f"::{kind} title={_property(_TITLE)}::{_data(message)}")


def append_step_summary(markdown: str) -> None:
    """Append to the summary of the step, if there is one. A file that cannot be written is said and no failure."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    try:
        with Path(path).open("a", encoding="utf-8", errors="replace") as file:  # names may hold lone surrogates
            file.write(markdown + "\n")
    except OSError as error:
        message = f"GITHUB_STEP_SUMMARY={path}: the summary cannot be written ({error.strerror}); the run goes on."
        print_message(f"ckpt-fix: {message}")
        annotate("warning", message)


def report_failure(message: str, code: int) -> None:
    """An error, or the answer that there is nothing to do, as annotation and in the summary."""
    from ckpt_tools.report.ci_summary import failure_markdown

    annotate("warning" if code == 3 else "error", message)
    append_step_summary(failure_markdown(message, code))


def report_reestimation(facts: Mapping[str, Any]) -> None:
    """A finished ``bn-reestimate``, from its JSON: what it was worried about, and its report."""
    from ckpt_tools.report.ci_summary import checkpoint_warnings
    from ckpt_tools.report.pages.markdown_page import checkpoint_markdown

    for worry in checkpoint_warnings(facts):
        annotate("warning", worry)
    append_step_summary(checkpoint_markdown(facts))


def report_folder_run(records: Sequence[Mapping[str, Any]]) -> None:
    """A finished folder, from its records: which checkpoints failed, what to look at in the others, its report."""
    from ckpt_tools.report.ci_summary import error_without_path, folder_warnings
    from ckpt_tools.report.pages.markdown_page import folder_markdown

    failed = [record for record in records if record["status"] == "failed"]
    errors = [f"{one['checkpoint']}: {error_without_path(one)}" for one in failed]
    said: dict[AnnotationLevel, Sequence[str]] = {"error": errors, "warning": folder_warnings(records)}
    for kind, messages in said.items():
        for message in messages[:_SHOWN]:
            annotate(kind, message)
    append_step_summary(folder_markdown(records))


def report_evaluation(facts: Mapping[str, Any]) -> None:
    """A finished evaluation, or one whose gate said no, from its JSON: images that were skipped, and the metrics."""
    from ckpt_tools.report.ci_summary import skipped_image_warnings
    from ckpt_tools.report.pages.markdown_page import evaluation_markdown

    for worry in skipped_image_warnings(facts):
        annotate("warning", worry)
    append_step_summary(evaluation_markdown(facts))


def _data(text: str) -> str:
    """A message as @actions/core escapes it, so that it stays one line; other control characters are shown.

    https://github.com/actions/toolkit/blob/main/packages/core/src/command.ts
    """
    text = escape_controls(text, keep="\r\n\t").replace("##[", "## [")
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
