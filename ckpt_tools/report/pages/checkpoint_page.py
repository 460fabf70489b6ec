"""The page of one checkpoint, made from the facts of ``outcome_json`` alone; what the facts lack is left out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from ckpt_tools.redaction import presentable
from ckpt_tools.report.columns import count_text, list_names
from ckpt_tools.report.facts import (
    Facts,
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
from ckpt_tools.report.page_content import KeyFigure, Page, Section, Tone
from ckpt_tools.report.pages.chart import measured_points
from ckpt_tools.report.pages.flagged_images import flagged_section
from ckpt_tools.report.pages.layer_tables import layers_section, sites_section
from ckpt_tools.report.pages.metric_tables import metrics_section
from ckpt_tools.report.wording import DROP_RATE_SOURCES, RECOGNISED_BY_TEXT

VERDICT_TONES: Mapping[str, Tone] = {"agree": "good", "disagree": "bad", "none": "quiet"}


def checkpoint_page(facts: Facts) -> Page:
    """What was done to one checkpoint, from the facts of its run."""
    facts = presentable(facts)
    source = get_mapping(facts, "checkpoint")
    path = str(source.get("path") or "a model")
    return Page(
        title=PurePath(path).name or path,
        subtitle=" · ".join(str(said) for said in (facts.get("architecture"), source.get("format")) if said),
        headline=_headline(facts),
        tone="bad" if _doubtful(facts) else "",
        figures=tuple(_figures(facts)),
        sections=tuple(section for section in _sections(facts) if section is not None),
    )


def control_verdict(facts: Facts) -> str:
    """What the control layers say: agree, disagree or none."""
    return str(get_mapping(facts, "controls").get("verdict", "none"))


def data_verdict(facts: Facts) -> str:
    """What the first look at the data said: agree, disagree or none."""
    return str(get_mapping(get_mapping(facts, "data"), "agreement").get("verdict", "none"))


def _headline(facts: Facts) -> str:
    layers, images = get_mappings(facts, "layers"), integer_text(get_mapping(facts, "data").get("images"))
    what = "means and variances" if facts.get("statistics") == "mean+variance" else "variances"
    doubt = "The data does not look like the training data; the run was forced. " if _doubtful(facts) else ""
    return (
        f"{doubt}{len(rewritten_layers(facts)):,} of {count_text(len(layers), 'BatchNorm layer')} got new running {what}, "
        f"measured on {images} images with dropout off. Nothing else in the checkpoint differs."
    )


def _doubtful(facts: Facts) -> bool:
    return "disagree" in (control_verdict(facts), data_verdict(facts))


def _figures(facts: Facts) -> Iterator[KeyFigure]:
    ratios, layers = median_ratios(facts), get_mappings(facts, "layers")
    yield KeyFigure("Layers rewritten", f"{len(rewritten_layers(facts)):,}", f"of {len(layers):,}")
    if ratios:
        name = most_changed_layer(ratios)
        assert name is not None
        yield KeyFigure("Stored ÷ new variance", ratio_text(statistics.median(ratios.values())), "median layer")
        yield KeyFigure("Largest change", ratio_text(ratios[name]), name or "(root)")
    errors = [
        finite_number(get_mapping(row, "relative_standard_error").get("median")) for row in rewritten_layers(facts)
    ]
    known = [error for error in errors if error is not None]
    if known:
        yield KeyFigure("Standard error", percent_text(max(known)), "median channel, least certain layer")
    yield KeyFigure(
        "Images", integer_text(get_mapping(facts, "data").get("images")), f"in {seconds_text(facts.get('seconds'))}"
    )


def _sections(facts: Facts) -> Iterator[Section | None]:
    yield _chart(facts)
    yield metrics_section(facts)
    yield _controls(get_mapping(facts, "controls"))
    yield _data(get_mapping(facts, "data"))
    yield flagged_section(facts)
    yield _provenance(facts)
    command = facts.get("command")
    yield Section("Repeat it", (_REPEAT,), code=str(command)) if command else None
    yield sites_section(facts)
    yield layers_section(facts)


_REPEAT = (
    "The same versions on the same machine give the same bytes. An existing output is replaced with --overwrite only."
)

_READING = (
    "A ratio above 1 means that the stored variance was too large for a network without dropout, below 1 too small. "
    "Layers stand in order of execution."
)


def _chart(facts: Facts) -> Section | None:
    return Section("Change by depth", (_READING,), chart=facts) if measured_points(facts) else None


def _controls(controls: Facts) -> Section:
    found = controls.get("names")
    names = [str(name) for name in found] if isinstance(found, list | tuple) else []
    verdict = str(controls.get("verdict", "none"))
    deviation, worst, shift = (finite_number(controls.get(key)) for key in ("deviation", "worst", "shift"))
    if verdict == "none" or deviation is None or worst is None:
        return Section("Control layers", (f"No verdict: {controls.get('reason') or 'there are none'}.",), "quiet")
    word = verdict + ("s" if len(names) == 1 else "")
    forced = "" if verdict == "agree" else "; it was used all the same (--force)"
    rows = [
        ("Layers", list_names(names, 12)),
        ("Stored and measured variance differ by", f"{deviation_text(deviation)} in the median channel"),
        ("In the worst layer", deviation_text(worst)),
    ]
    if shift is not None:
        rows.append(("Means differ by", f"{shift:.2g} standard deviations"))
    return Section(
        "Control layers",
        (f"{count_text(len(names), 'layer')} that no dropout reaches {word} with the data{forced}.", _CONTROLS),
        VERDICT_TONES.get(verdict, ""),
        pairs=tuple(rows),
    )


_CONTROLS = "On the training data their variance is the stored one; what is off here would be off everywhere."


def _data(data: Facts) -> Section:
    agreement = get_mapping(data, "agreement")
    scores, verdict = get_mapping(agreement, "scores"), str(agreement.get("verdict", "none"))
    said = {
        "agree": "It agrees with what the BatchNorm layers remember of the training data.",
        "disagree": f"It does not look like the training data: {agreement.get('cause')}. It was used all the same "
        "(--force).",
    }.get(verdict, f"It was not compared with the training data: {agreement.get('cause') or 'nobody can tell'}.")
    rows = [
        ("Data", f"{data.get('spec')} ({data.get('kind')})"),
        ("Images", f"{integer_text(data.get('images'))} in {integer_text(data.get('batches'))} batches of "
         f"{integer_text(data.get('cut_to') or data.get('batch_size'))}"),
        ("Preprocessing", str(data.get("transform") or "none")),
        ("Taken from", str(get_mapping(data, "input").get("origin") or "")),
    ]  # fmt: skip
    if scores:
        told = ", ".join(
            f"{name} layers {value:.2f}" for name, value in scores.items() if finite_number(value) is not None
        )
        rows.append(("Distance, 0 is perfect", f"{told}; on {integer_text(agreement.get('images'))} samples"))
    return Section("Data", (said,), VERDICT_TONES.get(verdict, ""), pairs=_nonempty_rows(rows))


def _provenance(facts: Facts) -> Section:
    source, output, tool = get_mapping(facts, "checkpoint"), get_mapping(facts, "output"), get_mapping(facts, "tool")
    libraries = get_mapping(facts, "libraries")
    told = RECOGNISED_BY_TEXT.get(str(facts.get("recognised_by")), "")  # type: ignore[call-overload]
    passes = finite_number(facts.get("passes")) or 1
    method = [facts.get("estimator"), facts.get("statistics"), facts.get("precision")]
    rows = [
        ("Checkpoint", str(source.get("path") or "")),
        ("SHA-256", str(source.get("sha256") or "")),
        ("Weights", str(source.get("weights") or "")),
        ("Output", str(output.get("path") or "")),
        ("SHA-256 of the output", str(output.get("sha256") or "")),
        ("Architecture", str(facts.get("architecture") or "") + (f", told by {told}" if told else "")),
        ("Arguments", ", ".join(f"{name}={value!r}" for name, value in get_mapping(facts, "model_kwargs").items())),
        ("Drop rates", DROP_RATE_SOURCES.get(str(facts.get("rates")), str(facts.get("rates") or ""))),
        ("Layers chosen", str(facts.get("why") or "")),
        ("Estimator", ", ".join(str(word) for word in method if word)),
        ("Passes", f"{passes:,.0f}" if passes > 1 else ""),
        ("Stopped", "at the tolerance" if facts.get("stopped_early") else ""),
        ("Left alone", list_names(f"{row.get('name')} ({row.get('reason')})" for row in get_mappings(facts, "left_alone"))),
        ("Device", str(facts.get("device") or "")),
        ("Tool", f"{tool.get('name', 'ckpt-tools')} {tool.get('version', '')}"),
        ("Libraries", ", ".join(f"{name} {version}" for name, version in libraries.items())),
    ]  # fmt: skip
    return Section("Provenance", pairs=_nonempty_rows(rows))


def _nonempty_rows(rows: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((name, text) for name, text in rows if text)
