"""The walk: BN layers in order of execution, dropout sites, and which lies behind which.

A BN layer behind an active dropout site has seen noisy inputs in training, so its running variance
is one of noisy inputs. Only such layers need a correction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.arguments import advise, check_callable
from ckpt_tools.errors import ModelError
from ckpt_tools.model.batch import Batch
from ckpt_tools.model.calling import Forward, call_model, unwrap_model
from ckpt_tools.model.model_copy import RecordingMode
from ckpt_tools.model.model_state import ModelState
from ckpt_tools.model.preserving import preserve_models
from ckpt_tools.results import BatchNormLayer, DropoutSite, LeftAlone, Walk
from ckpt_tools.walker.declared_dropout import require_declared_sites, resolve_declared_dropout
from ckpt_tools.walker.forward_recording import (
    FailedForward,
    ForwardCall,
    InactiveSitePolicy,
    record_forward,
)
from ckpt_tools.walker.taint import Feed, ForwardRecord
from ckpt_tools.walker.weights import weight_layers

_SHOWN_CHARACTERS = 150  # of an error of torch, whose list of backends may fill a screen


def walk(
    model: nn.Module,
    example_input: Batch,
    *,
    probe: nn.Module | None = None,
    forward: Forward = call_model,
    dropout: Mapping[str, float] | None = None,
) -> Walk:
    """Find the dropout sites and BN layers of a model, and which BN layers lie behind which site.

    A BN layer is downstream of a site if its input changes when the site injects noise. The model
    is run three times. A forward in training mode (BN layers in evaluation mode) follows the
    dataflow from every operation that draws random numbers. A second one with all rates above zero
    shows what inactive sites could reach. A third one in evaluation mode shows which layers are
    reached at all. ``model`` is not changed.

    Each forward is tried on meta tensors, which computes shapes only, then on the first two samples
    of the batch, and at last on the whole batch: the rows of a graph or of packed sequences depend
    on each other.

    Args:
        model: any nn.Module; DataParallel, DDP and torch.compile wrappers are looked through.
        example_input: a batch: tensor, tuple or list whose first item is the input, or dict of
            arguments.
        probe: the same architecture with every drop rate above zero, where the constructor leaves
            sites out at rate zero (timm's DropPath).
        forward: how to run the model on a batch, ``forward(model, batch)``.
        dropout: rates of dropout that the training had and this model lacks, as ports of other
            frameworks' networks do: on the output of modules by shell-style patterns of their
            names (``{"pool*": 0.25}``), or on their input (``{"conv2:input": 0.25}``). Every
            floating-point tensor is dropped value by value, as by ``nn.Dropout``.

    Raises:
        ModelError: if the model can be run neither on meta tensors nor for real. The message says
            what was tried.
        UsageError: a pattern of ``dropout`` matches no module that runs, or a rate is none.
    """
    model = unwrap_model(model)
    check_callable("forward", forward, "(model, batch)")
    with preserve_models(model, probe, forward) as state:
        return walk_preserved_model(
            model, example_input, state, probe=probe, forward=forward, dropout=dropout
        )


def walk_preserved_model(
    model: nn.Module,
    example_input: Batch,
    state: ModelState,
    *,
    probe: nn.Module | None = None,
    forward: Forward = call_model,
    dropout: Mapping[str, float] | None = None,
) -> Walk:
    """Walk a model that a caller already preserves; every forward starts from its ``state``.

    Arguments and errors are those of ``walk``.
    """
    _refuse_scripted(model)
    declared = resolve_declared_dropout(model, dropout or {})
    call = ForwardCall(example_input, forward, state, declared)
    evaluation = _record(model, call, "evaluation")
    mode, training = _record_training(model, call)
    # What probing feeds the model is at most as costly as what the training forward needed.
    feeds = tuple(Feed)[: tuple(Feed).index(training.feed) + 1]
    probing = _record_active_sites([probe, model], call, mode, feeds) or training

    require_declared_sites(declared, {**training.sites, **probing.sites})

    # The probe may have sites that the model lacks: at rate zero, timm builds no DropPath.
    inactive_names = [name for name in probing.sites if name not in training.sites]
    inactive_sites = [DropoutSite(name, probing.sites[name].op, 0.0) for name in inactive_names]
    layers, left_alone = _find_normalisers(model)
    # The variance is measured where F.batch_norm is called, and nowhere else.
    for name in [*layers]:
        if name in evaluation.called and name not in evaluation.inputs:
            kind = type(layers.pop(name)[0]).__name__
            reason = "normalises without F.batch_norm, so its variance cannot be measured"
            left_alone.append(LeftAlone(name, f"{kind}: {reason}"))
    # Layers that no forward reaches come last, in the order of the model's modules.
    executed = list(dict.fromkeys([*evaluation.inputs, *training.inputs]))
    position = {name: index for index, name in enumerate(executed)}
    names = sorted(layers, key=lambda name: position.get(name, len(position)))
    return Walk(
        batch_norms=tuple(
            _batch_norm_layer(name, layers[name], training, probing, evaluation) for name in names
        ),
        dropout_sites=(*training.sites.values(), *inactive_sites),
        weights=weight_layers(training.graph, model),
        left_alone=tuple(left_alone),
        device=training.device,
        containers_trained=mode == "training",
        declared_dropout=declared,
        bytes_per_sample=evaluation.peak_bytes // max(1, evaluation.samples),
    )


def record_training_forward(
    model: nn.Module, example_input: Batch, forward: Forward = call_model
) -> ForwardRecord:
    """Record one forward with dropout on.

    Where the whole model cannot be in training mode, only its leaf modules are. Raises ModelError.
    """
    _refuse_scripted(model)
    with preserve_models(model, forward) as state:
        call = ForwardCall(example_input, forward, state, every_step=True)
        return _record_training(model, call)[1]


def _batch_norm_layer(
    name: str,
    module_and_aliases: tuple[_BatchNorm, list[str]],
    training: ForwardRecord,
    probing: ForwardRecord,
    evaluation: ForwardRecord,
) -> BatchNormLayer:
    module, aliases = module_and_aliases
    sites = training.inputs.get(name, frozenset())
    further_sites = probing.inputs.get(name, frozenset()) - sites - set(training.sites)
    return BatchNormLayer(
        name=name,
        kind=type(module).__name__,
        channels=module.num_features,
        reached=name in evaluation.inputs,
        downstream_of=tuple(site for site in training.sites if site in sites),
        potentially_downstream_of=tuple(site for site in probing.sites if site in further_sites),
        aliases=tuple(aliases),
    )


def _refuse_scripted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and _holds_statistics(module):
            name = name or type(module).__name__
            raise ModelError(f"{name}: TorchScript cannot be walked. Load the Python model.")


def _holds_statistics(module: nn.Module) -> bool:
    """Tell whether there may be a BN layer inside, whose input TorchScript would not show."""
    return any(name.rpartition(".")[2] == "running_var" for name, _ in module.named_buffers())


def _record_training(model: nn.Module, call: ForwardCall) -> tuple[RecordingMode, ForwardRecord]:
    """Record a forward with dropout on; return it with the mode in which the model could be run.

    Detection models demand targets when the outermost module is in training mode. Then only the
    leaf modules are set to it. If that fails, too, the first error is raised.
    """
    try:
        return "training", _record(model, call, "training")
    except ModelError:
        with contextlib.suppress(ModelError):
            return "leaves", _record(model, call, "leaves")
        raise


def _record(model: nn.Module, call: ForwardCall, mode: RecordingMode) -> ForwardRecord:
    try:
        return record_forward(model, call, mode)
    except FailedForward as failed:
        error = failed.failures[-1][1]
        raise ModelError(
            f"{type(model).__name__}: a forward in {mode} mode failed: "
            f"{type(error).__name__}: {error}. It was tried on {_describe_attempts(failed)}. "
            f"Expected the model to run on the example input; check its shape{advise(' (--input-size)', '')}."
        ) from error


def _describe_attempts(failed: FailedForward) -> str:
    """Name what a forward was tried on, with the error of each attempt that differs from the last."""
    last, words = str(failed), []
    for feed, error in failed.failures:
        first_line = str(error).partition("\n")[0][:_SHOWN_CHARACTERS]
        other = f" ({type(error).__name__}: {first_line})" if str(error) != last else ""
        words.append(feed.value + other)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _record_active_sites(
    models: Sequence[nn.Module | None], call: ForwardCall, mode: RecordingMode, feeds: Sequence[Feed]
) -> ForwardRecord | None:
    """Record a forward with every drop rate above zero.

    The first model that runs like that is taken; if none does, the result is None.
    """
    for model in models:
        if model is None:
            continue
        # The second try leaves attributes alone: a name such as drop_tokens may hold a zero that
        # is no rate, and a forward with another value there fails.
        for set_attributes in (True, False):
            policy = InactiveSitePolicy(run=True, set_attributes=set_attributes)
            with contextlib.suppress(Exception):
                return record_forward(unwrap_model(model), call, mode, policy, feeds)
    return None


def _find_normalisers(
    model: nn.Module,
) -> tuple[dict[str, tuple[_BatchNorm, list[str]]], list[LeftAlone]]:
    """Return the BN layers with running statistics, and the normalisers that are left alone.

    Each layer stands under its first name, with the other names that it has.
    """
    layers: dict[str, tuple[_BatchNorm, list[str]]] = {}
    first_names: dict[int, str] = {}
    left_alone = []
    for name, module in model.named_modules(remove_duplicate=False):
        variance = _running_variance(module)
        # Modules that share their running variance are one layer, as is a module with two names.
        first_name = first_names.setdefault(id(module if variance is None else variance), name)
        if first_name != name:
            if first_name in layers:
                layers[first_name][1].append(name)
            continue
        reason = _reason_left_alone(module)
        if reason:
            left_alone.append(LeftAlone(name, f"{type(module).__name__}: {reason}"))
        elif isinstance(module, _BatchNorm):
            layers[name] = (module, [])
    return layers, left_alone


def _running_variance(module: nn.Module) -> Tensor | None:
    # Not module._buffers.get: scripted modules have no dict there.
    return dict(module.named_buffers(recurse=False)).get("running_var")


def _reason_left_alone(module: nn.Module) -> str:
    """Return why a normaliser is left alone; empty for BN layers and for all other modules."""
    has_statistics = _running_variance(module) is not None
    if isinstance(module, _BatchNorm) and not has_statistics:
        return "keeps no running statistics; it uses those of the batch at test time too"
    if has_statistics and not isinstance(module, _BatchNorm):
        return "no BatchNorm; its statistics are constants or mean something else"
    return ""
