"""The page of one checkpoint, made from the facts of ``outcome_json`` alone.

Facts that are missing are left out, so that the record of an earlier version gives a page, too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from ckpt_tools.redaction import presentable
from ckpt_tools.report.columns import count_text, list_names
from ckpt_tools.report.facts import (
    Facts,
    get_list,
    get_mapping,
    get_mappings,
    median_ratios,
    most_changed_layer,
    rewritten_layers,
)
from ckpt_tools.report.number_format import (
    deviation_text,
    finite_number,
    integer_text,
    percent_text,
    ratio_text,
    seconds_text,
)
from ckpt_tools.report.page_content import KeyFigure, Page, Section, Tone, join_subtitle
from ckpt_tools.report.pages.chart import measured_points
from ckpt_tools.report.pages.flagged_images import flagged_section
from ckpt_tools.report.pages.layer_tables import layers_section, sites_section
from ckpt_tools.report.pages.metric_tables import metrics_section
from ckpt_tools.report.wording import DROP_RATE_SOURCES, RECOGNISED_BY_TEXT, VERDICT_LEVELS, is_worse

VERDICT_TONES: Mapping[str, Tone] = {
    "agree": "good",
    "doubt": "doubt",
    "disagree": "bad",
    "refuse": "bad",
    "none": "quiet",
}

_HOW_TO_REPEAT = (
    "The same versions of the libraries on the same machine give the same bytes. "
    "An existing output is replaced with --overwrite only."
)
_HOW_TO_READ_THE_CHART = (
    "A ratio above 1 means that the stored variance was too large for a network without dropout, "
    "below 1 too small. Layers stand in order of execution."
)
_ESTIMATORS = {
    "ratio": "The stored variance is divided by what dropout adds: the variance with dropout on over that "
    "with dropout off, both measured on the same inputs, whose own distribution cancels.",
    "pooled": "The variances of the inputs with dropout off, pooled over all batches, as in the paper.",
}
_WHY_CONTROLS = "On the training data their variance is the stored one; other data changes every layer."


def checkpoint_page(facts: Facts) -> Page:
    """Return the page of one checkpoint from the facts of its run.

    Credentials, control characters and endless texts are taken out of the facts first, so nothing
    below has to do it.
    """
    facts = presentable(facts)
    source = get_mapping(facts, "checkpoint")
    path = str(source.get("path") or "a model")
    return Page(
        title=PurePath(path).name or path,
        subtitle=join_subtitle(facts.get("architecture"), source.get("format")),
        headline=_headline(facts),
        tone="bad" if _is_doubtful(facts) or get_list(facts, "warnings") else "",
        figures=tuple(_figures(facts)),
        sections=tuple(section for section in _sections(facts) if section is not None),
    )


def control_verdict(facts: Facts) -> str:
    """Return what the control layers say of the data: agree, doubt, disagree or none."""
    return str(get_mapping(facts, "controls").get("verdict", "none"))


def data_verdict(facts: Facts) -> str:
    """Return what the data check said of the first batches: agree, doubt, refuse or none."""
    return str(get_mapping(get_mapping(facts, "data"), "agreement").get("verdict", "none"))


def worst_verdict(facts: Facts) -> str:
    """Return the verdict that says more against the data: of all layers' mismatch or of the data check."""
    level, check = str(get_mapping(facts, "verdict").get("level", "none")), data_verdict(facts)
    return check if is_worse(check, level) else level


def _headline(facts: Facts) -> str:
    layers = count_text(len(get_mappings(facts, "layers")), "BatchNorm layer")
    images = integer_text(get_mapping(facts, "data").get("images"))
    statistics_text = "means and variances" if facts.get("statistics") == "mean+variance" else "variances"
    doubt = ""
    if _is_doubtful(facts):
        doubt = "The data does not look like the training data; the run was forced. "
    elif get_list(facts, "warnings"):
        doubt = "Look at the warnings before you use the result. "
    how = f"measured on {images} images with dropout off"
    if _is_ratio(facts):
        how = f"from the ratio of variances with dropout off and on, on {images} inputs"
    end = "Nothing else in the checkpoint differs."
    if "output" in facts and facts["output"] is None:
        end = "No checkpoint was written (--dry-run)."
    return (
        f"{doubt}{len(rewritten_layers(facts)):,} of {layers} got new running {statistics_text}, {how}. {end}"
    )


def _is_ratio(facts: Facts) -> bool:
    """Tell whether the result is that of the estimator that does not depend on the data's kind."""
    return facts.get("estimator") == "ratio"


def _is_doubtful(facts: Facts) -> bool:
    verdicts = {control_verdict(facts), data_verdict(facts)}
    return not _is_ratio(facts) and bool(verdicts & {"disagree", "refuse"})


def _figures(facts: Facts) -> Iterator[KeyFigure]:
    ratios, layers = median_ratios(facts), get_mappings(facts, "layers")
    yield KeyFigure("Layers rewritten", f"{len(rewritten_layers(facts)):,}", f"of {len(layers):,}")
    name = most_changed_layer(ratios)
    if name is not None:  # a name may be "": the model itself may be a BN layer
        yield KeyFigure(
            "Stored ÷ new variance", ratio_text(statistics.median(ratios.values())), "median layer"
        )
        yield KeyFigure("Largest change", ratio_text(ratios[name]), name or "(root)")
    medians = (
        get_mapping(layer, "relative_standard_error").get("median") for layer in rewritten_layers(facts)
    )
    errors = [error for error in map(finite_number, medians) if error is not None]
    if errors:
        yield KeyFigure("Standard error", percent_text(max(errors)), "median channel, least certain layer")
    images = integer_text(get_mapping(facts, "data").get("images"))
    yield KeyFigure("Images", images, f"in {seconds_text(facts.get('seconds'))}")


def _sections(facts: Facts) -> Iterator[Section | None]:
    warnings = tuple(str(warning) for warning in get_list(facts, "warnings"))
    if warnings:
        yield Section("Warnings", tuple(f"{text[:1].upper()}{text[1:]}." for text in warnings), "bad")
    if measured_points(facts):  # without a measured layer there is nothing to draw
        yield Section("Change by depth", (_HOW_TO_READ_THE_CHART,), chart=facts)
    yield metrics_section(facts)
    yield _estimator_section(facts)
    yield _controls_section(facts)
    yield _data_section(facts)
    # What a model says about inputs that were made up means nothing.
    if get_mapping(facts, "data").get("kind") != "synthetic":
        yield _effect_section(get_mapping(facts, "effect"))
    yield flagged_section(facts)
    yield _provenance_section(facts)
    if facts.get("command"):
        yield Section("Repeat it", (_HOW_TO_REPEAT,), code=str(facts["command"]))
    # The long tables stand at the end, where they hide nothing.
    yield sites_section(facts)
    yield layers_section(facts)


def _estimator_section(facts: Facts) -> Section | None:
    """Return which estimator was used, and why; None for the facts of an earlier version."""
    reason = str(facts.get("estimator_reason") or "")
    if not reason:
        return None
    estimator = str(facts.get("estimator"))
    sentences = [f"{estimator}: {reason}."]
    if estimator in _ESTIMATORS:
        sentences.append(_ESTIMATORS[estimator])
    return Section("Estimator", tuple(sentences))


def _effect_section(effect: Facts) -> Section | None:
    """Return what the correction changes in the outputs, None where that was not measured."""
    inputs = count_text(int(finite_number(effect.get("images")) or 0), "input")
    changed, relative = (finite_number(effect.get(key)) for key in ("changed", "relative_change"))
    before, after = (ratio_text(effect.get(f"confidence_{stage}")) for stage in ("before", "after"))
    if changed is not None:
        rows = [
            ("Predictions that change", percent_text(changed)),
            ("Mean confidence", f"{before} → {after}"),
        ]
    elif relative is not None:
        rows = [("Outputs change by", f"{percent_text(relative)} of their root mean square")]
    else:
        return None
    return Section("Effect on the outputs", (f"Without labels, on {inputs}.",), pairs=tuple(rows))


def _controls_section(facts: Facts) -> Section:
    controls = get_mapping(facts, "controls")
    names = [str(name) for name in get_list(controls, "names")]
    verdict = str(controls.get("verdict", "none"))
    deviation, worst, shift = (finite_number(controls.get(key)) for key in ("deviation", "worst", "shift"))
    if verdict == "none" or deviation is None or worst is None:
        return Section(
            "Control layers", (f"No verdict: {controls.get('reason') or 'there are none'}.",), "quiet"
        )
    layers = count_text(len(names), "layer")
    rows = [
        ("Layers", list_names(names, 12)),
        ("Stored and measured variance differ by", f"{deviation_text(deviation)} in the median channel"),
        ("In the worst layer", _worst_control_text(controls)),
    ]
    if shift is not None:
        rows.append(("Means differ by", f"{shift:.2g} standard deviations"))
    tone = VERDICT_TONES.get(verdict, "")
    if verdict == "agree" and worst_verdict(facts) in ("doubt", "refuse"):
        tone = "quiet"  # no tick stands over layers that moved, be it within their error bars
    sentences = (_controls_sentence(facts, layers, verdict), _WHY_CONTROLS)
    return Section("Control layers", sentences, tone, pairs=tuple(rows))


def _controls_sentence(facts: Facts, layers: str, verdict: str) -> str:
    reason = get_mapping(facts, "controls").get("reason")
    if verdict == "doubt":
        return f"{str(reason)[:1].upper()}{str(reason)[1:]}."
    if verdict == "disagree":
        cause = f": {reason}" if reason else ""
        return f"{layers} that no dropout reaches disagree with the data, {_why_used(facts)}{cause}."
    if worst_verdict(facts) in ("doubt", "refuse"):
        return f"{layers} that no dropout reaches moved no more than 5 % and three standard errors."
    word = "agrees" if layers.startswith("1 ") else "agree"
    return f"{layers} that no dropout reaches {word} with the data."


def _worst_control_text(controls: Facts) -> str:
    """Return how far the worst layer is off, with its standard error and its name."""
    text, ratio = deviation_text(controls.get("worst")), get_mapping(controls, "worst_ratio")
    median, error = (finite_number(ratio.get(key)) for key in ("median", "standard_error"))
    if not median or error is None:
        return text
    name = controls.get("worst_layer") or "(root)"
    return f"{text} ± {percent_text(error / median)}, {name} (stored ÷ measured {ratio_text(median)})"


def _why_used(facts: Facts) -> str:
    """Return why data that does not look right was used, as the end of a sentence."""
    if _is_ratio(facts):
        return "on which this estimator does not depend"
    return "which was used all the same (--force)"


def _data_section(facts: Facts) -> Section:
    data = get_mapping(facts, "data")
    agreement = get_mapping(data, "agreement")
    scores, verdict = get_mapping(agreement, "scores"), str(agreement.get("verdict", "none"))
    cause = agreement.get("cause")
    used = "It was used all the same (--force)."
    if _is_ratio(facts):
        used = "This estimator does not depend on that."
    refused = f"It does not look like the training data: {cause}. {used}"
    sentences = {
        "agree": "It agrees with the statistics that the BatchNorm layers have stored in training.",
        "doubt": f"It differs from what the BatchNorm layers remember: {cause}.",
        "disagree": refused,
        "refuse": refused,
        "none": f"It was not compared with the training data: {cause or 'no reason is recorded'}.",
    }
    # Where memory was short, batches were cut to a smaller size than the planned one.
    batch_size = integer_text(data.get("cut_to") or data.get("batch_size"))
    images, batches = integer_text(data.get("images")), integer_text(data.get("batches"))
    rows = [
        ("Data", f"{data.get('spec')} ({data.get('kind')})"),
        ("Images", f"{images} in {batches} batches of {batch_size}"),
        ("Preprocessing", str(data.get("transform") or "none")),
        ("Taken from", str(get_mapping(data, "input").get("origin") or "")),
    ]  # fmt: skip
    if scores:
        finite = {name: score for name, score in scores.items() if finite_number(score) is not None}
        distances = ", ".join(f"{name} layers {score:.2f}" for name, score in finite.items())
        samples = integer_text(agreement.get("images"))
        rows.append(("Distance, 0 is perfect", f"{distances}; on {samples} samples"))
    sentence = sentences.get(verdict, sentences["none"])
    mismatch = get_mapping(facts, "verdict")
    level = str(mismatch.get("level"))
    # Of two verdicts the one that says more against the data is shown.
    if level in VERDICT_LEVELS and not is_worse(verdict, level):
        verdict, sentence = level, f"It {VERDICT_LEVELS[level]}: {mismatch.get('reason')}."
    return Section("Data", (sentence,), VERDICT_TONES.get(verdict, ""), pairs=_nonempty_rows(rows))


def _provenance_section(facts: Facts) -> Section:
    """Return where the checkpoint came from and what was done to it, in full."""
    source, output, tool = (get_mapping(facts, name) for name in ("checkpoint", "output", "tool"))
    architecture = str(facts.get("architecture") or "")
    told_by = RECOGNISED_BY_TEXT.get(str(facts.get("recognised_by")))
    if told_by:
        architecture += f", told by {told_by}"
    arguments = (f"{name}={value!r}" for name, value in get_mapping(facts, "model_kwargs").items())
    libraries, rates = get_mapping(facts, "libraries"), get_mapping(facts, "rates")
    rate_source = str(rates.get("source") or "")
    passes = finite_number(facts.get("passes")) or 1
    method = [facts.get("estimator"), facts.get("statistics"), facts.get("precision")]
    left_alone = (
        f"{layer.get('name')} ({layer.get('reason')})" for layer in get_mappings(facts, "left_alone")
    )
    rows = [
        ("Checkpoint", str(source.get("path") or "")),
        ("SHA-256", str(source.get("sha256") or "")),
        ("Weights", str(source.get("weights") or "")),
        ("Output", str(output.get("path") or "")),
        ("SHA-256 of the output", str(output.get("sha256") or "")),
        ("Architecture", architecture),
        ("Arguments", ", ".join(arguments)),
        ("Drop rates", str(rates.get("fit") or DROP_RATE_SOURCES.get(rate_source, rate_source))),
        ("Layers chosen", str(facts.get("why") or "")),
        ("Estimator", ", ".join(str(word) for word in method if word)),
        ("Passes", f"{passes:,.0f}" if passes > 1 else ""),
        ("Stopped", "at the tolerance" if facts.get("stopped_early") else ""),
        ("Left alone", list_names(left_alone)),
        ("Device", str(facts.get("device") or "")),
        ("Tool", f"{tool.get('name', 'ckpt-tools')} {tool.get('version', '')}"),
        ("Libraries", ", ".join(f"{name} {version}" for name, version in libraries.items())),
    ]  # fmt: skip
    return Section("Provenance", pairs=_nonempty_rows(rows))


def _nonempty_rows(rows: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((name, text) for name, text in rows if text)
