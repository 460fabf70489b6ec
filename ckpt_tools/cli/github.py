"""What GitHub Actions is told: annotations, and the summary of the step.

Annotations are workflow commands (``::error title=…::message``). The runner looks for them in both streams of a step
(``ScriptHandler.cs`` of actions/runner), so they go to stderr and stdout stays the result's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click

_TITLE = "ckpt-fix"


def annotate(kind: Literal["error", "warning"], message: str) -> None:
    """Show ``message`` on the page of the run; elsewhere do nothing."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        click.echo(f"::{kind} title={_property(_TITLE)}::{_data(message)}", err=True)


def summarise(markdown: str) -> None:
    """Append to the summary of the step, if there is one. A file that cannot be written is said and no failure."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(markdown + "\n")
    except OSError as error:
        message = f"GITHUB_STEP_SUMMARY={path}: the summary cannot be written ({error.strerror}); the run goes on."
        click.echo(f"ckpt-fix: {message}", err=True)
        annotate("warning", message)


def fail(message: str, code: int) -> None:
    """An error, or the answer that there is nothing to do, as annotation and in the summary."""
    from ckpt_tools.report.summary import failure_markdown

    annotate("warning" if code == 3 else "error", message)
    summarise(failure_markdown(message, code))


def done(facts: Mapping[str, Any]) -> None:
    """A finished ``bn-reestimate``, from its JSON: what it was worried about, and its report."""
    from ckpt_tools.report.markdown import checkpoint_markdown
    from ckpt_tools.report.summary import worries

    for worry in worries(facts):
        annotate("warning", worry)
    summarise(checkpoint_markdown(facts))


def _data(text: str) -> str:
    """A message, as @actions/core escapes it."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
