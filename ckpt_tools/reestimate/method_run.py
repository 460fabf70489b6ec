"""A re-estimation from its settings to new statistics in the model's buffers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.contract import Rates
from ckpt_tools.diagnosis.batch_spread import measure_batch_spread
from ckpt_tools.distributed import ALONE, Team, join_team
from ckpt_tools.errors import ModelError, UsageError
from ckpt_tools.machine.precision import check_precision
from ckpt_tools.method import Method
from ckpt_tools.model.batch import Batch
from ckpt_tools.model.calling import Forward, call_model, device_of, force_eager, unwrap_model
from ckpt_tools.model.overwriting import overwrite_tensors
from ckpt_tools.model.preserving import evaluation_mode, preserve_models
from ckpt_tools.model.randomness import seed_random_generators
from ckpt_tools.observation.interception import CompiledInterception, Interception
from ckpt_tools.observation.layer import Layer, MeanVariance
from ckpt_tools.observation.paired_layer import PairedLayer
from ckpt_tools.observation.running import PairedRunner, Runner
from ckpt_tools.observation.training_mode import copy_in_training_mode
from ckpt_tools.reestimate.batches import Batches
from ckpt_tools.reestimate.choice import Choice, choose
from ckpt_tools.reestimate.concerns import collect_warnings, refuse_doubts
from ckpt_tools.reestimate.controls import judge_controls, refuse_disagreement
from ckpt_tools.reestimate.deviation import precision_deviation
from ckpt_tools.reestimate.effect import MAX_IMAGES as EFFECT_IMAGES
from ckpt_tools.reestimate.effect import measure_effect
from ckpt_tools.reestimate.frozen import frozen_layers
from ckpt_tools.reestimate.layer_results import layer_results
from ckpt_tools.reestimate.passes import PassContext
from ckpt_tools.reestimate.screening import Screening
from ckpt_tools.reestimate.selection import SYNTHETIC_REPEATS, estimate_statistics
from ckpt_tools.reestimate.shares import share_buffers
from ckpt_tools.reestimate.stopping import Progress
from ckpt_tools.results import Reestimation, Verdict, Walk
from ckpt_tools.walker.downstream import walk_preserved_model


def run_method(
    model: nn.Module,
    batches: Iterable[Batch],
    method: Method,
    *,
    rates: Rates = "model",
    forward: Forward = call_model,
    walk: Walk | None = None,
    dropout: Mapping[str, float] | None = None,
    progress: Callable[[Progress], None] | None = None,
    distributed: bool = False,
    synthetic: bool = False,
    verdict: Verdict | None = None,
    dry_run: bool = False,
    seed: int = 0,
    repeats: int | None = None,
) -> Reestimation:
    """Do what ``reestimate_bn`` describes, with its settings as one object.

    ``synthetic`` says that the batches are made up; ``verdict`` is what is known about the data.
    With ``dry_run`` the model stays as it is. ``seed`` is that of dropout in a paired measurement,
    which runs each batch ``repeats`` times under training conditions; None: as often as pays.
    """
    started = time.perf_counter()
    estimator, statistics, precision = method.estimator, method.statistics, method.precision
    data = Batches(batches)
    # Sources of our own say so: they put samples into batches themselves.
    rows_are_samples = method.rows_are_samples or bool(getattr(batches, "rows_are_samples", False))
    # Raised here rather than after the first pass, which may take long.
    if data.one_shot and method.reads_data_repeatedly:
        raise UsageError(
            f"estimator {estimator!r} reads the data several times, but batches is a one-shot "
            f"iterator ({type(batches).__name__}). Pass a list or a DataLoader."
        )
    if dropout and walk is not None:
        raise UsageError(
            "dropout is declared when a model is walked. Give it to ckpt_tools.walk, or leave walk out."
        )
    model = unwrap_model(model)
    check_precision(precision, device_of(model))
    if synthetic and repeats is None:
        repeats = SYNTHETIC_REPEATS
    group = join_team() if distributed else contextlib.nullcontext(ALONE)
    with preserve_models(model, forward) as state, group as team:
        check_team(estimator, team)
        walk = walk or team.first(
            lambda: walk_preserved_model(model, data.first(), state, forward=forward, dropout=dropout)
        )
        if walk.declared_dropout and rates == "unknown":
            rates = "given"
        frozen = team.first(lambda: frozen_layers(model, walk))
        choice = choose(
            walk,
            method.layers,
            rates=rates,
            statistics=statistics,
            only=method.only,
            keep=method.keep,
            frozen=frozen,
        )
        runner = _make_runner(model, forward, method, rows_are_samples=rows_are_samples)
        # Submodules that the user has compiled must run as they are written to be intercepted.
        uncompiled = contextlib.nullcontext() if method.compile else force_eager()
        with evaluation_mode(model), torch.no_grad(), uncompiled:
            share_buffers(model, team)
            screening = Screening(
                model,
                _sample_namer(batches, team),
                keep=method.keep_outliers,
                rows_are_samples=rows_are_samples,
            )
            observed = _observed_layers(model, walk, choice, replaced=method.replaces_statistics)
            context = PassContext(model, data, runner, observed, screening, team, progress)
            deviation = None if precision == "fp32" else precision_deviation(context)
            # The first inputs stay at hand, because the passes may use up what can be read once.
            # What a model predicts from made-up inputs means nothing.
            compares_outputs = estimator in ("auto", "ratio") and not synthetic
            sample = team.each(lambda: tuple(data.ahead(EFFECT_IMAGES)) if compares_outputs else ())
            selection = estimate_statistics(
                context,
                lambda: team.each(
                    lambda: _paired_context(context, walk, choice, frozen, forward, method, seed, repeats)
                ),
                method,
                rates=rates,
                synthetic=synthetic,
                verdict=verdict,
            )
            estimate = selection.estimate
            layers = {**selection.layers, **observed}
            effect = None
            if selection.paired and compares_outputs:
                parts = [part for batch in sample for part in runner.split(batch)]
                effect = team.first(
                    lambda: measure_effect(model, parts, forward, layers, estimate.statistics)
                )
        evidence = estimate.last_pass.evidence
        controls = team.first(lambda: judge_controls(choice, layers, evidence, synthetic=synthetic))
        noise_left_on = team.first(lambda: runner.noise_left_on)
        # Free memory differs between processes; the smallest part is what the user needs to know.
        cut_to = min(filter(None, team.all(lambda: runner.largest)), default=None)
    # From here on the model is as it was. All that may raise comes before the first write.
    results = layer_results(walk, choice, layers, estimate, selection.paired)
    # The variances that mean+variance replaces are no judge of the data, and `ratio` needs none.
    # A verdict that is known already comes from a closer look than that of the control layers.
    batch_spread = None if synthetic else measure_batch_spread(layers, evidence)
    is_judge_needed = verdict is None and statistics == "variance" and selection.estimator != "ratio"
    if is_judge_needed and not method.force:
        refuse_disagreement(controls)
    if method.strict:
        warnings = collect_warnings(
            results,
            None if synthetic else effect,
            noise_left_on,
            batch_spread,
            estimate.kept_outliers,
        )
        refuse_doubts((verdict, selection.verdict), controls, warnings)
    if not dry_run:
        _write(observed, estimate.statistics, means=statistics == "mean+variance")
    return Reestimation(
        layers=results,
        controls=controls,
        why=choice.why,
        estimator=selection.estimator,
        statistics=statistics,
        images=estimate.last_pass.total.images,
        batches=estimate.last_pass.total.batches,
        passes=estimate.passes,
        residual=estimate.residual,
        stopped_early=estimate.stopped_early,
        seconds=time.perf_counter() - started,
        device=str(device_of(model)),
        estimator_reason=selection.reason,
        verdict=selection.verdict,
        effect=effect,
        processes=team.world,
        cut_to=cut_to,
        precision=precision,
        deviation=deviation,
        left_alone=walk.left_alone,
        noise_left_on=noise_left_on,
        outliers=tuple(detected.outlier for detected in estimate.outliers),
        batch_spread=batch_spread,
        kept_outliers=estimate.kept_outliers,
        common=() if method.keep_outliers else tuple(sorted(screening.common)),
    )


def _make_runner(
    model: nn.Module,
    forward: Forward,
    method: Method,
    *,
    dropout: bool = False,
    containers: bool = True,
    rows_are_samples: bool,
) -> Runner:
    kind = CompiledInterception if method.compile else Interception
    return Runner(
        model,
        forward,
        kind(dropout=dropout, containers=containers),
        method.precision,
        compiled=method.compile,
        rows_are_samples=rows_are_samples,
    )


def _paired_context(
    context: PassContext,
    walk: Walk,
    choice: Choice,
    frozen: Mapping[str, str],
    forward: Forward,
    method: Method,
    seed: int,
    repeats: int | None,
) -> PassContext:
    """The context of a paired measurement: every reached layer, in the model and in a copy of it."""
    copied = copy_in_training_mode(
        context.model, containers=walk.containers_trained, dropout=walk.declared_dropout
    )
    # Each process draws dropout of its own. The caller restores the generators.
    seed_random_generators(seed + context.team.rank)
    modules, twins = dict(context.model.named_modules()), dict(copied.named_modules())
    layers: dict[str, Layer] = {}
    for walked in walk.batch_norms:
        module, twin = modules[walked.name], twins[walked.name]
        if walked.reached and isinstance(module, _BatchNorm) and isinstance(twin, _BatchNorm):
            is_frozen, rewritten = walked.name in frozen, walked.name in choice.rewrite
            layers[walked.name] = PairedLayer(
                walked.name, module, twin, rewritten=rewritten, frozen=is_frozen
            )
    training = _make_runner(
        copied,
        forward,
        method,
        dropout=True,
        containers=walk.containers_trained,
        rows_are_samples=context.screening.rows_are_samples,
    )
    return replace(context, layers=layers, runner=PairedRunner(context.runner, training, repeats=repeats))


def check_team(estimator: str, team: Team) -> None:
    """Raise UsageError if several processes cannot share the work of this estimator.

    A moving average depends on the order of the batches, so it has no parts that could be merged.
    """
    if estimator == "ema" and not team.alone:
        raise UsageError(
            f"estimator ema takes one batch after the other, which {team.world} processes cannot "
            "share. Run it in one process (without torchrun, distributed=False), or use pooled or "
            "exact."
        )


def _sample_namer(batches: object, team: Team) -> Callable[[int, int], str]:
    """A function that names a sample, given its row and the number of its batch in this process.

    The data of the command line knows file names; of other data the place is all there is.
    """
    sample_name: Callable[[int, int], str] | None = getattr(batches, "sample_name", None)
    if callable(sample_name):
        return sample_name
    process = "" if team.alone else f" of rank {team.rank}"
    return lambda batch, row: f"sample {row} of batch {batch}{process}"


def _observed_layers(model: nn.Module, walk: Walk, choice: Choice, *, replaced: bool) -> dict[str, Layer]:
    modules = {name: x for name, x in model.named_modules() if isinstance(x, _BatchNorm)}
    observed = choice.rewrite | choice.controls
    # In the walk's order, which is that of execution: the first control layers are judged.
    names = [layer.name for layer in walk.batch_norms if layer.name in observed]
    layers = {}
    for name in names:
        rewritten = name in choice.rewrite
        layers[name] = Layer(name, modules[name], rewritten=rewritten, replaced=rewritten and replaced)
    return layers


def _write(layers: Mapping[str, Layer], statistics: Mapping[str, MeanVariance], *, means: bool) -> None:
    """Copy the new statistics into the model's buffers.

    All are written, or none if one does not fit into its dtype (then ModelError is raised).
    """
    writes: list[tuple[Tensor, Tensor]] = []
    for name, new in statistics.items():
        module = layers[name].module
        pairs = [(module.running_var, new.variance)]
        if means:
            pairs.append((module.running_mean, new.mean))
        for buffer, value in pairs:
            assert buffer is not None
            converted = value.to(buffer.dtype)  # float16 ends at 65504
            if not bool(torch.isfinite(converted).all()):
                raise ModelError(
                    f"{name}: a new statistic of {float(value.abs().max()):.3g} does not fit into "
                    f"{buffer.dtype}. Convert the model to float32 first."
                )
            writes.append((buffer, converted))
    overwrite_tensors(writes)
