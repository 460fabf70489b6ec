"""Metrics as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from ckpt_tools.evaluate.metrics import BINS, Estimate, Metric
from ckpt_tools.evaluate.scores import Metrics, ModelScores


def metrics_json(metrics: Metrics) -> dict[str, object]:
    """Values and standard errors by metric; ``before`` and ``change`` are null where there was nothing before."""
    return {
        "data": metrics.data,
        "kind": metrics.kind,
        "images": metrics.images,
        "classes": metrics.classes,
        "units": {"error": "percent", "error5": "percent", "nll": "nats", "ece": f"percent, {BINS} bins, l1"},
        "skipped": [dataclasses.asdict(item) for item in metrics.skipped],
        "before": metrics.before and _scores(metrics.before),
        "after": _scores(metrics.after),
        "change": _change(metrics) if metrics.before else None,
        "gate": metrics.gate
        and {"expression": metrics.gate, "passed": not metrics.failures, "failures": list(metrics.failures)},
    }


def _scores(scores: ModelScores) -> dict[str, object]:
    found: dict[str, object] = {**_estimates(scores.metrics)}
    if scores.temperature is not None:
        assert scores.halves is not None
        found["calibration"] = {
            "temperature": scores.temperature,
            "temperatures_of_halves": list(scores.halves),
            **_estimates(scores.calibrated),
        }
    return found


def _change(metrics: Metrics) -> dict[str, object]:
    found: dict[str, object] = {**_estimates(metrics.change)}
    if metrics.calibrated_change:
        found["calibration"] = _estimates(metrics.calibrated_change)
    return found


def _estimates(found: Mapping[Metric, Estimate]) -> dict[str, object]:
    return {
        name: {"value": one.value, "standard_error": one.error if math.isfinite(one.error) else None}
        for name, one in found.items()
    }
