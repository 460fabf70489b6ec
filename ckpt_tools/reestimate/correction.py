"""The correction of a model in memory: BN running variances as they should be with dropout off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

from torch import nn

from ckpt_tools.arguments import check_callable
from ckpt_tools.contract import Estimator, LayerChoice, Precision, Rates, Statistics
from ckpt_tools.errors import UsageError
from ckpt_tools.method import Method
from ckpt_tools.model.batch import Batch
from ckpt_tools.model.calling import Forward, call_model, device_of, unwrap_model
from ckpt_tools.model.forward_cost import count_affordable_inputs
from ckpt_tools.model.input_shape import infer_input_shape
from ckpt_tools.model.random_inputs import RandomBatches
from ckpt_tools.reestimate.method_run import run_method
from ckpt_tools.reestimate.selection import AUTO_IMAGES, SYNTHETIC_REPEATS
from ckpt_tools.reestimate.stopping import Progress
from ckpt_tools.results import Reestimation, Walk


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
    dropout: Mapping[str, float] | None = None,
    force: bool = False,
    strict: bool = False,
    progress: Callable[[Progress], None] | None = None,
    distributed: bool = False,
    keep_outliers: bool = False,
    rows_are_samples: bool = False,
    input_shape: tuple[int, ...] | None = None,
) -> Reestimation:
    """Correct the running variances of BN layers for dropout (Hendrycks & Gimpel 2016, section 3).

    The model is run without gradients on the device it is on. When the function returns, only the
    chosen ``running_var`` buffers (with ``statistics="mean+variance"`` also ``running_mean``) have
    changed; when it raises, nothing has. Global random generators come back as they were.

    Args:
        model: any nn.Module; DataParallel, DDP and torch.compile wrappers are looked through.
        batches: an iterable of tensors, of tuples or lists whose first item is the input, or of
            dicts for ``model(**batch)`` (of ``{"image": …, "label": …}`` a model that takes a tensor
            gets the image), in random order: `pooled` is off where every batch holds one class or one
            video (``batch_spread`` of the result tells). A batch with one value per channel counts,
            normalised with the stored statistics. `exact` and ``epochs > 1`` iterate over them several
            times. None: up to 512 random inputs, fewer for a large model, for "ratio".
        estimator: "ratio": stored variance · V_off / V_on, both measured on the same inputs, with
            dropout off and, in a copy of the model in training mode, on, while all BN layers
            normalise with batch statistics. What the inputs have of their own cancels, so they need
            not be those of the training.
            "pooled", the paper's: one pass, each batch normalised with its own variance around the
            kept mean, variances pooled within and between batches, unbiased, (C,). "exact":
            continues with damped passes until each stored variance is that of the layer's input in
            the final network, to 1e-3 relative. "ema": exponential moving average of batch
            variances, as the paper's authors ran it, updated once a call of the layer. These three
            are right if the data is distributed as it was in training. Where a forward runs a layer
            on several parts (ghost batches, siamese nets), "pooled" has the bias of the part's
            size, 7 % in the median channel at 16 samples; "exact" has none.
            "auto": "ratio" on the first 512 inputs; where these agree with the stored statistics
            "pooled" on all. "pooled" where the rates are unknown.
        layers: "auto" (behind active dropout; every layer if the rates are unknown),
            "downstream", "all". Frozen layers, which ``model.train()`` leaves in evaluation mode,
            are kept unless ``only`` names them.
        only, keep: shell-style patterns of names of BN layers, or of modules that hold them
            (``"layer4"``). With ``only``, no other layer is rewritten; those of ``keep`` are not.
        statistics: "variance", or "mean+variance": precise BN (Wu & Johnson 2021,
            arXiv:2105.07576), population mean and biased variance, whatever is stored.
        tolerance: stop when the 95th percentile over channels of the relative standard error is
            below it in every rewritten layer, after at least 128 images. None: read everything.
        precision: of convolutions and matrix products: "fp32"; "tf32" on CUDA; "bf16", "fp16" by
            torch.autocast. Moments are made from float32 values in float64 whatever it is; how far
            the variances of the first 64 images deviate from fp32 is measured and returned. A
            ``torch.autocast`` around the call has no effect; one inside the model is part of it.
        compile: run what stands between BN layers through torch.compile; pays on long passes only.
        momentum, epochs: of "ema".
        rates: where the drop rates stem from; "model" takes the module's own as known.
        forward: ``forward(model, batch)`` for batches that the default cannot run.
        walk: the result of ``ckpt_tools.walk``, to save a second one.
        dropout: rates of dropout that the training had and the model lacks, by patterns of names
            of modules (``{"pool*": 0.25}``), as ``ckpt_tools.walk`` takes them. The drop rates are
            known then.
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
        rows_are_samples: the rows of a batch are independent samples (images, rows of a table), so
            an outlier is left out alone. Without it nothing is known about them (a graph's nodes,
            frames folded into the batch), and a batch is never cut: one with an outlier is left out
            as a whole or, where that would be over 1 % of the samples, counts and is named in
            ``kept_outliers``.
        input_shape: of one random input, where there are no batches; None: inferred from the model.

    Raises:
        NothingToDo: no BN layer, none behind dropout, every one of these is kept, or no noise that
            changes a variance.
        CheckFailed: control layers show that these are not the training data, and the estimator
            depends on it (``force`` overrides), or ``strict`` found a doubt.
        DataError: no batch, one value per channel in all the data, NaN in over 1 % of the samples.
        ModelError: NaN in the model or its stored statistics, a model that cannot be run.
        UsageError: arguments of a wrong type; settings that mean nothing; a pattern that matches no
            BN layer; no batches and a model that needs real data.
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
        rows_are_samples=rows_are_samples,
        force=force,
        strict=strict,
    )
    check_callable("forward", forward, "(model, batch)")
    if progress is not None:
        check_callable("progress", progress, "(progress)")
    if rates not in get_args(Rates):
        raise UsageError(f"rates={rates!r}: expected one of {', '.join(get_args(Rates))}.")
    if walk is not None and not isinstance(walk, Walk):
        raise UsageError(f"walk is a {type(walk).__name__}; expected the result of ckpt_tools.walk.")
    input_shape = None if input_shape is None else _check_shape(input_shape)
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
        dropout=dropout,
        progress=progress,
        distributed=distributed,
        synthetic=synthetic,
    )


def _check_shape(shape: object) -> tuple[int, ...]:
    """Return the shape as a tuple; raise UsageError if it is none."""
    if isinstance(shape, Sequence) and shape and all(type(size) is int and size > 0 for size in shape):
        return tuple(shape)
    raise UsageError(
        f"input_shape={shape!r}: expected the shape of one sample, without the batch, such as (3, 224, 224)."
    )
