"""The two long tables of a checkpoint's page: its dropout sites and its BN layers."""

from __future__ import annotations

from ckpt_tools.report.columns import count_text
from ckpt_tools.report.facts import Facts, get_mapping, get_mappings, layer_role
from ckpt_tools.report.number_format import finite_number, number_cell, percent_text, ratio_text
from ckpt_tools.report.page_content import Cell, Column, Section, Table


def sites_section(facts: Facts) -> Section:
    """Return a table of the dropout sites with their rates and the first BN layer behind each."""
    sites, layers = get_mappings(facts, "dropout_sites"), get_mappings(facts, "layers")
    if not sites:
        return Section("Dropout sites", ("The walk found none.",), "quiet")
    active = sum(bool(site.get("active")) for site in sites)
    rows = [
        (
            Cell(str(site.get("name") or "(root)"), str(site.get("name"))),
            Cell(str(site.get("op", "")), str(site.get("op", ""))),
            number_cell(site.get("rate"), _rate(site)),
            _behind(site, len(layers)),
        )
        for site in sites
    ]
    sentence = f"{count_text(len(sites), 'site')}, {active:,} of them active."
    return Section("Dropout sites", (sentence,), table=Table("Dropout sites", _SITE_COLUMNS, tuple(rows)))


def _rate(site: Facts) -> str:
    rate = finite_number(site.get("rate"))
    return "not known" if rate is None else f"{rate:g}"


_SITE_COLUMNS = (
    Column("Site", "code"), Column("Operation"), Column("Rate", "number"),
    Column("First layer behind it", "number"),
)  # fmt: skip


def _behind(site: Facts, layers: int) -> Cell:
    depth = finite_number(site.get("depth"))  # BN layers before the first one that the site reaches
    if depth is None:
        return Cell("none", layers + 1, "quiet")  # sorted behind the last layer
    return Cell(f"{depth + 1:.0f}", depth + 1)


_LAYER_COLUMNS = (
    Column("Layer", "code"), Column("Depth", "number"), Column("Channels", "number"),
    Column("Role"), Column("Stored ÷ new", "number"), Column("Smallest", "number"),
    Column("Largest", "number"), Column("Std. error", "number"), Column("Worst", "number"),
)  # fmt: skip


_LAYER_SENTENCE = (
    "Stored variance over new variance: the median channel, the smallest and the largest; "
    "the relative standard error of the new variance: median and worst channel."
)
_PAIRED = {
    "mismatch": (
        Column("Mismatch", "number"),
        "Mismatch is stored variance over the variance with dropout on, 1 if the data is that of the "
        "training: the median channel with its standard error.",
    ),
    "dropout_shift": (
        Column("Dropout shift", "number"),
        "Dropout shift is the variance with dropout on over that with dropout off, on the same inputs: the "
        "median channel with its standard error.",
    ),
}


def layers_section(facts: Facts) -> Section:
    """Return a table of all BN layers in order of execution: ratios and standard errors."""
    layers = get_mappings(facts, "layers")
    rows = [_layer_row(depth, layer) for depth, layer in enumerate(layers, 1)]
    sentences: list[str] = [_LAYER_SENTENCE]
    columns: tuple[Column, ...] = _LAYER_COLUMNS
    # Only a paired measurement tells the two apart, and on inputs that were made up there is no mismatch.
    for key, (column, sentence) in _PAIRED.items():
        if any(get_mapping(layer, key) for layer in layers):
            sentences.append(sentence)
            columns += (column,)
            pairs = zip(rows, layers, strict=True)
            rows = [(*row, _measured_cell(layer, key)) for row, layer in pairs]
    return Section("Every layer", tuple(sentences), table=Table("Every layer", columns, tuple(rows)))


def _measured_cell(layer: Facts, key: str) -> Cell:
    """Return a cell such as ``1.310 ± 0.012``, sorted by the value."""
    measured = get_mapping(layer, key)
    median, error = measured.get("median"), finite_number(measured.get("standard_error"))
    text = ratio_text(median)
    return number_cell(median, text if error is None else f"{text} ± {error:.3f}")


def _layer_row(depth: int, layer: Facts) -> tuple[Cell, ...]:
    ratio, error, role = (
        get_mapping(layer, "ratio"),
        get_mapping(layer, "relative_standard_error"),
        layer_role(layer),
    )
    return (
        Cell(str(layer.get("name") or "(root)"), str(layer.get("name"))),
        number_cell(depth),  # in order of execution, which sorting can restore by this column
        number_cell(layer.get("channels")),
        Cell(role, role, "" if role == "rewritten" else "quiet"),
        *(number_cell(ratio.get(key), ratio_text(ratio.get(key))) for key in ("median", "min", "max")),
        *(number_cell(error.get(key), percent_text(error.get(key))) for key in ("median", "max")),
    )
