"""An inspection as the page that a person reads first: file, model, input, layers, and what could be done."""

from __future__ import annotations

import shlex
from collections.abc import Container, Iterable, Mapping, Sequence

from ckpt_tools.contract import Checkpoint, InputSpec, LoadedModel
from ckpt_tools.jobs.inspection import Inspection, Prospect, TensorTotals
from ckpt_tools.plain_text import escape_controls, one_line
from ckpt_tools.report.columns import align_columns, count_text, list_names
from ckpt_tools.report.text.reestimation_text import architecture_line, size_text
from ckpt_tools.report.wording import DROP_RATE_SOURCES, RECOGNISED_BY_TEXT
from ckpt_tools.results import BatchNormLayer, DropoutSite, Walk

_SHOWN = 12  # rows of a table before it is cut
_WORDS = 8  # of the checkpoint's own
_WORD = 40  # characters of one


def inspection_text(found: Inspection, *, everything: bool = False) -> str:
    """The whole page. Tables are cut unless ``everything`` is set; without an architecture it ends with the file."""
    parts = [align_columns([*_file_rows(found), *_model_rows(found), *_layer_rows(found)])]
    if found.walk is not None:
        shown = None if everything else _SHOWN
        parts += [
            dropout_sites_text(found.walk, shown),
            batch_norm_layers_text(found.walk, found.steps, shown),
            *_notes(found.walk),
        ]
    if found.prospect is not None:
        parts.append(prospect_text(found.prospect, found))
    elif found.candidates:
        parts.append(
            f"bn-reestimate would let the data choose among these architectures.\n\n    {_command_line(found)}"
        )
    return "\n\n".join(part for part in parts if part)


def dropout_sites_text(walk: Walk, shown: int | None) -> str:
    """Every dropout site with its rate, and the BN layers behind it."""
    rows = [("dropout site", "op", "rate", "BN layers behind it")]
    rows += [(site.name, site.op, _rate(site), _behind(walk.batch_norms, site.name)) for site in walk.dropout_sites]
    return _table(rows, shown) if walk.dropout_sites else "no dropout site"


def batch_norm_layers_text(walk: Walk, steps: Mapping[str, int | None], shown: int | None) -> str:
    """BN layers in order of execution with the sites before them."""
    fresh = {name for name, step in steps.items() if step == 0}
    fresh = fresh if len(fresh) < len(steps) else set()  # where all are, the summary says it
    rows = [("BN layer", "channels", "behind active sites", "behind other sites", "")]
    rows += [
        (
            layer.name or "(root)",
            str(layer.channels),
            list_names(layer.downstream_of, 1) or "-",
            list_names(layer.potentially_downstream_of, 1) or "-",
            ", ".join(_remarks(layer, fresh)),
        )
        for layer in walk.batch_norms
    ]
    return _table(rows, shown) if walk.batch_norms else "no BN layer"


def prospect_text(prospect: Prospect, found: Inspection) -> str:
    """What ``bn-reestimate`` would do, and the command that does it."""
    if not prospect.rewrite:
        return f"bn-reestimate: {one_line(prospect.why)}"
    whole = len(found.walk.batch_norms) if found.walk else 0
    controls = (
        f"{count_text(len(prospect.controls), 'layer')} that dropout does not reach" if prospect.controls else "none"
    )
    layers, why = count_text(whole, "BN layer"), one_line(prospect.why)
    return (
        f"bn-reestimate would rewrite {len(prospect.rewrite)} of {layers}: {why}.\n"
        f"Controls: {controls}.\n\n    {_command_line(found)}"
    )


def _command_line(found: Inspection) -> str:
    """The command on one line of a terminal."""
    return escape_controls(reestimate_command(found))


def reestimate_command(found: Inspection) -> str:
    """The command for this file, with what the user had to say here; DATA stands for the training data."""
    request = found.request
    words = ["ckpt-fix", "bn-reestimate", str(request.checkpoint), "--data", "DATA"]
    if request.architecture is not None:
        words += ["--arch", request.architecture]
    for name, value in request.model_kwargs.items():
        words += ["--model-kwargs", f"{name}={value}"]
    if request.weights != "auto":
        words += ["--weights", request.weights]
    if request.input_size is not None:
        words += ["--input-size", ",".join(map(str, request.input_size))]
    return shlex.join([*words, *(["--trust"] if request.trust else [])])


def _file_rows(found: Inspection) -> list[tuple[str, str]]:
    checkpoint = found.checkpoint
    if checkpoint is None:
        return [("file", "none, the architecture alone"), ("holds", _holds(found))]
    rows = [
        ("file", f"{checkpoint.shown_path}, {size_text(found.size or 0)}, {checkpoint.format}"),
        ("taken", _weights_entry(checkpoint)),
        ("left out", list_names(checkpoint.left_out)),
        ("holds", _holds(found)),
        ("says", _recorded_words_text(checkpoint.words)),
    ]
    return [(name, text) for name, text in rows if text]


def _weights_entry(checkpoint: Checkpoint) -> str:
    entry = f"the weights under {checkpoint.weights!r}" if checkpoint.weights else ""
    prefix = f"prefix {checkpoint.prefix!r} removed" if checkpoint.prefix else ""
    return ", ".join(part for part in (entry, prefix) if part)


def _holds(found: Inspection) -> str:
    tensors = sum(tally.tensors for tally in found.types.values())
    sizes = ", ".join(_tally(name, tally) for name, tally in found.types.items())
    return f"{count_text(tensors, 'tensor')}, {count_text(found.parameters, 'parameter')}: {sizes or 'nothing'}"


def _tally(name: str, tally: TensorTotals) -> str:
    return f"{size_text(tally.bytes)} of {name}"


def _recorded_words_text(words: Mapping[str, object]) -> str:
    """Single values first, then settings by the number of their entries."""
    plain = [f"{key}={_short(value)}" for key, value in words.items() if isinstance(value, str | int | float)]
    nested = [_describe_nested(key, value) for key, value in words.items() if isinstance(value, Mapping | list)]
    return list_names([*plain, *nested], _WORDS)


def _describe_nested(key: str, value: Mapping[str, object] | list[object]) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("class"), str):  # of a module that was saved whole
        return f"{key} of class {_short(value['class'])}"
    return f"{key} ({len(value)} entries)"


def _short(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _WORD else text[: _WORD - 1] + "…"


def _model_rows(found: Inspection) -> list[tuple[str, str]]:
    loaded = found.loaded
    if loaded is None:
        return [("architecture", f"one of {list_names(found.candidates)}" if found.candidates else "not known")]
    rows = [
        ("architecture", architecture_line(loaded)),
        ("told by", RECOGNISED_BY_TEXT[loaded.recognised_by] if loaded.checkpoint else "you (--arch)"),
        ("the same as", list_names(loaded.twins)),
        ("other head", _head(loaded)),
    ]
    return [(name, text) for name, text in rows if text] + _input_rows(found.input_spec)


def _head(loaded: LoadedModel) -> str:
    return f"what the file holds under {list_names(loaded.as_built)} is not the library's" if loaded.as_built else ""


def _input_rows(spec: InputSpec | None) -> list[tuple[str, str]]:
    if spec is None:
        return [("input", "size not known; give one sample's shape with --input-size")]
    rows = [("input", f"{'×'.join(map(str, spec.shape))} ({spec.origin})")]
    if len(spec.shape) == 3:
        scale = f"mean {_numbers(spec.mean)}, std {_numbers(spec.std)}" if spec.mean else "divided by 255 only"
        rows.append(("images", f"{scale}, {spec.interpolation}, {_crop_text(spec)}"))
    return rows


def _crop_text(spec: InputSpec) -> str:
    if spec.crop_mode == "squash":
        return "stretched to the size"
    return f"{'padded' if spec.crop_mode == 'border' else 'centre'} crop of {spec.crop_pct:.3g}"


def _numbers(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)


def _layer_rows(found: Inspection) -> list[tuple[str, str]]:
    if found.walk is None or found.loaded is None:
        return _statistics(found.checkpoint)
    active = sum(site.active for site in found.walk.dropout_sites)
    sites = f"{count_text(active, 'active dropout site')}, {len(found.walk.dropout_sites) - active} at rate 0"
    layers = count_text(len(found.walk.batch_norms), "BN layer") + _training_batches_text(found.steps)
    return [("drop rates", f"{DROP_RATE_SOURCES[found.loaded.rates]}; {sites}"), ("batch norm", layers)]


def _statistics(checkpoint: Checkpoint | None) -> list[tuple[str, str]]:
    """What the keys alone tell."""
    variances = sum(key.endswith("running_var") for key in checkpoint.tensors) if checkpoint else 0
    return [("batch norm", f"running variances of {count_text(variances, 'layer')}")] if variances else []


def _training_batches_text(steps: Mapping[str, int | None]) -> str:
    """What the counters say about all layers."""
    if not steps:
        return ""
    fresh = sum(step == 0 for step in steps.values())
    if fresh:
        return f", {'none' if fresh == len(steps) else f'only {len(steps) - fresh}'} of which has seen data"
    known = {step for step in steps.values() if step is not None}
    if not known:
        return ", no counters in the file"
    fewest, most = min(known), max(known)
    return f", trained on {fewest:,}{'' if fewest == most else f' to {most:,}'} batches"


def _behind(layers: Iterable[BatchNormLayer], site: str) -> str:
    behind = [x.name or "(root)" for x in layers if site in (*x.downstream_of, *x.potentially_downstream_of)]
    return f"{len(behind)}: {list_names(behind, 1)}" if behind else "none"


def _remarks(layer: BatchNormLayer, fresh: Container[str]) -> list[str]:
    return ([] if layer.reached else ["never reached"]) + (["never trained"] if layer.name in fresh else [])


def _rate(site: DropoutSite) -> str:
    return "unknown" if site.rate is None else f"{site.rate:g}"


def _notes(walk: Walk) -> list[str]:
    notes = []
    if not walk.containers_trained:
        notes.append("note: the model does not run in training mode without targets; only its leaf modules did")
    if walk.left_alone:
        notes.append("left alone: " + list_names(f"{item.name} ({item.reason})" for item in walk.left_alone))
    return notes


def _table(rows: Sequence[tuple[str, ...]], shown: int | None) -> str:
    if shown is None or len(rows) - 1 <= shown:
        return align_columns(rows)
    return f"{align_columns(rows[: shown + 1])}\n… and {len(rows) - 1 - shown} more (--all shows them)"
