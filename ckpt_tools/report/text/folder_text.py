"""What became of a folder of checkpoints, as text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_tools.plain_text import escape_controls, one_line, shorten_message
from ckpt_tools.report.ci_summary import error_without_path
from ckpt_tools.report.columns import align_columns, count_text
from ckpt_tools.report.facts import get_mapping, get_mappings, median_ratios, other_names_sentence, rewritten_layers
from ckpt_tools.report.metric_facts import metrics_by_name
from ckpt_tools.report.number_format import integer_text, value_and_error


def folder_text(records: Sequence[Mapping[str, Any]], manifest: object) -> str:
    """A row for every checkpoint, then why some failed; ``records`` as the manifest has them."""
    rows = [("checkpoint", "", "architecture", "layers", "ratio", "images"), *map(_row, records)]
    scores = [_scores(record) for record in records]
    if any(map(any, scores)):
        rows = [(*row, *more) for row, more in zip(rows, [("error, %", "NLL"), *scores], strict=True)]
    lines = [align_columns(rows)]
    linked = [record for record in records if other_names_sentence(record)]
    if linked:
        lines += [
            "",
            *(f"{_clean(str(record.get('checkpoint')))}: {_clean(other_names_sentence(record))}" for record in linked),
        ]
    failed = [record for record in records if record.get("status") == "failed"]
    if failed:
        lines += ["", f"{count_text(len(failed), 'failure')}:"]
        lines += [f"  {one_line(record.get('checkpoint'))}: {_clean(error_without_path(record))}" for record in failed]
    replaced = [record for record in records if record.get("replaced")]
    if replaced:
        lines += ["", f"{count_text(len(replaced), 'damaged earlier output')}, made again:"]
        lines += [f"  {one_line(record.get('output'))}: {_clean(str(record['replaced']))}" for record in replaced]
    lines += ["", f"manifest: {one_line(manifest)}"]
    return "\n".join(lines)


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    report = get_mapping(record, "report")
    name, status = str(record.get("checkpoint")), str(record.get("status"))
    if not report:
        return (name, status, "", "", "", "")
    ratios = median_ratios(report).values()
    return (
        name,
        status,
        str(report.get("architecture")),
        f"{len(rewritten_layers(report))} of {len(get_mappings(report, 'layers'))}",
        f"{statistics.median(ratios):.3f}" if ratios else "",
        integer_text(get_mapping(report, "data").get("images")),
    )


def _scores(record: Mapping[str, Any]) -> tuple[str, str]:
    """Error and NLL before and after, of one that a gate refused as well."""
    found = metrics_by_name(get_mapping(record, "report") or record)
    return _change(found.get("error"), 2), _change(found.get("nll"), 4)


def _change(entries: tuple[object, object, object] | None, digits: int) -> str:
    before, after = (value_and_error(entry)[0] for entry in (entries or (None, None))[:2])
    return "" if before is None or after is None else f"{before:.{digits}f} → {after:.{digits}f}"


def _clean(text: str) -> str:
    """An error message of bounded size, its further lines indented."""
    return "\n    ".join(map(escape_controls, shorten_message(text).splitlines()))
