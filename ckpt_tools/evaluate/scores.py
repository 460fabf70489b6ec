"""The table of an evaluation.

Metrics before and after, what a temperature does to them, and the gate's verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ckpt_tools.data.stream import SkippedSample
from ckpt_tools.errors import CheckFailed, DataError, ModelError
from ckpt_tools.evaluate.metrics import Estimate, Metric, changes, measure
from ckpt_tools.evaluate.validation import ModelEvaluation, Validation

CALIBRATED_METRICS: tuple[Metric, ...] = ("nll", "ece")  # what a temperature changes


@dataclass(frozen=True)
class ModelScores:
    """One model: its metrics with standard errors.

    With a temperature, NLL and ECE of held-out halves as well.
    """

    metrics: Mapping[Metric, Estimate]
    temperature: float | None = None
    halves: tuple[float, float] | None = None
    calibrated: Mapping[Metric, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Metrics:
    """The table: after, and before with the change if there was one.

    ``failures`` are the conditions of the gate that do not hold.
    """

    data: str
    kind: str
    images: int
    classes: int
    after: ModelScores
    before: ModelScores | None = None
    change: Mapping[Metric, Estimate] = field(default_factory=dict)
    calibrated_change: Mapping[Metric, Estimate] = field(default_factory=dict)
    gate: str | None = None
    failures: tuple[str, ...] = ()
    skipped: tuple[SkippedSample, ...] = ()

    @property
    def provenance(self) -> dict[str, object]:
        """What the output says of itself: the temperature, for whoever divides its logits by it."""
        if self.after.temperature is None:
            return {}
        return {"temperature": self.after.temperature, "temperature_images": self.images}


class GateFailed(CheckFailed):
    """A gate said no, to these metrics."""

    def __init__(self, message: str, metrics: Metrics) -> None:
        super().__init__(message)
        self.metrics = metrics


def compute_metrics(
    validation: Validation, before: ModelEvaluation | None, after: ModelEvaluation
) -> Metrics:
    """Metrics of one or two models on the same images.

    Raises DataError if the images were not the same, ModelError if the heads do not have the same size.
    """
    asked = validation.question
    if before is not None and before.classes != after.classes:
        raise ModelError(
            f"expected two checkpoints with the same classes, found a head of {before.classes:,} "
            "outputs before and of "
            f"{after.classes:,} after. Evaluate each alone, without --before."
        )
    if before is not None and not torch.equal(before.labels, after.labels):
        raise DataError(
            f"{asked.data}: the labels before ({len(before.labels)}) are not those after "
            f"({len(after.labels)}). "
            "Both must see the same images in the same order: switch off shuffling and leave the data alone."
        )
    was, now = None if before is None else _scores(before), _scores(after)
    gate = asked.gate
    return Metrics(
        data=asked.data,
        kind=validation.kind,
        images=len(after.outcomes),
        classes=after.classes,
        after=now,
        before=was,
        change=changes(before.outcomes, after.outcomes) if before else {},
        calibrated_change=_calibrated_change(before, after),
        gate=gate.text if gate else None,
        failures=gate.failures(_values(was), _values(now)) if gate else (),
        skipped=validation.stream.skipped_samples,
    )


def compute_gated_metrics(
    validation: Validation | None, before: ModelEvaluation | None, after: ModelEvaluation | None
) -> Metrics | None:
    """The metrics, if there is labelled data.

    Raises GateFailed, before anything is written, if the gate says no.
    """
    if validation is None or after is None:
        return None
    metrics = compute_metrics(validation, before, after)
    refuse_failed_gate(metrics, " Nothing was written.")
    return metrics


def refuse_failed_gate(metrics: Metrics, consequence: str = "") -> None:
    """Raise GateFailed if the gate did not hold."""
    if metrics.failures:
        raise GateFailed(f"the gate is not passed: {'; '.join(metrics.failures)}.{consequence}", metrics)


def _scores(judged: ModelEvaluation) -> ModelScores:
    found, calibration = measure(judged.outcomes), judged.calibration
    if calibration is None:
        return ModelScores(found)
    return ModelScores(
        found, calibration.temperature, calibration.halves, _select_calibrated(measure(calibration.held_out))
    )


def _calibrated_change(before: ModelEvaluation | None, after: ModelEvaluation) -> Mapping[Metric, Estimate]:
    if before is None or before.calibration is None or after.calibration is None:
        return {}
    return _select_calibrated(changes(before.calibration.held_out, after.calibration.held_out))


def _select_calibrated(found: Mapping[Metric, Estimate]) -> dict[Metric, Estimate]:
    return {name: found[name] for name in CALIBRATED_METRICS}


def _values(scores: ModelScores | None) -> dict[str, float]:
    return {name: estimate.value for name, estimate in scores.metrics.items()} if scores else {}
