"""Labelled data that models are judged on, before and after, and what is asked of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.labelled import LabelledStream, labelled_batches
from ckpt_tools.data.labels import ClassMap, read_class_map
from ckpt_tools.data.source import Source
from ckpt_tools.data.stream import Skipped
from ckpt_tools.errors import CheckFailed, DataError, UsageError
from ckpt_tools.evaluate.gate import Gate, parse_gate
from ckpt_tools.evaluate.metrics import Estimate, Metric, changes, measure, require_torchmetrics
from ckpt_tools.evaluate.outcomes import TOP, Outcomes
from ckpt_tools.evaluate.run import evaluate
from ckpt_tools.evaluate.temperature import Calibration, calibrate
from ckpt_tools.jobs.inputs import Preprocessing, input_spec_for

CALIBRATED: tuple[Metric, ...] = ("nll", "ece")  # what a temperature changes


@dataclass(frozen=True)
class Question:
    """What is asked of an evaluation: the data, which output each class is, a temperature, a gate."""

    data: str
    class_map: ClassMap | None = None
    calibrate: bool = False
    gate: Gate | None = None


def question(data: str, class_map: Path | None, calibrate: bool, gate: str | None, *, compared: bool) -> Question:
    """Checks what can be checked without data. ``compared``: whether there will be metrics before.

    Raises UsageError for a gate that does not parse or needs a before that there is none; DataError for a class map
    that cannot be read; CkptToolsError if torchmetrics is missing.
    """
    parsed = None if gate is None else parse_gate(gate)
    if parsed is not None and parsed.needs_before and not compared:
        raise UsageError(f"--gate {gate!r}: there is no 'before' in this evaluation. Give --before CHECKPOINT.")
    require_torchmetrics()
    return Question(data, None if class_map is None else read_class_map(class_map), calibrate, parsed)


@dataclass(frozen=True, eq=False)
class Judged:
    """One model on all images: their outcomes, and with ``--calibrate`` its temperature."""

    outcomes: Outcomes
    labels: Tensor
    classes: int
    calibration: Calibration | None


@dataclass(frozen=True)
class Validation:
    """The labelled data, found and counted but not read, as one model takes it."""

    question: Question
    source: Source
    stream: LabelledStream
    seed: int = 0

    def judge(self, model: nn.Module, progress: Callable[[int], None] | None = None) -> Judged:
        """A pass over the images. Raises DataError if the classes are not those of the head, ModelError."""
        found = evaluate(
            model,
            self.stream,
            check=self._check,
            keep_logits=self.question.calibrate,
            seed=self.seed,
            progress=progress,
        )
        calibration = None if found.logits is None else calibrate(found.logits, found.labels, seed=self.seed)
        return Judged(found.outcomes, found.labels, found.classes, calibration)

    @property
    def kind(self) -> str:
        """What the data is, in words."""
        return "dataset, test split" if self.source.kind == "dataset" else self.source.kind

    def _check(self, labels: Tensor, outputs: int) -> None:
        self.stream.check(labels, outputs)
        gate = self.question.gate
        if gate is not None and "error5" in gate.metrics and outputs <= TOP:
            raise UsageError(
                f"--gate {gate.text!r}: error5 needs a head with six classes or more, this one has {outputs}."
            )


def open_validation(
    asked: Question,
    source: Source,
    known: InputSpec | None,
    said: Preprocessing,
    *,
    batch_size: int,
    workers: int | None,
    device: str | torch.device,
    seed: int = 0,
    cached: bool = False,
) -> Validation:
    """Labelled batches of a source for a model that ``known`` describes. Raises DataError, UsageError."""
    stream = labelled_batches(
        source,
        input_spec_for(known, said, source),
        class_map=asked.class_map,
        batch_size=batch_size,
        workers=workers,
        cached=cached,
        device=device,
    )
    return Validation(asked, source, stream, seed)


@dataclass(frozen=True)
class Scores:
    """One model: its metrics with standard errors; with a temperature, NLL and ECE of held-out halves as well."""

    metrics: Mapping[Metric, Estimate]
    temperature: float | None = None
    halves: tuple[float, float] | None = None
    calibrated: Mapping[Metric, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Metrics:
    """The table: after, and before with the change if there was one. ``failures``: what of the gate does not hold."""

    data: str
    kind: str
    images: int
    classes: int
    after: Scores
    before: Scores | None = None
    change: Mapping[Metric, Estimate] = field(default_factory=dict)
    calibrated_change: Mapping[Metric, Estimate] = field(default_factory=dict)
    gate: str | None = None
    failures: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()


def metrics_of(validation: Validation, before: Judged | None, after: Judged) -> Metrics:
    """Metrics of one or two models on the same images. Raises DataError if the images were not the same."""
    asked = validation.question
    if before is not None and not torch.equal(before.labels, after.labels):
        raise DataError(
            f"{asked.data}: the labels before ({len(before.labels)}) are not those after ({len(after.labels)}). "
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
        skipped=validation.stream.skipped,
    )


def refuse_failed(metrics: Metrics, consequence: str = "") -> None:
    """Raise CheckFailed if the gate did not hold."""
    if metrics.failures:
        raise CheckFailed(f"the gate is not passed: {'; '.join(metrics.failures)}.{consequence}")


def _scores(judged: Judged) -> Scores:
    found, calibration = measure(judged.outcomes), judged.calibration
    if calibration is None:
        return Scores(found)
    return Scores(found, calibration.temperature, calibration.halves, _calibrated(measure(calibration.held_out)))


def _calibrated_change(before: Judged | None, after: Judged) -> Mapping[Metric, Estimate]:
    if before is None or before.calibration is None or after.calibration is None:
        return {}
    return _calibrated(changes(before.calibration.held_out, after.calibration.held_out))


def _calibrated(found: Mapping[Metric, Estimate]) -> dict[Metric, Estimate]:
    return {name: found[name] for name in CALIBRATED}


def _values(scores: Scores | None) -> dict[str, float]:
    return {name: estimate.value for name, estimate in scores.metrics.items()} if scores else {}
