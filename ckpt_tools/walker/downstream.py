"""The walk: BN layers in order of execution, dropout sites, and which layer lies behind which site."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.errors import CkptToolsError, ModelError
from ckpt_tools.model.batch import Batch, batch_size
from ckpt_tools.model.calling import Forward, call_model, unwrap_model
from ckpt_tools.model.model_copy import RecordingMode
from ckpt_tools.model.model_state import ModelState
from ckpt_tools.model.preserving import preserve_models
from ckpt_tools.results import BatchNormLayer, DropoutSite, LeftAlone, Walk
from ckpt_tools.walker.forward_recording import ForwardRecord, InactiveSitePolicy, record_forward
from ckpt_tools.walker.weights import weight_layers


def walk(
    model: nn.Module, example_input: Batch, *, probe: nn.Module | None = None, forward: Forward = call_model
) -> Walk:
    """Find the dropout sites and BN layers of a model, and which BN layers lie behind which site.

    A BN layer is downstream of a site if its input changes when the site injects noise: one recorded forward
    in training mode (BN layers in evaluation mode) follows the dataflow from every operation that draws random
    numbers. A second one with all rates above zero shows what inactive sites could reach, a third one in
    evaluation mode which layers are reached at all. ``model`` is not changed.

    Args:
        model: any nn.Module; DataParallel, DDP and torch.compile wrappers are looked through.
        example_input: a batch: tensor, tuple or list whose first item is the input, or dict of arguments.
        probe: the same architecture with every drop rate above zero, where the constructor leaves sites out
            at rate zero (timm's DropPath).
        forward: how to run the model on a batch, ``forward(model, batch)``.

    Raises:
        ModelError: if the model can be run neither on meta tensors nor for real.
    """
    model = unwrap_model(model)
    with preserve_models(model, probe, forward) as state:
        return walk_preserved_model(model, example_input, state, probe=probe, forward=forward)


def walk_preserved_model(
    model: nn.Module,
    example_input: Batch,
    state: ModelState,
    *,
    probe: nn.Module | None = None,
    forward: Forward = call_model,
) -> Walk:
    """The walk of a model that a caller preserves already, whose ``state`` each recorded forward starts from.

    Arguments and errors as in ``walk``.
    """
    _refuse_scripted(model)
    evaluated = _record(model, example_input, forward, "evaluation", state)
    mode, trained = _record_training(model, example_input, forward, state)
    possible = _possible([probe, model], example_input, forward, mode, state) or trained

    active = trained.sites
    dormant = {name: DropoutSite(name, site.op, 0.0) for name, site in possible.sites.items() if name not in active}
    order = [*evaluated.inputs, *(name for name in trained.inputs if name not in evaluated.inputs)]
    layers, left_alone = _survey(model)
    for name in [name for name in layers if name in evaluated.called and name not in evaluated.inputs]:
        module, _ = layers.pop(name)
        reason = "normalises without torch.nn.functional.batch_norm, so its variance cannot be measured"
        left_alone.append(LeftAlone(name, f"{type(module).__name__}: {reason}"))
    ranked = sorted(layers, key=lambda name: order.index(name) if name in order else len(order))
    return Walk(
        batch_norms=tuple(_layer(name, layers[name], trained, possible, evaluated) for name in ranked),
        dropout_sites=(*active.values(), *dormant.values()),
        weights=weight_layers(trained.graph, model),
        left_alone=tuple(left_alone),
        device=trained.device,
        containers_trained=mode == "training",
        bytes_per_sample=_bytes_per_sample(evaluated, example_input),
    )


def record_training_forward(model: nn.Module, example_input: Batch, forward: Forward = call_model) -> ForwardRecord:
    """One recorded forward with dropout on; of the leaf modules only where the whole model cannot be in training mode.

    Raises ModelError.
    """
    _refuse_scripted(model)
    with preserve_models(model, forward) as state:
        return _record_training(model, example_input, forward, state)[1]


def _layer(
    name: str,
    modules: tuple[_BatchNorm, list[str]],
    trained: ForwardRecord,
    possible: ForwardRecord,
    evaluated: ForwardRecord,
) -> BatchNormLayer:
    module, aliases = modules
    behind = trained.inputs.get(name, frozenset())
    could = possible.inputs.get(name, frozenset()) - behind - set(trained.sites)
    return BatchNormLayer(
        name=name,
        kind=type(module).__name__,
        channels=module.num_features,
        reached=name in evaluated.inputs,
        downstream_of=tuple(site for site in trained.sites if site in behind),
        potentially_downstream_of=tuple(site for site in possible.sites if site in could),
        aliases=tuple(aliases),
    )


def _refuse_scripted(model: nn.Module) -> None:
    """Raise ModelError for TorchScript, whose operations cannot be recorded."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{name or type(module).__name__}: TorchScript cannot be walked. Load the Python model.")


def _record_training(
    model: nn.Module, batch: Batch, forward: Forward, state: ModelState
) -> tuple[RecordingMode, ForwardRecord]:
    """The record with dropout on, and in which mode the model could be run."""
    try:
        return "training", _record(model, batch, forward, "training", state)
    except ModelError:
        with contextlib.suppress(ModelError):
            return "leaves", _record(model, batch, forward, "leaves", state)
        raise


def _record(model: nn.Module, batch: Batch, forward: Forward, mode: RecordingMode, state: ModelState) -> ForwardRecord:
    try:
        return record_forward(model, batch, forward, mode, state)
    except CkptToolsError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: a forward in {mode} mode failed: {type(error).__name__}: {error}. "
            "Expected the model to run on the example input; check its shape (--input-size)."
        ) from error


def _possible(
    models: Sequence[nn.Module | None], batch: Batch, forward: Forward, mode: RecordingMode, state: ModelState
) -> ForwardRecord | None:
    """The record with every rate above zero, of the first model that runs like that; None if none does."""
    for model in models:
        for attributes in (True, False):  # a zero that is no rate may stand under a name like drop_tokens
            if model is None:
                continue
            with contextlib.suppress(Exception):
                return record_forward(
                    unwrap_model(model),
                    batch,
                    forward,
                    mode,
                    state,
                    InactiveSitePolicy(alive=True, attributes=attributes),
                )
    return None


def _bytes_per_sample(evaluated: ForwardRecord, batch: Batch) -> int:
    samples = batch_size(batch) if evaluated.device == "meta" else min(2, batch_size(batch))
    return evaluated.peak_bytes // max(1, samples)


def _survey(model: nn.Module) -> tuple[dict[str, tuple[_BatchNorm, list[str]]], list[LeftAlone]]:
    """BN layers with running statistics by first name with their aliases, and normalisers left alone."""
    layers: dict[str, tuple[_BatchNorm, list[str]]] = {}
    first_names: dict[int, str] = {}
    left_alone = []
    for name, module in model.named_modules(remove_duplicate=False):
        variance = module._buffers.get("running_var")
        # Modules that share their running variance are one layer, as is one module under several names.
        first = first_names.setdefault(id(module) if variance is None else id(variance), name)
        if first != name:
            if first in layers:
                layers[first][1].append(name)
            continue
        reason = _reason_to_leave(module)
        if reason:
            left_alone.append(LeftAlone(name, f"{type(module).__name__}: {reason}"))
        elif isinstance(module, _BatchNorm):
            layers[name] = (module, [])
    return layers, left_alone


def _reason_to_leave(module: nn.Module) -> str:
    variance = module._buffers.get("running_var")
    if isinstance(module, _BatchNorm):
        return (
            "" if variance is not None else "keeps no running statistics; it uses those of the batch at test time too"
        )
    return "" if variance is None else "no BatchNorm; its statistics are constants or mean something else"
