"""Recognises the architecture of a checkpoint; where several fit its keys, the data decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt_tools.contract import Checkpoint, LoadedModel
from ckpt_tools.data.data_source import Source
from ckpt_tools.data.preprocessing import Preprocessing, example_input, resolve_input_spec
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.diagnosis.agreement import Agreement, best_candidate, measure_agreement
from ckpt_tools.diagnosis.data_sample import draw_sample
from ckpt_tools.errors import AmbiguousArchitecture
from ckpt_tools.identify.candidate import Candidate, load_candidate
from ckpt_tools.identify.file_name_hints import guess_by_file_name
from ckpt_tools.identify.key_matching import has_counters
from ckpt_tools.identify.recorded_provenance import describe_input
from ckpt_tools.identify.recorded_rates import recorded_rates
from ckpt_tools.identify.resolution import find_candidates
from ckpt_tools.jobs.request import ModelChoice
from ckpt_tools.walker.downstream import walk

_SAMPLES, _BATCH_SIZE = 256, 64  # what each candidate is tried on


@dataclass(frozen=True)
class Recognition:
    """The model, and where several architectures fit its keys the score of each: 0 is perfect."""

    loaded: LoadedModel
    scores: Mapping[str, float | None] = field(default_factory=dict)


def recognise_architecture(
    checkpoint: Checkpoint, choice: ModelChoice, source: Source | None, preprocessing: Preprocessing
) -> Recognition:
    """Load the checkpoint into the architecture it belongs to.

    Keys and shapes of the tensors come first; data, if there is any, is read only where several
    architectures fit them. Raises AmbiguousArchitecture if neither the data nor the file's name decides.
    """
    recognition = _recognise(checkpoint, choice, source, preprocessing)
    return replace(recognition, loaded=choice.declare_dropout(recognition.loaded))


def _recognise(
    checkpoint: Checkpoint, choice: ModelChoice, source: Source | None, preprocessing: Preprocessing
) -> Recognition:
    candidates = find_candidates(checkpoint, choice.architecture, choice.model_kwargs)
    if len(candidates) == 1:
        return Recognition(load_candidate(checkpoint, candidates[0]))
    # Architectures with the same keys may differ in function or in their input: data tells more.
    agreements: dict[str, Agreement] = {}
    if source is not None:
        agreements = {
            candidate.architecture: _measure_agreement(checkpoint, candidate, source, preprocessing)
            for candidate in candidates
        }
    scores = {name: agreement.score for name, agreement in agreements.items()}
    best = best_candidate(agreements)
    if best is not None:
        winner = next(candidate for candidate in candidates if candidate.architecture == best)
        winner = replace(winner, recognised_by="data")
        return Recognition(load_candidate(checkpoint, winner), scores)
    guess = guess_by_file_name(checkpoint.path, candidates)
    if guess is None:
        names = tuple(candidate.architecture for candidate in candidates)
        raise AmbiguousArchitecture(_ambiguity_message(checkpoint, names, scores), names)
    guess = replace(guess, recognised_by="file name")
    return Recognition(load_candidate(checkpoint, guess), scores)


def recorded_input(
    checkpoint: Checkpoint, loaded: LoadedModel, preprocessing: Preprocessing
) -> dict[str, object]:
    """Return what the provenance of a corrected file says of the input and of rates of modules.

    Without it the output, which has none of its source's words, would be evaluated at the library's
    usual size. The shape is the one that the checkpoint, the library or the user knows: that of
    samples which happened to be read says nothing about the model.
    """
    spec = loaded.input_spec
    if spec is not None or preprocessing.input_size is not None:
        spec = resolve_input_spec(spec, preprocessing, None)
    rates = recorded_rates(checkpoint) if loaded.rates == "recorded" else {}
    return describe_input(spec) | ({"module_rates": rates} if rates else {})


def _measure_agreement(
    checkpoint: Checkpoint, candidate: Candidate, source: Source, preprocessing: Preprocessing
) -> Agreement:
    """How well the first batches agree with the stored statistics, if this is the architecture.

    Every candidate sees the same images, each with the preprocessing of its own library.
    """
    loaded = load_candidate(checkpoint, candidate)
    spec = resolve_input_spec(loaded.input_spec, preprocessing, source)
    layers = walk(loaded.model, example_input(spec, source), probe=loaded.probe)
    stream = source.batches(spec, Reading(_BATCH_SIZE, workers=0))
    return measure_agreement(
        loaded.model,
        draw_sample(stream, _SAMPLES),  # without outliers, NaN among them
        layers,
        rates_known=loaded.rates != "unknown",
        normalise="batch",
        counted=has_counters(checkpoint),
        rows_are_samples=stream.rows_are_samples,
    )


def _ambiguity_message(
    checkpoint: Checkpoint, names: Sequence[str], scores: Mapping[str, float | None]
) -> str:
    lines = list(names)
    decided = "and there is no data that could decide"
    if scores:
        lines = [
            f"{name}: {'no score' if score is None else f'{score:.3f}'}" for name, score in scores.items()
        ]
        decided = (
            "and the data fits them about equally (distance from the stored BN statistics, 0 is perfect)"
        )
    return (
        f"{checkpoint.shown_path}: its tensors fit {len(names)} architectures that differ in "
        f"function, {decided}:\n  " + "\n  ".join(lines) + f"\nChoose one, e.g. --arch {names[0]}."
    )
