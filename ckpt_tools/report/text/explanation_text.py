"""The answer of ``inspect --data`` to "why is my model worse in eval mode?", in plain words."""

from __future__ import annotations

from ckpt_tools.jobs.explanation import Explanation
from ckpt_tools.jobs.inspection import Inspection
from ckpt_tools.plain_text import escape_controls, one_line
from ckpt_tools.reestimate.concerns import noise_warning
from ckpt_tools.report.columns import align_columns, count_text
from ckpt_tools.report.text.metrics_text import other_files_text, skipped_text
from ckpt_tools.report.text.reestimation_text import measured_text, mismatch_verdict_text
from ckpt_tools.report.text.suggested_command import reestimate_command

_MEANINGS = (
    "mismatch: stored variance / variance with dropout on, 1 if the data is that of the training\n"
    "dropout shift: variance with dropout on / off, on the same inputs, 1 if dropout changes nothing"
)

_CORRECTED = (
    "this file is an output of bn-reestimate, and its variances are those with dropout off. So the mismatch "
    "holds dropout's share here, and nothing is left to correct. Inspect the file that it was made of."
)


def explanation_text(explanation: Explanation, inspection: Inspection, limit: int | None) -> str:
    """Return what differs layer by layer, at most ``limit`` rows, the verdict, and what to do."""
    measured = [layer for layer in explanation.layers if layer.mismatch or layer.dropout_shift]
    rows = [("BN layer", "mismatch", "dropout shift", "behind dropout")]
    for layer in measured[:limit]:
        shift = measured_text(layer.dropout_shift) or "-"
        behind = "yes" if layer.downstream_of else "no"
        rows.append((layer.name or "(root)", measured_text(layer.mismatch), shift, behind))
    hidden = len(measured) - (len(rows) - 1)
    table = align_columns(rows) + (f"\n… and {hidden} more (--all shows them)" if hidden else "")
    verdict = mismatch_verdict_text(explanation.verdict)
    paragraph = explanation_paragraph(explanation, inspection)
    facts = [f"{_MEANINGS}\ndata: {verdict}"]
    if explanation.other_files:
        facts.append(f"not read: {other_files_text(explanation.other_files)}")
    if explanation.skipped:
        facts.append(skipped_text(explanation.skipped))
    if inspection.rate_fit is not None:
        facts.append(one_line(inspection.rate_fit.sentence))
    parts = [table, "\n".join(facts), _join_lines(paragraph)]
    command = explanation_command(explanation, inspection)
    if command:
        parts.append(f"    {escape_controls(command)}")
    return "\n\n".join(parts)


def _join_lines(text: str) -> str:
    """Return a paragraph whose names from other people's files cannot begin a line of their own."""
    return escape_controls(" ".join(text.split()))


def explanation_paragraph(explanation: Explanation, inspection: Inspection) -> str:
    """Return in plain words why eval mode differs from training, and what helps."""
    first = f"Why is eval worse than train? Measured on {count_text(explanation.images, 'sample')}: "
    if inspection.correction is not None:
        return first + _CORRECTED
    noise = noise_warning(explanation.noise_left_on)
    return first + _CAUSES[explanation.cause](explanation) + (f" Besides, {noise}." if noise else "")


def explanation_command(explanation: Explanation, inspection: Inspection) -> str | None:
    """Return the command that helps, None if there is none."""
    if inspection.correction is not None:
        return None
    if explanation.cause == "dropout":
        return reestimate_command(inspection)
    if explanation.dropout_shifts and explanation.cause in ("mismatch", "unknown"):
        return reestimate_command(inspection, "--estimator", "ratio")
    if explanation.cause == "mismatch" and not explanation.rates_known:
        return reestimate_command(inspection)
    if explanation.cause == "mismatch":
        return reestimate_command(inspection, "--layers", "all", "--estimator", "pooled")
    return None


def _explain_nothing(explanation: Explanation) -> str:
    no_dropout = "and dropout changes it by no more than 1 % in any layer"
    if not explanation.dropout_on:
        no_dropout = "and there is no dropout that would change it"
    return (
        f"the BatchNorm layers get inputs of the variance that they have stored, {no_dropout}. BatchNorm "
        "is not the reason. Look at what else differs between training and evaluation: another "
        f"preprocessing, other data, overfitting.{_unknown_rates(explanation)}"
    )


def _explain_dropout(explanation: Explanation) -> str:
    return (
        f"{_strongest_shift(explanation)} In eval mode dropout is off, and the layers still divide by the "
        "variances that they stored with dropout on. The data agrees with what they stored, so new "
        "variances can be measured on it."
    )


def _explain_mismatch(explanation: Explanation) -> str:
    differs = (
        "the inputs of the layers are not distributed as they were in training "
        f"({_strongest_mismatch(explanation)})"
    )
    if explanation.dropout_shifts:
        return (
            f"two things differ. First, {_strongest_shift(explanation)} Second, {differs}: training "
            "augmentation or another preprocessing explain that. The ratio estimator takes out dropout's "
            "share alone, and does not depend on how the data is distributed."
            f"{_unknown_rates(explanation)}"
        )
    cause = "dropout changes no variance" if explanation.dropout_on else "no dropout is on"
    causes = "Training augmentation" if explanation.rates_known else "Dropout in training, augmentation"
    return (
        f"{cause}, yet {differs}. {causes}, averaged weights, frozen layers, too few batches or a small "
        "momentum for the running averages, or other data explain that. If this data, with this "
        "preprocessing, is what the model shall see, its variances can be stored instead; compare both "
        f"on labelled data (--eval-data).{_unknown_rates(explanation)}"
    )


def _explain_preprocessing(explanation: Explanation) -> str:
    cause = explanation.preprocessing or explanation.verdict.reason
    shifts = f" Besides, {_strongest_shift(explanation)}" if explanation.dropout_shifts else ""
    return (
        f"the data does not look like that of the training: {one_line(cause)}. Mend that first, and then "
        f"inspect again.{shifts}"
    )


def _explain_unknown(explanation: Explanation) -> str:
    reason = one_line(explanation.verdict.reason)
    if not explanation.dropout_shifts:
        return f"the data could not be compared with the stored statistics ({reason})."
    return (
        f"{_strongest_shift(explanation)} In eval mode dropout is off, and the layers still divide by the "
        f"variances that they stored with dropout on. Whether the data is that of the training could not "
        f"be told ({reason}); the ratio estimator does not depend on it."
    )


_CAUSES = {
    "nothing": _explain_nothing,
    "dropout": _explain_dropout,
    "mismatch": _explain_mismatch,
    "preprocessing": _explain_preprocessing,
    "unknown": _explain_unknown,
}


def _unknown_rates(explanation: Explanation) -> str:
    """Return a sentence about drop rates that nobody knows, as a bare state dict holds none."""
    if explanation.rates_known:
        return ""
    if explanation.dropout_on:
        return (
            " The drop rates are the architecture's own, since the file records none; if the training used "
            "others, give them (--model-kwargs drop_rate=0.2) and inspect again."
        )
    return " If the training used dropout, give its rates (--model-kwargs drop_rate=0.2) and inspect again."


def _strongest_shift(explanation: Explanation) -> str:
    shifts = {
        layer.name: layer.dropout_shift for layer in explanation.layers if layer.dropout_shift is not None
    }
    name = max(shifts, key=lambda name: _distance_from_one(shifts[name].median))
    return (
        "dropout changes the variances that the layers see, most in "
        f"{one_line(name or '(root)')}, by a factor of {measured_text(shifts[name])}."
    )


def _strongest_mismatch(explanation: Explanation) -> str:
    mismatches = {layer.name: layer.mismatch for layer in explanation.layers if layer.mismatch is not None}
    name = max(mismatches, key=lambda name: _distance_from_one(mismatches[name].median))
    return (
        f"most in {one_line(name or '(root)')}, stored / measured variance {measured_text(mismatches[name])}"
    )


def _distance_from_one(ratio: float) -> float:
    # Half is as far from 1 as twice.
    return max(ratio, 1 / max(ratio, 1e-30))
