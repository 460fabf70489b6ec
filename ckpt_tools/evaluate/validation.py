"""Labelled data that models are judged on, and what is asked of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ckpt_tools.contract import LoadedModel
from ckpt_tools.data.data_source import Source, describe_source
from ckpt_tools.data.label_files import LabelFile, read_label_file
from ckpt_tools.data.labelled_stream import LabelledStream, labelled_batches
from ckpt_tools.data.labels import ClassMap, read_class_map
from ckpt_tools.data.preprocessing import Preprocessing, resolve_input_spec
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.errors import ModelError, UsageError
from ckpt_tools.evaluate.classifier import evaluate
from ckpt_tools.evaluate.gate import Gate, parse_gate
from ckpt_tools.evaluate.metrics import require_torchmetrics
from ckpt_tools.evaluate.outcomes import TOP, Outcomes
from ckpt_tools.evaluate.temperature import Calibration, calibrate
from ckpt_tools.location import LocationLike


@dataclass(frozen=True)
class EvaluationSettings:
    """What is asked of an evaluation: the data, its labels, a temperature, a gate."""

    data: str
    class_map: ClassMap | None = None
    label_file: LabelFile | None = None
    calibrate: bool = False
    gate: Gate | None = None


def parse_evaluation_settings(
    data: str,
    class_map: LocationLike | None,
    calibrate: bool,
    gate: str | None,
    *,
    compared: bool,
    labels: LocationLike | None = None,
) -> EvaluationSettings:
    """Checks what can be checked without data. ``compared``: whether there will be metrics before.

    Raises UsageError for a gate that does not parse or needs a before that there is none; DataError
    for a class map or a label file that cannot be read; CkptToolsError if torchmetrics is missing.
    """
    parsed = None if gate is None else parse_gate(gate)
    if parsed is not None and parsed.needs_before and not compared:
        raise UsageError(
            f"--gate {gate!r}: there is no 'before' in this evaluation. Give --before CHECKPOINT."
        )
    require_torchmetrics()
    return EvaluationSettings(
        data,
        None if class_map is None else read_class_map(class_map),
        None if labels is None else read_label_file(labels),
        calibrate,
        parsed,
    )


def parse_optional_settings(
    data: str | None,
    class_map: LocationLike | None,
    calibrate: bool,
    gate: str | None,
    labels: LocationLike | None = None,
) -> EvaluationSettings | None:
    """Open validation data if a command was given any, else return None.

    Raises UsageError if options of an evaluation were given without data.
    """
    if data is not None:
        return parse_evaluation_settings(data, class_map, calibrate, gate, compared=True, labels=labels)
    for option, said in (
        ("--gate", gate is not None),
        ("--calibrate", calibrate),
        ("--class-map", class_map),
        ("--labels", labels),
    ):
        if said:
            raise UsageError(f"{option} needs labelled data to evaluate on. Give --eval-data SPEC.")
    return None


@dataclass(frozen=True, eq=False)
class ModelEvaluation:
    """One model on all images: their outcomes, and with ``--calibrate`` its temperature."""

    outcomes: Outcomes
    labels: Tensor
    classes: int
    calibration: Calibration | None


@dataclass(frozen=True)
class Validation:
    """The labelled data, found and counted but not read, as one model takes it."""

    question: EvaluationSettings
    source: Source
    stream: LabelledStream
    seed: int = 0

    def evaluate_model(
        self, model: nn.Module, name: str, progress: Callable[[str, int], None] | None = None
    ) -> ModelEvaluation:
        """A pass over the images; ``progress`` is told ``name`` and the number of images so far.

        Raises DataError if the classes are not those of the head, ModelError for a model that is no
        classifier.
        """
        found = evaluate(
            model,
            self.stream,
            check=self._check,
            keep_logits=self.question.calibrate,
            seed=self.seed,
            progress=progress and partial(progress, name),
        )
        calibration = None if found.logits is None else calibrate(found.logits, found.labels, seed=self.seed)
        return ModelEvaluation(found.outcomes, found.labels, found.classes, calibration)

    @property
    def kind(self) -> str:
        """What the data is, in words."""
        return "dataset, test split" if self.source.kind == "dataset" else describe_source(self.source)

    def _check(self, labels: Tensor, outputs: int) -> None:
        self.stream.check(labels, outputs)
        gate = self.question.gate
        if gate is not None and "error5" in gate.metrics and outputs <= TOP:
            raise UsageError(
                f"--gate {gate.text!r}: error5 needs a head with six classes or more, this one has {outputs}."
            )


def open_validation(
    asked: EvaluationSettings,
    source: Source,
    loaded: LoadedModel,
    said: Preprocessing,
    reading: Reading,
    *,
    seed: int = 0,
) -> Validation:
    """Return labelled batches of a source for a model.

    Raises DataError, UsageError, and ModelError for a model without a trained head.
    """
    _require_head(loaded)
    stream = labelled_batches(
        source,
        resolve_input_spec(loaded.input_spec, said, source),
        reading,
        class_map=asked.class_map,
        label_file=asked.label_file,
    )
    return Validation(asked, source, stream, seed)


def _require_head(loaded: LoadedModel) -> None:
    """Raise ModelError if the model has no head, or one that is as it was built and not the checkpoint's."""
    keys = loaded.model.state_dict()
    none = loaded.recipe.kwargs.get("num_classes") == 0  # timm's word for it, and the factories'
    own = [one for one in loaded.as_built if none or any(key.startswith(one) for key in keys)]
    if none or own:
        found = f"other weights or none under {', '.join(own)}" if own else "none"
        raise ModelError(
            f"{loaded.recipe.architecture}: expected a checkpoint with the classifier of this "
            "architecture, found "
            f"{found}. Name what builds your model: --arch package.module:factory."
        )
