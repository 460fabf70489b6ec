"""Metrics as a table: before, after, and the change, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ckpt_tools.evaluate.metrics import Estimate, Metric
from ckpt_tools.jobs.evaluation import Contestant, EvaluationOutcome, EvaluationPlan
from ckpt_tools.jobs.validation import Metrics, Scores
from ckpt_tools.report.columns import columns, count, listed

_NAMES: Mapping[Metric, tuple[str, int]] = {  # digits behind the point
    "error": ("top-1 error, %", 2),
    "error5": ("top-5 error, %", 2),
    "nll": ("NLL, nats", 4),
    "ece": ("ECE, %", 2),
}


def metrics_text(metrics: Metrics) -> str:
    """The table, what it was measured on, what a temperature does, and whether the gate is passed."""
    parts = [
        f"evaluated on {metrics.data} ({metrics.kind}): {count(metrics.images, 'image')}, {metrics.classes:,} classes",
        columns(_rows(metrics)),
    ]
    if metrics.before is not None:
        parts.append("(± standard error; that of the change is paired, image by image)")
    if metrics.skipped:
        names = listed(f"{item.name} ({item.reason})" for item in metrics.skipped)
        parts.append(f"skipped: {count(len(metrics.skipped), 'unreadable image')}: {names}")
    if metrics.after.temperature is not None:
        parts.append(_temperatures(metrics))
    if metrics.gate is not None:
        parts.append(f"gate: {metrics.gate}: {'NOT passed' if metrics.failures else 'passed'}")
    return "\n".join(parts)


def _rows(metrics: Metrics) -> list[tuple[str, ...]]:
    compared = metrics.before is not None
    rows: list[tuple[str, ...]] = [("", "before", "after", "change") if compared else ("", "value ± standard error")]
    for name, words, after, before, change in (
        *((name, _NAMES[name][0], *_three(metrics, name, calibrated=False)) for name in metrics.after.metrics),
        *(
            (name, f"{_NAMES[name][0]}, T", *_three(metrics, name, calibrated=True))
            for name in metrics.after.calibrated
        ),
    ):
        digits = _NAMES[name][1]
        cells = [before and _shown(before, digits), _shown(after, digits), change and _shown(change, digits, "+")]
        rows.append((words, *(cell for cell in cells if cell)))
    return rows


def _three(metrics: Metrics, name: Metric, *, calibrated: bool) -> tuple[Estimate, Estimate | None, Estimate | None]:
    def of(scores: Scores) -> Mapping[Metric, Estimate]:
        return scores.calibrated if calibrated else scores.metrics

    change = metrics.calibrated_change if calibrated else metrics.change
    before = of(metrics.before)[name] if metrics.before else None
    return of(metrics.after)[name], before, change.get(name)


def _shown(estimate: Estimate, digits: int, sign: str = "") -> str:
    sure = f"{estimate.error:.{digits}f}" if math.isfinite(estimate.error) else "unknown"
    return f"{estimate.value:{sign}.{digits}f} ± {sure}".replace("-", "−")


def _temperatures(metrics: Metrics) -> str:
    assert metrics.after.halves is not None
    before = metrics.before and metrics.before.temperature
    first, second = metrics.after.halves
    fitted = (
        f"{before:.3f} before, {metrics.after.temperature:.3f} after" if before else f"{metrics.after.temperature:.3f}"
    )
    return (
        f"temperature to divide logits by: {fitted}, fitted on all images; in the rows with T, either half of the "
        f"images has the other's ({first:.3f}, {second:.3f})"
    )


def evaluation_plan_text(plan: EvaluationPlan) -> str:
    """What is in force, before the pass."""
    rows = [] if plan.before is None else [("before", _contestant(plan.before))]
    rows.append(("checkpoint" if plan.before is None else "after", _contestant(plan.after)))
    stream = plan.after.validation.stream
    known = "an unknown number of images" if stream.count is None else count(stream.count, "image")
    rows += [("data", f"{plan.request.data} ({plan.after.validation.source.kind}), {known}")]
    rows += [("input", stream.transform), ("device", plan.device)]
    return columns(rows)


def _contestant(contestant: Contestant) -> str:
    return f"{contestant.checkpoint.path} ({contestant.loaded.recipe.architecture})"


def evaluation_text(outcome: EvaluationOutcome) -> str:
    """The result of ``evaluate``."""
    return metrics_text(outcome.metrics)
