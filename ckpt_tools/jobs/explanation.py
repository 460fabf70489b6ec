"""Why is a model worse in eval mode than in training? The stored statistics beside those of data.

Two things can make them differ: dropout, which is off in eval mode and changes variances, and data
that is not distributed as it was in training. A paired measurement tells the two apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ckpt_tools.contract import InputSpec, LoadedModel
from ckpt_tools.data.data_source import Source, count_other_files
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.data.stream import BatchStream, SkippedSample
from ckpt_tools.diagnosis.data_check import DataVerdict
from ckpt_tools.errors import NothingToDo
from ckpt_tools.jobs.first_samples import check_first_samples, open_first_samples
from ckpt_tools.jobs.request import ReadingOptions
from ckpt_tools.machine.device import move_to_device, resolve_device
from ckpt_tools.machine.memory import fitting_batch_size
from ckpt_tools.method import Method
from ckpt_tools.reestimate.method_run import run_method
from ckpt_tools.results import DropoutSite, LayerResult, Measured, Reestimation, Verdict, Walk

MAX_SAMPLES = 512
_LARGEST_BATCH = 128  # so that 512 samples are four batches, which show how batches scatter
_NO_SHIFT = 0.01  # a smaller relative change of a layer's variance has no effect worth mending
_MAX_MISMATCH = 0.05  # as of control layers

# nothing: neither differs. dropout: it shifts variances, and the data agrees. mismatch: the data
# differs, whether dropout shifts variances or not is in `dropout_shifts`. preprocessing: another
# one fits the stored statistics. unknown: the data could not be compared.
Cause = Literal["nothing", "dropout", "mismatch", "preprocessing", "unknown"]


@dataclass(frozen=True)
class Explanation:
    """What makes the stored statistics differ from those of the data.

    Attributes:
        cause: of the difference, as far as it can be told.
        dropout_shifts: whether dropout changes the variance of any layer by more than sampling and
            1 % explain.
        dropout_on: whether any noise reached a BN layer at all. If not, the mismatch is that of
            a single measurement, and no layer has a dropout shift.
        rates_known: whether the drop rates are those of the training. If not, what dropout did is
            part of the mismatch.
        verdict: whether the data agrees with the stored statistics.
        layers: every BN layer; its mismatch and its dropout shift are what was measured.
        preprocessing: what is wrong with it, and the option that mends it; empty if nothing is.
        images: how many samples were measured.
        skipped: samples that could not be read.
        other_files: how many files beside the images are not read, by extension.
        noise_left_on: operations that drew random numbers with dropout off, too.
    """

    cause: Cause
    dropout_shifts: bool
    dropout_on: bool
    rates_known: bool
    verdict: Verdict
    layers: tuple[LayerResult, ...]
    preprocessing: str
    images: int
    skipped: tuple[SkippedSample, ...] = ()
    other_files: Mapping[str, int] = field(default_factory=dict)
    noise_left_on: tuple[DropoutSite, ...] = ()


def explain_difference(
    loaded: LoadedModel, walk: Walk, source: Source, spec: InputSpec | None, options: ReadingOptions
) -> Explanation:
    """Measure every BN layer with dropout on and off, and say what makes its statistics differ.

    ``source`` should be limited to MAX_SAMPLES. The model keeps its statistics. Raises DataError,
    ModelError, UsageError.
    """
    device = resolve_device(options.device)
    fitting = min(_LARGEST_BATCH, fitting_batch_size(walk.bytes_per_sample, device))
    reading = Reading(options.batch_size or fitting, options.workers, device=device)
    move_to_device(loaded.model, device)
    data_check = check_first_samples(loaded, open_first_samples(source, spec), walk, source, spec)
    stream = source.batches(spec, reading)
    try:
        method = Method(estimator="ratio", force=True)
        result = run_method(loaded.model, stream, method, rates=loaded.rates, walk=walk, dry_run=True)
        layers, verdict, dropout_on = result.layers, result.verdict, True
    except NothingToDo:  # no noise reaches a BN layer, so one measurement is both
        stream = source.batches(spec, reading)
        result = _measure_without_dropout(loaded, walk, stream)
        layers = tuple(_take_ratio_for_mismatch(layer) for layer in result.layers)
        verdict, dropout_on = _judge_layers(layers, data_check, result.images), False
    verdict = verdict or _verdict_of_first_samples(data_check)
    shifts = any(_is_off(layer.dropout_shift, _NO_SHIFT) for layer in layers)
    preprocessing = data_check.cause if data_check.verdict == "refuse" else ""
    cause = _find_cause(verdict, shifts=shifts, preprocessing=preprocessing)
    return Explanation(
        cause,
        shifts,
        dropout_on,
        loaded.rates != "unknown",
        verdict,
        layers,
        preprocessing,
        result.images,
        stream.skipped_samples,
        count_other_files(source),
        result.noise_left_on,
    )


def _measure_without_dropout(loaded: LoadedModel, walk: Walk, stream: BatchStream) -> Reestimation:
    """Measure the variances of all layers as `pooled` does, and write nothing."""
    method = Method(estimator="pooled", layers="all", force=True)
    return run_method(loaded.model, stream, method, rates=loaded.rates, walk=walk, dry_run=True)


def _take_ratio_for_mismatch(layer: LayerResult) -> LayerResult:
    """Without dropout, stored variance / new variance is the mismatch."""
    if layer.ratio is None or layer.error is None:
        return layer
    ratio, error = layer.ratio, layer.ratio.median * layer.error.median
    return replace(layer, mismatch=Measured(ratio.median, ratio.low, ratio.high, error))


def _judge_layers(layers: tuple[LayerResult, ...], data_check: DataVerdict, images: int) -> Verdict | None:
    """Return a doubt if a layer's mismatch is more than sampling explains; None if there is none.

    Layers that were hardly trained cannot be judged, which the ``data_check`` has found out.
    """
    measured = {layer.name: layer.mismatch for layer in layers if layer.mismatch is not None}
    moved = {name: mismatch for name, mismatch in measured.items() if _is_off(mismatch, _MAX_MISMATCH)}
    if not moved or data_check.verdict == "none":
        return None
    worst = max(moved, key=lambda name: abs(math.log(max(moved[name].median, 1e-30))))
    ratio = f"{moved[worst].median:.3f} ± {moved[worst].error:.3f}"
    reason = (
        f"{len(moved)} of {len(measured)} BN layers are off by more than {_MAX_MISMATCH:.0%} and three "
        f"standard errors, most {worst or '(root)'}, where stored / measured variance is {ratio}"
    )
    return Verdict("doubt", reason, images=images)


def _verdict_of_first_samples(data_check: DataVerdict) -> Verdict:
    """Return the verdict of the check of the first samples in the form of one about the mismatch."""
    scores = data_check.scores
    if data_check.verdict == "none" or scores is None:
        return Verdict("none", data_check.cause, images=data_check.images)
    if data_check.verdict != "agree":
        return Verdict(data_check.verdict, data_check.cause, scores.deep, images=data_check.images)
    reason = f"distance {scores.deep:.3f} from the stored statistics, on {data_check.images} samples"
    return Verdict("agree", reason, scores.deep, images=data_check.images)


def _is_off(ratio: Measured | None, limit: float) -> bool:
    """Tell whether a ratio differs from 1 by more than a limit and three standard errors."""
    if ratio is None or ratio.median <= 0 or not math.isfinite(ratio.error):
        return False
    return abs(math.log(ratio.median)) > limit + 3 * ratio.error / ratio.median


def _find_cause(verdict: Verdict, *, shifts: bool, preprocessing: str) -> Cause:
    if preprocessing or verdict.level == "refuse":
        return "preprocessing"
    if verdict.level == "doubt":
        return "mismatch"
    if verdict.level == "none":
        return "unknown"
    return "dropout" if shifts else "nothing"
