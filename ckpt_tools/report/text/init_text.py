"""The result of ``init-rewrite`` as text: the divisor of each weight, and the signals."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_tools.initialize.init_results import InitLayer, InitRewrite, LayerSignal
from ckpt_tools.jobs.initialization import InitOutcome
from ckpt_tools.jobs.verification import HEALTHY_VARIANCES, VerificationBatches, count_healthy_layers
from ckpt_tools.plain_text import one_line
from ckpt_tools.report.columns import align_columns, count_text, list_names
from ckpt_tools.report.text.reestimation_text import architecture_line, checkpoint_line
from ckpt_tools.report.wording import DROP_RATE_SOURCES

_SHOWN_ROWS = 40  # of a table before it is cut
# f is the activation and f' its derivative; "keep" is the keep probability of the dropout there.
_HEAD = ("weight layer", "shape", "f before", "E[f²]", "keep", "f behind", "E[f'²]", "keep", "divided by")


def init_text(outcome: InitOutcome) -> str:
    """Return the settings, the weights in order of execution, the signals, and the output."""
    result = outcome.result
    parts = [_settings(outcome), "", rewritten_weights_text(result), *_unchanged_weights_lines(result)]
    if outcome.trial is not None:
        parts += ["", signals_text(outcome.trial, outcome.before, outcome.after)]
    if outcome.request.report is not None:
        parts.append(f"picture: {one_line(outcome.request.report)}")
    biases = sum(bool(layer.bias) for layer in result.rewritten)
    weights = count_text(len(result.layers), "weight")
    zeroed = f"{biases:,} {'bias' if biases == 1 else 'biases'} set to 0"
    remainder = "nothing else differs"
    if outcome.source_sha256 is None:
        remainder = "the rest is the library's own initialisation"
    parts += [
        "",
        f"{len(result.rewritten)} of {weights} rewritten, {zeroed}",
        f"written: {one_line(outcome.output)}",
        f"         sha256 {outcome.output_sha256}; {remainder}",
    ]
    return "\n".join(parts)


def _settings(outcome: InitOutcome) -> str:
    loaded, result = outcome.loaded, outcome.result
    source = "none, a new model" if loaded.checkpoint is None else checkpoint_line(loaded.checkpoint)
    backward = f"backward term {result.backward_term}, backward factor {result.backward_factor}"
    return align_columns(
        [
            ("checkpoint", source),
            ("architecture", architecture_line(loaded)),
            ("drop rates", DROP_RATE_SOURCES[loaded.rates]),
            ("rule", f"{result.rule}, {backward}"),
            ("scheme", f"{result.scheme}, seed {result.seed}"),
        ]
    )


def rewritten_weights_text(result: InitRewrite) -> str:
    """Return a table of the rewritten weights.

    Every row names the activations before and behind a weight with their keep probabilities, and
    the divisor that follows from them.
    """
    rows = [_HEAD, *map(_row, result.rewritten[:_SHOWN_ROWS])]
    return "\n".join([align_columns(rows), *_cut_note(len(result.rewritten))])


def signals_text(
    trial: VerificationBatches, before: Sequence[LayerSignal], after: Sequence[LayerSignal]
) -> str:
    """Return the variance of every layer's output z and of its error signal δ, before and after.

    The last line counts the layers whose Var(z) is in the range that counts as healthy.
    """
    signals_before = {signal.parameter: signal for signal in before}
    rows: list[tuple[str, ...]] = [("weight layer", "Var(z) before", "after", "Var(δ) before", "after")]
    for signal in after[:_SHOWN_ROWS]:
        old = signals_before.get(signal.parameter)
        old_variance, old_error = (old.variance, old.error_variance) if old else (None, None)
        numbers = (old_variance, signal.variance, old_error, signal.error_variance)
        rows.append(
            (signal.name or "(root)", *("-" if value is None else f"{value:.3g}" for value in numbers))
        )
    low, high = HEALTHY_VARIANCES
    healthy_before = f"{count_healthy_layers(before)} of {count_text(len(before), 'layer')} before"
    samples = count_text(trial.samples, "sample")
    inputs, device = one_line(trial.inputs), one_line(trial.device)
    summary = (
        f"Var(z) within {low:g}–{high:g}: {healthy_before}, "
        f"{count_healthy_layers(after)} of {len(after)} after, in training mode "
        f"({samples} of {inputs}, batches of {trial.batch_size} on {device})"
    )
    return "\n".join([align_columns(rows), *_cut_note(len(after)), "", summary])


def _row(layer: InitLayer) -> tuple[str, ...]:
    name, shape = layer.name or "(root)", f"{layer.kind} {'×'.join(map(str, layer.shape))}"
    factors = layer.factors
    if factors is None:
        return (name, shape, *["-"] * 7)
    behind = ("-", "-", "-")  # the backward term has no part in the divisor
    if factors.next_slope is not None:
        behind = (factors.next_activation, f"{factors.next_slope:.3f}", f"{factors.next_keep:.3g}")
    before = (factors.activation, f"{factors.second_moment:.3f}", f"{factors.keep:.3g}")
    return (name, shape, *before, *behind, f"{factors.divisor:.3f}")


def _unchanged_weights_lines(result: InitRewrite) -> list[str]:
    """Return one line for each reason to leave weights as they are."""
    by_reason: dict[str, list[str]] = {}
    for layer in result.layers:
        if not layer.rewritten:
            by_reason.setdefault(layer.reason, []).append(layer.parameter)
    return [
        f"left as they are: {list_names(names)} ({one_line(reason)})" for reason, names in by_reason.items()
    ]


def _cut_note(rows: int) -> list[str]:
    return [f"… and {rows - _SHOWN_ROWS} more (--json lists all)"] if rows > _SHOWN_ROWS else []
