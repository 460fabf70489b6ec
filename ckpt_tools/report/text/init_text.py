"""An initialisation as text: what each weight was divided by and why, what was left, what the signals say."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_tools.initialize.init_results import InitLayer, InitRewrite, LayerSignal
from ckpt_tools.jobs.initialization import InitOutcome
from ckpt_tools.jobs.verification import HEALTHY_VARIANCES, VerificationBatches, count_healthy_layers
from ckpt_tools.plain_text import one_line
from ckpt_tools.report.columns import align_columns, count_text, list_names
from ckpt_tools.report.text.reestimation_text import architecture_line, checkpoint_line
from ckpt_tools.report.wording import DROP_RATE_SOURCES

_SHOWN = 40  # rows of a table before it is cut
_HEAD = ("weight layer", "shape", "f before", "E[f²]", "keep", "f behind", "E[f'²]", "keep", "divided by")


def init_text(outcome: InitOutcome) -> str:
    """Settings, the table of the layers in order of execution, what was left, the signals, the output."""
    result = outcome.result
    parts = [_settings(outcome), "", rewritten_weights_text(result), *_unchanged_weights_lines(result)]
    if outcome.trial is not None:
        parts += ["", signals_text(outcome.trial, outcome.before, outcome.after)]
    if outcome.request.report is not None:
        parts.append(f"picture: {one_line(outcome.request.report)}")
    biases = sum(bool(layer.bias) for layer in result.rewritten)
    zeroed = f"{biases:,} {'bias' if biases == 1 else 'biases'} set to 0"
    parts += ["", f"{len(result.rewritten)} of {count_text(len(result.layers), 'weight')} rewritten, {zeroed}"]
    parts.append(f"written: {one_line(outcome.output)}")
    rest = "the rest is the library's own initialisation" if outcome.source_sha256 is None else "nothing else differs"
    return "\n".join([*parts, f"         sha256 {outcome.output_sha256}; {rest}"])


def _settings(outcome: InitOutcome) -> str:
    loaded, result = outcome.loaded, outcome.result
    source = "none, a new model" if loaded.checkpoint is None else checkpoint_line(loaded.checkpoint)
    method = f"{result.rule}, backward term {result.backward_term}, backward factor {result.backward_factor}"
    return align_columns(
        [
            ("checkpoint", source),
            ("architecture", architecture_line(loaded)),
            ("drop rates", DROP_RATE_SOURCES[loaded.rates]),
            ("rule", method),
            ("scheme", f"{result.scheme}, seed {result.seed}"),
        ]
    )


def rewritten_weights_text(result: InitRewrite) -> str:
    """The rewritten weights: what stands before and behind them, and what their directions were divided by."""
    rows = [_HEAD, *map(_row, result.rewritten[:_SHOWN])]
    return "\n".join([align_columns(rows), *_cut_note(len(result.rewritten))])


def signals_text(trial: VerificationBatches, before: Sequence[LayerSignal], after: Sequence[LayerSignal]) -> str:
    """Variance of every layer's output and of its error signal, before and after."""
    then = {signal.parameter: signal for signal in before}
    rows: list[tuple[str, ...]] = [("weight layer", "Var(z) before", "after", "Var(δ) before", "after")]
    for now in after[:_SHOWN]:
        was, old_error = (old.variance, old.error_variance) if (old := then.get(now.parameter)) else (None, None)
        numbers = (was, now.variance, old_error, now.error_variance)
        rows.append((now.name or "(root)", *("-" if value is None else f"{value:.3g}" for value in numbers)))
    inputs, device = one_line(trial.inputs), one_line(trial.device)
    tried = f"{count_text(trial.samples, 'sample')} of {inputs}, batches of {trial.batch_size} on {device}"
    summary = (
        f"Var(z) within {HEALTHY_VARIANCES[0]:g}–{HEALTHY_VARIANCES[1]:g}: {count_healthy_layers(before)} of {count_text(len(before), 'layer')} before, "
        f"{count_healthy_layers(after)} of {len(after)} after, in training mode ({tried})"
    )
    return "\n".join([align_columns(rows), *_cut_note(len(after)), "", summary])


def _row(layer: InitLayer) -> tuple[str, ...]:
    name, shape = layer.name or "(root)", f"{layer.kind} {'×'.join(map(str, layer.shape))}"
    if (factors := layer.factors) is None:
        return (name, shape, *["-"] * 7)
    behind = ("-", "-", "-")
    if factors.next_slope is not None:
        behind = (factors.next_activation, f"{factors.next_slope:.3f}", f"{factors.next_keep:.3g}")
    before = (factors.activation, f"{factors.second_moment:.3f}", f"{factors.keep:.3g}")
    return (name, shape, *before, *behind, f"{factors.divisor:.3f}")


def _unchanged_weights_lines(result: InitRewrite) -> list[str]:
    """One line for each reason to leave weights as they are."""
    by_reason: dict[str, list[str]] = {}
    for layer in result.layers:
        if not layer.rewritten:
            by_reason.setdefault(layer.reason, []).append(layer.parameter)
    return [f"left as they are: {list_names(names)} ({one_line(reason)})" for reason, names in by_reason.items()]


def _cut_note(rows: int) -> list[str]:
    return [f"… and {rows - _SHOWN} more (--json lists all)"] if rows > _SHOWN else []
