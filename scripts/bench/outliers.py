"""Put three bad images among 600, and see what each tool makes of them.

It is also measured how far clean images stay away from the limits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import fvcore.nn
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from bench.image_sets import image_set, resize
from bench.trained_nets import TRAININGS, normalisation, train_net
from ckpt_tools import Reestimation, reestimate_bn
from ckpt_tools.model.preserving import preserved_evaluation_mode
from ckpt_tools.observation.interception import Interception
from ckpt_tools.observation.layer import Layer, batch_variance
from ckpt_tools.observation.outliers import LAYER_LIMIT, log_energies, margins

CASES = ("densenet, dropout", "wrn, dropout, crops")
IMAGES, BATCH = 600, 300
BAD = (100, 200, 300)  # 100 times too large, all white, NaN


def cases() -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Name, net, clean images (600, C, H, W), the same with three bad ones."""
    for training in TRAININGS:
        if training.name in CASES:
            model, data = train_net(replace(training, epochs=2)), image_set(training.data)
            mean, std = normalisation(training, data)
            images = (resize(data.source[data.train[:IMAGES]]).float() / 255 - mean) / std
            bad = images.clone()
            bad[BAD[0]] *= 100
            bad[BAD[1]] = ((1 - mean) / std).expand_as(bad[0])
            bad[BAD[2]] = math.nan
            yield training.name, model, images, bad


def ruin(
    model: nn.Module, images: Tensor, bad: Tensor, rows: Sequence[int]
) -> dict[str, tuple[float, float] | None]:
    """Relative error of running variances, median and worst channel, against the same tool without
    those images.

    ``rows``: of the bad images, which are put among the clean ones. None: NaN.
    """
    mixed = images.clone()
    mixed[list(rows)] = bad[list(rows)]
    clean_images = images[[row for row in range(len(images)) if row not in rows]]
    errors: dict[str, tuple[float, float] | None] = {}
    for name, run in TOOLS.items():
        spoilt, clean = (_variances(model, run, part) for part in (mixed, clean_images))
        error = (spoilt - clean).abs() / clean.clamp_min(1e-12)
        errors[name] = (float(error.median()), float(error.max())) if bool(error.isfinite().all()) else None
    return errors


def name_outliers(model: nn.Module, bad: Tensor) -> list[str]:
    """The outliers that are named, each with its reason."""
    return [f"{outlier.name}: {outlier.reason}" for outlier in _ours(copy.deepcopy(model), bad).outliers]


def clean_margins(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the largest input margin of clean images for several batch sizes; 1 is the limit.

    Clean images that are taken for outliers all the same are counted as false alarms.
    """
    figures: dict[str, float] = {}
    for size in (8, 32, 128, len(images)):
        values = [log_energies(part) for part in images.split(size)]
        figures[f"batch {size}"] = max(float(margins(one, one).max()) for one in values if one is not None)
        alarms = _ours(copy.deepcopy(model), images, size).outliers
        figures[f"false alarms at batch {size}"] = len(alarms)
        figures[f"batch {size}, in a layer"] = max(_deep_margins(model, part) for part in images.split(size))
    return figures


def _deep_margins(model: nn.Module, images: Tensor) -> float:
    """The largest margin of a batch's images in any BN layer, measured image by image."""
    interception, modules = Interception(), dict(model.named_modules())
    layers = [
        Layer(name, module, rewritten=True)
        for name, module in modules.items()
        if isinstance(module, nn.BatchNorm2d)
    ]
    for layer in layers:
        layer.begin_pass(batch_variance)
        layer.begin_batch(per_image=True)
    interception.begin(len(images), layers, stop=False)
    with preserved_evaluation_mode(model), torch.no_grad(), interception:
        model(images)
    shown = [item.image_energy for layer in layers if (item := layer.take_observation()) is not None]
    return max(float(margins(one, one, LAYER_LIMIT).max()) for one in shown if one is not None)


def _variances(model: nn.Module, run: Callable[[nn.Module, Tensor], object], images: Tensor) -> Tensor:
    model = copy.deepcopy(model)
    run(model, images)
    return torch.cat([buffer for name, buffer in model.named_buffers() if name.endswith("running_var")])


def _ours(model: nn.Module, images: Tensor, size: int = BATCH) -> Reestimation:
    return reestimate_bn(
        model,
        list(images.split(size)),
        layers="all",
        force=True,
        estimator="pooled",
        rows_are_samples=True,
    )


def _update_bn(model: nn.Module, images: Tensor) -> None:
    update_bn(list(images.split(BATCH)), model)


def _fvcore(model: nn.Module, images: Tensor) -> None:
    batches = list(images.split(BATCH))
    fvcore.nn.update_bn_stats(model.train(), batches, len(batches))


TOOLS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "reestimate_bn": _ours,
    "update_bn": _update_bn,
    "fvcore": _fvcore,
}
