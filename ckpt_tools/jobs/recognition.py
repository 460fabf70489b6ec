"""Which architecture a checkpoint holds; among several that fit its keys, the one that the data fits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ckpt_tools.contract import Checkpoint, LoadedModel
from ckpt_tools.data.data_source import Source
from ckpt_tools.data.preprocessing import Preprocessing, example_input, resolve_input_spec
from ckpt_tools.diagnosis.agreement import Agreement, best_candidate, measure_agreement
from ckpt_tools.errors import AmbiguousArchitecture
from ckpt_tools.identify.candidate import Candidate, load_candidate
from ckpt_tools.identify.file_name_hints import guess_by_file_name
from ckpt_tools.identify.key_matching import has_counters
from ckpt_tools.identify.resolution import find_candidates
from ckpt_tools.walker.downstream import walk

_BATCHES, _BATCH_SIZE = 4, 64


@dataclass(frozen=True)
class Recognition:
    """The model, and the score of every architecture that fits its keys where there were several: 0 is perfect."""

    loaded: LoadedModel
    scores: Mapping[str, float | None] = field(default_factory=dict)


def recognise_architecture(
    checkpoint: Checkpoint,
    architecture: str | None,
    model_kwargs: Mapping[str, object],
    source: Source,
    preprocessing: Preprocessing,
) -> Recognition:
    """Load the checkpoint into the architecture it belongs to. Reads data only where the keys leave a choice.

    Raises AmbiguousArchitecture if neither the data nor the file's name decides.
    """
    found = find_candidates(checkpoint, architecture, model_kwargs)
    if len(found) == 1:
        return Recognition(load_candidate(checkpoint, found[0]))
    seen = {one.architecture: _agreement(checkpoint, one, source, preprocessing) for one in found}
    scores = {name: agreement.score for name, agreement in seen.items()}
    best = best_candidate(seen)
    if best is not None:
        chosen = next(one for one in found if one.architecture == best)
        return Recognition(load_candidate(checkpoint, replace(chosen, recognised_by="data")), scores)
    guess = guess_by_file_name(checkpoint.path, found)
    if guess is None:
        raise AmbiguousArchitecture(_ambiguity_message(checkpoint, scores), tuple(scores))
    return Recognition(load_candidate(checkpoint, replace(guess, recognised_by="file name")), scores)


def _agreement(checkpoint: Checkpoint, candidate: Candidate, source: Source, said: Preprocessing) -> Agreement:
    """How well the first batches agree with the stored statistics in this architecture; each eats its own input."""
    loaded = load_candidate(checkpoint, candidate)
    spec = resolve_input_spec(loaded.input_spec, said, source)
    found = walk(loaded.model, example_input(spec, source), probe=loaded.probe)
    batches = itertools.islice(source.batches(spec, batch_size=_BATCH_SIZE, workers=0), _BATCHES)
    return measure_agreement(
        loaded.model,
        batches,
        found,
        rates_known=loaded.rates != "unknown",
        normalise="batch",
        counted=has_counters(checkpoint),
    )


def _ambiguity_message(checkpoint: Checkpoint, scores: Mapping[str, float | None]) -> str:
    lines = [f"{name}: {'no score' if score is None else f'{score:.3f}'}" for name, score in scores.items()]
    return (
        f"{checkpoint.shown_path}: its tensors fit {len(scores)} architectures that differ in function, and the data "
        "fits "
        "them about equally (distance from the stored BN statistics, 0 is perfect):\n  "
        + "\n  ".join(lines)
        + f"\nChoose one, e.g. --arch {next(iter(scores))}."
    )
