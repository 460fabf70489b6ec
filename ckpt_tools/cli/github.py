"""Reports to GitHub Actions: annotations, and the summary of the step.

Annotations are workflow commands (``::error title=…::message``). The runner looks for them in both
streams of a step (``ScriptHandler.cs`` of actions/runner), so they go to stderr and stdout stays
the result's.
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
        write_workflow_command(f"::{kind} title={_escape_property(_TITLE)}::{_escape_data(message)}")


def append_step_summary(markdown: str) -> None:
    """Append to the summary of the step, if there is one.

    A summary that cannot be written is a warning, and no failure.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    try:
        # Names may hold lone surrogates, which UTF-8 cannot encode.
        with Path(path).open("a", encoding="utf-8", errors="replace") as file:
            file.write(markdown + "\n")
    except OSError as error:
        message = (
            f"GITHUB_STEP_SUMMARY={path}: the summary cannot be written ({error.strerror}); the run goes on."
        )
        print_message(f"ckpt-fix: {message}")
        annotate("warning", message)


def report_failure(message: str, code: int) -> None:
    """Report an error, or that there is nothing to do (code 3), as an annotation and in the
    summary.
    """
    from ckpt_tools.report.ci_summary import failure_markdown

    annotate("warning" if code == 3 else "error", message)
    append_step_summary(failure_markdown(message, code))


def report_reestimation(facts: Mapping[str, Any]) -> None:
    """Report a finished ``bn-reestimate`` from its JSON: warnings, and a page as the summary."""
    from ckpt_tools.report.ci_summary import checkpoint_warnings
    from ckpt_tools.report.pages.markdown_page import checkpoint_markdown

    for message in checkpoint_warnings(facts):
        annotate("warning", message)
    append_step_summary(checkpoint_markdown(facts))


def report_folder_run(records: Sequence[Mapping[str, Any]]) -> None:
    """Report a finished folder run from its records.

    The annotations say which checkpoints failed, and what to look at in the others.
    """
    from ckpt_tools.report.ci_summary import error_without_path, folder_warnings
    from ckpt_tools.report.pages.markdown_page import folder_markdown

    errors = [
        f"{record['checkpoint']}: {error_without_path(record)}"
        for record in records
        if record["status"] == "failed"
    ]
    for message in errors[:_SHOWN]:
        annotate("error", message)
    for message in folder_warnings(records)[:_SHOWN]:
        annotate("warning", message)
    append_step_summary(folder_markdown(records))


def report_evaluation(facts: Mapping[str, Any]) -> None:
    """Report an evaluation, also one whose gate was not passed, from its JSON.

    The annotations name images that were skipped; the summary holds the metrics.
    """
    from ckpt_tools.report.ci_summary import skipped_image_warnings
    from ckpt_tools.report.pages.markdown_page import evaluation_markdown

    for message in skipped_image_warnings(facts):
        annotate("warning", message)
    append_step_summary(evaluation_markdown(facts))


def _escape_data(text: str) -> str:
    """Escape a message as @actions/core does, so that it stays one line.

    Other control characters become visible.
    https://github.com/actions/toolkit/blob/main/packages/core/src/command.ts
    """
    # `##[` begins a command in an older syntax that runners still obey.
    text = escape_controls(text, keep="\r\n\t").replace("##[", "## [")
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape_data(text).replace(":", "%3A").replace(",", "%2C")
