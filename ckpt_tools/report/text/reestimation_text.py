"""Results as text for a terminal: what is in force, what was done, what a walk found, what differs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from ckpt_tools.contract import Checkpoint, LoadedModel
from ckpt_tools.data.data_source import describe_source
from ckpt_tools.demo.train import Score
from ckpt_tools.diagnosis.data_check import DataVerdict
from ckpt_tools.jobs.conversion import Conversion
from ckpt_tools.jobs.plan import Plan
from ckpt_tools.jobs.reestimation import ReestimationOutcome
from ckpt_tools.plain_text import one_line
from ckpt_tools.report.columns import align_columns, count_text, list_names
from ckpt_tools.report.number_format import deviation_text
from ckpt_tools.report.text.metrics_text import metrics_text
from ckpt_tools.report.wording import DROP_RATE_SOURCES, RECOGNISED_BY_TEXT
from ckpt_tools.results import Controls, LayerResult, Outlier, Reestimation
from ckpt_tools.storage.compare import Comparison, TensorChange

_SHOWN = 8  # rows of a table before it is cut
_UNEXPECTED = 100  # of the tensors that should not differ
_ARGUMENTS, _LONGEST = 5, 40  # of an architecture on one line, and their characters


def plan_text(plan: Plan) -> str:
    """What is in force, before the pass."""
    request = plan.request
    size = plan.batch_size
    where = plan.device if plan.team.alone else f"{plan.device.split(':')[0]}, {plan.team.world} processes"
    active = [site for site in plan.walk.dropout_sites if site.active]
    rows = [
        ("checkpoint", checkpoint_line(plan.checkpoint)),
        (
            "architecture",
            f"{architecture_line(plan.loaded_model)} (told by {RECOGNISED_BY_TEXT[plan.loaded_model.recognised_by]})",
        ),
        *([("scores", _scores(plan.recognised.scores))] if plan.recognised.scores else []),
        (
            "drop rates",
            f"{DROP_RATE_SOURCES[plan.loaded_model.rates]}; {count_text(len(active), 'active dropout site')}",
        ),
        ("layers", f"{plan.choice.why}; {count_text(len(plan.choice.controls), 'control layer')}"),
        ("data", f"{plan.source.spec} ({describe_source(plan.source)}), {_amount(plan.stream.count)}"),
        ("input", plan.stream.transform),
        ("preprocessing", plan.input_spec.origin if plan.input_spec and not plan.source.is_preprocessed else "none"),
        ("pass", f"{request.estimator}, {request.statistics}, {request.precision}, batches of {size} on {where}"),
        ("output", str(plan.output)),
        *([("runs code", ", ".join(own))] if (own := _own_code(plan)) else []),
    ]
    return align_columns(rows)


def _own_code(plan: Plan) -> list[str]:
    """What is imported and executed beside this tool and its libraries, as the user named it."""
    sources = [plan.source, *([plan.validation.source] if plan.validation else [])]
    own = [plan.loaded_model.recipe.name] if plan.loaded_model.recipe.adapter == "factory" else []
    own += [source.spec for source in sources if source.kind == "callable"]
    return [*own, *(["what the checkpoint names (--trust)"] if plan.request.trust else [])]


def _scores(scores: Mapping[str, float | None]) -> str:
    """How far each architecture is from the stored BN statistics on the data."""
    ranked = sorted(scores.items(), key=lambda item: math.inf if item[1] is None else item[1])
    told = ", ".join(f"{name} {'none' if score is None else f'{score:.3f}'}" for name, score in ranked)
    return f"{told} (distance from the stored BN statistics, 0 is perfect)"


def checkpoint_line(checkpoint: Checkpoint) -> str:
    """Path, format, and which of its entries was taken."""
    taken = f", weights from {one_line(checkpoint.weights)!r}" if checkpoint.weights else ""
    stripped = f", prefix {one_line(checkpoint.prefix)!r} removed" if checkpoint.prefix else ""
    return f"{one_line(checkpoint.shown_path)} ({one_line(checkpoint.format)}{taken}{stripped})"


def architecture_line(loaded: LoadedModel) -> str:
    """The architecture with its keyword arguments, as many as fit on a line."""
    said = [f"{name}={value}" for name, value in loaded.recipe.kwargs.items()]
    shown = [text for text in said if len(text) <= _LONGEST][:_ARGUMENTS]
    more = [f"and {count_text(len(said) - len(shown), 'more argument')}"] if len(said) > len(shown) else []
    return one_line(" ".join([loaded.recipe.architecture, *shown, *more]))


def size_text(size: int) -> str:
    """Bytes in the unit that people use: ``97.8 MB``."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):  # noqa: B007 - the last one stays
        if value < 999.5:
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def outcome_text(outcome: ReestimationOutcome) -> str:
    """What was done: the largest changes with their error bars, the controls, the output."""
    result = outcome.result
    parts = [_headline(result), _changes(result.rewritten), ""]
    if outcome.metrics is not None:
        parts += [metrics_text(outcome.metrics), ""]
    parts.append(verdict_text(outcome.verdict))
    parts.append(controls_text(result.controls))
    if result.deviation is not None:
        low, high = result.deviation.median, result.deviation.high
        parts.append(f"{result.precision}: variances of the first images within {low:.2g} (median), {high:.2g} of fp32")
    if result.cut_to is not None:
        parts.append(f"memory was short: batches were cut to {count_text(result.cut_to, 'sample')} at a time")
    parts += _unrewritten(result.layers)
    if result.left_alone:
        parts.append(f"left alone: {list_names(f'{item.name} ({item.reason})' for item in result.left_alone)}")
    if outcome.skipped:
        names = list_names(f"{item.name} ({item.reason})" for item in outcome.skipped)
        parts.append(f"skipped: {count_text(len(outcome.skipped), 'unreadable sample')}: {names}")
    parts += outliers_text(result)
    parts.append(f"written: {one_line(outcome.plan.output)}")
    parts.append(f"         sha256 {outcome.output_sha256}; only {_buffers(result)} differ from the source")
    return "\n".join(parts)


def outliers_text(result: Reestimation) -> list[str]:
    """Which samples were left out, ten at most, and which kinds were not because they are common."""
    parts = []
    if result.outliers:
        parts.append(f"outliers: {count_text(len(result.outliers), 'sample')} left out (--keep-outliers includes them)")
        rows = [(f"  {one.name}", one.reason, leverage_text(one)) for one in result.outliers[:_NAMED]]
        parts.append(align_columns(rows))
    if len(result.outliers) > _NAMED:
        parts.append(f"  … and {len(result.outliers) - _NAMED} more (--json lists all)")
    if result.common:
        kinds = " or ".join(map(one_line, result.common))
        parts.append(f"outliers: over 1 % of the samples are {kinds}, so these were not left out")
    return parts


_NAMED = 10  # outliers


def leverage_text(one: Outlier) -> str:
    """How large a sample is against the others, and where that shows most."""
    where = "the input" if one.where == "input" else one.where
    return f"in {where}" if one.leverage is None else f"{one.leverage:,.3g} × the median sample's energy in {where}"


def _headline(result: Reestimation) -> str:
    passes = f", {result.passes} passes" if result.passes > 1 else ""
    residual = "" if result.residual is None else f", last change {result.residual:.1g}"
    stopped = ", stopped at the tolerance" if result.stopped_early else ""
    return (
        f"{len(result.rewritten)} of {count_text(len(result.layers), 'BN layer')} rewritten from {result.images:,} samples "
        f"in {result.seconds:.1f} s ({result.estimator}{passes}{residual}{stopped})"
    )


def _changes(layers: Sequence[LayerResult]) -> str:
    measured = [(layer.name, layer.ratio, layer.error) for layer in layers if layer.ratio and layer.error]
    if not measured:
        return "no layer was reached by the data"
    largest = sorted(measured, key=lambda row: -abs(math.log(max(row[1].median, 1e-30))))
    rows = [("largest changes", "stored/new variance", "range over channels", "standard error")]
    for name, ratio, error in largest[:_SHOWN]:
        sure = f"{error.median:.1%} (worst {error.high:.1%})" if math.isfinite(error.high) else "unknown"
        rows.append((name or "(root)", f"{ratio.median:.3f}", f"{ratio.low:.3f} – {ratio.high:.3f}", sure))
    if len(largest) > _SHOWN:
        rows.append((f"… and {len(largest) - _SHOWN} more (--json lists all)", "", "", ""))
    return align_columns(rows)


def verdict_text(verdict: DataVerdict) -> str:
    """What the first look at the data said."""
    if verdict.verdict == "none" or verdict.early_score is None or verdict.deep_score is None:
        return f"data: not compared with the training data ({one_line(verdict.cause)})"
    scores = (
        f"distance {verdict.early_score:.2f} in the first BN layers, {verdict.deep_score:.2f} over all, 0 is perfect"
    )
    if verdict.verdict == "agree":
        return f"data: {verdict.images:,} samples agree with what the BN layers remember ({scores})"
    return (
        f"data: does NOT look like the training data, used all the same (--force): {one_line(verdict.cause)} ({scores})"
    )


def controls_text(controls: Controls) -> str:
    """The verdict of the control layers in a sentence."""
    if controls.deviation is None or controls.worst is None:
        return f"controls: none ({one_line(controls.reason)})"
    return (
        f"controls: {count_text(len(controls.names), 'layer')} beyond the reach of dropout {controls.verdict} with the "
        f"data; stored and measured variance differ by {deviation_text(controls.deviation)} in the median channel "
        f"({deviation_text(controls.worst)} in the worst layer), means by {controls.shift:.2f} standard deviations"
    )


def _unrewritten(layers: Iterable[LayerResult]) -> list[str]:
    missed = [layer.name for layer in layers if layer.reason.startswith("never reached")]
    return [f"never reached, left as they are: {list_names(missed)}"] if missed else []


def _buffers(result: Reestimation) -> str:
    return "running variances" if result.statistics == "variance" else "running means and variances"


def conversion_text(conversion: Conversion) -> str:
    """What was read, what was written, and which tensors it now holds more than once."""
    tensors = conversion.checkpoint.tensors
    size = size_text(sum(tensor.nbytes for tensor in tensors.values()))
    parts = [f"read: {checkpoint_line(conversion.checkpoint)}"]
    if conversion.checkpoint.left_out:
        parts.append(f"left out: {list_names(conversion.checkpoint.left_out)}")
    for group in conversion.shared:
        parts.append(f"share memory in the source, written once each: {list_names(group)}")
    parts.append(f"written: {one_line(conversion.output)}")
    parts.append(
        f"         {count_text(len(tensors), 'tensor')}, {size}, bit for bit; sha256 {conversion.output_sha256}"
    )
    return "\n".join(parts)


def comparison_text(comparison: Comparison, violations: Sequence[str]) -> str:
    """What differs between two checkpoints, and what of it was not expected."""
    rows = [("tensor", "difference")]
    rows += [(change.key, _difference(change)) for change in comparison.changes[:_SHOWN]]
    if len(comparison.changes) > _SHOWN:
        rows.append((f"… and {len(comparison.changes) - _SHOWN} more", ""))
    parts = [f"{count_text(comparison.identical, 'tensor')} identical, {len(comparison.changes)} different"]
    if comparison.changes:
        parts.append(align_columns(rows))
    parts += [f"unexpected: {one_line(violation)}" for violation in violations[:_UNEXPECTED]]
    if len(violations) > _UNEXPECTED:
        parts.append(f"… and {len(violations) - _UNEXPECTED} more (--json lists all)")
    return "\n".join(parts)


def demo_text(pairs: Sequence[tuple[Score, Score]]) -> str:
    """Test error and NLL of every network before and after, and the mean change with its standard error."""
    rows = [("network", "test error before", "after", "NLL before", "after")]
    for number, (before, after) in enumerate(pairs):
        rows.append(
            (str(number), f"{before.error:.2f} %", f"{after.error:.2f} %", f"{before.nll:.3f}", f"{after.nll:.3f}")
        )
    errors = [after.error - before.error for before, after in pairs]
    nlls = [after.nll - before.nll for before, after in pairs]
    return f"{align_columns(rows)}\n\nchange of test error: {_mean(errors, 2)} points; of NLL: {_mean(nlls, 3)} nats"


def _mean(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):+.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def _difference(change: TensorChange) -> str:
    if change.relative is None:
        return f"{change.what}: {change.before} → {change.after}"
    return f"values, up to {change.relative:.3g} relative"


def _amount(number: int | None) -> str:
    return "an unknown number of samples" if number is None else f"{number:,} samples"
