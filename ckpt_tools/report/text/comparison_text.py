"""The results of ``convert`` and ``diff`` as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_tools.jobs.conversion import Conversion
from ckpt_tools.plain_text import one_line
from ckpt_tools.report.columns import align_columns, count_text, list_names
from ckpt_tools.report.text.reestimation_text import checkpoint_line, size_text
from ckpt_tools.storage.compare import Comparison, TensorChange

_SHOWN_ROWS = 8  # of a table before it is cut
_SHOWN_VIOLATIONS = 100  # differences that were not expected


def conversion_text(conversion: Conversion) -> str:
    """Return the result of ``convert``: what was read, what was left out, and what was written.

    safetensors refuses tensors that share memory, so each of them is written on its own.
    """
    tensors = conversion.checkpoint.tensors
    size = size_text(sum(tensor.nbytes for tensor in tensors.values()))
    parts = [f"read: {checkpoint_line(conversion.checkpoint)}"]
    if conversion.checkpoint.left_out:
        parts.append(f"left out: {list_names(conversion.checkpoint.left_out)}")
    for group in conversion.shared:
        parts.append(f"share memory in the source, written once each: {list_names(group)}")
    parts.append(f"written: {one_line(conversion.output)}")
    count = count_text(len(tensors), "tensor")
    parts.append(f"         {count}, {size}, bit for bit; sha256 {conversion.output_sha256}")
    return "\n".join(parts)


def comparison_text(comparison: Comparison, violations: Sequence[str]) -> str:
    """Return the result of ``diff``: what differs, and what of it was not expected."""
    rows = [("tensor", "difference")]
    rows += [(change.key, _difference(change)) for change in comparison.changes[:_SHOWN_ROWS]]
    if len(comparison.changes) > _SHOWN_ROWS:
        rows.append((f"… and {len(comparison.changes) - _SHOWN_ROWS} more", ""))
    identical = count_text(comparison.identical, "tensor")
    parts = [f"{identical} identical, {len(comparison.changes)} different"]
    if comparison.changes:
        parts.append(align_columns(rows))
    parts += [f"unexpected: {one_line(violation)}" for violation in violations[:_SHOWN_VIOLATIONS]]
    if len(violations) > _SHOWN_VIOLATIONS:
        parts.append(f"… and {len(violations) - _SHOWN_VIOLATIONS} more (--json lists all)")
    return "\n".join(parts)


def _difference(change: TensorChange) -> str:
    if change.relative is None:
        return f"{change.what}: {change.before} → {change.after}"
    return f"values, up to {change.relative:.3g} relative"
