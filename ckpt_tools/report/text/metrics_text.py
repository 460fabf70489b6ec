"""Metrics with their standard errors as a table, and the plan of ``evaluate``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ckpt_tools.data.data_source import count_other_files
from ckpt_tools.data.preprocessing import Preprocessing
from ckpt_tools.data.unreadable_samples import SkippedSample
from ckpt_tools.evaluate.metrics import Estimate, Metric
from ckpt_tools.evaluate.scores import Metrics
from ckpt_tools.evaluate.temperature import HIGHEST, LOWEST
from ckpt_tools.jobs.evaluation import EvaluatedCheckpoint, EvaluationPlan, InputDecision
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
    """Return the data, the table of metrics, the temperature, and the verdict of the gate."""
    data = f"{one_line(metrics.data)} ({one_line(metrics.kind)})"
    parts = [
        f"evaluated on {data}: {count_text(metrics.images, 'image')}, {metrics.classes:,} classes",
        align_columns(_rows(metrics)),
    ]
    if metrics.before is not None:
        # Paired: both checkpoints see the same images, so the change is surer than either value.
        parts.append("± standard error; that of the change is paired, image by image")
    if metrics.skipped:
        parts.append(skipped_text(metrics.skipped, "image"))
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
    # T is the temperature that the logits were divided by.
    rows += [
        _row(name, " at T", calibrated, after.calibrated, metrics.calibrated_change)
        for name in after.calibrated
    ]
    return rows


def _row(
    name: Metric, suffix: str, before: Estimates | None, after: Estimates, change: Estimates
) -> tuple[str, ...]:
    title, unit, digits = _NAMES[name]
    label, value = f"{title}{suffix}, {unit}", _estimate_text(after[name], digits)
    if before is None:
        return label, value
    return label, _estimate_text(before[name], digits), value, _estimate_text(change[name], digits, "+")


def _estimate_text(estimate: Estimate, digits: int, sign: str = "") -> str:
    error = f"{estimate.error:.{digits}f}" if math.isfinite(estimate.error) else "unknown"
    return f"{estimate.value:{sign}.{digits}f} ± {error}".replace("-", "−")


def _temperatures(metrics: Metrics) -> str:
    """Return the temperatures that were fitted, and why the rows "at T" use two others.

    A temperature flatters the images that it was fitted on, so each half of them is scored with the
    other half's.
    """
    assert metrics.after.halves is not None
    before = metrics.before and metrics.before.temperature
    first, second = metrics.after.halves
    after = f"{metrics.after.temperature:.3f}"
    if metrics.after.temperature in (LOWEST, HIGHEST):
        after += " (where the search ends)"  # the best temperature may lie beyond
    if before:
        after = f"{before:.3f} before, {after} after"
    return (
        f"temperature to divide logits by: {after}, fitted on all images; "
        f"in the rows at T, either half of the images has the other's ({first:.3f}, {second:.3f})"
    )


def evaluation_plan_text(plan: EvaluationPlan) -> str:
    """Return the settings of ``evaluate`` in force, which the user reads before the pass begins."""
    if plan.before is None:
        rows = [("checkpoint", _checkpoint_line(plan.after))]
    else:
        rows = [("before", _checkpoint_line(plan.before)), ("after", _checkpoint_line(plan.after))]
    stream = plan.after.validation.stream
    amount = "an unknown number of images" if stream.count is None else count_text(stream.count, "image")
    rows += [
        ("data", f"{plan.request.data} ({plan.after.validation.kind}), {amount}"),
        ("not read", other_files_text(count_other_files(plan.after.validation.source))),
        ("labels", str(plan.request.evaluation.labels or "")),
        ("input", _input_text(plan)),
        ("device", plan.device),
    ]
    return align_columns([(name, text) for name, text in rows if text])


def skipped_text(skipped: Sequence[SkippedSample], noun: str = "sample") -> str:
    """Return a warning that names samples which could not be read."""
    names = list_names(f"{item.name} ({item.reason})" for item in skipped)
    return f"WARNING: skipped {count_text(len(skipped), f'unreadable {noun}')}: {names}"


def other_files_text(counts: Mapping[str, int]) -> str:
    """Return how many files beside the images are not read, the most frequent kinds by name."""
    if not counts:
        return ""
    kinds = list_names(f"{count:,} × {extension}" for extension, count in counts.items())
    return f"{count_text(sum(counts.values()), 'other file')}: {kinds}"


_DECISIONS: Mapping[InputDecision, str] = {
    "before": "as BEFORE says",
    "after": "as AFTER says",
    "options": "as your options and the data say",
    "data": "which is preprocessed already",
}


def _input_text(plan: EvaluationPlan) -> str:
    """Return the input, and for two checkpoints whose it is: a change must not be one of the input."""
    transform = plan.after.validation.stream.transform
    decision = plan.input_decision
    if plan.before is None or decision is None:
        return transform
    if decision == "each":
        before = plan.before.validation.stream.transform
        return f"each its own, as the networks differ: before on {before}; after on {transform}"
    is_changed = decision in ("before", "after") and plan.request.preprocessing != Preprocessing()
    options = ", but for your options" if is_changed else ""
    return f"both on {transform}, {_DECISIONS[decision]}{options}"


def _checkpoint_line(evaluated: EvaluatedCheckpoint) -> str:
    return f"{evaluated.checkpoint.shown_path} ({evaluated.loaded.recipe.architecture})"
