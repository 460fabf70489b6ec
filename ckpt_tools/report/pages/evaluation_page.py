"""The page of an evaluation: metrics of one checkpoint, or of two on the same images."""

from __future__ import annotations

from pathlib import PurePath

from ckpt_tools.redaction import presentable
from ckpt_tools.report.facts import Facts, get_mapping
from ckpt_tools.report.number_format import integer_text
from ckpt_tools.report.page_content import Page, join_subtitle
from ckpt_tools.report.pages.flagged_images import flagged_section
from ckpt_tools.report.pages.metric_tables import metrics_section


def evaluation_page(facts: Facts) -> Page:
    """Return the page of an evaluation from the facts of ``evaluation_json`` or ``refusal_json``.

    The latter are those of a ``bn-reestimate`` whose gate was not passed.
    """
    facts = presentable(facts)
    metrics, source, before = (get_mapping(facts, name) for name in ("metrics", "checkpoint", "before"))
    path = str(source.get("path") or "a model")
    # At the top for a refused gate, beside the path for an evaluation.
    architecture = facts.get("architecture") or source.get("architecture")
    comparison = f", and {before['path']} before" if before.get("path") else ""
    sections = (metrics_section(facts), flagged_section(facts) if metrics.get("skipped") else None)
    return Page(
        title=PurePath(path).name or path,
        subtitle=join_subtitle(architecture, source.get("format")),
        headline=f"Evaluated on {integer_text(metrics.get('images'))} labelled images{comparison}.",
        tone="bad" if get_mapping(metrics, "gate").get("passed") is False else "",
        sections=tuple(section for section in sections if section is not None),
    )
