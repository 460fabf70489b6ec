"""The results of a folder of checkpoints as text, one row for each checkpoint."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_tools.plain_text import escape_controls, one_line, shorten_message
from ckpt_tools.report.ci_summary import error_without_path
from ckpt_tools.report.columns import align_columns, count_text
from ckpt_tools.report.facts import (
    get_list,
    get_mapping,
    get_mappings,
    median_ratios,
    other_names_sentence,
    rewritten_layers,
)
from ckpt_tools.report.metric_facts import metrics_by_name
from ckpt_tools.report.number_format import integer_text, value_and_error
from ckpt_tools.report.wording import is_worse


def folder_text(records: Sequence[Mapping[str, Any]], manifest: object) -> str:
    """Return a row for every checkpoint, then why some failed and which outputs were replaced.

    ``records`` are those of the manifest. Error and NLL are columns if any checkpoint was
    evaluated.
    """
    head = ("checkpoint", "", "architecture", "layers", "ratio", "images", "estimator", "data")
    rows = [head, *map(_row, records)]
    scores = [_scores(record) for record in records]
    if any(map(any, scores)):  # two columns for nothing would push the others off the screen
        rows = [(*row, *more) for row, more in zip(rows, [("error, %", "NLL"), *scores], strict=True)]
    lines, linked, failures, replaced = [align_columns(rows)], [], [], []
    warnings: list[str] = []
    for record in records:
        path, output = one_line(record.get("checkpoint")), one_line(record.get("output"))
        if sentence := other_names_sentence(record):
            linked.append(f"{path}: {_clean(sentence)}")
        report = get_mapping(record, "report")
        warnings += [f"  {path}: {_clean(str(text))}" for text in get_list(report, "warnings")]
        if record.get("status") == "failed":
            failures.append(f"  {path}: {_clean(error_without_path(record))}")
        if record.get("replaced"):
            replaced.append(f"  {output}: {_clean(str(record['replaced']))}")
    if linked:
        lines += ["", *linked]
    if warnings:
        lines += ["", f"{count_text(len(warnings), 'WARNING')}:", *warnings]
    if failures:
        lines += ["", f"{count_text(len(failures), 'failure')}:", *failures]
    if replaced:
        lines += ["", f"{count_text(len(replaced), 'damaged earlier output')}, made again:", *replaced]
    return "\n".join([*lines, "", f"manifest: {one_line(manifest)}"])


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    report = get_mapping(record, "report")
    name, status = str(record.get("checkpoint")), str(record.get("status"))
    if not report:  # the checkpoint failed, or there was nothing to do
        return (name, status, "", "", "", "", "", "")
    ratios = median_ratios(report).values()
    # A run without a paired measurement has the verdict of the first samples alone.
    level = str(get_mapping(report, "verdict").get("level") or "none")
    check = str(get_mapping(get_mapping(report, "data"), "agreement").get("verdict"))
    return (
        name,
        status,
        str(report.get("architecture")),
        f"{len(rewritten_layers(report))} of {len(get_mappings(report, 'layers'))}",
        f"{statistics.median(ratios):.3f}" if ratios else "",
        integer_text(get_mapping(report, "data").get("images")),
        str(report.get("estimator") or ""),
        check if is_worse(check, level) else level,
    )


def _scores(record: Mapping[str, Any]) -> tuple[str, str]:
    """Return error and NLL before and after, "" where there are none.

    Where a gate was not passed there is no report, and the metrics stand in the record itself.
    """
    metrics = metrics_by_name(get_mapping(record, "report") or record)
    return _change(metrics.get("error"), 2), _change(metrics.get("nll"), 4)


def _change(entries: tuple[object, object, object] | None, digits: int) -> str:
    before, after = (value_and_error(entry)[0] for entry in (entries or (None, None))[:2])
    return "" if before is None or after is None else f"{before:.{digits}f} → {after:.{digits}f}"


def _clean(text: str) -> str:
    """Return a message of bounded size without control characters, its further lines indented."""
    return "\n    ".join(map(escape_controls, shorten_message(text).splitlines()))
