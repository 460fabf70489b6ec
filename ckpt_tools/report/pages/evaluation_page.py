"""The page of an evaluation: metrics of one checkpoint, or of two on the same images."""

from __future__ import annotations

from pathlib import PurePath

from ckpt_tools.redaction import presentable
from ckpt_tools.report.facts import Facts, get_mapping
from ckpt_tools.report.number_format import integer_text
from ckpt_tools.report.page_content import Page
from ckpt_tools.report.pages.flagged_images import flagged_section
from ckpt_tools.report.pages.metric_tables import metrics_section


def evaluation_page(facts: Facts) -> Page:
    """How good a checkpoint is, from the facts of ``evaluation_json`` or ``refusal_json``."""
    facts = presentable(facts)
    found, source, before = (
        get_mapping(facts, "metrics"),
        get_mapping(facts, "checkpoint"),
        get_mapping(facts, "before"),
    )
    path = str(source.get("path") or "a model")
    architecture = facts.get("architecture") or source.get("architecture")
    than = f", and {before['path']} before" if before.get("path") else ""
    sections = (metrics_section(facts), flagged_section(facts) if found.get("skipped") else None)
    return Page(
        title=PurePath(path).name or path,
        subtitle=" · ".join(str(said) for said in (architecture, source.get("format")) if said),
        headline=f"Evaluated on {integer_text(found.get('images'))} labelled images{than}.",
        tone="bad" if get_mapping(found, "gate").get("passed") is False else "",
        sections=tuple(section for section in sections if section is not None),
    )
