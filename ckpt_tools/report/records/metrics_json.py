"""Metrics as JSON, with their standard errors and units."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ckpt_tools.evaluate.metrics import BINS, Estimate, Metric
from ckpt_tools.evaluate.scores import Metrics, ModelScores
from ckpt_tools.report.records.plain_values import to_plain_values


def metrics_json(metrics: Metrics) -> dict[str, object]:
    """Return values and standard errors by metric.

    ``before`` and ``change`` are null where only one checkpoint was evaluated, ``gate`` where no
    gate was set.
    """
    return {
        "data": metrics.data,
        "kind": metrics.kind,
        "images": metrics.images,
        "classes": metrics.classes,
        # A number without its unit is misread: an error of 0.5 could be a half or half a percent.
        "units": {"error": "percent", "error5": "percent", "nll": "nats", "ece": f"percent, {BINS} bins, l1"},
        "skipped": [dataclasses.asdict(item) for item in metrics.skipped],
        "before": metrics.before and _scores(metrics.before),
        "after": _scores(metrics.after),
        "change": _change(metrics) if metrics.before else None,
        "gate": metrics.gate
        and {"expression": metrics.gate, "passed": not metrics.failures, "failures": list(metrics.failures)},
    }


def _scores(scores: ModelScores) -> dict[str, object]:
    values = _estimates(scores.metrics)
    if scores.temperature is not None:
        assert scores.halves is not None
        values["calibration"] = {
            "temperature": scores.temperature,
            "temperatures_of_halves": list(scores.halves),
            **_estimates(scores.calibrated),
        }
    return values


def _change(metrics: Metrics) -> dict[str, object]:
    changes = _estimates(metrics.change)
    if metrics.calibrated_change:
        changes["calibration"] = _estimates(metrics.calibrated_change)
    return changes


def _estimates(estimates: Mapping[Metric, Estimate]) -> dict[str, object]:
    # The error of a single image is infinite, which to_plain_values turns into null.
    return {
        name: to_plain_values({"value": estimate.value, "standard_error": estimate.error})
        for name, estimate in estimates.items()
    }
