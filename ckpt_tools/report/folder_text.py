"""What became of a folder of checkpoints, as text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_tools.report.columns import columns, count


def folder_text(records: Sequence[Mapping[str, Any]], manifest: Path) -> str:
    """A row for every checkpoint, then why some failed; ``records`` as the manifest has them."""
    rows = [("checkpoint", "", "architecture", "layers", "ratio", "images"), *map(_row, records)]
    parts = [columns(rows)]
    failed = [record for record in records if record["status"] == "failed"]
    if failed:
        parts += ["", f"{count(len(failed), 'failure')}:"]
        parts += [f"  {_clean(record['checkpoint'])}: {_clean(_without_name(record))}" for record in failed]
    parts += ["", f"manifest: {manifest}"]
    return "\n".join(parts)


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    report = record.get("report")
    name, status = record["checkpoint"], record["status"]
    if not report:
        return (name, status, "", "", "", "")
    rewritten = [layer for layer in report["layers"] if layer["rewritten"]]
    ratios = [layer["ratio"]["median"] for layer in rewritten if layer["ratio"]]
    return (
        name,
        status,
        report["architecture"],
        f"{len(rewritten)} of {len(report['layers'])}",
        f"{statistics.median(ratios):.3f}" if ratios else "",
        f"{report['data']['images']:,}",
    )


def _without_name(record: Mapping[str, Any]) -> str:
    """Most messages begin with the path, which stands before them here."""
    return str(record["error"]).removeprefix(f"{record['checkpoint']}: ")


def _clean(text: str) -> str:
    return "\n    ".join(line if line.isprintable() else ascii(line)[1:-1] for line in text.splitlines())
