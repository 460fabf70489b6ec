"""Metrics as a table: before, after, and the change, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ckpt_tools.evaluate.metrics import Estimate, Metric
from ckpt_tools.evaluate.scores import Metrics
from ckpt_tools.evaluate.temperature import HIGHEST, LOWEST
from ckpt_tools.jobs.evaluation import EvaluatedCheckpoint, EvaluationOutcome, EvaluationPlan
from ckpt_tools.plain_text import one_line
from ckpt_tools.report.columns import align_columns, count_text, list_names

Estimates = Mapping[Metric, Estimate]

_NAMES: Mapping[Metric, tuple[str, str, int]] = {  # name, unit, digits behind the point
    "error": ("top-1 error", "%", 2),
    "error5": ("top-5 error", "%", 2),
    "nll": ("NLL", "nats", 4),
    "ece": ("ECE", "%", 2),
}


def metrics_text(metrics: Metrics) -> str:
    """The table, what it was measured on, what a temperature does, and whether the gate is passed."""
    data = f"{one_line(metrics.data)} ({one_line(metrics.kind)})"
    parts = [
        f"evaluated on {data}: {count_text(metrics.images, 'image')}, {metrics.classes:,} classes",
        align_columns(_rows(metrics)),
    ]
    if metrics.before is not None:
        parts.append("± standard error; that of the change is paired, image by image")
    if metrics.skipped:
        names = list_names(f"{item.name} ({item.reason})" for item in metrics.skipped)
        parts.append(f"skipped: {count_text(len(metrics.skipped), 'unreadable image')}: {names}")
    if metrics.after.temperature is not None:
        parts.append(_temperatures(metrics))
    if metrics.gate is not None:
        parts.append(f"gate: {one_line(metrics.gate)}: {'NOT passed' if metrics.failures else 'passed'}")
    return "\n".join(parts)


def _rows(metrics: Metrics) -> list[tuple[str, ...]]:
    heads = ("value",) if metrics.before is None else ("before", "after", "change")
    rows: list[tuple[str, ...]] = [("", *heads)]
    before, after = metrics.before, metrics.after
    plain = before.metrics if before else None
    calibrated = before.calibrated if before else None
    rows += [_row(name, "", plain, after.metrics, metrics.change) for name in after.metrics]
    rows += [_row(name, " at T", calibrated, after.calibrated, metrics.calibrated_change) for name in after.calibrated]
    return rows


def _row(name: Metric, suffix: str, before: Estimates | None, after: Estimates, change: Estimates) -> tuple[str, ...]:
    words, unit, digits = _NAMES[name]
    label, now = f"{words}{suffix}, {unit}", _estimate_text(after[name], digits)
    if before is None:
        return label, now
    return label, _estimate_text(before[name], digits), now, _estimate_text(change[name], digits, "+")


def _estimate_text(estimate: Estimate, digits: int, sign: str = "") -> str:
    sure = f"{estimate.error:.{digits}f}" if math.isfinite(estimate.error) else "unknown"
    return f"{estimate.value:{sign}.{digits}f} ± {sure}".replace("-", "−")


def _temperatures(metrics: Metrics) -> str:
    assert metrics.after.halves is not None
    before = metrics.before and metrics.before.temperature
    first, second = metrics.after.halves
    after = f"{metrics.after.temperature:.3f}"
    if metrics.after.temperature in (LOWEST, HIGHEST):
        after += " (where the search ends)"
    return (
        f"temperature to divide logits by: {f'{before:.3f} before, {after} after' if before else after}, fitted on all "
        f"images; in the rows at T, either half of the images has the other's ({first:.3f}, {second:.3f})"
    )


def evaluation_plan_text(plan: EvaluationPlan) -> str:
    """What is in force, before the pass."""
    rows = [] if plan.before is None else [("before", _contestant(plan.before))]
    rows.append(("checkpoint" if plan.before is None else "after", _contestant(plan.after)))
    stream = plan.after.validation.stream
    known = "an unknown number of images" if stream.count is None else count_text(stream.count, "image")
    rows += [("data", f"{plan.request.data} ({plan.after.validation.kind}), {known}")]
    rows += [("input", stream.transform), ("device", plan.device)]
    return align_columns(rows)


def _contestant(contestant: EvaluatedCheckpoint) -> str:
    return f"{contestant.checkpoint.shown_path} ({contestant.loaded.recipe.architecture})"


def evaluation_text(outcome: EvaluationOutcome) -> str:
    """The result of ``evaluate``."""
    return metrics_text(outcome.metrics)
