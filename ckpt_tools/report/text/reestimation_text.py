"""The results of ``bn-reestimate`` as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ckpt_tools.contract import Checkpoint, LoadedModel
from ckpt_tools.data.data_source import count_other_files, describe_source
from ckpt_tools.diagnosis.data_check import DataVerdict
from ckpt_tools.jobs.plan import Plan
from ckpt_tools.jobs.reestimation import ReestimationOutcome
from ckpt_tools.plain_text import one_line
from ckpt_tools.reestimate.concerns import is_synthetic, result_warnings
from ckpt_tools.report.columns import align_columns, count_text, list_names
from ckpt_tools.report.number_format import deviation_text, percent_text
from ckpt_tools.report.text.metrics_text import metrics_text, other_files_text, skipped_text
from ckpt_tools.report.wording import DROP_RATE_SOURCES, RECOGNISED_BY_TEXT, VERDICT_LEVELS, is_worse
from ckpt_tools.results import Controls, Effect, LayerResult, Measured, Outlier, Reestimation, Verdict

_SHOWN_ROWS = 8  # of a table before it is cut
_SHOWN_OUTLIERS = 10
_SHOWN_ARGUMENTS = 5  # of an architecture, so that it fits on a line
_LONGEST_ARGUMENT = 40  # characters


def plan_text(plan: Plan) -> str:
    """Return the settings in force, which the user reads before the pass begins."""
    loaded, count = plan.loaded_model, plan.stream.count
    device, origin = plan.device, "none"
    if not plan.team.alone:
        device = f"{plan.device.split(':')[0]}, {plan.team.world} processes"
    if plan.input_spec and not plan.source.is_preprocessed:
        origin = plan.input_spec.origin
    active_sites = sum(site.active for site in plan.walk.dropout_sites)
    settings = plan.request.method
    method = f"{settings.estimator}, {settings.statistics}, {settings.precision}"
    amount = "an unknown number of samples" if count is None else f"{count:,} samples"
    # A row without a text, such as that of scores where one architecture fits, is left out below.
    rows = [
        ("checkpoint", checkpoint_line(plan.checkpoint)),
        ("architecture", f"{architecture_line(loaded)} (told by {RECOGNISED_BY_TEXT[loaded.recognised_by]})"),
        ("scores", _scores(plan.recognised.scores)),
        (
            "drop rates",
            f"{DROP_RATE_SOURCES[loaded.rates]}; {count_text(active_sites, 'active dropout site')}",
        ),
        ("layers", f"{plan.choice.why}; {count_text(len(plan.choice.controls), 'control layer')}"),
        ("data", f"{plan.source.spec} ({describe_source(plan.source)}), {amount}"),
        ("not read", other_files_text(count_other_files(plan.source))),
        ("input", plan.stream.transform),
        ("preprocessing", origin),
        ("pass", f"{method}, batches of {plan.batch_size} on {device}"),
        ("output", str(plan.output)),
        ("runs code", ", ".join(_code_of_the_user(plan))),
    ]
    return align_columns([(name, text) for name, text in rows if text])


def _code_of_the_user(plan: Plan) -> list[str]:
    """Return what is imported and executed beside this tool and its libraries."""
    names = []
    if plan.loaded_model.recipe.adapter == "factory":
        names.append(plan.loaded_model.recipe.name)
    sources = [plan.source, *([plan.validation.source] if plan.validation else [])]
    names += [source.spec for source in sources if source.kind == "callable"]
    if plan.request.model.trust:
        names.append("what the checkpoint names (--trust)")
    return names


def _scores(scores: Mapping[str, float | None]) -> str:
    """Return how far several fitting architectures are from the stored statistics."""
    if not scores:
        return ""
    # An architecture that could not be scored has None, which sorts to the end.
    ranked = sorted(scores.items(), key=lambda item: math.inf if item[1] is None else item[1])
    listed = ", ".join(f"{name} {'none' if score is None else f'{score:.3f}'}" for name, score in ranked)
    return f"{listed} (distance from the stored BN statistics, 0 is perfect)"


def checkpoint_line(checkpoint: Checkpoint) -> str:
    """Return path and format, and the entry of the file that holds the weights."""
    entry = f", weights from {one_line(checkpoint.weights)!r}" if checkpoint.weights else ""
    prefix = f", prefix {one_line(checkpoint.prefix)!r} removed" if checkpoint.prefix else ""
    return f"{one_line(checkpoint.shown_path)} ({one_line(checkpoint.format)}{entry}{prefix})"


def architecture_line(loaded: LoadedModel) -> str:
    """Return the architecture with its keyword arguments, as many as fit on a line."""
    arguments = [f"{name}={value}" for name, value in loaded.recipe.kwargs.items()]
    # A long value, such as a list of block settings, is counted and not shown.
    shown = [text for text in arguments if len(text) <= _LONGEST_ARGUMENT][:_SHOWN_ARGUMENTS]
    hidden = len(arguments) - len(shown)
    more = [f"and {count_text(hidden, 'more argument')}"] if hidden else []
    return one_line(" ".join([loaded.recipe.architecture, *shown, *more]))


def size_text(size: int) -> str:
    """Return a number of bytes in the unit that people use: ``97.8 MB``."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):  # noqa: B007 - the unit is used after the loop
        # 999.5 and not 1000: three digits of 999.7 would be rounded to "1e+03".
        if value < 999.5:
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def outcome_text(outcome: ReestimationOutcome) -> str:
    """Return the result of ``bn-reestimate``.

    The largest changes with their errors come first, then what speaks for and against the data,
    then what was left out, and at last where the output is.
    """
    result = outcome.result
    parts = [_headline(result), changes_text(result.rewritten, made_up=is_synthetic(result)), ""]
    parts += [f"WARNING: {one_line(warning)}" for warning in result_warnings(result)]
    if outcome.metrics is not None:
        parts += [metrics_text(outcome.metrics), ""]
    parts += evidence_lines(result, outcome.verdict)
    if outcome.plan.rate_fit is not None:
        parts.append(one_line(outcome.plan.rate_fit.sentence))
    if result.deviation is not None:
        low, high = result.deviation.median, result.deviation.high
        limits = f"{low:.2g} (median), {high:.2g}"
        parts.append(f"{result.precision}: variances of the first images within {limits} of fp32")
    if result.cut_to is not None:
        parts.append(f"memory was short: batches were cut to {count_text(result.cut_to, 'sample')} at a time")
    # What stayed as it was is named: a reader must not take it for corrected.
    parts += _unrewritten(result.layers)
    if result.left_alone:
        names = list_names(f"{item.name} ({item.reason})" for item in result.left_alone)
        parts.append(f"left alone: {names}")
    if outcome.skipped:
        parts.append(skipped_text(outcome.skipped))
    parts += outliers_text(result)
    if outcome.output_sha256 is None:
        parts.append(f"not written: {one_line(outcome.plan.output)} (--dry-run)")
        return "\n".join(parts)
    parts.append(f"written: {one_line(outcome.plan.output)}")
    parts.append(f"         sha256 {outcome.output_sha256}; only {_buffers(result)} differ from the source")
    return "\n".join(parts)


def evidence_lines(result: Reestimation, data_check: DataVerdict) -> list[str]:
    """Return why this estimator was used, what speaks for and against the data, and the effect.

    The data has two verdicts: from the mismatch of all layers, and from the check of the first
    samples. The one that says more against the data is shown.
    """
    lines = []
    depends = result.estimator != "ratio"
    if result.estimator_reason:
        reason = short_estimator_reason(result, data_check)
        lines.append(f"estimator: {result.estimator} ({one_line(reason)})")
    if result.verdict is not None and not is_worse(data_check.verdict, result.verdict.level):
        lines.append(f"data: {mismatch_verdict_text(result.verdict)}")
    else:
        lines.append(verdict_text(data_check, depends=depends))
    levels = {data_check.verdict, result.verdict.level if result.verdict else "none"}
    in_doubt = bool(levels & {"doubt", "refuse"})
    lines.append(controls_text(result.controls, depends=depends, in_doubt=in_doubt))
    # What a model says about inputs that were made up means nothing.
    if result.effect is not None and not is_synthetic(result):
        lines.append(f"effect: {effect_text(result.effect)}")
    return lines


def short_estimator_reason(result: Reestimation, data_check: DataVerdict) -> str:
    """Return why this estimator was used, without the verdicts on the data that it quotes."""
    quoted = [data_check.cause, result.verdict.reason if result.verdict else ""]
    reason = result.estimator_reason
    for text in filter(None, quoted):
        reason = reason.replace(f" ({text})", "")
    return reason


def mismatch_verdict_text(verdict: Verdict) -> str:
    """Return whether the data looks like the training data, from the mismatch of all layers."""
    return f"{VERDICT_LEVELS[verdict.level]} ({one_line(verdict.reason)})"


def effect_text(effect: Effect) -> str:
    """Return what the correction changes in the outputs, in a sentence."""
    inputs = f"on {count_text(effect.images, 'input')}"
    if effect.changed is None or effect.confidence_before is None or effect.confidence_after is None:
        return f"outputs change by {effect.relative_change:.1%} of their root mean square {inputs}"
    return (
        f"{effect.changed:.1%} of the predictions change {inputs}; mean confidence "
        f"{effect.confidence_before:.3f} before, {effect.confidence_after:.3f} after"
    )


def outliers_text(result: Reestimation) -> list[str]:
    """Return which samples were left out, and which kinds are too common to be outliers."""
    parts = []
    if result.outliers:
        count = count_text(len(result.outliers), "sample")
        parts.append(f"outliers: {count} left out (--keep-outliers includes them)")
        shown = result.outliers[:_SHOWN_OUTLIERS]
        rows = [(f"  {item.name}", item.reason, leverage_text(item)) for item in shown]
        parts.append(align_columns(rows))
        if any(item.whole_batch for item in result.outliers):
            parts.append(
                "  with their whole batches, whose rows are not known to be independent samples "
                "(--rows-are-samples)"
            )
    if len(result.outliers) > _SHOWN_OUTLIERS:
        parts.append(f"  … and {len(result.outliers) - _SHOWN_OUTLIERS} more (--json lists all)")
    if result.common:
        kinds = " or ".join(map(one_line, result.common))
        parts.append(f"outliers: over 1 % of the samples are {kinds}, so these were not left out")
    return parts


def leverage_text(outlier: Outlier) -> str:
    """Return how large a sample is against the median one, and in which layer that shows most."""
    place = "the input" if outlier.where == "input" else outlier.where
    if outlier.leverage is None:
        return f"in {place}"
    return f"{outlier.leverage:,.3g} × the median sample's energy in {place}"


def _headline(result: Reestimation) -> str:
    passes = f", {result.passes} passes" if result.passes > 1 else ""
    residual = "" if result.residual is None else f", last change {result.residual:.1g}"
    stopped = ", stopped at the tolerance" if result.stopped_early else ""
    return (
        f"{len(result.rewritten)} of {count_text(len(result.layers), 'BN layer')} rewritten "
        f"from {result.images:,} samples in {result.seconds:.1f} s "
        f"({result.estimator}{passes}{residual}{stopped})"
    )


def changes_text(layers: Sequence[LayerResult], *, made_up: bool = False) -> str:
    """Return a table of the layers whose variance changed most.

    The columns mismatch and dropout shift are there if they were measured in any layer; on inputs
    that were ``made_up`` a mismatch means nothing.
    """
    measured = [(layer, layer.ratio, layer.error) for layer in layers if layer.ratio and layer.error]
    if not measured:
        return "no layer was reached by the data"
    # Half is as large a change as twice, so logarithms are compared.
    measured.sort(key=lambda row: -abs(math.log(max(row[1].median, 1e-30))))
    shown = [layer for layer, _, _ in measured[:_SHOWN_ROWS]]
    rows: list[tuple[str, ...]] = [
        ("largest changes", "stored/new variance", "range over channels", "standard error")
    ]
    for layer, ratio, error in measured[:_SHOWN_ROWS]:
        span = f"{ratio.low:.3f} – {ratio.high:.3f}"
        error_text = "unknown"
        if math.isfinite(error.high):
            error_text = f"{error.median:.1%} (worst {error.high:.1%})"
        rows.append((layer.name or "(root)", f"{ratio.median:.3f}", span, error_text))
    for title, values in _paired_columns(shown, made_up=made_up).items():
        rows = [(*row, cell) for row, cell in zip(rows, [title, *values], strict=True)]
    table = align_columns(rows)
    if len(measured) > _SHOWN_ROWS:
        table += f"\n… and {len(measured) - _SHOWN_ROWS} more (--json lists all)"
    return table


def _paired_columns(layers: Sequence[LayerResult], *, made_up: bool) -> dict[str, list[str]]:
    """Return the columns of a paired measurement by their titles, without those that are empty."""
    columns = {"dropout shift": [measured_text(layer.dropout_shift) for layer in layers]}
    if not made_up:
        columns = {"mismatch": [measured_text(layer.mismatch) for layer in layers], **columns}
    return {title: texts for title, texts in columns.items() if any(texts)}


def measured_text(value: Measured | None) -> str:
    """Return ``1.310 ± 0.012``; empty where nothing was measured."""
    if value is None:
        return ""
    error = f" ± {value.error:.3f}" if math.isfinite(value.error) else ""
    return f"{value.median:.3f}{error}"


def verdict_text(verdict: DataVerdict, *, depends: bool = True) -> str:
    """Return whether the first batches agree with the statistics that the BN layers have stored.

    ``depends`` says whether the estimator is right only if they do.
    """
    if verdict.verdict == "none" or verdict.early_score is None or verdict.deep_score is None:
        return f"data: not compared with the training data ({one_line(verdict.cause)})"
    early, deep = f"{verdict.early_score:.2f}", f"{verdict.deep_score:.2f}"
    scores = f"distance {early} in the first BN layers, {deep} over all, 0 is perfect"
    if verdict.verdict == "agree":
        return f"data: {verdict.images:,} samples agree with what the BN layers remember ({scores})"
    cause = one_line(verdict.cause)
    if verdict.verdict == "doubt":
        return f"data: {VERDICT_LEVELS['doubt']}: {cause}"
    used = "used all the same (--force)" if depends else "which this estimator does not depend on"
    return f"data: {VERDICT_LEVELS['refuse']}, {used}: {cause} ({scores})"


def controls_text(controls: Controls, *, depends: bool = True, in_doubt: bool = False) -> str:
    """Return the verdict of the control layers in a sentence.

    No dropout reaches these layers, so on the right data their measured variance is the stored one.
    ``depends`` says whether the estimator is right only if they agree. Where other layers put the
    data ``in_doubt``, those within their error bars are not said to agree with it.
    """
    if controls.deviation is None or controls.worst is None:
        return f"controls: none ({one_line(controls.reason)})"
    if controls.verdict == "doubt":
        return f"controls: {one_line(controls.reason)}"
    if controls.verdict == "disagree":
        used = "used all the same (--force)" if depends else "which this estimator does not depend on"
        return f"controls: disagree with the data, {used}: {one_line(controls.reason)}"
    verdict = "moved no more than 5 % and three standard errors" if in_doubt else "agree with the data"
    layers = count_text(len(controls.names), "layer")
    worst = worst_control_text(controls)
    return (
        f"controls: {layers} beyond the reach of dropout {verdict}; stored and measured variance differ "
        f"by {deviation_text(controls.deviation)} in the median channel ({worst}), "
        f"means by {controls.shift:.2f} standard deviations"
    )


def worst_control_text(controls: Controls) -> str:
    """Return how far the worst layer is off, with its standard error: ``5.1 % ± 0.8 % in bn1``."""
    if controls.worst_layer is None or controls.worst_ratio is None:
        return f"{deviation_text(controls.worst)} in the worst layer"
    error = controls.worst_ratio.error / controls.worst_ratio.median if controls.worst_ratio.median else None
    name = one_line(controls.worst_layer or "(root)")
    return f"{deviation_text(controls.worst)} ± {percent_text(error)} in the worst layer, {name}"


def _unrewritten(layers: Iterable[LayerResult]) -> list[str]:
    names = [layer.name for layer in layers if layer.reason.startswith("never reached")]
    return [f"never reached, left as they are: {list_names(names)}"] if names else []


def _buffers(result: Reestimation) -> str:
    return "running variances" if result.statistics == "variance" else "running means and variances"
