"""The re-estimation of BN running variances with dropout off: one pass or several, one result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.contract import Estimator, LayerChoice, Precision, Rates, Statistics
from ckpt_tools.distributed import ALONE, Team, joined
from ckpt_tools.errors import ModelError, UsageError
from ckpt_tools.machine.heap import kept_heap
from ckpt_tools.machine.precision import check_precision
from ckpt_tools.method import Method
from ckpt_tools.model.batch import Batch
from ckpt_tools.model.calling import Forward, call_model, device_of, force_eager, unwrap_model
from ckpt_tools.model.overwriting import overwrite_tensors
from ckpt_tools.model.preserving import evaluation_mode, preserve_models
from ckpt_tools.reestimate.choice import Choice, choose
from ckpt_tools.reestimate.interception import CompiledInterception, Interception
from ckpt_tools.reestimate.layer import Layer
from ckpt_tools.reestimate.outcome import judge_controls, layer_results, refuse_disagreement
from ckpt_tools.reestimate.passes import Passes
from ckpt_tools.reestimate.running import Runner
from ckpt_tools.reestimate.screening import Screening
from ckpt_tools.reestimate.shares import share_buffers
from ckpt_tools.reestimate.source import Batches
from ckpt_tools.reestimate.stopping import Progress
from ckpt_tools.results import Reestimation, Walk
from ckpt_tools.walker.downstream import walk_preserved_model


def reestimate_bn(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    estimator: Estimator = "pooled",
    layers: LayerChoice = "auto",
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
    progress: Callable[[Progress], None] | None = None,
    distributed: bool = False,
    keep_outliers: bool = False,
) -> Reestimation:
    """Re-estimate the running variances of BN layers with dropout off (Hendrycks & Gimpel 2016, section 3).

    The model is run in evaluation mode without gradients on the device it is on. When it returns, only the
    chosen ``running_var`` buffers (with ``statistics="mean+variance"`` also ``running_mean``) have changed; when
    it raises, nothing has. Global random generators come back as they were.

    Args:
        model: any nn.Module; DataParallel, DDP and torch.compile wrappers are looked through.
        batches: an iterable of tensors, of tuples or lists whose first item is the input, or of dicts for
            ``model(**batch)``. `exact` and ``epochs > 1`` iterate over it several times.
        estimator: "pooled": one pass, each batch normalised with its own variance around the kept mean, variances
            pooled within and between batches, unbiased, (C,). "exact": continues with damped passes until each
            stored variance is that of the layer's input in the final network, to 1e-3 relative.
            "ema": exponential moving average of batch variances, as the paper's authors ran it.
        layers: "auto" (behind active dropout; every layer if the rates are unknown), "downstream", "all".
        statistics: "variance", or "mean+variance": precise BN (Wu & Johnson 2021, arXiv:2105.07576),
            population mean and biased variance.
        tolerance: stop when the 95th percentile over channels of the relative standard error is below it in
            every rewritten layer, after at least 128 images. None: read everything.
        precision: of convolutions and matrix products: "fp32"; "tf32" on CUDA; "bf16", "fp16" by torch.autocast.
            Moments are made from float32 values in float64 whatever it is; how far the variances of the first 64
            images deviate from fp32 is measured and returned.
        compile: run what stands between BN layers through torch.compile; pays on long passes only.
        momentum, epochs: of "ema".
        rates: who knows the drop rates; "model" takes the module's own as known.
        forward: ``forward(model, batch)`` for batches that the default cannot run.
        walk: the result of ``ckpt_tools.walk``, to save a second one.
        force: go on although control layers disagree with the data.
        progress: called after every batch.
        distributed: every process of torch.distributed's group calls this at once, with its own copy of the model and
            its own share of the batches; numbers of batches may differ, but rank 0 has one. What they see is
            merged, once a pass, or with ``tolerance`` after every batch; all end with the same statistics, or raise
            the same error. `exact` and `pooled` only.
        keep_outliers: let samples count that no clean sample of this data could show (one 100 times too large, one
            of a single colour). Without it they are left out and named in ``outliers``, unless over 1 % are of
            their kind. A sample with NaN or infinity never counts.

    Raises:
        NothingToDo: no BN layer, or none behind dropout.
        CheckFailed: control layers show that these are not the training data (``force`` overrides).
        DataError: no batch, a batch of one value per channel, NaN in over 1 % of the samples.
        ModelError: NaN in the model, a model that cannot be run.
        RankError: a process of the group is gone.
    """
    method = Method(
        estimator=estimator,
        layers=layers,
        statistics=statistics,
        tolerance=tolerance,
        momentum=momentum,
        epochs=epochs,
        precision=precision,
        compile=compile,
        keep_outliers=keep_outliers,
        force=force,
    )
    return run_method(
        model, batches, method, rates=rates, forward=forward, walk=walk, progress=progress, distributed=distributed
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
) -> Reestimation:
    """Do what ``reestimate_bn`` describes, with its settings as one object."""
    started = time.perf_counter()
    estimator, statistics, precision = method.estimator, method.statistics, method.precision
    source = Batches(batches)
    if source.one_shot and method.reads_data_repeatedly:
        raise UsageError(
            f"estimator {estimator!r} reads the data several times, but batches is a one-shot iterator "
            f"({type(batches).__name__}). Pass a list or a DataLoader."
        )
    model = unwrap_model(model)
    check_precision(precision, device_of(model))
    interception = CompiledInterception() if method.compile else Interception()
    runner = Runner(model, forward, interception, precision, compiled=method.compile)
    with preserve_models(model, forward) as state, joined() if distributed else contextlib.nullcontext(ALONE) as team:
        check_team(estimator, team)
        found = walk or team.first(lambda: walk_preserved_model(model, source.first(), state, forward=forward))
        choice = choose(found, method.layers, rates=rates, statistics=statistics)
        with (
            kept_heap(),
            evaluation_mode(model),
            torch.no_grad(),
            contextlib.nullcontext() if method.compile else force_eager(),
        ):
            share_buffers(model, team)
            screening = Screening(model, _names(batches, team), keep=method.keep_outliers)
            run = Passes(model, source, runner, _observed(model, found, choice), progress, screening, team)
            if precision != "fp32":
                run.compare_precision()
            run.estimate(method)
        controls = team.first(lambda: judge_controls(choice, run.layers))
        cut_to = min(filter(None, team.all(lambda: runner.largest)), default=None)
    results = layer_results(found, choice, run.layers, run.error_scale)
    if not method.force:
        refuse_disagreement(controls)
    _write(run.layers, statistics)
    return Reestimation(
        layers=results,
        controls=controls,
        why=choice.why,
        estimator=estimator,
        statistics=statistics,
        images=run.images,
        batches=run.batches,
        passes=run.passes,
        residual=run.residual,
        stopped_early=run.stopped_early,
        seconds=time.perf_counter() - started,
        device=str(device_of(model)),
        processes=team.world,
        cut_to=cut_to,
        precision=precision,
        deviation=run.deviation,
        left_alone=found.left_alone,
        outliers=tuple(one.outlier for one in run.found),
        common=() if method.keep_outliers else tuple(sorted(screening.common)),
    )


def _names(batches: object, team: Team) -> Callable[[int, int], str]:
    """What the data itself calls a sample, given its batch of this rank and its row, or its place."""
    named = getattr(batches, "sample_name", None)
    whose = "" if team.alone else f" of rank {team.rank}"
    return named if callable(named) else lambda batch, row: f"sample {row} of batch {batch}{whose}"


def check_team(estimator: str, team: Team) -> None:
    """Raise UsageError if several processes cannot share the work of this estimator."""
    if estimator == "ema" and not team.alone:
        raise UsageError(
            f"estimator ema takes one batch after the other, which {team.world} processes cannot share. Run it in one "
            "process (without torchrun, distributed=False), or use pooled or exact."
        )


def _observed(model: nn.Module, walk: Walk, choice: Choice) -> dict[str, Layer]:
    modules = dict(model.named_modules())
    observed = {}
    for layer in walk.batch_norms:
        if layer.name in choice.rewrite or layer.name in choice.controls:
            module = modules[layer.name]
            assert isinstance(module, _BatchNorm)
            observed[layer.name] = Layer(layer.name, module, rewritten=layer.name in choice.rewrite)
    return observed


def _write(layers: dict[str, Layer], statistics: Statistics) -> None:
    """Copy the new statistics into the model's buffers: all of them, or none if one does not fit its dtype."""
    writes: list[tuple[Tensor, Tensor]] = []
    for layer in layers.values():
        if not layer.rewritten or layer.moments is None:
            continue
        pairs = [(layer.module.running_var, layer.scale.variance)]
        if statistics == "mean+variance":
            pairs.append((layer.module.running_mean, layer.scale.mean))
        for buffer, value in pairs:
            assert buffer is not None
            cast = value.to(buffer.dtype)
            if not bool(torch.isfinite(cast).all()):
                raise ModelError(
                    f"{layer.name}: a new statistic of {float(value.abs().max()):.3g} does not fit into "
                    f"{buffer.dtype}. Convert the model to float32 first."
                )
            writes.append((buffer, cast))
    overwrite_tensors(writes)
