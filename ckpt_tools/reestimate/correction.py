"""The correction of a model: BN running variances measured with dropout off, and written back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.contract import Estimator, LayerChoice, Precision, Rates, Statistics
from ckpt_tools.distributed import ALONE, Team, join_team
from ckpt_tools.errors import ModelError, UsageError
from ckpt_tools.machine.precision import check_precision
from ckpt_tools.method import Method
from ckpt_tools.model.batch import Batch
from ckpt_tools.model.calling import Forward, call_model, device_of, force_eager, unwrap_model
from ckpt_tools.model.forward_cost import count_affordable_inputs
from ckpt_tools.model.input_shape import infer_input_shape
from ckpt_tools.model.overwriting import overwrite_tensors
from ckpt_tools.model.preserving import evaluation_mode, preserve_models
from ckpt_tools.model.random_inputs import RandomBatches
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
from ckpt_tools.reestimate.selection import AUTO_IMAGES, SYNTHETIC_REPEATS, estimate_statistics
from ckpt_tools.reestimate.shares import share_buffers
from ckpt_tools.reestimate.stopping import Progress
from ckpt_tools.results import Reestimation, Verdict, Walk
from ckpt_tools.walker.downstream import walk_preserved_model


def reestimate_bn(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    estimator: Estimator = "auto",
    layers: LayerChoice = "auto",
    only: Sequence[str] = (),
    keep: Sequence[str] = (),
    statistics: Statistics = "variance",
    tolerance: float | None = None,
    precision: Precision = "fp32",
    compile: bool = False,
    momentum: float = 0.1,
    epochs: int = 1,
    rates: Rates = "model",
    forward: Forward = call_model,
    walk: Walk | None = None,
    force: bool = False,
    strict: bool = False,
    progress: Callable[[Progress], None] | None = None,
    distributed: bool = False,
    keep_outliers: bool = False,
    input_shape: tuple[int, ...] | None = None,
) -> Reestimation:
    """Correct the running variances of BN layers for dropout (Hendrycks & Gimpel 2016, section 3).

    The model is run without gradients on the device it is on. When the function returns, only the
    chosen ``running_var`` buffers (with ``statistics="mean+variance"`` also ``running_mean``) have
    changed; when it raises, nothing has. Global random generators come back as they were.

    Args:
        model: any nn.Module; DataParallel, DDP and torch.compile wrappers are looked through.
        batches: an iterable of tensors, of tuples or lists whose first item is the input, or of
            dicts for ``model(**batch)``. `exact` and ``epochs > 1`` iterate over it several times.
            None: up to 512 random inputs, fewer for a large model, for "ratio".
        estimator: "ratio": stored variance · V_off / V_on, both measured on the same inputs, with
            dropout off and, in a copy of the model in training mode, on, while all BN layers
            normalise with batch statistics. What the inputs have of their own cancels, so they need
            not be those of the training.
            "pooled", the paper's: one pass, each batch normalised with its own variance around the
            kept mean, variances pooled within and between batches, unbiased, (C,). "exact":
            continues with damped passes until each stored variance is that of the layer's input in
            the final network, to 1e-3 relative. "ema": exponential moving average of batch
            variances, as the paper's authors ran it. These three are right if the data is
            distributed as it was in training.
            "auto": "ratio" on the first 512 inputs; where these agree with the stored statistics
            "pooled" on all. "pooled" where the rates are unknown.
        layers: "auto" (behind active dropout; every layer if the rates are unknown),
            "downstream", "all". Frozen layers, which ``model.train()`` leaves in evaluation mode,
            are kept unless ``only`` names them.
        only, keep: shell-style patterns of names of BN layers, or of modules that hold them
            (``"layer4"``). With ``only``, no other layer is rewritten; those of ``keep`` are not.
        statistics: "variance", or "mean+variance": precise BN (Wu & Johnson 2021,
            arXiv:2105.07576), population mean and biased variance.
        tolerance: stop when the 95th percentile over channels of the relative standard error is
            below it in every rewritten layer, after at least 128 images. None: read everything.
        precision: of convolutions and matrix products: "fp32"; "tf32" on CUDA; "bf16", "fp16" by
            torch.autocast. Moments are made from float32 values in float64 whatever it is; how far
            the variances of the first 64 images deviate from fp32 is measured and returned.
        compile: run what stands between BN layers through torch.compile; pays on long passes only.
        momentum, epochs: of "ema".
        rates: where the drop rates stem from; "model" takes the module's own as known.
        forward: ``forward(model, batch)`` for batches that the default cannot run.
        walk: the result of ``ckpt_tools.walk``, to save a second one.
        force: go on although control layers disagree with the data.
        strict: raise CheckFailed for every doubt about the data, and every warning about the
            result.
        progress: called after every batch.
        distributed: every process of torch.distributed's group calls this at once, with its own
            copy of the model and its own share of the batches; numbers of batches may differ, but
            rank 0 has one. What they measure is merged, once a pass, or with ``tolerance`` after
            every batch; all end with the same statistics, or raise the same error. Not for "ema".
        keep_outliers: let samples count that no clean sample of this data could resemble (100
            times too large, or of a single colour). Without it they are left out and named in
            ``outliers``, unless over 1 % are of their kind. A sample with NaN or infinity never
            counts.
        input_shape: of one random input, where there are no batches; None: inferred from the model.

    Raises:
        NothingToDo: no BN layer, none behind dropout, every one of these is kept, or no noise that
            changes a variance.
        CheckFailed: control layers show that these are not the training data, and the estimator
            depends on it (``force`` overrides), or ``strict`` found a doubt.
        DataError: no batch, a batch of one value per channel, NaN in over 1 % of the samples.
        ModelError: NaN in the model, a model that cannot be run.
        UsageError: settings that mean nothing; a pattern that matches no BN layer; no batches and a
            model that needs real data.
        RankError: a process of the group is gone.
    """
    method = Method(
        estimator=estimator,
        layers=layers,
        only=only,
        keep=keep,
        statistics=statistics,
        tolerance=tolerance,
        momentum=momentum,
        epochs=epochs,
        precision=precision,
        compile=compile,
        keep_outliers=keep_outliers,
        force=force,
        strict=strict,
    )
    synthetic = batches is None
    if batches is None:
        method.require_no_data()
        inner = unwrap_model(model)
        shape = input_shape or infer_input_shape(inner)
        count = count_affordable_inputs(inner, shape, 1 + SYNTHETIC_REPEATS, AUTO_IMAGES)
        batches = RandomBatches(shape, count, device=device_of(inner))
    return run_method(
        model,
        batches,
        method,
        rates=rates,
        forward=forward,
        walk=walk,
        progress=progress,
        distributed=distributed,
        synthetic=synthetic,
    )


def run_method(
    model: nn.Module,
    batches: Iterable[Batch],
    method: Method,
    *,
    rates: Rates = "model",
    forward: Forward = call_model,
    walk: Walk | None = None,
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
    # Raised here rather than after the first pass, which may take long.
    if data.one_shot and method.reads_data_repeatedly:
        raise UsageError(
            f"estimator {estimator!r} reads the data several times, but batches is a one-shot "
            f"iterator ({type(batches).__name__}). Pass a list or a DataLoader."
        )
    model = unwrap_model(model)
    check_precision(precision, device_of(model))
    if synthetic and repeats is None:
        repeats = SYNTHETIC_REPEATS
    group = join_team() if distributed else contextlib.nullcontext(ALONE)
    with preserve_models(model, forward) as state, group as team:
        check_team(estimator, team)
        walk = walk or team.first(lambda: walk_preserved_model(model, data.first(), state, forward=forward))
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
        runner = _make_runner(model, forward, method)
        # Submodules that the user has compiled must run as they are written to be intercepted.
        uncompiled = contextlib.nullcontext() if method.compile else force_eager()
        with evaluation_mode(model), torch.no_grad(), uncompiled:
            share_buffers(model, team)
            screening = Screening(model, _sample_namer(batches, team), keep=method.keep_outliers)
            observed = _observed_layers(model, walk, choice)
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
                effect = team.first(
                    lambda: measure_effect(model, sample, forward, layers, estimate.statistics)
                )
        evidence = estimate.last_pass.evidence
        controls = team.first(lambda: judge_controls(choice, layers, evidence, synthetic=synthetic))
        # Free memory differs between processes; the smallest part is what the user needs to know.
        cut_to = min(filter(None, team.all(lambda: runner.largest)), default=None)
    # From here on the model is as it was. All that may raise comes before the first write.
    results = layer_results(walk, choice, layers, estimate, selection.paired)
    # The variances that mean+variance replaces are no judge of the data, and `ratio` needs none.
    # A verdict that is known already comes from a closer look than that of the control layers.
    is_judge_needed = verdict is None and statistics == "variance" and selection.estimator != "ratio"
    if is_judge_needed and not method.force:
        refuse_disagreement(controls)
    if method.strict:
        warnings = collect_warnings(results, None if synthetic else effect)
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
        outliers=tuple(detected.outlier for detected in estimate.outliers),
        common=() if method.keep_outliers else tuple(sorted(screening.common)),
    )


def _make_runner(model: nn.Module, forward: Forward, method: Method, *, dropout: bool = False) -> Runner:
    kind = CompiledInterception if method.compile else Interception
    return Runner(model, forward, kind(dropout=dropout), method.precision, compiled=method.compile)


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
    copied = copy_in_training_mode(context.model, containers=walk.containers_trained)
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
    training = _make_runner(copied, forward, method, dropout=True)
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


def _observed_layers(model: nn.Module, walk: Walk, choice: Choice) -> dict[str, Layer]:
    modules = {name: x for name, x in model.named_modules() if isinstance(x, _BatchNorm)}
    observed = choice.rewrite | choice.controls
    # In the walk's order, which is that of execution: the first control layers are judged.
    names = [layer.name for layer in walk.batch_norms if layer.name in observed]
    return {name: Layer(name, modules[name], rewritten=name in choice.rewrite) for name in names}


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
