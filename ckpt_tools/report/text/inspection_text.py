"""The result of ``inspect`` as text: the file, the model, and what ``bn-reestimate`` would do.

Many users read this page first, before they know what the tool changes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

from ckpt_tools.contract import Checkpoint, InputSpec
from ckpt_tools.jobs.earlier_output import describe_correction
from ckpt_tools.jobs.inspection import Inspection, Prospect
from ckpt_tools.plain_text import escape_controls, one_line
from ckpt_tools.report.columns import align_columns, count_text, list_names
from ckpt_tools.report.text.explanation_text import explanation_text
from ckpt_tools.report.text.reestimation_text import architecture_line, size_text
from ckpt_tools.report.text.suggested_command import reestimate_command
from ckpt_tools.report.wording import DROP_RATE_SOURCES, RECOGNISED_BY_TEXT
from ckpt_tools.results import BatchNormLayer, DropoutSite, Walk

_SHOWN_ROWS = 12  # of a table before it is cut
_SHOWN_ENTRIES = 8  # that stand in the checkpoint beside its weights
_LONGEST_VALUE = 40  # characters


def inspection_text(inspection: Inspection, *, everything: bool = False) -> str:
    """Return the page. Tables are cut unless ``everything`` is set.

    Where no architecture is known the page ends with the file, and with a command that lets the
    data choose if several architectures fit.
    """
    parts = [align_columns([*_file_rows(inspection), *_model_rows(inspection), *_layer_rows(inspection)])]
    if inspection.walk is not None:
        limit = None if everything else _SHOWN_ROWS
        parts += [
            dropout_sites_text(inspection.walk, limit),
            batch_norm_layers_text(inspection.walk, inspection.steps, limit),
            *_notes(inspection.walk),
        ]
    if inspection.explanation is not None:
        # It ends with the command that helps, which may be another one than that of the prospect.
        limit = None if everything else _SHOWN_ROWS
        parts.append(explanation_text(inspection.explanation, inspection, limit))
    elif inspection.prospect is not None:
        parts.append(prospect_text(inspection.prospect, inspection))
    elif inspection.candidates:
        choice = "bn-reestimate would let the data choose among these architectures."
        parts.append(f"{choice}\n\n    {escape_controls(reestimate_command(inspection))}")
    return "\n\n".join(part for part in parts if part)


def dropout_sites_text(walk: Walk, limit: int | None) -> str:
    """Return a table of the dropout sites and the BN layers behind them, at most ``limit`` rows."""
    rows = [("dropout site", "op", "rate", "BN layers behind it")]
    rows += [
        (site.name, site.op, _rate(site), _behind(walk.batch_norms, site.name)) for site in walk.dropout_sites
    ]
    return _table(rows, limit) if walk.dropout_sites else "no dropout site"


def batch_norm_layers_text(walk: Walk, steps: Mapping[str, int | None], limit: int | None) -> str:
    """Return a table of the BN layers in order of execution with the dropout sites before them.

    ``steps`` has the training batches that each layer has counted, None where the file does not
    say.
    """
    untrained = {name for name, step in steps.items() if step == 0}
    if len(untrained) == len(steps):
        untrained = set()  # one sentence above the table says it of all layers
    rows = [("BN layer", "channels", "behind active sites", "behind other sites", "")]
    rows += [
        (
            layer.name or "(root)",
            str(layer.channels),
            list_names(layer.downstream_of, 1) or "-",
            list_names(layer.potentially_downstream_of, 1) or "-",
            ", ".join(_remarks(layer, untrained)),
        )
        for layer in walk.batch_norms
    ]
    return _table(rows, limit) if walk.batch_norms else "no BN layer"


def prospect_text(prospect: Prospect, inspection: Inspection) -> str:
    """Return what ``bn-reestimate`` would do and its command, or why there is nothing to do."""
    why = one_line(prospect.why)
    if not prospect.rewrite:
        return f"bn-reestimate: {why}"
    controls = "none"
    if prospect.controls:
        controls = f"{count_text(len(prospect.controls), 'layer')} that dropout does not reach"
    layers = count_text(len(inspection.walk.batch_norms) if inspection.walk else 0, "BN layer")
    return (
        f"bn-reestimate would rewrite {len(prospect.rewrite)} of {layers}: {why}.\n"
        f"Controls: {controls}.\n\n    {escape_controls(reestimate_command(inspection))}"
    )


def _file_rows(inspection: Inspection) -> list[tuple[str, str]]:
    checkpoint = inspection.checkpoint
    if checkpoint is None:
        return [("file", "none, the architecture alone"), ("holds", _holds(inspection))]
    rows = [
        ("file", f"{checkpoint.shown_path}, {size_text(inspection.size or 0)}, {checkpoint.format}"),
        ("taken", _weights_entry(checkpoint)),
        ("corrected", describe_correction(inspection.correction) if inspection.correction else ""),
        ("left out", list_names(checkpoint.left_out)),
        ("holds", _holds(inspection)),
        ("says", _recorded_entries(checkpoint.words)),
    ]
    return [(name, text) for name, text in rows if text]


def _weights_entry(checkpoint: Checkpoint) -> str:
    entry = f"the weights under {checkpoint.weights!r}" if checkpoint.weights else ""
    prefix = f"prefix {checkpoint.prefix!r} removed" if checkpoint.prefix else ""
    return ", ".join(part for part in (entry, prefix) if part)


def _holds(inspection: Inspection) -> str:
    tensors = count_text(sum(totals.tensors for totals in inspection.types.values()), "tensor")
    parameters = count_text(inspection.parameters, "parameter")
    sizes = ", ".join(f"{size_text(totals.bytes)} of {dtype}" for dtype, totals in inspection.types.items())
    return f"{tensors}, {parameters}: {sizes or 'nothing'}"


def _recorded_entries(entries: Mapping[str, object]) -> str:
    """Return what the checkpoint holds beside its weights: first values, then containers."""
    values = [
        f"{key}={_short(value)}" for key, value in entries.items() if isinstance(value, str | int | float)
    ]
    containers = [
        _describe_container(key, value) for key, value in entries.items() if isinstance(value, Mapping | list)
    ]
    return list_names([*values, *containers], _SHOWN_ENTRIES)


def _describe_container(key: str, value: Mapping[str, object] | list[object]) -> str:
    # A module that was saved whole is recorded as a mapping with the name of its class.
    if isinstance(value, Mapping) and isinstance(value.get("class"), str):
        return f"{key} of class {_short(value['class'])}"
    return f"{key} ({len(value)} entries)"


def _short(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _model_rows(inspection: Inspection) -> list[tuple[str, str]]:
    loaded = inspection.loaded
    if loaded is None:
        candidates = list_names(inspection.candidates)
        return [("architecture", f"one of {candidates}" if candidates else "not known")]
    rows = [
        ("architecture", architecture_line(loaded)),
        ("told by", RECOGNISED_BY_TEXT[loaded.recognised_by] if loaded.checkpoint else "you (--arch)"),
        ("the same as", list_names(loaded.twins)),
    ]
    if loaded.as_built:
        rows.append(
            ("other head", f"what the file holds under {list_names(loaded.as_built)} is not the library's")
        )
    return [(name, text) for name, text in rows if text] + _input_rows(inspection.input_spec)


def _input_rows(spec: InputSpec | None) -> list[tuple[str, str]]:
    if spec is None:
        return [("input", "size not known; give one sample's shape with --input-size")]
    rows = [("input", f"{'×'.join(map(str, spec.shape))} ({spec.origin})")]
    if len(spec.shape) == 3:  # channels, height, width: only images are resized and normalised
        scale = (
            f"mean {_numbers(spec.mean)}, std {_numbers(spec.std)}" if spec.mean else "divided by 255 only"
        )
        rows.append(("images", f"{scale}, {spec.interpolation}, {_crop_text(spec)}"))
    return rows


def _crop_text(spec: InputSpec) -> str:
    if spec.crop_mode == "squash":
        return "stretched to the size"
    return f"{'padded' if spec.crop_mode == 'border' else 'centre'} crop of {spec.crop_pct:.3g}"


def _numbers(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)


def _layer_rows(inspection: Inspection) -> list[tuple[str, str]]:
    if inspection.walk is None or inspection.loaded is None:
        return _running_variance_rows(inspection.checkpoint)
    active = sum(site.active for site in inspection.walk.dropout_sites)
    inactive = len(inspection.walk.dropout_sites) - active
    sites = f"{count_text(active, 'active dropout site')}, {inactive} at rate 0"
    layers = count_text(len(inspection.walk.batch_norms), "BN layer") + _training_batches_text(
        inspection.steps
    )
    return [("drop rates", f"{DROP_RATE_SOURCES[inspection.loaded.rates]}; {sites}"), ("batch norm", layers)]


def _running_variance_rows(checkpoint: Checkpoint | None) -> list[tuple[str, str]]:
    """Return how many BN layers the keys of the state dict name, which needs no architecture."""
    variances = sum(key.endswith("running_var") for key in checkpoint.tensors) if checkpoint else 0
    return [("batch norm", f"running variances of {count_text(variances, 'layer')}")] if variances else []


def _training_batches_text(steps: Mapping[str, int | None]) -> str:
    """Return what the layers' counters ``num_batches_tracked`` say about their training."""
    if not steps:
        return ""
    counts = {step for step in steps.values() if step is not None}
    if not counts:
        return ", no counters in the file"
    trained = sum(step != 0 for step in steps.values())
    if trained < len(steps):
        return f", {f'only {trained}' if trained else 'none'} of which has seen data"
    fewest, largest = min(counts), max(counts)
    return f", trained on {fewest:,}{'' if fewest == largest else f' to {largest:,}'} batches"


def _behind(layers: Iterable[BatchNormLayer], site: str) -> str:
    names = [
        layer.name or "(root)"
        for layer in layers
        if site in (*layer.downstream_of, *layer.potentially_downstream_of)
    ]
    return f"{len(names)}: {list_names(names, 1)}" if names else "none"


def _remarks(layer: BatchNormLayer, untrained: Container[str]) -> list[str]:
    remarks = {"never reached": not layer.reached, "never trained": layer.name in untrained}
    return [remark for remark, applies in remarks.items() if applies]


def _rate(site: DropoutSite) -> str:
    return "unknown" if site.rate is None else f"{site.rate:g}"


def _notes(walk: Walk) -> list[str]:
    notes = []
    if not walk.containers_trained:
        notes.append("note: the model needs targets in training mode; only its leaf modules ran in it")
    if walk.left_alone:
        notes.append("left alone: " + list_names(f"{item.name} ({item.reason})" for item in walk.left_alone))
    return notes


def _table(rows: Sequence[tuple[str, ...]], limit: int | None) -> str:
    """Return the head and at most ``limit`` of the rows below it, and how many more there are."""
    if limit is None or len(rows) - 1 <= limit:
        return align_columns(rows)
    return f"{align_columns(rows[: limit + 1])}\n… and {len(rows) - 1 - limit} more (--all shows them)"
